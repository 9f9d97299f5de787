"""A gate: the latents that it wants, by the ratio that it says, and nothing else of them moved."""

from __future__ import annotations

import math
import struct
from functools import cache
from pathlib import Path

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor, nn

from fl_wb.adaptation import (
    Adaptation,
    adapt,
    fast_adaptation,
    fit_gate,
    folded,
    gates,
    own_start,
)
from fl_wb.adaptation.anchor import choose_anchor
from fl_wb.adaptation.gates import asked_for
from fl_wb.clients.fast_adaptation import make_own
from fl_wb.generators.code import Code
from fl_wb.generators.gate import Gate
from fl_wb.generators.networks import make_generator
from fl_wb.generators.reweighted import Reweighted, reweighted
from fl_wb.generators.sampling import generate
from fl_wb.ternary import PackedFileError, Ternarization, load, numpy_reader, pack, save, ternarize
from fl_wb.training.wgan import Sampler, Training, resample
from tests.points import same


def latents(n: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def gate_of(slope: float, dim: int, at: int = 0) -> Gate:
    """Make the gate that wants z exp(slope |z_at|) times as often."""
    first = torch.zeros(2, dim + 1)
    first[0, at], first[1, at] = 1.0, -1.0
    second = torch.tensor([[1.0, 1.0, 0.0]])
    return Gate([first, second, torch.tensor([[slope, 0.0]])])


def random_gate(dim: int, seed: int = 0) -> Gate:
    rng = torch.Generator().manual_seed(seed)
    return Gate([torch.randn(*shape, generator=rng) for shape in [(6, dim + 1), (5, 7), (1, 6)]])


# what it chooses


def test_a_gate_says_what_its_layers_say():
    z = latents(100, 4)
    torch.testing.assert_close(gate_of(0.5, 4, at=2)(z), 0.5 * z[:, 2].abs().double())


@pytest.mark.parametrize("dim", [1, 2, 32, 40])
def test_a_gate_that_wants_all_alike_leaves_them_normal(dim: int):
    z = latents(20_000, dim)
    chosen = gate_of(0.0, dim).choose(z)
    for column in chosen.T[:4]:
        assert kstest(column.numpy(), "norm").pvalue > 1e-4
    assert (chosen.abs().sort(1).values == z.abs().sort(1).values).all()


def test_latents_come_by_the_ratio_that_the_gate_says():
    n, dim, slope = 40_000, 32, -1.0
    chosen = gate_of(slope, dim, at=3).choose(latents(n, dim))
    other = latents(200_000, dim, seed=1)
    ratio = (slope * other[:, 3].abs()).exp()
    for f in (torch.abs, torch.square, lambda z: (z > 1).float()):
        expected = (ratio * f(other[:, 3])).sum() / ratio.sum()
        assert f(chosen[:, 3]).mean() == pytest.approx(expected.item(), abs=0.02)
    # the coordinate whose digits decide, and any other, stay as they were
    for column in (0, 1, 31):
        assert kstest(chosen[:, column].numpy(), "norm").pvalue > 1e-4
    correlation = torch.corrcoef(chosen.T) - torch.eye(dim)
    assert correlation.abs().max() < 0.03


def test_what_nobody_wants_is_met_seldom():
    chosen = gate_of(-20.0, 32).choose(latents(2000, 32))
    assert chosen[:, 0].abs().quantile(0.9) < 0.3
    assert chosen.isfinite().all()


def test_no_random_numbers_are_drawn_and_rows_stand_alone():
    gate, z, state = random_gate(8), latents(300, 8), torch.random.get_rng_state()
    chosen = gate.choose(z)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(chosen[17:40], gate.choose(z[17:40]))


@pytest.mark.parametrize(
    "shapes",
    [
        [(6, 5), (5, 7)],
        [(6, 5), (5, 6), (1, 6)],
        [(6, 5), (5, 7), (2, 6)],
        [(6, 1), (5, 7), (1, 6)],
        [(6,), (5, 7), (1, 6)],
    ],
)
def test_layers_that_do_not_follow_are_refused(shapes: list[tuple[int, ...]]):
    with pytest.raises(ValueError, match="no finite layers of a gate"):
        Gate([torch.zeros(shape) for shape in shapes])


def test_layers_that_are_not_finite_or_of_other_latents_are_refused():
    with pytest.raises(ValueError, match="no finite layers"):
        Gate([torch.full((6, 5), math.nan), torch.zeros(5, 7), torch.zeros(1, 6)])
    with pytest.raises(ValueError, match="a gate of 5 latent coordinates for a generator of 4"):
        reweighted(network(), Code((1, 1)), (1, 1), gate=random_gate(5))


# fitted to a few samples


class Points(nn.Module):
    """Four clusters, by where the first two of many coordinates lie."""

    latent_dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.tensor([0.0, 1.0, 2.0, 3.0]))

    def forward(self, z: Tensor) -> Tensor:
        quadrant = 2 * (z[:, 0] > 0).long() + (z[:, 1] > 0).long()
        return (self.centres[quadrant] + 0.1 * z[:, 2]).unsqueeze(1)


def few_of(points: list[float], n: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    centres = torch.tensor(points).repeat_interleave(n)
    return (centres + 0.1 * torch.randn(len(centres), generator=rng)).unsqueeze(1)


def test_a_target_gets_its_clusters_of_what_no_cell_tells_apart():
    start, code = Points(), Code((1, 1))
    own = own_start(start, code, few_of([0.0, 3.0], 15))
    assert isinstance(own, Reweighted) and own.gate is not None
    found = generate(own, 4000).round().clamp(0, 3).long().flatten().bincount(minlength=4) / 4000
    assert found[1] + found[2] < 0.2  # half of the start
    assert found[0] == pytest.approx(0.5, abs=0.1)


class Corners(nn.Module):
    """Eight clusters, at the corners of a cube."""

    latent_dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.spread = nn.Parameter(torch.tensor(0.1))

    def forward(self, z: Tensor) -> Tensor:
        return z[:, :3].sign() + self.spread * z[:, 3:6]


def test_a_target_that_lacks_little_of_the_start_gets_a_gate_too():
    start = Corners()
    corner = torch.tensor(
        [[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)]
    )
    noise = torch.randn(70, 3, generator=torch.Generator().manual_seed(0))
    few = corner[:7].repeat_interleave(10, 0) + 0.1 * noise
    assert choose_anchor(generate(start, 2000), few) > 0  # by far and near alone, the start fits
    own = own_start(start, Code((1, 1)), few)
    found = generate(own, 2000)
    assert (found > 0).all(1).float().mean() < 0.05  # an eighth of the start


def test_what_needs_no_gate_gets_none():
    start = Points()
    assert fit_gate(start, few_of([0.0], 1)) is None
    for n in (2, 3, 20, 100):
        assert fit_gate(start, generate(start, n, seed=7)) is None
    assert own_start(start, Code((1, 1)), generate(start, 400, seed=7)) is start


@pytest.mark.parametrize(
    ("n", "points", "stays"), [(200, 4, True), (50, 4, False), (200, 2, False)]
)
def test_many_samples_have_to_be_nearer_to_what_is_fitted(
    n: int, points: int, stays: bool, monkeypatch: pytest.MonkeyPatch
):
    # whatever is fitted has only two of the four clusters
    start, code = Points(), Code((1, 1))
    fitted = reweighted(start, code, (1.0, 0.0))
    monkeypatch.setattr(gates, "fit_weights", lambda *_, **__: fitted.weights)
    monkeypatch.setattr(gates, "fit_gate", lambda *_, **__: None)
    has = sorted(generate(fitted, 500).round().flatten().unique().tolist())
    few = few_of([0.0, 1.0, 2.0, 3.0] if points == 4 else has, n // points)
    assert (own_start(start, code, few) is start) is stays


@pytest.mark.usefixtures("quick_gate")
def test_what_the_generator_makes_nothing_like_asks_for_no_part_of_it():
    corner, near = (few_of([3.0], 15) + away for away in (2.0, 0.0))
    assert fit_gate(Points(), corner) is None
    assert fit_gate(Points(), near) is not None


@pytest.mark.usefixtures("quick_gate")
def test_the_same_arguments_give_the_same_gate():
    few = few_of([1.0], 15)
    one, two = fit_gate(Points(), few), fit_gate(Points(), few)
    assert one is not None and two is not None and same(one, two)


# ternary and packed


def network() -> nn.Module:
    torch.manual_seed(0)
    return make_generator("mlp", (1, 8, 8), latent_dim=4, width=8)


@cache
def gated() -> nn.Module:
    own = reweighted(network(), Code((0.3, 0.7)), (0.6, 0.4), gate=random_gate(4))
    return ternarize(own, settings=Ternarization(iterations=3, planes=1))


def test_ternarization_leaves_the_gate_alone():
    assert same(gated().gate, random_gate(4))


def test_a_gate_comes_back_bit_for_bit(tmp_path: Path):
    path = save(gated(), tmp_path / "file")
    loaded = load(path, network())
    assert same(loaded, gated())
    assert generate(loaded, 500).equal(generate(gated(), 500))
    assert struct.unpack_from("<I", path.read_bytes(), 8) == (3,)
    plain = ternarize(network(), settings=Ternarization(iterations=1))
    assert struct.unpack_from("<I", pack(plain), 8) == (2,)  # older readers read it


def test_numpy_makes_the_samples_of_a_gate(tmp_path: Path):
    reader = numpy_reader.PackedGenerator(save(gated(), tmp_path / "file"), (1, 8, 8))
    z = latents(3000, 4)
    with torch.no_grad():
        expected = gated()(z)
    torch.testing.assert_close(torch.from_numpy(reader(z.numpy())), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer", [torch.zeros(6, 6), torch.zeros(6), torch.full((6, 5), math.inf)])
def test_a_forged_gate_is_refused(layer: Tensor, tmp_path: Path):
    forged = load(save(gated(), tmp_path / "good"), network())
    forged.gate.register_buffer("first", layer)
    path = tmp_path / "file"
    path.write_bytes(pack(forged))
    with pytest.raises(PackedFileError, match=r"its code is none|another network"):
        load(path, network())
    if layer.isfinite().all():
        with pytest.raises(PackedFileError, match="holds no MLPGenerator"):
            numpy_reader.PackedGenerator(path, (1, 8, 8))


# adapted


@pytest.mark.usefixtures("quick_gate")
def test_a_gated_start_keeps_its_gate_and_learns_from_its_own_samples():
    start = reweighted(Points(), Code((1, 1)), (1, 1), gate=fit_gate(Points(), few_of([3.0], 15)))
    brief = Adaptation(training=Training(iterations=2, warmup=2))
    adapted = adapt(start, few_of([3.0], 15), settings=brief)
    assert same(adapted.gate, start.gate)


@pytest.mark.usefixtures("quick_gate")
def test_of_a_start_that_fits_in_part_that_part_is_learned(monkeypatch: pytest.MonkeyPatch):
    learned: list[Tensor] = []

    def noted(bank: Tensor) -> Sampler:
        learned.append(bank)
        return resample(bank)

    monkeypatch.setattr(fast_adaptation, "resample", noted)
    monkeypatch.setattr(fast_adaptation, "choose_anchor", lambda *_: 5.0)  # what is wanted fits
    all_alike = reweighted(Points(), Code((1, 1)), (1, 1), gate=gate_of(0.0, 16))
    adapt(all_alike, few_of([0.0, 3.0], 15), iterations=0)
    assert len(learned[-1]) == 2000 + 8000  # the widened few, and four times as many of the start's
    assert ((learned[-1] > 0.5) & (learned[-1] < 2.5)).float().mean() < 0.2  # half of the start


@pytest.mark.usefixtures("quick_gate")
def test_of_more_samples_than_are_widened_no_class_is_left_out(monkeypatch: pytest.MonkeyPatch):
    learned: list[Tensor] = []

    def noted(bank: Tensor) -> Sampler:
        learned.append(bank)
        return resample(bank)

    monkeypatch.setattr(fast_adaptation, "resample", noted)
    monkeypatch.setattr(fast_adaptation, "choose_anchor", lambda *_: 5.0)
    monkeypatch.setattr(fast_adaptation, "WIDENED", 15)
    few = few_of([0.0, 3.0], 15)  # sorted: the first 15 are of one class
    gated = reweighted(Points(), Code((1, 1)), (1, 1), gate=fit_gate(Points(), few))
    adapt(gated, few, iterations=0)
    assert 3 < (learned[-1][:15] > 1.5).sum() < 12


@pytest.mark.usefixtures("quick_gate")
def test_what_a_gate_keeps_back_can_be_asked_for():
    start = reweighted(Points(), Code((1, 1)), (1, 1), gate=fit_gate(Points(), few_of([3.0], 15)))
    assert ((generate(start, 1000) - 3.0).abs() < 0.5).float().mean() > 0.9
    wanted = asked_for(start, few_of([0.0], 15), 1000)
    assert wanted is not None
    assert (wanted.abs() < 0.5).float().mean() > 0.9


@pytest.mark.usefixtures("quick_gate")
def test_what_keeps_its_architecture_is_guided_by_the_gate():
    # Prepare
    few, start = few_of([0.0, 3.0], 15), Points()
    own = own_start(start, Code((1, 1)), few)
    plain = folded(own)

    # Execute
    made = make_own(
        start, few, code=Code((1, 1)), plain=True, adaptation=Adaptation(training=Training(5, 2))
    )
    alone = adapt(plain, few, settings=Adaptation(training=Training(5, 2)))

    # Assert
    assert isinstance(made.adapted, Points) and not same(made.adapted, alone)


@pytest.mark.usefixtures("quick_gate")
@pytest.mark.parametrize("n", [1, 2])
def test_so_few_ask_for_nothing_in_particular(n: int):
    start = reweighted(Points(), Code((1, 1)), (1, 1), gate=fit_gate(Points(), few_of([3.0], 15)))
    assert asked_for(start, few_of([3.0], n), 1000) is None
