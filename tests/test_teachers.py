"""The pairs that a stage learns from: how many of each measure, and where they lie."""

from __future__ import annotations

import pytest
import torch

from fl_wb.barycenter.teachers import Measure, Pool, mixture_pool
from fl_wb.generators.code import Code
from fl_wb.generators.latents import Latents
from tests.points import Gaussian

WEIGHTS = [1.0, 16.0, 16.0, 16.0]


def pool(batch: int) -> Pool:
    measures = [Measure.of(Gaussian((float(k), 0.0)), w) for k, w in enumerate(WEIGHTS)]
    return mixture_pool(measures, Latents(4), 10_000, batch, torch.Generator().manual_seed(0))


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
