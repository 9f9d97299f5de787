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
from fl_wb.training import distillation
from fl_wb.training.distillation import CoupledPairs, Distillation, distill, pairs_of
from fl_wb.transport import coupling, energy_distance
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


# pairs that are coupled anew


def shuffled(n: int = 600, groups: int = 2) -> CoupledPairs:
    """Pair 2 z, moved by 10 from group to group, with the latents of each group in no order."""
    rng = torch.Generator().manual_seed(0)
    z, group = torch.randn(n, 4, generator=rng), torch.arange(n) % groups
    order = groups * torch.randperm(n // groups, generator=rng).repeat_interleave(groups) + group
    return CoupledPairs(z, (2 * z[:, :2] + 10 * group.unsqueeze(1))[order], group, group)


def test_pairs_are_coupled_anew_with_what_is_nearest_within_their_group() -> None:
    pairs = shuffled()

    pairs.renew(Gaussian((1.0, -3.0), std=2.0), torch.Generator().manual_seed(1))

    samples = pairs.x[pairs.order]
    torch.testing.assert_close(samples, 2 * pairs.z[:, :2] + 10 * pairs.group.unsqueeze(1))
    z, x, cell = pairs(5, torch.Generator().manual_seed(2))
    drawn = [int((pairs.z == row).all(1).nonzero()) for row in z]
    assert x.equal(samples[drawn]) and cell.equal(pairs.cell[drawn])


def test_pairs_stay_where_a_student_makes_what_is_not_finite() -> None:
    pairs = shuffled()
    pairs.renew(Gaussian((0.0, math.nan)), torch.Generator().manual_seed(1))
    assert pairs.order.equal(torch.arange(600))


def test_what_a_first_coupling_imports_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], list[int]()

    def slow(x: Tensor, y: Tensor) -> Tensor:
        clock[0] += 1 if calls else 1000
        calls.append(len(x))
        return coupling(x, y)

    monkeypatch.setattr(distillation, "coupling", slow)
    monkeypatch.setattr(distillation, "perf_counter", lambda: clock[0])
    # two groups, a second each, twice, of ten times as many pairs
    assert shuffled(60).seconds(Gaussian((0.0, 0.0)), 600) == pytest.approx(40)


def test_pairs_are_coupled_with_random_numbers_of_their_own() -> None:
    students = []
    with torch.random.fork_rng():
        for outside in (1, 2):
            torch.manual_seed(outside)
            before = torch.get_rng_state()
            students.append(nn.Sequential(Gaussian((0.0, 0.0)), nn.Dropout(0.5)))
            distill(students[-1], shuffled(60), SHORT)
            assert torch.get_rng_state().equal(before)
    assert same(*students)


def test_a_student_learns_pairs_in_no_order_once_they_are_coupled() -> None:
    far = []
    for pairs in (shuffled(groups=1), shuffled(groups=1).forward):  # the latter never are
        torch.manual_seed(0)
        student = nn.Linear(4, 2)
        distill(student, pairs, Distillation(iterations=300, lr=1e-2), energy=0.0)
        made = generate(student, 600, latent_dim=4)
        far.append(float(energy_distance(made, shuffled(groups=1).x)))
    assert far[0] < 0.05 and far[1] > 10 * far[0]  # the mean of all, where none is nearer


@pytest.mark.parametrize("killed_at", [1, 2, 3, 6])
def test_a_resumed_distillation_has_the_pairs_as_they_were_coupled(monkeypatch, killed_at: int):
    monkeypatch.setattr(stage_store, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    checkpoint = StageStore().checkpoint("key")
    few = Distillation(iterations=8, batch_size=8, lr=1e-2)
    students = []
    for callback in (None, kill_at(killed_at), None):
        torch.manual_seed(0)
        students.append(nn.Linear(4, 2))
        kept = checkpoint if len(students) > 1 else None
        try:
            distill(students[-1], shuffled(60), few, checkpoint=kept, callback=callback)
        except Killed:
            continue
    assert same(students[0], students[2]) and not same(students[0], students[1])


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
