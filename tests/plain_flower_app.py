"""A Flower app as its users write it, without FL-WB: a GAN on two-dimensional points, by FedAvg.

test_swap.py replaces its strategy, and adds a mod to its ClientApp, by editing this text.
"""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

LATENT = 3


class Generator(nn.Module):
    """Noise to points."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(LATENT, 16)
        self.norm = nn.BatchNorm1d(16)
        self.out = nn.Linear(16, 2)

    def forward(self, noise):
        return self.out(torch.relu(self.norm(self.hidden(noise))))


class Critic(nn.Module):
    """Points to scores."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, points):
        return self.net(points)


def load_points(context: Context) -> torch.Tensor:
    partition = int(context.node_config["partition-id"])
    return torch.randn(40, 2, generator=torch.Generator().manual_seed(partition)) + partition


def train_gan(generator: nn.Module, points: torch.Tensor) -> float:
    critic = Critic()
    for_critic = torch.optim.Adam(critic.parameters(), lr=1e-3)
    for_generator = torch.optim.Adam(generator.parameters(), lr=1e-3)
    for _ in range(3):
        fakes = generator(torch.randn(len(points), LATENT))
        loss = critic(fakes.detach()).mean() - critic(points).mean()
        for_critic.zero_grad()
        loss.backward()
        for_critic.step()
        loss = -critic(fakes).mean()
        for_generator.zero_grad()
        loss.backward()
        for_generator.step()
    return loss.item()


client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    points, model = load_points(context), Generator()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loss = train_gan(model, points)
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(points)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


@client_app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    points, model = load_points(context), Generator()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    model.eval()
    with torch.no_grad():
        samples = model(torch.randn(len(points), LATENT))
    metrics = MetricRecord(
        {
            "distance": float((samples.mean(0) - points.mean(0)).norm()),
            "distinct-weights": len(model.hidden.weight.unique()),
            "num-examples": len(points),
        }
    )
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)


server_app = ServerApp()
final = {}


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    model = Generator()
    strategy = FedAvg(fraction_train=1.0, min_available_nodes=2)
    result = strategy.start(grid=grid, initial_arrays=ArrayRecord(model.state_dict()), num_rounds=2)
    model.load_state_dict(result.arrays.to_torch_state_dict())
    final.update(result=result, model=model)
