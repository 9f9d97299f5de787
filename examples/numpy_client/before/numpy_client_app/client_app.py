"""What a node does: trains generator and discriminator on its own digits, as a NumPyClient."""

import torch
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp

from numpy_client_app.task import Discriminator, Generator, get_weights, load_data, set_weights
from numpy_client_app.task import test as test_generator
from numpy_client_app.task import train as train_generator


class DigitsClient(NumPyClient):
    """Trains on one node's digits, and tests the generator on others of them."""

    def __init__(self, images, held_out, epochs):
        self.images, self.held_out, self.epochs = images, held_out, epochs
        self.generator, self.discriminator = Generator(), Discriminator()

    def fit(self, parameters, config):
        """Train both networks, and send both back."""
        set_weights(self.generator, self.discriminator, parameters)
        loss = train_generator(self.generator, self.discriminator, self.images, self.epochs)
        return get_weights(self.generator, self.discriminator), len(self.images), {"loss": loss}

    def evaluate(self, parameters, config):
        """Test the generator."""
        set_weights(self.generator, self.discriminator, parameters)
        distance = test_generator(self.generator, self.held_out)
        return distance, len(self.held_out), {"energy-distance": distance}


def client_fn(context):
    """Return this node's client."""
    partition, partitions = (context.node_config[k] for k in ("partition-id", "num-partitions"))
    torch.manual_seed(partition)
    data = load_data(partition, partitions)
    return DigitsClient(*data, context.run_config["local-epochs"]).to_client()


app = ClientApp(client_fn)
