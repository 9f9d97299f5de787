"""The server: coalesces the decoders, and tests the result on all nodes' digits."""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from fl_wb.strategies import AdaptiveCoalescence
from fl_wb.training.encoder import fit_encoder
from vae_app.task import LATENT, Net, load_data
from vae_app.task import test as test_net

app = ServerApp()


def evaluate(server_round: int, arrays: ArrayRecord):
    """Test the global network on all digits."""
    torch.manual_seed(0)
    net = Net()
    net.load_state_dict(arrays.to_torch_state_dict())
    error, distance = test_net(net, load_data(0, 1)[1])
    return MetricRecord({"reconstruction-error": error, "energy-distance": distance})


class Decoder(Net):
    """The part of the network that generates."""

    def __init__(self):
        super().__init__()
        del self.encoder, self.fc1, self.fc2

    def forward(self, z):
        """Latents to images."""
        return self.decode(z)


def refit(state):
    """Fit the encoder to the new decoder; without this, it would be that of the old ones."""
    net = Net()
    net.load_state_dict(state)
    encoder = [p for part in (net.encoder, net.fc1, net.fc2) for p in part.parameters()]
    fit_encoder(net.encode, net.decode, encoder, latent_dim=LATENT, noise=0.3)
    return net.state_dict()


@app.main()
def main(grid: Grid, context: Context):
    """Run the federation."""
    torch.manual_seed(0)
    strategy = AdaptiveCoalescence(
        generator=Decoder, latent_dim=LATENT, generator_keys=("fc3.", "decoder."), refit=refit
    )
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        num_rounds=context.run_config["num-server-rounds"],
        evaluate_fn=evaluate,
    )
