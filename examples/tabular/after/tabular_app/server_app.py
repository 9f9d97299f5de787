"""The server: coalesces the generators, and tests the result on all records."""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from fl_wb.strategies import AdaptiveCoalescence
from tabular_app.task import LATENT, Discriminator, Generator, load_data
from tabular_app.task import test as test_generator

app = ServerApp()


def evaluate(server_round: int, arrays: ArrayRecord):
    """Test the global generator on all records."""
    torch.manual_seed(0)
    generator = Generator()
    generator.load_state_dict(arrays.to_torch_state_dict())
    return MetricRecord({"energy-distance": test_generator(generator, load_data(0, 1)[1])})


@app.main()
def main(grid: Grid, context: Context):
    """Run the federation."""
    torch.manual_seed(0)
    strategy = AdaptiveCoalescence(generator=Generator, critic=Discriminator, latent_dim=LATENT)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Generator().state_dict()),
        num_rounds=context.run_config["num-server-rounds"],
        evaluate_fn=evaluate,
    )
