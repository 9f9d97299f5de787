"""Normalisation of a ternary generator: its statistics are folded, and matched to the teacher's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fl_wb.generators.copies import copy_of
from fl_wb.ternary import ternarize
from fl_wb.ternary.planes import take_statistics
from fl_wb.ternary.ternarization import _fold_statistics


def test_statistics_are_folded_into_scale_and_shift():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(5).eval()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 2)
    x = torch.randn(7, 5)
    before = norm(x)

    _fold_statistics(norm)

    torch.testing.assert_close(norm(x), before)
    assert norm.running_mean.eq(0).all() and len(norm.running_var.unique()) == 1


class Bent(nn.BatchNorm1d):
    """It scales by 1 + weight."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, 1 + self.weight, self.bias, eps=self.eps
        )


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, Bent])
def test_statistics_that_cannot_be_folded_stay(norm: type[nn.BatchNorm1d]):
    torch.manual_seed(0)
    one, other = norm(5), norm(5)
    other.weight = one.weight  # of both, which have other statistics
    network = nn.Sequential(nn.Linear(4, 5), one, nn.ReLU(), nn.Linear(5, 5), other)
    network = network if norm is nn.BatchNorm1d else network[:3]
    for value in (value for value in network.buffers() if value.is_floating_point()):
        value.uniform_(0.5, 2)

    ternary = ternarize(network, iterations=0, latent_dim=4)

    for made, given in ((ternary[i], network[i]) for i in range(1, len(network), 3)):
        assert torch.equal(made.weight, given.weight) and torch.equal(made.bias, given.bias)
        assert made.running_mean.ne(0).all()


def test_a_normalisation_that_is_called_by_keyword_is_matched():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)

        def forward(self, z: Tensor) -> Tensor:
            return self.norm(input=self.first(z))

    torch.manual_seed(0)
    teacher, z = Named().eval(), torch.randn(500, 4)
    student = copy_of(teacher)
    with torch.no_grad():
        student.first.weight.mul_(3)
        take_statistics(student, teacher, z, seed=0)
        torch.testing.assert_close(student(z), teacher(z), atol=1e-3, rtol=0)
