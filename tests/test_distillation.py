"""Distillation: a student learns a known map of the latent, resumably."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from fl_wb.generators.latents import Latents
from fl_wb.generators.networks import make_generator
from fl_wb.generators.sampling import generate
from fl_wb.persistence import stage_store
from fl_wb.persistence.stage_store import StageStore
from fl_wb.training.distillation import Distillation, distill, pairs_of
from tests.points import Gaussian, Killed, kill_at, same

SHORT = Distillation(iterations=6, batch_size=8)


def conv() -> nn.Module:
    torch.manual_seed(0)
    return make_generator("conv", (1, 8, 8), latent_dim=4, width=4).train()


def ramp(z: Tensor) -> Tensor:
    """Images whose brightness is the first latent."""
    return z[:, :1].tanh().reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8)


def test_a_student_learns_the_map():
    student, losses = Gaussian((0.0, 0.0)), []

    def teacher(z: Tensor) -> Tensor:
        return 2 * z[:, :2].flip(1) + torch.tensor([1.0, -3.0])

    distill(
        student,
        pairs_of(teacher, Latents(4)),
        Distillation(iterations=300, batch_size=64, lr=1e-2),
        callback=lambda done, total, loss: losses.append((done, total, loss["distillation"])),
    )

    z = torch.randn(400, 4, generator=torch.Generator().manual_seed(1))
    assert (student(z) - teacher(z)).norm(dim=1).mean() < 0.1
    assert [loss[:2] for loss in losses] == [(done, 300) for done in range(1, 301)]
    assert losses[-1][2] < losses[0][2] / 20


def test_the_loss_of_two_points():
    student, losses = Gaussian((0.0, 0.0), std=0.0), []
    distill(
        student,
        pairs_of(lambda z: torch.tensor([[3.0, 4.0]]).expand(len(z), 2), Latents(4)),
        Distillation(iterations=1),
        energy=3.0,
        callback=lambda done, total, loss: losses.append(loss["distillation"]),
    )
    assert losses == [pytest.approx(7 / math.sqrt(2) + 3 * 2 * 5)]


def test_the_energy_distance_of_several_cells_is_within_them():
    student, losses = Gaussian((0.0, 0.0), std=0.0), []

    def pairs(n: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        cell = torch.arange(n) % 2
        x = torch.stack([2.0 * cell - 1, torch.zeros(n)], 1)  # -1 in the one, 1 in the other
        return torch.zeros(n, 4), x, cell

    distill(
        student,
        pairs,
        Distillation(iterations=1),
        energy=3.0,
        callback=lambda done, total, loss: losses.append(loss["distillation"]),
    )
    # of the whole it would be less: the samples differ among each other
    assert losses == [pytest.approx(1 / math.sqrt(2) + 3 * 2)]


def test_two_modes_are_both_reached_where_the_map_cannot_be_followed():
    # A linear student of a teacher that jumps: it cannot follow, but covers both sides.
    torch.manual_seed(0)
    student = nn.Linear(4, 1)

    def teacher(z: Tensor) -> Tensor:
        return z[:, 3:].sign()

    distill(student, pairs_of(teacher, Latents(4)), Distillation(iterations=300, lr=1e-2))

    samples = generate(student, 1000, latent_dim=4)
    assert 0.45 < (samples > 0).float().mean() < 0.55
    assert samples.std() > 0.9  # without the energy term it shrinks to about 0.8


def test_the_same_seed_gives_the_same_student():
    students = [Gaussian((0.0, 0.0)) for _ in range(3)]
    rng = torch.get_rng_state()
    for student, seed in zip(students, (1, 1, 2), strict=True):
        distill(student, pairs_of(Gaussian((2.0, 2.0)), Latents(4)), SHORT, seed=seed)
    assert torch.get_rng_state().equal(rng)
    assert same(students[0], students[1]) and not same(students[0], students[2])


@pytest.mark.parametrize("killed_at", [1, 4, 6])
def test_a_resumed_distillation_ends_like_an_unbroken_one(monkeypatch, killed_at: int):
    monkeypatch.setattr(stage_store, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    checkpoint = StageStore().checkpoint("key")
    unbroken, resumed = conv(), conv()
    distill(unbroken, pairs_of(ramp, Latents(4)), SHORT)
    iterations = []

    with pytest.raises(Killed):
        distill(
            conv(),
            pairs_of(ramp, Latents(4)),
            SHORT,
            checkpoint=checkpoint,
            callback=kill_at(killed_at),
        )
    distill(
        resumed,
        pairs_of(ramp, Latents(4)),
        SHORT,
        checkpoint=checkpoint,
        callback=lambda done, *_: iterations.append(done),
    )

    assert iterations == list(range(killed_at + 1, SHORT.iterations + 1))
    assert same(resumed, unbroken)


def test_statistics_follow_in_training_mode_and_stay_in_eval_mode():
    moving, still = conv(), conv().eval()
    before = {name: value.clone() for name, value in still.named_buffers()}
    for student in (moving, still):
        distill(student, pairs_of(ramp, Latents(4)), SHORT)
    assert all(value.equal(before[name]) for name, value in still.named_buffers())
    assert not any(value.equal(before[name]) for name, value in moving.named_buffers())


def test_a_group_keeps_its_own_rate():
    student = Gaussian((0.0, 0.0))
    residual = [p.clone() for p in student.residual.parameters()]
    groups = [
        {"params": list(student.affine.parameters())},
        {"params": list(student.residual.parameters()), "lr": 0.0},
    ]

    distill(student, pairs_of(Gaussian((1.0, 0.0)), Latents(4)), SHORT, groups=groups)

    assert all(p.equal(q) for p, q in zip(student.residual.parameters(), residual, strict=True))
    assert generate(student, 100).mean(0)[0] > generate(Gaussian((0.0, 0.0)), 100).mean(0)[0]


def test_a_group_stands_still_after_its_share():
    student, biases = Gaussian((0.0, 0.0)), []
    groups = [
        {"params": [student.affine.weight]},
        {"params": [student.affine.bias], "until": 0.5},
    ]

    distill(
        student,
        pairs_of(Gaussian((1.0, 0.0)), Latents(4)),
        SHORT,
        groups=groups,
        callback=lambda *_: biases.append(student.affine.bias.detach().clone()),
    )

    assert [not a.equal(b) for a, b in pairwise(biases)] == [True, True, False, False, False]
