"""The one WGAN-GP loop: its loss, its determinism, and that it learns."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from fl_wb.generators.networks import MLPCritic, make_critic, make_generator
from fl_wb.generators.sampling import generate
from fl_wb.persistence import stage_store
from fl_wb.persistence.stage_store import StageStore
from fl_wb.training.statistics import moving_average
from fl_wb.training.wgan import (
    Training,
    critic_loss,
    distance_to,
    resample,
    train_wgan,
)
from fl_wb.transport import wasserstein1
from tests.points import Gaussian, Killed, critic, kill_at, same

SHORT = Training(iterations=6, batch_size=8, critic_steps=2, warmup=1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Have critics start alike whichever tests ran before."""
    torch.manual_seed(0)


def images(n: int = 40) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def conv() -> nn.Module:
    """Make a generator with BatchNorm, whose statistics are state as well."""
    torch.manual_seed(0)
    return make_generator("conv", (1, 8, 8), latent_dim=4, width=4)


def image_critics(n: int) -> list[nn.Module]:
    torch.manual_seed(1)
    return [make_critic("mlp", (1, 8, 8), width=8) for _ in range(n)]


class LinearCritic(nn.Module):
    """psi(x) = <direction, x>: its gradient is the direction, whatever the sample."""

    def __init__(self, direction: Tensor) -> None:
        super().__init__()
        self.direction = nn.Parameter(direction)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.direction


class Parabola(nn.Module):
    """psi(x) = |x|^2 / 2: its gradient at x is x."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).square().sum(1, keepdim=True) / 2


@pytest.mark.parametrize("norm", [0.0, 1.0, 3.0])
def test_the_penalty_of_a_linear_critic(norm: float):
    direction = norm * torch.ones(64) / 8
    real, fake = images(5), images(10)[5:]

    loss = critic_loss(LinearCritic(direction), real, fake, 10.0, torch.Generator())

    scores = (fake - real).mean(0).flatten() @ direction
    # a norm per pixel would be norm / 8 here and put the fixed point at 8
    assert loss.item() == pytest.approx(scores.item() + 10 * (norm - 1) ** 2, abs=1e-5)


def test_the_penalty_is_of_each_sample_between_real_and_fake():
    real, fake = images(6), torch.zeros(6, 1, 8, 8)

    loss = critic_loss(Parabola(), real, fake, 2.0, torch.Generator().manual_seed(3))

    mix = torch.rand(6, 1, 1, 1, generator=torch.Generator().manual_seed(3))
    norms = (mix * real).flatten(1).norm(dim=1)
    scores = -real.flatten(1).square().sum(1).mean() / 2
    torch.testing.assert_close(loss, scores + 2 * (norms - 1).square().mean())


@pytest.mark.parametrize("n", [1, 2])
def test_the_same_seed_gives_the_same_networks(n: int):
    reals = [resample(images())] * n

    one = train_wgan(conv(), image_critics(n), reals, SHORT, seed=5)
    torch.manual_seed(99)  # the caller's random state plays no part
    two = train_wgan(conv(), image_critics(n), reals, SHORT, seed=5)
    other = train_wgan(conv(), image_critics(n), reals, SHORT, seed=6)

    assert same(one.generator, two.generator)
    assert all(same(a, b) for a, b in zip(one.critics, two.critics, strict=True))
    assert len(one.critics) == n and not same(one.generator, other.generator)


@pytest.mark.parametrize("mode", [True, False])
def test_the_arguments_are_left_alone(mode: bool):
    generator, (judge,) = conv().train(mode), image_critics(1)
    judge.eval().requires_grad_(False)
    before, real = (deepcopy(generator), deepcopy(judge)), images()
    rng = torch.get_rng_state()

    trained = train_wgan(generator, [judge], [resample(real)], SHORT)

    assert torch.get_rng_state().equal(rng) and real.equal(images())
    assert same(generator, before[0]) and same(judge, before[1])
    assert generator.training is mode and not judge.training
    assert not any(p.requires_grad for p in judge.parameters())
    assert not same(trained.generator, generator) and not same(trained.critics[0], judge)
    assert not trained.generator.training
    assert all(p.requires_grad for p in trained.generator.parameters())


def test_what_is_frozen_in_a_critic_stays():
    (judge,) = image_critics(1)
    judge.net[1].requires_grad_(False)
    learned = train_wgan(conv(), [judge], [resample(images())], SHORT).critics[0]

    assert same(learned.net[1], judge.net[1]) and not same(learned.net[-1], judge.net[-1])


@pytest.mark.parametrize("killed_at", [1, 3, 6])
@pytest.mark.parametrize("n", [1, 2])
def test_a_resumed_training_ends_like_an_unbroken_one(monkeypatch, n: int, killed_at: int):
    monkeypatch.setattr(stage_store, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    checkpoint = StageStore().checkpoint("key")
    reals = [resample(images())] * n
    unbroken = train_wgan(conv(), image_critics(n), reals, SHORT)
    iterations = []

    with pytest.raises(Killed):
        train_wgan(
            conv(),
            image_critics(n),
            reals,
            SHORT,
            checkpoint=checkpoint,
            callback=kill_at(killed_at),
        )
    resumed = train_wgan(
        conv(),
        image_critics(n),
        reals,
        SHORT,
        checkpoint=checkpoint,
        callback=lambda done, *_: iterations.append(done),
    )

    assert iterations == list(range(killed_at + 1, SHORT.iterations + 1))
    assert same(resumed.generator, unbroken.generator)
    assert all(same(a, b) for a, b in zip(resumed.critics, unbroken.critics, strict=True))


def test_one_checkpoint_can_be_resumed_twice(monkeypatch):
    monkeypatch.setattr(stage_store, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    memory = StageStore()
    arguments = (conv(), image_critics(1), [resample(images())], SHORT)
    unbroken = train_wgan(*arguments)
    with pytest.raises(Killed):
        train_wgan(*arguments, checkpoint=memory.checkpoint("key"), callback=kill_at(2))
    # the second attempt is killed before it saves anything
    monkeypatch.setattr(stage_store, "SECONDS_BETWEEN_CHECKPOINTS", 1e9)
    with pytest.raises(Killed):
        train_wgan(*arguments, checkpoint=memory.checkpoint("key"), callback=kill_at(3))

    resumed = train_wgan(*arguments, checkpoint=memory.checkpoint("key"))

    assert same(resumed.generator, unbroken.generator)


def test_a_checkpoint_of_other_networks_is_discarded(monkeypatch):
    monkeypatch.setattr(stage_store, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    checkpoint = StageStore().checkpoint("key")
    train_wgan(
        Gaussian((0.0, 0.0)),
        [critic()],
        [resample(torch.randn(9, 2))],
        SHORT,
        checkpoint=checkpoint,
    )
    unbroken = train_wgan(conv(), image_critics(1), [resample(images())], SHORT)

    trained = train_wgan(
        conv(), image_critics(1), [resample(images())], SHORT, checkpoint=checkpoint
    )

    assert same(trained.generator, unbroken.generator)


def test_warmup_trains_the_critic_alone():
    start, judge = Gaussian((0.0, 0.0)), critic()
    training = Training(iterations=0, batch_size=32, warmup=60, critic_lr=1e-2)
    real = Gaussian((3.0, 0.0))

    trained = train_wgan(start, [judge], [resample(generate(real, 500))], training)

    assert same(trained.generator, start)
    # the optimal critic of two translates rises by the distance between them
    (warmed,) = trained.critics
    rise = warmed(generate(real, 500)).mean() - warmed(generate(start, 500)).mean()
    assert rise.item() == pytest.approx(3, abs=0.6)


def test_a_good_generator_is_warmed_up_without_moving_its_statistics():
    generator = conv()
    generator(torch.randn(50, 4))  # statistics that are not the initial ones
    training = Training(iterations=0, batch_size=8, warmup=3)

    kept = train_wgan(generator.eval(), image_critics(1), [resample(images())], training)

    assert same(kept.generator, generator)


def test_a_long_warmup_has_no_more_at_once_than_an_iteration():
    drawn: list[int] = []

    def real(n: int, rng: torch.Generator) -> Tensor:
        drawn.append(n)
        return torch.randn(n, 2, generator=rng)

    training = Training(iterations=1, batch_size=4, critic_steps=5, warmup=12)
    train_wgan(Gaussian((0.0, 0.0)), [critic()], [real], training)
    assert drawn == [20, 20, 8, 20]


@pytest.mark.parametrize("dim", [1, 2])
def test_it_learns_a_gaussian(dim: int):
    rng = torch.Generator().manual_seed(0)
    real = torch.randn(3000, dim, generator=rng) * torch.tensor([0.5, 1.0])[:dim] + 1.5
    torch.manual_seed(0)
    judge = MLPCritic((dim,), width=32)
    training = Training(iterations=300, generator_lr=5e-3, critic_lr=1e-2, penalty=0.1)
    start = Gaussian([0.0] * dim, std=1.0)

    trained = train_wgan(start, [judge], [resample(real)], training).generator

    held_out = torch.randn(500, dim, generator=rng) * torch.tensor([0.5, 1.0])[:dim] + 1.5
    samples = generate(trained, 500)
    assert wasserstein1(generate(start, 500), held_out) > 1
    assert wasserstein1(samples, held_out) < 0.3
    torch.testing.assert_close(samples.mean(0), torch.full((dim,), 1.5), atol=0.15, rtol=0)


def test_two_critics_pull_to_two_measures():
    # two translates: every minimiser of W1(nu, a) + W1(nu, b) lies between them
    left, right = -1 + torch.zeros(9, 2), 1 + torch.zeros(9, 2)
    training = Training(
        iterations=150, batch_size=32, critic_steps=3, generator_lr=1e-2, critic_lr=1e-2
    )
    torch.manual_seed(0)
    trained = train_wgan(
        Gaussian((4.0, 4.0), std=0.1),
        [critic(), critic()],
        [resample(left), resample(right)],
        training,
    ).generator
    assert generate(trained, 500).mean(0).abs().max() < 1.2


def test_frozen_parameters_stay_and_the_others_are_trained():
    generator = conv()
    frozen = [name for name, _ in generator.named_parameters() if name.endswith("bias")]
    for name in frozen:
        generator.get_parameter(name).requires_grad_(False)
    trained = train_wgan(generator, image_critics(1), [resample(images())], SHORT).generator
    for name, before in generator.named_parameters():
        assert before.equal(trained.get_parameter(name)) is (name in frozen), name
    assert frozen


def test_the_regularizer_holds_the_generator():
    start, real = Gaussian((0.0, 0.0)), 3 + torch.zeros(50, 2)
    training = Training(iterations=40, batch_size=16, generator_lr=1e-2)
    torch.manual_seed(0)
    judge = critic()

    free = train_wgan(start, [judge], [resample(real)], training).generator
    regularizer = distance_to(start, 30.0)
    held = train_wgan(start, [judge], [resample(real)], training, regularizer=regularizer).generator

    def moved(generator: nn.Module) -> float:
        return (generate(generator, 200) - generate(start, 200)).norm(dim=1).mean().item()

    assert moved(free) > 0.5 and moved(held) < 0.1


def test_distance_to_a_teacher():
    fakes = torch.randn(6, 1, 2, 2)
    rng = torch.Generator()
    shifted = fakes + 1.5  # |shift| = 3 over four pixels
    once, twice = distance_to(lambda _: shifted, 0.5), distance_to(lambda _: shifted, 0.5, power=2)
    assert once and once(nn.Identity(), fakes, fakes, rng).item() == pytest.approx(1.5)
    assert twice and twice(nn.Identity(), fakes, fakes, rng).item() == pytest.approx(4.5)
    assert distance_to(lambda z: z, 0.0) is None


def test_resample_draws_every_row_with_replacement():
    rows = torch.arange(5.0).unsqueeze(1)
    drawn = resample(rows)(5000, torch.Generator().manual_seed(0)).flatten()
    shares = drawn.long().bincount() / 5000
    torch.testing.assert_close(shares, torch.full((5,), 0.2), atol=0.03, rtol=0)


def test_moving_average():
    module = nn.BatchNorm1d(2)
    average = moving_average(module, decay=0.5)
    with torch.no_grad():
        for t, value in enumerate((2.0, 4.0)):
            module.weight.fill_(value)
            module.running_mean.fill_(value)
            module.num_batches_tracked.fill_(t + 1)
            average.update_parameters(module)
    # decays (t+1)/(t+10) until 0.5 is reached: 1/10, 2/11
    first = 0.1 * 1 + 0.9 * 2
    second = 2 / 11 * first + 9 / 11 * 4
    torch.testing.assert_close(average.module.weight, torch.full((2,), second))
    mean = 2 / 11 * (0.9 * 2) + 9 / 11 * 4
    torch.testing.assert_close(average.module.running_mean, torch.full((2,), mean))
    assert average.module.num_batches_tracked == 2
    with torch.no_grad():
        module.weight.fill_(0.0)
        before = average.module.weight.clone()
        average.n_averaged.fill_(1000)
        average.update_parameters(module)
    torch.testing.assert_close(average.module.weight, before / 2)


class Masked(Gaussian):
    """A generator with a buffer that is infinite by half, and one that it counts its calls in."""

    def __init__(self, each: float = 1.0) -> None:
        super().__init__((0.0, 0.0))
        self.each = each
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        self.calls += self.each
        return super().forward(z) + self.mask.softmax(0)


def test_an_infinite_buffer_stays_as_it_is():
    trained = train_wgan(Masked(), [critic()], [resample(torch.ones(9, 2))], SHORT).generator

    assert trained.mask.tolist() == [0.0, -torch.inf]
    assert 0 < trained.calls < torch.inf  # averaged, as ever


def test_a_buffer_that_becomes_no_number_is_said():
    with pytest.raises(FloatingPointError, match="diverged"):
        train_wgan(Masked(torch.nan), [critic()], [resample(torch.ones(9, 2))], SHORT)


@pytest.mark.parametrize(
    ("real", "training"),
    [
        (torch.full((9, 2), torch.nan), SHORT),
        (torch.ones(9, 2), Training(iterations=3, batch_size=8, generator_lr=1e30)),
    ],
    ids=["data", "rate"],
)
def test_a_training_that_diverges_says_so(real: Tensor, training: Training):
    with pytest.raises(FloatingPointError, match=r"diverged.*generator_lr"):
        train_wgan(Gaussian((0.0, 0.0)), [critic()], [resample(real)], training)


@pytest.mark.parametrize(("critics", "reals"), [(0, 0), (1, 2), (2, 1)])
def test_every_critic_needs_its_measure(critics: int, reals: int):
    with pytest.raises(ValueError, match=f"{critics} critics for {reals} real measures"):
        train_wgan(
            Gaussian((0.0, 0.0)),
            [critic() for _ in range(critics)],
            [resample(torch.ones(3, 2))] * reals,
            SHORT,
        )
