"""How much likelier a target makes a sample: by what is alike, and no more than the few can say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fl_wb.adaptation.likeness import _rows, likeness


def rings(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return points near circles of radii 1 and 1.5, and which one each is near."""
    rng = torch.Generator().manual_seed(seed)
    angle, outer = 2 * math.pi * torch.rand(n, generator=rng), torch.rand(n, generator=rng) < 0.5
    circle = torch.stack([angle.cos(), angle.sin()], 1) * (1 + 0.5 * outer.float()).unsqueeze(1)
    return circle + 0.05 * torch.randn(n, 2, generator=rng), outer


def test_few_samples_reach_along_what_is_alike_and_not_across():
    # some points of the outer ring are nearer to the inner one than to each other
    made, outer = rings(1000)
    some, there = rings(40, seed=1)
    few = some[there][:20]
    others = torch.cdist(few, few).fill_diagonal_(torch.inf).amin(1)
    assert (others > torch.cdist(few, made[~outer]).amin(1)).any()
    ratio = likeness(made, few)(made)
    share = outer.double().mean()
    assert ratio[outer].mean() == pytest.approx(1 / share.item(), rel=0.1)
    assert ratio[~outer].mean() < 0.1
    assert ratio.mean() == pytest.approx(1, abs=0.05) and ratio.min() >= 0
    fresh, ring = rings(500, seed=2)
    asked = likeness(made, few)(fresh)
    assert asked[ring].mean() > 10 * asked[~ring].mean()


@pytest.mark.parametrize("n", [1, 2, 3, 20, 100, 1000])
def test_the_generators_own_samples_ask_for_nothing_else(n: int):
    made, _ = rings(1000)
    few, _ = rings(n, seed=3)
    assert (likeness(made, few)(made) - 1).abs().mean() < 0.12


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("tight", [5, 15])
def test_each_of_the_few_has_its_share_however_sure_it_is(tight: int, seed: int):
    # a tight blob, a wide one, and one that nobody asks for
    rng = torch.Generator().manual_seed(seed)
    blob = torch.randint(3, (1500,), generator=rng)
    spread, middle = (
        torch.tensor([0.1, 0.6, 0.3]),
        torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]]),
    )
    made = torch.randn(1500, 2, generator=rng) * spread[blob].unsqueeze(1) + middle[blob]
    asked = torch.arange(20) >= tight
    few = torch.randn(20, 2, generator=rng) * spread[asked.long()].unsqueeze(1)
    ratio = likeness(made, few + middle[asked.long()])(made)
    share = ratio[blob == 0].sum() / ratio[blob < 2].sum()
    assert share.item() == pytest.approx(tight / 20, abs=0.08)


def test_few_of_what_touches_it_are_taken_for_what_is_asked_for():
    # two blobs, of which some points lie among those of the other; unsharpened, 0.040 of them
    strangers = []
    for seed in range(4):
        rng = torch.Generator().manual_seed(seed)
        other = torch.randint(2, (1500,), generator=rng)
        made = 0.6 * torch.randn(1500, 2, generator=rng)
        made[:, 0] += 2.75 * other
        ratio = likeness(made, 0.6 * torch.randn(20, 2, generator=rng))(made)
        strangers.append((ratio[other == 1].sum() / ratio.sum()).item())
    assert sum(strangers) / 4 < 0.03


def test_two_alike_say_little_and_one_nothing():
    made, outer = rings(1000)
    few = rings(40, seed=1)[0][rings(40, seed=1)[1]]
    assert likeness(made, few[:1])(made).allclose(torch.ones(1000, dtype=torch.float64))
    assert likeness(made, few[:2])(made)[~outer].mean() > 0.9


@pytest.mark.parametrize("n", [2, 3, 4])
def test_of_few_samples_chance_is_not_taken_for_a_wish(n: int):
    made, _ = rings(1000)
    for seed in range(10):
        few, _ = rings(n, seed=seed)
        assert (likeness(made, few)(made) - 1).abs().mean() / 2 < 0.1


def test_samples_that_are_all_the_same_leave_it_finite():
    for made in (torch.zeros(50, 2), torch.cat([torch.zeros(40, 2), torch.ones(10, 2)])):
        ratio = likeness(made, made[:5])(made)
        assert ratio.isfinite().all() and ratio.mean() == pytest.approx(1, abs=0.1)


def test_the_same_arguments_give_the_same_ratios_and_nothing_moves():
    made, few, state = rings(500)[0], rings(10, seed=1)[0], torch.random.get_rng_state()
    assert likeness(made, few)(made).equal(likeness(made, few)(made))
    assert state.equal(torch.random.get_rng_state())


def test_a_stroke_of_a_large_image_is_like_itself_a_pixel_away() -> None:
    def far(side: int, moved: int) -> float:
        stroke = torch.full((2, 3, side, side + 4), -1.0)
        stroke[0, ..., side // 2] = stroke[1, ..., side // 2 + moved] = 1.0
        one, other = _rows(stroke)
        assert one.shape == (3 * side * (side + 4),)
        return (one - other).norm().item()

    assert far(28, 1) < 0.5 * far(28, 5)
    assert far(8, 1) > 0.7 * far(8, 3)  # a pixel of few is a part of the shape
    flat = torch.full((1, 1, 28, 20), 0.7)
    torch.testing.assert_close(_rows(flat), flat.flatten(1))  # borders do not darken
    vectors = torch.randn(5, 7)
    assert _rows(vectors).equal(vectors)
