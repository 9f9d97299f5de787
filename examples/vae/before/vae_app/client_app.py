"""What a node does: trains the network on its own digits, and tests it on them."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from vae_app.task import Net, load_data
from vae_app.task import test as test_net
from vae_app.task import train as train_net

app = ClientApp()


def load(message, context):
    """Return the network in the message, and this node's training and test images."""
    partition, partitions = (context.node_config[k] for k in ("partition-id", "num-partitions"))
    torch.manual_seed(partition)
    net = Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return net, *load_data(partition, partitions)


@app.train()
def train(message: Message, context: Context):
    """Train the network."""
    net, images, _ = load(message, context)
    loss = train_net(net, images, context.run_config["local-epochs"])
    metrics = MetricRecord({"loss": loss, "num-examples": len(images)})
    content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context):
    """Test the network."""
    net, _, images = load(message, context)
    error, _ = test_net(net, images)
    metrics = MetricRecord({"reconstruction-error": error, "num-examples": len(images)})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)
