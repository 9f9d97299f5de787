"""What a node does: trains the generator on its own digits, and tests it on them."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from conditional_app.task import Generator, load_data
from conditional_app.task import test as test_generator
from conditional_app.task import train as train_generator

app = ClientApp()


def load(message, context):
    """Return the generator in the message, and this node's training and test data."""
    partition, partitions = (context.node_config[k] for k in ("partition-id", "num-partitions"))
    torch.manual_seed(partition)
    generator = Generator()
    generator.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return generator, *load_data(partition, partitions)


@app.train()
def train(message: Message, context: Context):
    """Train the generator."""
    generator, data, _ = load(message, context)
    loss = train_generator(generator, data, context.run_config["local-epochs"])
    metrics = MetricRecord({"loss": loss, "num-examples": len(data[0])})
    content = RecordDict({"arrays": ArrayRecord(generator.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context):
    """Test the generator."""
    generator, _, data = load(message, context)
    metrics = MetricRecord({**test_generator(generator, data), "num-examples": len(data[0])})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)
