"""A source's store: what it is asked for by another network or after damage is trained anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fl_wb.clients import training
from fl_wb.clients.source import source_train
from fl_wb.persistence.stage_store import StageStore
from fl_wb.strategies import RoleFedAvg
from fl_wb.testing.in_process_grid import InProcessGrid
from tests.toys import SHAPE, TRAINING, critic, generator, initial_arrays, seeded_state


class Louder(nn.Module):
    """The same state as the inner network's, under its names, but another forward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.net, self.shape = inner.net, SHAPE
        self.latent_dim = 4

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = 2 * self.net(x).reshape(-1, *SHAPE)
        return y


def trainings(store: Path, **changed: object) -> int:
    """Answer one TRAIN message; count the trainings that it took."""
    told: list[int] = []
    arguments = {"generator": generator, "critic": critic, "settings": TRAINING, "device": "cpu"}

    def train(message: Message, context: Context) -> Message:
        content = source_train(
            message,
            context,
            samples=lambda: torch.linspace(-1, 1, 9 * 16).reshape(9, *SHAPE),
            store=StageStore(store),
            callback=lambda done, total, losses: told.append(done == total),
            **(arguments | changed),
        )
        return Message(content, reply_to=message)

    app = ClientApp()
    app.train()(train)
    strategy = RoleFedAvg(min_train_nodes=1, min_available_nodes=1, min_evaluate_nodes=1)
    strategy.start(grid=InProcessGrid(app, 1), initial_arrays=initial_arrays(), num_rounds=1)
    return sum(told)


def test_an_old_result_answers_for_the_same_training_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trainings(tmp_path) == 1
    assert trainings(tmp_path) == 0
    assert trainings(tmp_path, generator=lambda: Louder(generator())) == 1
    monkeypatch.setattr(training, "VERSION", 99)
    assert trainings(tmp_path) == 1


def test_a_flipped_bit_is_trained_anew(tmp_path: Path) -> None:
    trainings(tmp_path)
    (path,) = (tmp_path / "stages").glob("*.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 0x40]))
    assert trainings(tmp_path) == 1


def test_what_is_trained_once_is_found_whatever_the_server_sends_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trainings(tmp_path) == 1
    monkeypatch.setattr(
        "tests.test_source_store.initial_arrays", lambda: ArrayRecord(seeded_state(5))
    )
    assert trainings(tmp_path) == 0
    assert trainings(tmp_path, again=True) == 1
