"""The server: averages the generators, and tests the average on all nodes' digits."""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from conditional_app.task import Generator, load_data
from conditional_app.task import test as test_generator

app = ServerApp()


def evaluate(server_round: int, arrays: ArrayRecord):
    """Test the global generator on all digits."""
    torch.manual_seed(0)
    generator = Generator()
    generator.load_state_dict(arrays.to_torch_state_dict())
    return MetricRecord(test_generator(generator, load_data(0, 1)[1]))


@app.main()
def main(grid: Grid, context: Context):
    """Run the federation."""
    torch.manual_seed(0)
    strategy = FedAvg()
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Generator().state_dict()),
        num_rounds=context.run_config["num-server-rounds"],
        evaluate_fn=evaluate,
    )
