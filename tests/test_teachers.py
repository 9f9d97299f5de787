"""The pairs that a stage learns from: how many of each measure, and where they lie."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from fl_wb.barycenter import Stage, recursive_barycenter
from fl_wb.barycenter.alignment import nearest_turn
from fl_wb.barycenter.teachers import BYTES, Measure, Pool, UselessMeasures, mixture_pool
from fl_wb.generators.code import Code
from fl_wb.generators.latents import Latents
from fl_wb.generators.mixture import Mixture
from fl_wb.persistence.tensor_files import digest
from fl_wb.training.distillation import Distillation
from tests.points import Gaussian, critic

WEIGHTS = [1.0, 16.0, 16.0, 16.0]


def pool(batch: int) -> Pool:
    measures = [Measure.of(Gaussian((float(k), 0.0)), w) for k, w in enumerate(WEIGHTS)]
    return mixture_pool(measures, Latents(4), 10_000, batch, rng(0), Gaussian((0.0, 0.0)))


def test_pairs_are_drawn_by_a_power_of_the_share_and_weigh_what_it_says():
    drawn = pool(200)
    cell, _ = Code(WEIGHTS).place(drawn.z)
    counts = cell.bincount(minlength=4).double()
    assert (counts[1:] / counts[0]).tolist() == pytest.approx([8, 8, 8], rel=0.03)  # 16 ** 3/4
    for k, weight in enumerate(WEIGHTS):
        assert drawn.weight[cell == k].sum().item() == pytest.approx(weight / 49, rel=1e-3)
        assert drawn.x[cell == k, 0].mean().item() == pytest.approx(k, abs=0.1)


@pytest.mark.parametrize(("batch", "depth"), [(8, 0), (47, 0), (48, 1), (96, 2), (200, 3)])
def test_a_batch_has_two_dozen_pairs_of_each_branch(batch: int, depth: int):
    drawn = pool(batch)
    cell, _ = Code(WEIGHTS).place(drawn.z)
    assert drawn.cell.equal(Code(WEIGHTS).branches(depth)[cell])


class Striped(Gaussian):
    """A conditional generator: a label's points stand together."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z[:, :4]) + 10 * z[:, 4:]


@pytest.mark.parametrize(("batch", "groups"), [(8, 1), (79, 3), (200, 5), (400, 5)])
def test_a_batch_has_a_score_of_pairs_of_each_label_or_of_some_together(batch: int, groups: int):
    measures = [Measure.of(Striped((0.0, k)), 1.0) for k in range(2)]
    latents = Latents(4, labels=(0.2,) * 5)
    drawn = mixture_pool(measures, latents, 4_000, batch, rng(0), Striped((0.0, 0.0)))
    label = drawn.z[:, 4].long()
    assert len(drawn.cell.unique()) == groups * (2 if batch == 400 else 1)
    for k in range(groups):
        together = drawn.cell[label % groups == k].unique()
        assert not torch.isin(drawn.cell[label % groups != k], together).any()


class Waves(nn.Module):
    """A map of the latent that is neither linear nor even, after a turn of the latent."""

    latent_dim = 4

    def __init__(self, turn: Tensor) -> None:
        super().__init__()
        self.turn = turn

    def forward(self, z: Tensor) -> Tensor:
        scale = torch.tensor([3.0, 1.0, 0.5, 0.2])
        return torch.tanh(scale * (z @ self.turn.T)) @ TO_SAMPLES


def turn(seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(4, 4, generator=rng(seed))).Q


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


TO_SAMPLES = torch.randn(4, 6, generator=rng(7))


def test_the_nearest_turn_of_a_linear_map_is_the_turn_itself() -> None:
    a, r, z = torch.randn(6, 4, generator=rng(1)), turn(2), torch.randn(20_000, 4, generator=rng(3))
    found = nearest_turn(z, z @ a.T + 5, z @ (a @ r).T - 7)
    torch.testing.assert_close(found, r, atol=0.06, rtol=0)
    torch.testing.assert_close(found @ found.T, torch.eye(4))


def test_directions_that_hardly_matter_stay_where_they_are() -> None:
    z = torch.randn(1000, 4, generator=rng(0))
    torch.testing.assert_close(
        nearest_turn(z, z[:, :1], 2 * z[:, :1]), torch.eye(4), atol=0.05, rtol=0
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_turns_nothing(bad: float) -> None:
    z = torch.randn(100, 4, generator=rng(0))
    x = z.clone()
    x[3, 2] = bad
    assert nearest_turn(z, x, bad * x).equal(torch.eye(4))


def test_a_map_that_says_nothing_of_its_latents_is_not_turned() -> None:
    z = torch.randn(100, 4, generator=rng(0))
    assert nearest_turn(z, torch.ones(100, 6), z @ TO_SAMPLES).equal(torch.eye(4))


def test_measures_are_turned_towards_what_the_student_makes_in_their_cells() -> None:
    first, weights = Waves(torch.eye(4)), [1.0, 2.0, 1.0]
    sources = [first, Waves(turn(1)), Waves(turn(2))]
    measures = [
        Measure.of(g, w, str(k)) for k, (g, w) in enumerate(zip(sources, weights, strict=True))
    ]
    student = Mixture([first] * 3, weights)
    pool = mixture_pool(measures, Latents(4), 30_000, 200, rng(0), student.eval())
    with torch.no_grad():
        apart = (pool.x - student(pool.z)).abs().mean()
        unturned = (Mixture(sources, weights).eval()(pool.z) - student(pool.z)).abs().mean()
    assert apart < 0.1 * unturned
    assert pool.z.mean(0).abs().max() < 0.1  # and the latents are what they were


class Failing(Gaussian):
    """A generator that makes nothing."""

    def forward(self, z: Tensor) -> Tensor:
        raise IndexError("no such row")


class Wide(Gaussian):
    """A generator of a mebibyte a sample."""

    def forward(self, z: Tensor) -> Tensor:
        return z.new_zeros(1, 1).expand(len(z), 1 << 18)


def sources(n: int) -> list[nn.Module]:
    """Return sources of which 1, 4, 7, ... are of no use."""
    made: list[nn.Module] = [Gaussian((0.0 if k % 3 != 1 else math.nan, k)) for k in range(n)]
    made[4] = Failing((0.0, 4.0))
    return made


def test_all_useless_measures_are_found_at_once():
    measures = [Measure.of(source, 1.0, str(k)) for k, source in enumerate(sources(9)[1:])]
    with pytest.raises(UselessMeasures) as found:
        mixture_pool(measures, Latents(4), 1000, 100, rng(0), Gaussian((0.0, 0.0)))
    nan, fails = "the generator makes samples that are not finite", "fails to generate: no such row"
    assert found.value.why == {"0": nan, "3": f"the generator {fails}", "6": nan}
    assert str(pickle.loads(pickle.dumps(found.value))) == f"the generator {fails}; {nan}"


def test_a_pool_is_bounded_where_the_first_measure_says_nothing_of_its_size():
    measures = [Measure.of(Failing((0.0, 0.0)), 1.0), Measure.of(Wide((0.0, 0.0)), 1.0)]
    drawn: list[int] = []
    measures[1].generator().register_forward_hook(lambda _, args, __: drawn.append(len(args[0])))
    with pytest.raises(UselessMeasures):
        mixture_pool(measures, Latents(4), 100_000, 100, rng(0), Failing((0.0, 0.0)))
    assert sum(drawn) << 20 <= BYTES


@pytest.mark.parametrize("executor", [None, "ray"])
def test_a_tree_finds_those_of_all_its_groups(executor: str | None):
    stage = Stage(distillation=Distillation(iterations=220, batch_size=8))
    with pytest.raises(UselessMeasures) as found:
        recursive_barycenter(sources(9), stage=stage, critic=critic, fan_in=3, executor=executor)
    assert set(found.value.why) == {digest(sources(9)[k].state_dict()) for k in (1, 4, 7)}


def test_a_budget_s_estimate_finds_them_all() -> None:
    stage = Stage(distillation=Distillation(iterations=220, batch_size=8))
    with pytest.raises(UselessMeasures) as found:
        recursive_barycenter(sources(9), stage=stage, critic=critic, budget=60)
    assert set(found.value.why) == {digest(sources(9)[k].state_dict()) for k in (1, 4, 7)}


@pytest.mark.parametrize("student", [Failing((0.0, 0.0)), Waves(torch.full((4, 4), math.nan))])
def test_a_student_that_makes_nothing_turns_nothing_and_is_no_measures_fault(
    student: nn.Module,
) -> None:
    sources = [Waves(turn(1)), Waves(turn(2))]
    measures = [Measure.of(source, 1.0) for source in sources]
    pool = mixture_pool(measures, Latents(4), 1000, 200, rng(0), student)
    with torch.no_grad():
        torch.testing.assert_close(pool.x, Mixture(sources).eval()(pool.z))


def test_a_student_learns_in_train_mode_only_once_all_pairs_are_drawn() -> None:
    seen: list[tuple[bool, int]] = []

    class Watched(Gaussian):
        def forward(self, z: Tensor) -> Tensor:
            seen.append((self.training, len(z)))
            return super().forward(z)

    stage = Stage(distillation=Distillation(iterations=150, batch_size=8))
    recursive_barycenter([Watched((0.0, 0.0)), Watched((1.0, 0.0))], stage=stage, critic=critic)
    first = seen.index((True, 8))
    assert any(n > 128 for _, n in seen[:first])
    assert all(n <= 128 for training, n in seen if training)
