"""The server: coalesces the generators, and tests the result on all nodes' digits."""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from dcgan_app.task import LATENT, Discriminator, Generator, load_data
from dcgan_app.task import test as test_generator
from fl_wb.strategies import AdaptiveCoalescence

app = ServerApp()


class FromVectors(Generator):
    """The generator, of latents (n, LATENT), as they are drawn in a merge."""

    def forward(self, z):
        """Latents (n, LATENT) to images (n, 1, 8, 8)."""
        return super().forward(z[:, :, None, None])


def evaluate(server_round: int, arrays: ArrayRecord):
    """Test the global generator on all digits."""
    torch.manual_seed(0)
    generator = Generator()
    generator.load_state_dict(arrays.to_torch_state_dict())
    return MetricRecord({"energy-distance": test_generator(generator, load_data(0, 1)[1])})


@app.main()
def main(grid: Grid, context: Context):
    """Run the federation."""
    torch.manual_seed(0)
    strategy = AdaptiveCoalescence(generator=FromVectors, critic=Discriminator, latent_dim=LATENT)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Generator().state_dict()),
        num_rounds=context.run_config["num-server-rounds"],
        evaluate_fn=evaluate,
    )
