"""The server: averages the networks, and tests the average on all nodes' digits."""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from vae_app.task import Net, load_data
from vae_app.task import test as test_net

app = ServerApp()


def evaluate(server_round: int, arrays: ArrayRecord):
    """Test the global network on all digits."""
    torch.manual_seed(0)
    net = Net()
    net.load_state_dict(arrays.to_torch_state_dict())
    error, distance = test_net(net, load_data(0, 1)[1])
    return MetricRecord({"reconstruction-error": error, "energy-distance": distance})


@app.main()
def main(grid: Grid, context: Context):
    """Run the federation."""
    torch.manual_seed(0)
    strategy = FedAvg()
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        num_rounds=context.run_config["num-server-rounds"],
        evaluate_fn=evaluate,
    )
