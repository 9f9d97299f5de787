"""Networks that do not fit each other or the arrays are refused before anything is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord
from flwr.clientapp import ClientApp
from torch import nn

from fl_wb.strategies import AdaptiveCoalescence
from fl_wb.strategies.checks import check_networks
from fl_wb.testing.in_process_grid import InProcessGrid
from tests.toys import STAGE, uploads


class Made(nn.Module):
    """A generator of whatever ``make`` makes of a linear layer's output (n, 6)."""

    def __init__(self, make: Any, *, train: bool = True) -> None:
        super().__init__()
        self.latent_dim, self.make = 4, make
        self.layer = nn.Linear(4, 6).requires_grad_(train)

    def forward(self, z: torch.Tensor) -> Any:
        return self.make(self.layer(z))


class Rounded(nn.Module):
    """A critic through which no gradient passes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach().flatten(1).sum(1)


class Once(nn.Module):
    """A critic whose gradient has no gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1).sum(1)


CASES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "scalars": (lambda x: x[:, 0], {}, r"makes float32 samples \(4,\) .* floating ones \(4, ...\)"),
    "integers": (lambda x: x.long(), {}, r"makes int64 samples \(4, 6\)"),
    "batch mixed up": (lambda x: x.T, {}, r"makes float32 samples \(6, 4\)"),
    "tuple": (lambda x: (x, x), {}, r"makes a tuple of latents \(4, 4\), not one tensor"),
    "dropout": (
        lambda x: nn.functional.dropout(x, 0.5, training=True),
        {},
        "other samples of the same latents when it is called again",
    ),
    "half": (lambda x: x, {"dtype": torch.float16}, "'layer.weight' is float16, and latents are"),
    "double": (lambda x: x, {"dtype": torch.float64}, "'layer.weight' is float64, and latents are"),
    "critic of other samples": (
        lambda x: x.unflatten(1, (2, 3)),
        {"critic": lambda: nn.Linear(6, 1)},
        r"the critic does not take samples \(4, 2, 3\)",
    ),
    "critic without gradient": (lambda x: x, {"critic": Rounded}, "critic cannot be trained"),
    "critic without weights": (lambda x: x, {"critic": Once}, "critic cannot be trained"),
    "critic of tuples": (
        lambda x: x,
        {"critic": lambda: nn.LSTM(6, 1)},
        r"critic makes scores tuple of samples \(4, 6\)",
    ),
    "factory of something else": (lambda x: x, {"critic": dict}, "critic's factory made a dict"),
}


def begin(generator: Any, **arguments: Any) -> None:
    app = ClientApp()
    uploads(app)
    grid = InProcessGrid(app, nodes=2)
    coalescence = AdaptiveCoalescence(generator=generator, stage=STAGE, **arguments)
    try:
        coalescence.start(
            grid=grid, initial_arrays=ArrayRecord(generator().state_dict()), num_rounds=1
        )
    finally:
        assert not any(node.received for node in grid.nodes.values())


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_named(case: str) -> None:
    make, arguments, reason = CASES[case]
    arguments = dict(arguments)
    kind = arguments.pop("dtype", torch.float32)
    with pytest.raises(ValueError, match=reason):
        begin(lambda: Made(make).to(kind), **arguments)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (
            ["0", "1", "2"],
            r"list has 3 arrays, .* 2 \(they are a list, .* more than the generator's 2",
        ),
        (["layer.bias"], r"1 of its 2 arrays: if clients train adapters alone"),
    ],
)
def test_arrays_under_other_names_are_told_why(names: list[str], reason: str) -> None:
    arrays = ArrayRecord({name: torch.zeros(6) for name in names})
    with pytest.raises(ValueError, match=reason):
        check_networks(arrays, lambda: Made(lambda x: x), None, None)


def test_lazy_layers_are_named() -> None:
    class Lazy(nn.Module):
        latent_dim = 4

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LazyLinear(6)

    with pytest.raises(ValueError, match=r"lazy layers \('layer.weight' has no shape yet\)"):
        check_networks(ArrayRecord(), Lazy, None, None)


def test_samples_that_hang_on_their_batch_are_said(caplog: pytest.LogCaptureFixture) -> None:
    def make() -> Made:
        return Made(nn.BatchNorm1d(6, affine=False, track_running_stats=False))

    check_networks(ArrayRecord(make().state_dict()), make, None, None)
    assert "a sample of its latent and of those beside it (batch statistics" in caplog.text


def test_a_generator_that_cannot_be_trained_is_named() -> None:
    with pytest.raises(ValueError, match="no parameter that can be trained"):
        begin(lambda: Made(lambda x: x, train=False))


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"geodesic": "mix"}, "geodesic='mix' must be one of: two_critics, mixture, displacement"),
        ({"iterations": -1}, "iterations=-1 must be at least 0"),
        ({"seed": "a"}, "seed='a' must be an integer of 0 or more"),
        ({"patience": 0}, "patience=0 must be an integer of 1 or more"),
        ({"screening": 1.0}, "screening=1.0 must be more than 1"),
        ({"device": "gpu"}, "device='gpu' cannot be used"),
    ],
)
def test_a_setting_that_is_none_is_named(setting: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        begin(lambda: Made(lambda x: x), **setting)


@pytest.mark.parametrize("latent_dim", [0, -1, 2.5])
def test_a_latent_dimension_that_is_none_is_named(latent_dim: Any) -> None:
    with pytest.raises(ValueError, match="latent dimension of Made is unknown"):
        begin(lambda: Made(lambda x: x), latent_dim=latent_dim)


def test_the_checks_leave_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with pytest.raises(ValueError, match="scores"):
        begin_quietly()
    assert torch.equal(torch.rand(3), expected)


def begin_quietly() -> None:
    with torch.random.fork_rng(devices=[]):
        network = Made(lambda x: x)
    check_networks(ArrayRecord(network.state_dict()), lambda: network, nn.Flatten, None)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3)])
def test_samples_of_any_shape_have_a_default_critic(shape: tuple[int, ...]) -> None:
    app, torch_state = ClientApp(), Made(lambda x: x).state_dict()
    uploads(app)  # they do not fit, and are dropped: it is the start that counts here
    grid = InProcessGrid(app, nodes=2)
    result = AdaptiveCoalescence(
        generator=lambda: Made(lambda x: x.unflatten(1, shape)), stage=STAGE
    ).start(grid=grid, initial_arrays=ArrayRecord(torch_state), num_rounds=1)
    assert result.train_metrics_clientapp[1]["uploads-dropped"] == 2
