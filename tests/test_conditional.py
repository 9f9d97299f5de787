"""Conditional generators and other latents: merge, adaptation, ternarization, file, figures."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fl_wb.adaptation import Adaptation, adapt, own_start
from fl_wb.barycenter import Stage, recursive_barycenter
from fl_wb.generators.code import Code
from fl_wb.generators.copies import seeded
from fl_wb.generators.latents import Driven, Latents
from fl_wb.generators.networks import DCGANCritic, MLPCritic, make_generator
from fl_wb.generators.reweighted import Reweighted
from fl_wb.generators.sampling import driven, generate, generate_rows
from fl_wb.metrics import augmentation, compare, evaluate, train_features
from fl_wb.ternary import PackedFileError, load, pack, save, ternarize, unpack
from fl_wb.ternary.numpy_reader import PackedGenerator
from fl_wb.training.conditional import (
    Labelled,
    LabelledGenerator,
    label_counts,
    labelled_critic,
)
from fl_wb.training.distillation import Distillation
from fl_wb.training.wgan import Training, critic_loss, resample, train_wgan
from tests.points import same

STAGE = Stage(distillation=Distillation(iterations=400, batch_size=64, lr=1e-2))
LONGER = Stage(distillation=Distillation(iterations=600, batch_size=128, lr=1e-2))
LONGEST = Stage(distillation=Distillation(iterations=1000, batch_size=128, lr=1e-2))
PLACES = torch.tensor([[0.0, 4.0], [4.0, 0.0], [0.0, -4.0]])  # of labels 0, 1, 2


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Points(nn.Module):
    """Label l at PLACES[l] + shift, normally around it; what a few layers can learn to move."""

    latent_dim = 3

    def __init__(self, shift: float = 0.0, spread: float = 0.3) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
            )
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)
        self.places = nn.Parameter(PLACES + torch.tensor([shift, 0.0]))
        self.spread = nn.Parameter(torch.tensor(spread))

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        known = torch.cat([z, nn.functional.one_hot(label, 3).to(z)], 1)
        samples: Tensor = self.places[label] + self.spread * z[:, :2] + self.net(known)
        return samples


def labelled_blobs(n: int, seed: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(n) % 3
    return PLACES[labels] / 8 + 0.1 * torch.randn(n, 2, generator=rng(seed)), labels


class Blobs(Points):
    """What `labelled_blobs` has; or, with a turn, each under the next label's name."""

    def __init__(self, turn: int = 0) -> None:
        super().__init__(spread=0.1)
        self.places = nn.Parameter(PLACES.roll(-turn, 0) / 8)


def of_label(generator: nn.Module, label: int, n: int = 2000) -> Tensor:
    often = [float(each == label) for each in range(3)]
    return generate(generator, n, labels=often, seed=3)


def test_each_label_is_merged_by_who_has_it() -> None:
    left, right = Points(-3.0), Points(3.0)
    nu = recursive_barycenter(
        [left, right], [1, 1], labels=3, label_counts=[[10, 5, 0], [0, 15, 10]], stage=STAGE
    )

    assert type(nu) is Points
    x = [of_label(nu, label)[:, 0] - PLACES[label, 0] for label in range(3)]
    assert (x[0] < 0).float().mean() > 0.97  # the left one's alone
    assert (x[2] > 0).float().mean() > 0.97
    share = (x[1] < 0).float().mean().item()  # 1/3 of the left one's data and 3/5 of the other's
    assert share == pytest.approx((1 / 3) / (1 / 3 + 3 / 5), abs=0.04)
    for label, side in ((0, -3.0), (2, 3.0)):
        middle = of_label(nu, label).mean(0)
        torch.testing.assert_close(
            middle, PLACES[label] + torch.tensor([side, 0.0]), atol=0.15, rtol=0
        )


def test_without_counts_all_labels_are_everybodys() -> None:
    nu = recursive_barycenter([Points(-3.0), Points(3.0)], [3, 1], labels=3, stage=STAGE)

    for label in range(3):
        left = (of_label(nu, label)[:, 0] < PLACES[label, 0]).float().mean().item()
        assert left == pytest.approx(0.75, abs=0.04)


def test_a_tree_of_stages_keeps_the_counts() -> None:
    counts = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    sources = [Points(shift) for shift in (-3.0, 0.0, 3.0)]
    nu = recursive_barycenter(sources, labels=3, label_counts=counts, fan_in=2, stage=STAGE)

    for label, shift in enumerate((-3.0, 0.0, 3.0)):
        middle = of_label(nu, label).mean(0)[0].item()
        assert middle == pytest.approx(PLACES[label, 0].item() + shift, abs=0.3)


class Dreamer(Points):
    """Draws the label itself, as the natural wrapper of a conditional generator does."""

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        return super().forward(z, torch.randint(3, (len(z),)))


@pytest.mark.parametrize(
    "use",
    [
        lambda g: recursive_barycenter([g, g]),
        lambda g: adapt(g, torch.zeros(3, 2)),
        lambda g: ternarize(g),
    ],
)
def test_a_generator_that_draws_its_labels_is_refused(use: Any) -> None:
    with pytest.raises(ValueError, match=r"other samples of the same latents .*labels="):
        use(Dreamer())


@pytest.mark.parametrize("how", [{"geodesic": "displacement"}, {"start": "previous"}])
def test_a_way_that_would_lose_the_labels_is_refused(how: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="merge with geodesic='mixture' and start='distilled'"):
        recursive_barycenter([Points(), Points()], labels=3, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("counts", [[[1, 1, 1]], [[1, 1], [1, 1]], [[1, 1, 1], [0, 0, 0]]])
def test_counts_that_are_none_are_refused(counts: Any) -> None:
    with pytest.raises(ValueError, match="counts"):
        recursive_barycenter([Points(), Points()], labels=3, label_counts=counts)


class Line(nn.Module):
    """Around `centre`, over its latent's whole law: U(0, 1) alone makes it what it is."""

    latent_dim = 4

    def __init__(self, centre: float) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
            )
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)
        self.centre = nn.Parameter(torch.tensor([centre, 0.0]))

    def forward(self, z: Tensor) -> Tensor:
        samples: Tensor = self.centre + z[:, :2] + self.net(z)
        return samples


def triangular(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(2, n, 4, generator=generator).sum(0)


@pytest.mark.parametrize("law", ["uniform", "uniform(-1,1)", triangular])
@pytest.mark.parametrize("share", [0.5, 0.2])
def test_every_source_keeps_its_share_whatever_the_law(law: Any, share: float) -> None:
    # of a triangular law 600 iterations leave 0.03 of a half to be learned
    stage = LONGEST if law is triangular else LONGER
    nu = recursive_barycenter([Line(-5.0), Line(5.0)], [share, 1 - share], latents=law, stage=stage)

    assert type(nu) is Line
    left = (generate(nu, 4000, latents=law)[:, 0] < 0).float().mean().item()
    assert left == pytest.approx(share, abs=0.03)


def test_a_target_gets_its_own_weights_of_uniform_latents() -> None:
    start = recursive_barycenter([Line(-5.0), Line(5.0)], latents="uniform", stage=STAGE)
    few = generate(Line(5.0), 60, latents="uniform", seed=2)
    one = driven(start, latents="uniform")
    own = own_start(one, Code([1, 1]), few)

    assert isinstance(own, Reweighted)
    right = (generate(own, 2000)[:, 0] > 0).float().mean().item()
    assert right > 0.9


ADAPTATION = Adaptation(
    training=Training(iterations=150, batch_size=64, critic_steps=2, generator_lr=1e-2, warmup=50)
)


def test_adaptation_follows_the_targets_labels() -> None:
    few, labels = labelled_blobs(60, 1)
    # the start has the same samples under other names: only a joint view of both can see it
    start = Blobs(turn=1)
    adapted = adapt(start, few, labels=3, few_labels=labels, settings=ADAPTATION, seed=1)

    assert type(adapted) is Blobs
    for label in range(3):
        for generator, wanted in ((start, (label + 1) % 3), (adapted, label)):
            nearest = torch.cdist(of_label(generator, label), PLACES / 8).argmin(1)
            assert (nearest == wanted).float().mean() > 0.9


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (None, "few_labels are needed where there are labels=3"),
        (torch.tensor([0, 3]), "one integer label each, from 0 to 2"),
        (torch.tensor([0, -1]), "one integer label each"),
        (torch.tensor([0.0, 1.0]), "one integer label each"),
        (torch.tensor([0]), "2 samples need one integer label each"),
    ],
)
def test_labels_that_are_none_are_refused(labels: Tensor | None, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        adapt(Points(), torch.zeros(2, 2), labels=3, few_labels=labels, settings=ADAPTATION)


def test_a_labelled_sample_is_a_vector() -> None:
    form = Labelled((1, 2), 3, scale=5.0)
    x = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    joined = form.join(x, torch.tensor([2, 0]))

    assert joined.tolist() == [[1, 2, 0, 0, 5], [3, 4, 5, 0, 0]]
    samples, marks = form.split(joined)
    assert torch.equal(samples, x)
    assert marks.argmax(1).tolist() == [2, 0]


@pytest.mark.parametrize(("kind", "width"), [(MLPCritic, 8), (DCGANCritic, 4)])
def test_a_critic_sees_labels_and_can_be_trained(kind: Any, width: int) -> None:
    form = Labelled((1, 8, 8), 3, scale=2.0)
    judge = seeded(lambda: labelled_critic(kind((1, 8, 8), width=width), form), 0)
    x = torch.randn(4, 1, 8, 8, generator=rng())
    one, other = (form.join(x, torch.full((4,), label)) for label in (0, 2))

    assert (judge(one) - judge(other)).abs().min() > 1e-4
    critic_loss(judge, one, other, 10.0, rng(1)).backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for p in judge.parameters() if p.dim() > 1
    )


def test_a_conditional_wgan_learns_which_label_is_where() -> None:
    data, labels = labelled_blobs(300, 1)
    start, form = Blobs(), Labelled.of(data, 3)
    nn.init.zeros_(start.places)
    one = driven(start, labels=3)
    assert isinstance(one, Driven)
    trained = train_wgan(
        LabelledGenerator(one, form),
        [labelled_critic(MLPCritic((2,), width=64), form)],
        [resample(form.join(data, labels))],
        Training(iterations=200, batch_size=64, critic_steps=3, generator_lr=1e-2),
    ).generator

    for label in range(3):
        made = of_label(trained.generator.generator, label)
        assert (torch.cdist(made, PLACES / 8).argmin(1) == label).float().mean() > 0.9


def network(labels: int | None = 3, name: str = "mlp") -> nn.Module:
    shape = (1, 4, 4) if name == "mlp" else (1, 8, 8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return make_generator(name, shape, latent_dim=4, width=16, labels=labels).eval()


@pytest.mark.parametrize("name", ["mlp", "conv", "dcgan"])
@pytest.mark.parametrize("law", ["normal", "uniform(-1,1)"])
def test_a_packed_conditional_generator_is_the_same_with_numpy(
    name: str, law: str, tmp_path: Path
) -> None:
    shape = (1, 4, 4) if name == "mlp" else (1, 8, 8)
    small = ternarize(network(name=name), labels=3, latents=law, iterations=3)
    file = save(small, tmp_path / "a.flwb", latents=law)

    assert same(load(file, network(name=name)), small)
    reader = PackedGenerator(file, shape)
    assert (reader.labels, reader.latents, reader.latent_dim) == (3, law, 4)
    rows, made = generate_rows(driven(small, labels=3, latents=law), 9)
    again = reader(rows[:, :4].numpy(), rows[:, 4].long().numpy())
    np.testing.assert_allclose(again, made.numpy(), atol=2e-5)
    drawn = reader.samples(6, seed=2)
    assert np.array_equal(drawn, reader.samples(6, seed=2, labels=[0, 1, 2, 0, 1, 2]))
    assert not np.array_equal(drawn, reader.samples(6, seed=2, labels=[1] * 6))


def test_a_packed_file_says_more_only_where_there_is_more() -> None:
    plain = ternarize(network(None), iterations=2)

    assert pack(plain)[8] == 2
    assert b"latents" not in pack(plain)
    assert pack(plain, latents="uniform")[8] == 3
    assert b'"latents": "uniform"' in pack(plain, latents="uniform")
    assert b'"latents": "own"' in pack(plain, latents=triangular)
    assert same(unpack(pack(plain, latents=triangular), network(None)), plain)
    assert b'"labels": 7' in pack(plain, labels=7)
    one = driven(plain, latents="uniform")
    assert pack(one) == pack(plain, latents="uniform")


def test_latents_of_an_own_law_must_be_given_to_the_reader(tmp_path: Path) -> None:
    plain = ternarize(network(None), latents=triangular, iterations=2)
    reader = PackedGenerator(save(plain, tmp_path / "a", latents=triangular), (1, 4, 4))

    with pytest.raises(ValueError, match="a law of their own"):
        reader.samples(3)
    z = triangular(5, rng())
    np.testing.assert_allclose(reader(z.numpy()), plain(z).detach().numpy(), atol=2e-5)


@pytest.mark.parametrize("law", ["uniform", "uniform(-1,1)"])
def test_reweighted_cells_of_uniform_latents_are_the_same_with_numpy(
    law: str, tmp_path: Path
) -> None:
    own = Reweighted(driven(network(None), latents=law), [0.5, 0.3, 0.2], [0.1, 0.1, 0.8])
    small = ternarize(own, iterations=2)
    file = save(small, tmp_path / "a")

    assert isinstance(small, Reweighted)
    assert same(load(file, network(None)), small)
    z = Latents(4, law).draw(200, rng())
    made = PackedGenerator(file, (1, 4, 4))(z.numpy())
    np.testing.assert_allclose(made, small(z).detach().numpy(), atol=1e-4)


def test_a_reader_of_labels_that_are_none_refuses(tmp_path: Path) -> None:
    data = pack(ternarize(network(), labels=3, iterations=2), labels=3)
    body = data[:-32].replace(b'"labels": 3', b'"labels": -')
    with pytest.raises(PackedFileError, match="header cannot be read"):
        unpack(body + hashlib.sha256(body).digest(), network())


def test_right_labels_are_those_that_the_classifier_sees() -> None:
    x, y = labelled_blobs(600, 0)
    features = train_features(x, y)

    assert (features.classify(x) == y).float().mean() > 0.95
    good = evaluate(Blobs(), x, features=features, labels=3)
    assert good["right-labels"] > 0.95
    assert evaluate(Blobs(turn=1), x, features=features, labels=3)["right-labels"] < 0.05
    assert "right-labels" not in evaluate(Blobs(), x, labels=3)
    assert "right-labels" not in compare(x, x, features=features)
    assert compare(x, x, features=features, labels=y.roll(1))["right-labels"] < 0.05


def test_augmentation_helps_as_much_as_what_is_generated_is_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = import_module("fl_wb.metrics.augmentation")  # its function has the same name
    monkeypatch.setattr(module, "STEPS", 300)  # of 1500: these are easily told apart
    few, held_out = labelled_blobs(6, 1), labelled_blobs(300, 2)
    good = augmentation(Blobs(), few, held_out)
    bad = augmentation(Blobs(turn=1), few, held_out)

    assert set(good) == {"few", "augmented", "real"}
    assert good["augmented"] > 0.95
    assert good["real"] > 0.95
    assert bad["augmented"] < 0.5
    assert (bad["few"], bad["real"]) == (good["few"], good["real"])


@pytest.mark.parametrize("labels", [torch.arange(100) % 2, torch.arange(100) // 50])
def test_real_samples_and_those_that_judge_are_of_the_same_classes(
    monkeypatch: pytest.MonkeyPatch, labels: Tensor
) -> None:
    def seen(learned: tuple[Tensor, ...], judges: tuple[Tensor, ...], *_: int) -> float:
        labels = [each[1].long() for each in (learned, judges)]
        sets.append([each.bincount(minlength=2) / len(each) for each in labels])
        return 0.0

    sets: list[list[Tensor]] = []
    monkeypatch.setattr(import_module("fl_wb.metrics.augmentation"), "_accuracy", seen)
    augmentation(Blobs(), labelled_blobs(6, 1), (torch.rand(100, 2), labels))
    for shares in sets[-1]:
        torch.testing.assert_close(shares, torch.full((2,), 0.5), atol=0.2, rtol=0)


@pytest.mark.parametrize(
    "few", [(torch.zeros(0, 2), torch.zeros(0).long()), (torch.zeros(3, 2), torch.tensor([0, 1]))]
)
def test_augmentation_names_samples_without_labels(few: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="few must be samples"):
        augmentation(Blobs(), few, labelled_blobs(30, 0))


def test_augmentation_wants_two_that_judge_and_takes_classes_that_only_the_real_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(import_module("fl_wb.metrics.augmentation"), "STEPS", 10)
    few, held_out = labelled_blobs(6, 1), labelled_blobs(30, 2)
    with pytest.raises(ValueError, match="held_out must be 2 samples or more"):
        augmentation(Blobs(), few, (held_out[0][:1], held_out[1][:1]))
    samples, labels = labelled_blobs(30, 3)
    found = augmentation(Blobs(), few, held_out, real=(samples, labels + 1))
    assert all(0 <= accuracy <= 1 for accuracy in found.values())


def test_the_stage_of_a_conditional_merge_is_found_again(tmp_path: Path) -> None:
    tiny = replace(STAGE, distillation=Distillation(iterations=3, batch_size=8))
    sources = [Points(-3.0), Points(3.0)]

    def merged(counts: list[list[int]]) -> nn.Module:
        return recursive_barycenter(
            sources, labels=3, label_counts=counts, stage=tiny, store=tmp_path
        )

    first = merged([[1, 1, 0], [0, 1, 1]])
    assert same(first, merged([[1, 1, 0], [0, 1, 1]]))
    assert len(list((tmp_path / "stages").iterdir())) == 1
    assert not same(first, merged([[1, 0, 0], [0, 1, 1]]))


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int16])
def test_labels_of_few_bits_are_counted(kind: torch.dtype) -> None:
    counts = label_counts(torch.tensor([0, 3, 100], dtype=kind), 300)
    assert (sum(counts), counts[3], counts[100]) == (3, 1, 1)
    with pytest.raises(ValueError, match="from 0 to 3, not"):
        label_counts(torch.tensor([0, 100], dtype=kind), 4)
