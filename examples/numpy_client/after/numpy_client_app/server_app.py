"""The server: coalesces the generators, and tests the result on all nodes' digits."""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from fl_wb.strategies import AdaptiveCoalescence
from numpy_client_app.task import (
    LATENT,
    Discriminator,
    Generator,
    get_weights,
    load_data,
    set_weights,
)
from numpy_client_app.task import test as test_generator

app = ServerApp()


def evaluate(server_round: int, arrays: ArrayRecord):
    """Test the global generator on all digits."""
    torch.manual_seed(0)
    generator = Generator()
    set_weights(generator, Discriminator(), arrays.to_numpy_ndarrays())
    return MetricRecord({"energy-distance": test_generator(generator, load_data(0, 1)[1])})


@app.main()
def main(grid: Grid, context: Context):
    """Run the federation."""
    torch.manual_seed(0)
    strategy = AdaptiveCoalescence(
        weighted_by_key="num_examples",
        arrayrecord_key="fitins.parameters",
        configrecord_key="fitins.config",
        generator=Generator,
        critic=Discriminator,
        latent_dim=LATENT,
        generator_keys=slice(0, len(Generator().state_dict())),  # of the list; the rest is averaged
    )
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(get_weights(Generator(), Discriminator())),
        num_rounds=context.run_config["num-server-rounds"],
        evaluate_fn=evaluate,
    )
