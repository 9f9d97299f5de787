"""What a node does: trains the generator on its own digits, and tests it on them."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from gan_app.task import Discriminator, Generator, load_data
from gan_app.task import test as test_generator
from gan_app.task import train as train_generator

app = ClientApp()


def load(message, context):
    """Return the generator in the message, and this node's training and test images."""
    partition, partitions = (context.node_config[k] for k in ("partition-id", "num-partitions"))
    torch.manual_seed(partition)
    generator = Generator()
    generator.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return generator, *load_data(partition, partitions)


@app.train()
def train(message: Message, context: Context):
    """Train the generator."""
    generator, images, _ = load(message, context)
    discriminator = Discriminator()
    if "discriminator" in context.state:  # a fresh one would spoil a generator that is good already
        discriminator.load_state_dict(context.state["discriminator"].to_torch_state_dict())
    loss = train_generator(generator, discriminator, images, context.run_config["local-epochs"])
    context.state["discriminator"] = ArrayRecord(discriminator.state_dict())
    metrics = MetricRecord({"loss": loss, "num-examples": len(images)})
    content = RecordDict({"arrays": ArrayRecord(generator.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context):
    """Test the generator."""
    generator, _, images = load(message, context)
    distance = test_generator(generator, images)
    metrics = MetricRecord({"energy-distance": distance, "num-examples": len(images)})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)
