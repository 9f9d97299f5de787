"""Metrics against closed forms and torchmetrics."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor, nn

from fl_wb.app.config import compose
from fl_wb.app.overrides import ConfigError
from fl_wb.commands.cli import check
from fl_wb.data.datasets import DataConfig, load, source_samples, target_samples
from fl_wb.metrics import (
    compare,
    coverage,
    density,
    energy_distance,
    evaluate,
    evenly,
    features,
    frechet_distance,
    kernel_distance,
    memorization,
    sample_sets,
    train_features,
)

KEYS = {"w1", "frechet", "kid", "energy", "density", "coverage", "memorization"}


def normal(n: int, d: int, seed: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return mean + scale * torch.randn(n, d, generator=rng, dtype=torch.float64)


class Shift(nn.Module):
    """Generates z + shift."""

    latent_dim = 3

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, z: Tensor) -> Tensor:
        return z + self.shift


def test_w1_of_translates_is_the_shift():
    x = normal(60, 3, 0)
    y = x + torch.tensor([1.0, 2.0, 2.0])
    assert compare(x, y)["w1"] == pytest.approx(3)


def test_w1_does_not_depend_on_the_number_generated():
    x = normal(60, 3, 0)
    assert compare(x.repeat(2, 1), x + 1)["w1"] == pytest.approx(math.sqrt(3))


def test_energy_distance_of_normals():
    # E|x-y| for N(0,1) and N(m,1) is E|N(m, 2)|, the mean of a folded normal.
    mean, s = 1.5, math.sqrt(2)
    folded = s * math.sqrt(2 / math.pi) * math.exp(-(mean**2) / (2 * s**2)) + mean * math.erf(
        mean / (s * math.sqrt(2))
    )
    expected = 2 * folded - 2 * s * math.sqrt(2 / math.pi)
    assert energy_distance(normal(4000, 1, 0), normal(3000, 1, 1, mean)) == pytest.approx(
        expected, rel=0.05
    )


@pytest.mark.parametrize("distance", [energy_distance, kernel_distance])
def test_unbiased_distances_average_to_zero(distance):
    values = torch.tensor([distance(normal(20, 4, s), normal(30, 4, s + 500)) for s in range(300)])
    assert (values < 0).any()
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))


def test_energy_distance_by_hand():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [3.0]])
    assert energy_distance(x, y) == pytest.approx(2 * (0 + 3 + 1 + 2) / 4 - 1 - 3)


def test_chunks_change_nothing(monkeypatch):
    x, y = normal(50, 4, 0), normal(40, 4, 1)
    whole = compare(x, y, few=y[:7])
    monkeypatch.setattr(sample_sets, "ENTRIES", 130)
    assert compare(x, y, few=y[:7]) == pytest.approx(whole)


def test_frechet_distance_of_normals():
    # Diagonal covariances commute: |m|^2 + sum (s_x - s_y)^2.
    scale = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    x, y = normal(40000, 3, 0), normal(40000, 3, 1, mean=1.0) * scale
    expected = float((scale**2).sum() + ((scale - 1) ** 2).sum())
    assert frechet_distance(x, y) == pytest.approx(expected, rel=0.03)


def test_frechet_distance_of_singular_covariances():
    # A line along the first axis against the same line along the second: tr C_x + tr C_y.
    line = torch.linspace(-1, 1, 9, dtype=torch.float64)
    x, y = torch.zeros(9, 30), torch.zeros(9, 30)
    x[:, 0], y[:, 1] = line, line
    assert frechet_distance(x, y) == pytest.approx(2 * float(line.var()), rel=1e-6)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(x, x + 1) == pytest.approx(30)
    assert frechet_distance(x[:1], x[:1] + 1) == pytest.approx(30)


@pytest.mark.parametrize("n", [12, 100])  # fewer and more samples than features
def test_torchmetrics_agrees(n):
    fid_module = pytest.importorskip("torchmetrics.image.fid")
    kid_module = pytest.importorskip("torchmetrics.image.kid")
    x, y = normal(n, 20, 0), normal(n, 20, 1, mean=0.5, scale=1.5)
    identity = nn.Identity()
    identity.num_features = 20  # type: ignore[assignment]
    fid = fid_module.FrechetInceptionDistance(feature=identity).set_dtype(torch.float64)
    kid = kid_module.KernelInceptionDistance(feature=identity, subsets=1, subset_size=n)
    for metric in (fid, kid):
        metric.update(x, real=True)
        metric.update(y, real=False)
    assert frechet_distance(x, y) == pytest.approx(float(fid.compute()), rel=1e-4)
    assert kernel_distance(x, y) == pytest.approx(float(kid.compute()[0]), rel=1e-4)


def test_coverage_and_density_of_the_same_set_and_of_a_distant_one():
    x = normal(100, 4, 0)
    assert coverage(x, x) == 1
    assert density(x, x) >= 1
    assert coverage(x + 100, x) == density(x + 100, x) == 0


def test_coverage_counts_the_modes_that_are_there():
    modes = torch.cat([normal(90, 2, 0, scale=0.1), normal(10, 2, 1, mean=50, scale=0.1)])
    assert coverage(normal(400, 2, 2, scale=0.1), modes) == pytest.approx(0.9, abs=0.03)


def test_coverage_and_density_of_fresh_samples():
    x, y = normal(1000, 4, 0), normal(1000, 4, 1)
    # Naeem et al., equation 9: the expectation is about 1 - 2^-k for equally many samples.
    assert coverage(x, y) == pytest.approx(1 - 2**-5, abs=0.02)
    assert density(x, y) == pytest.approx(1, abs=0.05)


def test_memorization_of_copies_and_of_fresh_samples():
    few, held, fresh = normal(30, 4, 0), normal(400, 4, 1), normal(400, 4, 2)
    assert memorization(few.repeat(10, 1), few, held) == pytest.approx(0, abs=1e-6)
    assert memorization(fresh, few, held) == pytest.approx(1, abs=0.08)
    half = torch.cat([few.repeat(7, 1)[:200], fresh[:200]])
    assert memorization(half, few, held) == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(("few", "held"), [(1, 300), (300, 40)])
def test_memorization_compares_equally_large_sets(few, held):
    ratios = [
        memorization(normal(200, 4, s), normal(few, 4, s + 50), normal(held, 4, s + 99))
        for s in range(20)
    ]
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.1)


def test_evaluate_returns_all_keys_of_a_perfect_generator():
    samples = normal(500, 3, 7).float()
    found = evaluate(Shift(0.0), samples, few=normal(20, 3, 8).float(), n=400, seed=1)
    assert set(found) == KEYS
    assert all(type(value) is float for value in found.values())
    assert found["coverage"] > 0.9
    assert abs(found["energy"]) < 0.02
    assert found["memorization"] == pytest.approx(1, abs=0.1)
    assert found == evaluate(Shift(0.0), samples, few=normal(20, 3, 8).float(), n=400, seed=1)


def test_evaluate_prefers_the_better_generator():
    samples = normal(300, 3, 7).float()
    good, bad = (evaluate(Shift(shift), samples) for shift in (0.0, 1.0))
    assert math.isnan(good["memorization"])
    for key in ("w1", "frechet", "kid", "energy"):
        assert good[key] < bad[key]
    for key in ("density", "coverage"):
        assert good[key] > bad[key]


def test_features_callable_is_applied():
    x, y = normal(50, 3, 0), normal(50, 3, 1)
    found = compare(x, y, features=lambda samples: 2 * samples)
    plain = compare(x, y)
    assert found["frechet"] == pytest.approx(4 * plain["frechet"])
    assert found["w1"] == plain["w1"]


def test_constant_generator_is_measured():
    found = compare(torch.zeros(40, 3), normal(50, 3, 1))
    assert all(math.isfinite(value) for key, value in found.items() if key != "memorization")


@pytest.mark.parametrize(
    ("generated", "words"),
    [
        (torch.zeros(0, 3), r"\(0, 3\)"),
        (torch.zeros(5, 4), r"\(5, 4\).*\(6, 3\)"),
        (torch.full((5, 3), math.nan), "not finite"),
    ],
)
def test_unusable_samples_are_refused(generated, words):
    with pytest.raises(ValueError, match=words):
        compare(generated, torch.zeros(6, 3))


def test_features_of_digits():
    train, test = load(DataConfig())
    network = train_features(train.images, train.labels)
    assert network.accuracy >= 0.95  # 125 digits: one in a hundred is noise
    assert network(test.images).shape == (len(test), 48)
    assert train_features(train.images, train.labels) is network
    # Real data beat a copy of few real samples, which no pixel distance shows as clearly.
    few = target_samples(DataConfig(), 0).images
    unseen = torch.cat([source_samples(DataConfig(), i).images for i in (0, 1)])
    real = compare(unseen, test.images, few=few, features=network)
    copies = compare(few.repeat(6, 1, 1, 1)[:540], test.images, few=few, features=network)
    assert real["coverage"] > 0.9 > 0.75 > copies["coverage"]
    assert copies["memorization"] == pytest.approx(0, abs=1e-6)
    assert real["memorization"] == pytest.approx(1, abs=0.05)
    assert copies["frechet"] > 1.5 * real["frechet"]


def test_features_are_deterministic_and_leave_random_numbers_alone():
    images, labels = torch.rand(60, 1, 20, 20), torch.arange(60) % 3  # large enough for the CNN
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = train_features(images, labels, seed=1)
    assert torch.equal(torch.rand(1), expected)
    features._cache.clear()
    assert train_features(images, labels, seed=1).digest == first.digest
    assert train_features(images, labels, seed=2).digest != first.digest


def test_features_refuse_labels_that_do_not_fit():
    with pytest.raises(ValueError, match="one label each"):
        train_features(torch.zeros(4, 3), torch.zeros(5))


def test_inception_sees_bytes_of_three_channels():
    seen = []

    class Network(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return images.flatten(1).float()

    body = features._Inception(Network())
    samples = torch.tensor([-1.0, 0.0, 1.0, 3.0]).reshape(4, 1, 1, 1).expand(4, 1, 2, 2)
    assert body(samples).shape == (4, 12)
    assert seen[0].dtype == torch.uint8
    assert seen[0].shape == (4, 3, 2, 2)
    assert seen[0][:, 2, 1, 1].tolist() == [0, 128, 255, 255]
    with pytest.raises(ValueError, match=r"not of samples \(5, 7\)"):
        body(torch.zeros(5, 7))


def test_without_torch_fidelity_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    features.inception_features.cache_clear()
    with pytest.raises(ConfigError, match=r'inception: .* pip install "fl-wb\[inception\]"'):
        check(compose("client.features=inception"))


def test_of_many_samples_some_are_taken_evenly() -> None:
    samples = torch.arange(10.0)[:, None]
    assert (evenly(samples, 5).flatten() // 2).tolist() == [0, 1, 2, 3, 4]
    assert evenly(samples, 10) is samples
    in_turn = torch.arange(10).repeat(2000)
    assert evenly(in_turn, 2000).bincount(minlength=10).min() > 150
