"""What is merged of a node that goes on: the mean of what it sent, unless it began anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fl_wb.federation.memory import Memory
from fl_wb.federation.uploads import Uploads
from fl_wb.strategies import AdaptiveCoalescence
from fl_wb.testing.in_process_grid import InProcessGrid
from tests.toys import STAGE, reply


class Scaled(nn.Module):
    """N(0, s^2): a linear map, which makes the same of -s, and nothing of their mean."""

    latent_dim = 2

    def __init__(self, scale: float = 1.0, fails_at: float | None = None) -> None:
        super().__init__()
        self.scale, self.fails_at = nn.Parameter(torch.tensor([scale])), fails_at

    def forward(self, z: Tensor) -> Tensor:
        """Map latents (n, 2) to samples (n, 2)."""
        if self.fails_at is not None and abs(self.scale.item() - self.fails_at) < 1e-6:
            raise RuntimeError("no such scale")
        return z * self.scale


SENT = {
    11: (1.0, 1.2, 0.9),  # goes on
    12: (1.0, -1.0, -1.1),  # begins anew in round 2
    13: (1.0, 1.0, 1.4),  # did not learn in round 2
    14: (1.0, 1.2, 1.2),  # nor in round 3
}


def run(
    sent: dict[int, tuple[float, ...]], folder: Path | None = None, **arguments: Any
) -> tuple[dict[int, float], dict[int, list[float]], AdaptiveCoalescence]:
    """Run a round for each number sent: what is merged of each node, what it was given, by whom."""
    app = ClientApp()
    given: dict[int, list[float]] = {node: [] for node in sent}

    @app.train()
    def train(message: Message, context: Context) -> Message:
        node, arrays = context.node_id, message.content["arrays"]
        given[node].append(float(arrays.to_torch_state_dict()["scale"]))
        scale = sent[node][len(given[node]) - 1]
        return reply(message, ArrayRecord(Scaled(scale).state_dict()))

    grid = InProcessGrid(app)
    for node in sent:
        grid.add({}, node)
    arguments = {"generator": Scaled, "stage": STAGE, "store": folder} | arguments
    strategy = AdaptiveCoalescence(
        fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1, **arguments
    )
    rounds = len(next(iter(sent.values())))
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Scaled().state_dict()),
        num_rounds=rounds,
        evaluate_fn=lambda *_: None,
    )
    assert strategy._coalescence is not None
    uploads = strategy._coalescence.uploads
    merged = {}
    for node, upload in uploads.of_nodes().items():
        mean = uploads.mean(upload)
        merged[node] = float((uploads.state(upload) if mean is None else mean)["scale"])
    return merged, given, strategy


def test_what_goes_on_is_averaged_and_what_begins_anew_is_not() -> None:
    merged, given, _ = run(SENT)

    assert merged[11] == pytest.approx(((1.0 + 1.2) / 2 + 0.9) / 2)
    assert merged[12] == pytest.approx((-1.0 - 1.1) / 2)  # not (0 - 1.1) / 2
    assert merged[13] == pytest.approx((1.0 + 1.4) / 2)  # the same again is no step
    assert merged[14] == pytest.approx((1.0 + 1.2) / 2)
    # a node goes on from what it sent itself
    assert {node: scales[1:] for node, scales in given.items()} == {
        node: pytest.approx(list(scales[:-1])) for node, scales in SENT.items()
    }


@pytest.mark.parametrize(
    "arguments", [{"continue_from": "average"}, {"continue_from": "barycenter"}, {"max_age": 0}]
)
def test_without_a_way_of_their_own_there_is_no_mean(arguments: dict[str, Any]) -> None:
    merged, _, _ = run({11: (1.0, 1.2), 12: (1.0, 0.8)}, **arguments)
    assert merged == pytest.approx({11: 1.2, 12: 0.8})


def test_a_mean_at_which_the_network_fails_is_none() -> None:
    merged, _, _ = run({11: (1.0, 1.2), 12: (1.0, 0.8)}, generator=lambda: Scaled(fails_at=1.1))
    assert merged == pytest.approx({11: 1.2, 12: 0.9})


def test_the_measure_that_is_merged_is_the_mean() -> None:
    """The barycenter of one node is its generator: here the mean, not the last that it sent."""
    _, _, strategy = run({11: (1.5, 0.5)})
    assert strategy._coalescence is not None
    merged = strategy._coalescence._merged
    assert merged is not None and float(merged["scale"]) == 1.0
    (upload,) = strategy._coalescence.uploads.ordered()
    assert upload.merged == upload.mean != upload.digest


def test_a_mean_is_kept_on_disk_and_what_is_lost_of_it_costs_the_upload(tmp_path: Path) -> None:
    run(SENT, tmp_path)
    model = dict(Scaled().state_dict())

    uploads, _ = Memory(tmp_path / "nodes", model, {}).load()
    means = {node: uploads.mean(upload) for node, upload in uploads.of_nodes().items()}
    assert {node: float(mean["scale"]) for node, mean in means.items() if mean} == pytest.approx(
        {11: 1.0, 12: -1.05, 13: 1.2, 14: 1.1}
    )

    lost = uploads.of_nodes()[11]
    (tmp_path / "nodes" / f"{lost.mean}.safetensors").unlink()
    found, _ = Memory(tmp_path / "nodes", model, {}).load()
    assert sorted(found.of_nodes()) == [12, 13, 14] and found.changed


def test_a_mean_goes_with_its_node() -> None:
    kept, one = Uploads(), {"a": torch.ones(1)}
    kept.put(1, {1: (1.0, "sent", one)}, [1], means={1: {"a": torch.zeros(1)}})
    (upload,) = kept.ordered()
    assert upload.merged == upload.mean != upload.digest
    kept.put(2, {1: (1.0, "sent", one)}, [1])
    assert kept.changed and kept.mean(kept.ordered()[0]) is None
    assert kept._states.get("1-mean") is None
    kept.put(3, {1: (1.0, "sent", one)}, [1], means={1: {"a": torch.zeros(1)}})
    kept.drop(1)
    assert kept._states.get("1-mean") is None


def test_what_is_kept_is_counted_once_however_many_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_wb.federation.uploads.MEMORY", 20)  # two nodes and their means: 16
    kept, one = Uploads(), {"a": torch.ones(1)}
    for number in range(1, 6):
        sent = {node: (1.0, f"{node} {number}", one) for node in (1, 2)}
        kept.put(number, sent, [1, 2], means={1: one, 2: one})
    assert kept._on_disk is None
    kept.put(6, {3: (1.0, "3", one)}, [3], means={3: one})
    assert kept._on_disk is not None
