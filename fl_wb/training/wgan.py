"""WGAN-GP: the one training loop, one generator against one or more critics.

Every WGAN of the project runs here: a source's pre-training (one critic, its own data), a stage
of the barycenter (one or two critics, samples of generators) and a target's adaptation (one critic,
few samples, a regulariser). Gulrajani et al., "Improved Training of Wasserstein GANs", 2017:

    min_G mean_j max_{psi_j} E_{x ~ mu_j} psi_j(x) - E_z psi_j(G(z)) - rho E (||grad psi_j|| - 1)^2
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from fl_wb.generators.copies import copy_of, trainable_copy
from fl_wb.generators.sampling import device_of, input_gradient, latents_of
from fl_wb.settings import Settings, above, at_least
from fl_wb.training.checkpoints import Checkpoint, TrainingState
from fl_wb.training.random_numbers import own_random_numbers
from fl_wb.training.statistics import moving_average

Sampler = Callable[[int, torch.Generator], Tensor]
"""Draws n real samples with the given random generator."""

CriticSteps = Callable[..., Tensor]
"""Trains a critic for some steps: with the arguments and the result of `critic_steps`."""

Regularizer = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]
"""Adds a term to the generator's loss: from the generator, its latents and its fakes."""

Progress = Callable[[int, int, dict[str, float]], None]
"""Told (iterations done, iterations in all, losses by name) after every iteration."""


@dataclass
class Training(Settings):
    """How a WGAN is trained.

    Attributes
    ----------
    iterations
        Generator steps.
    batch_size
        Samples in a batch, real and fake alike.
    critic_steps
        Critic steps before each generator step.
    warmup
        Critic steps before the first generator step: a fresh critic would first pull a good
        generator away from where it is.
    generator_lr, critic_lr
        Adam's learning rates, betas (0.5, 0.9). A critic five times faster than the generator
        measured better than equal rates at equal seconds.
    penalty
        Weight rho of the gradient penalty.
    ema
        Decay of the moving average of the generator's weights, which is what training returns.
    """

    iterations: Annotated[int, at_least(0)] = 1000
    batch_size: Annotated[int, at_least(2)] = 64
    critic_steps: Annotated[int, at_least(1)] = 5
    warmup: Annotated[int, at_least(0)] = 0
    generator_lr: Annotated[float, above(0)] = 2e-4
    critic_lr: Annotated[float, above(0)] = 1e-3
    penalty: Annotated[float, at_least(0)] = 10.0
    ema: Annotated[float, at_least(0, below=1)] = 0.99

    @property
    def reals(self) -> int:
        """Real samples that each critic sees."""
        return (self.warmup + self.iterations * self.critic_steps) * self.batch_size


@dataclass(frozen=True)
class Trained:
    """What training returns: the generator's moving average, and the critics."""

    generator: nn.Module
    critics: list[nn.Module]


def resample(samples: Tensor) -> Sampler:
    """Sampler that draws rows of `samples` (n, ...) with replacement."""

    def draw(n: int, rng: torch.Generator) -> Tensor:
        index = torch.randint(len(samples), (n,), generator=rng, device=rng.device)
        return samples[index]

    return draw


def part_of(callback: Progress | None, before: int, total: int) -> Progress | None:
    """Progress of one of several trainings that are counted as one."""
    if callback is None:
        return None
    return lambda done, _, losses: callback(before + done, total, losses)


def distance_to(
    teacher: Callable[[Tensor], Tensor], weight: float, power: int = 1
) -> Regularizer | None:
    """Regularizer weight * E||G(z) - teacher(z)||^power on shared latents z.

    Sharing z is a coupling, so at power 1 the mean distance bounds W1(G, teacher) from above.
    """
    if not weight:
        return None

    def term(_: nn.Module, z: Tensor, fakes: Tensor, rng: torch.Generator) -> Tensor:
        with torch.no_grad():
            target = teacher(z)
        distance: Tensor = (fakes - target).flatten(1).norm(dim=1).pow(power).mean()
        return weight * distance

    return term


def train_wgan(
    generator: nn.Module,
    critics: Sequence[nn.Module],
    reals: Sequence[Sampler],
    settings: Training,
    *,
    latent_dim: int | None = None,
    seed: int = 0,
    regularizer: Regularizer | None = None,
    critic_steps: CriticSteps | None = None,
    callback: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> Trained:
    """Train a generator against critics; the arguments are left alone.

    Parameters
    ----------
    generator : nn.Module
        Where training starts; its device is where training runs. In training mode it is a new
        network; in eval mode, one that is already good: its normalisation keeps the statistics
        that it has, so that it starts from what it generates when it is sampled. Parameters
        that require no gradient stay as they are.
    critics, reals
        Critic j tells samples of ``reals[j]`` from the generator's.
    settings : Training
    latent_dim : int, optional
        For a generator without the attribute.
    seed : int
        All randomness comes from it: the same arguments give the same result (bit for bit on
        the CPU with one thread), also when a checkpoint interrupts the run.
    regularizer, critic_steps, callback, checkpoint : optional
        A further term of the generator's loss; how critics learn, if not by the function of that
        name; a listener; where to save and resume.

    Raises
    ------
    FloatingPointError
        If the generator's weights are not finite in the end, or its buffers no numbers.
    """
    loop = _Loop(generator, critics, reals, settings, latent_dim, seed, regularizer, critic_steps)
    if not (checkpoint and loop.state.resume(checkpoint)):
        for begun in range(0, settings.warmup, settings.critic_steps):
            with own_random_numbers(seed + begun):
                loop.critic_phase(min(settings.critic_steps, settings.warmup - begun))
    while loop.state.iteration < settings.iterations:
        with own_random_numbers(seed + 1 + loop.state.iteration):
            losses = loop.step()
        if checkpoint:
            loop.state.save_if_due(checkpoint)
        if callback:
            told = {name: loss.item() for name, loss in losses.items()}
            callback(loop.state.iteration, settings.iterations, told)
    for mine, given in zip(loop.ema.module.parameters(), generator.parameters(), strict=True):
        mine.requires_grad_(given.requires_grad)
    trained = Trained(loop.ema.module.eval(), loop.critics)
    buffers = zip(trained.generator.buffers(), generator.buffers(), strict=True)
    ruined = any(mine.isnan().any() and not given.isnan().any() for mine, given in buffers)
    if ruined or not all(torch.isfinite(p).all() for p in trained.generator.parameters()):
        raise FloatingPointError(
            "WGAN training diverged: the generator's weights are not finite; lower "
            f"generator_lr ({settings.generator_lr}) or critic_lr ({settings.critic_lr})"
        )
    return trained


class _Loop:
    """The state of one training, and its two kinds of step."""

    def __init__(
        self,
        generator: nn.Module,
        critics: Sequence[nn.Module],
        reals: Sequence[Sampler],
        settings: Training,
        latent_dim: int | None,
        seed: int,
        regularizer: Regularizer | None,
        steps: CriticSteps | None,
    ) -> None:
        if not critics or len(critics) != len(reals):
            raise ValueError(f"{len(critics)} critics for {len(reals)} real measures")
        self.law = latents_of(generator, latent_dim)
        device = device_of(generator)
        self.generator = copy_of(generator)
        self.trained = [p for p in self.generator.parameters() if p.requires_grad]
        self.critics = [trainable_copy(c).to(device).train() for c in critics]
        self.reals, self.settings, self.regularizer = reals, settings, regularizer
        self.critic_steps = steps or critic_steps
        self.rng = torch.Generator(device).manual_seed(seed)
        self.ema = moving_average(self.generator, settings.ema)
        self.generator_adam = _adam(self.trained, settings.generator_lr)
        self.critic_adams = [_adam(list(c.parameters()), settings.critic_lr) for c in self.critics]
        named = {f"critic{j}": critic for j, critic in enumerate(self.critics)}
        self.state = TrainingState(
            {"generator": self.generator, "average": self.ema.module, **named},
            {"generator": self.generator_adam, **dict(zip(named, self.critic_adams, strict=True))},
            self.rng,
        )

    def latents(self, n: int) -> Tensor:
        return self.law.draw(n, self.rng)

    def step(self) -> dict[str, Tensor]:
        """One iteration: the critics' steps, then the generator's; returns its losses."""
        critic_losses = self.critic_phase(self.settings.critic_steps)
        z = self.latents(self.settings.batch_size)
        fakes = self.generator(z)
        loss = -torch.stack([critic(fakes).mean() for critic in self.critics]).mean()
        if self.regularizer:
            loss = loss + self.regularizer(self.generator, z, fakes, self.rng)
        self.generator_adam.zero_grad()
        # Only the generator's gradients: the critics' would be computed and thrown away.
        loss.backward(inputs=self.trained)
        self.generator_adam.step()
        self.state.iteration += 1
        self.ema.n_averaged.fill_(self.state.iteration)  # which a resumed training has not counted
        self.ema.update_parameters(self.generator)
        return {"generator": loss.detach(), "critic": critic_losses}

    def critic_phase(self, steps: int) -> Tensor:
        """Critic steps on fakes made at once, without a graph; returns the last mean loss."""
        if not steps:
            return torch.zeros(())
        size, batch = steps * self.settings.batch_size, self.settings.batch_size
        with torch.no_grad():
            fakes = self.generator(self.latents(size)).split(batch)
        total = torch.zeros((), device=self.rng.device)
        for critic, adam, real in zip(self.critics, self.critic_adams, self.reals, strict=True):
            last = self.critic_steps(critic, adam, real, fakes, self.settings.penalty, self.rng)
            total += last / len(self.critics)
        return total


def critic_steps(
    critic: nn.Module,
    adam: torch.optim.Optimizer,
    real: Sampler,
    fakes: Sequence[Tensor],
    penalty: float,
    rng: torch.Generator,
) -> Tensor:
    """One step of a critic for each batch of fakes; returns the last loss."""
    sizes = [len(batch) for batch in fakes]
    for x, y in zip(real(sum(sizes), rng).split(sizes), fakes, strict=True):
        loss = critic_loss(critic, x, y, penalty, rng)
        adam.zero_grad()
        loss.backward()
        adam.step()
    return loss.detach()


def critic_loss(
    critic: nn.Module, real: Tensor, fake: Tensor, penalty: float, rng: torch.Generator
) -> Tensor:
    """WGAN-GP loss of one critic: E psi(fake) - E psi(real) + penalty * E (||grad|| - 1)^2.

    The gradient's norm is one number a SAMPLE. (Taken per pixel, as some scripts do, the
    penalty pulls the norm to sqrt(pixels) instead of 1.)
    """
    n = len(real)
    scores = critic(torch.cat([fake, real])).reshape(-1)
    mix = torch.rand(n, *[1] * (real.dim() - 1), generator=rng, device=rng.device)
    between = gradient_penalty(critic, torch.lerp(fake, real, mix))
    loss: Tensor = scores[:n].mean() - scores[n:].mean() + penalty * between
    return loss


def gradient_penalty(critic: nn.Module, points: Tensor) -> Tensor:
    """Return E (||grad psi|| - 1)^2 at points (n, ...)."""
    norm = input_gradient(critic, points).flatten(1).norm(dim=1)
    penalty: Tensor = (norm - 1).square().mean()
    return penalty


def _adam(parameters: list[nn.Parameter], lr: float) -> torch.optim.Adam:
    # fused: one kernel a step instead of some ten a tensor
    return torch.optim.Adam(parameters, lr=lr, betas=(0.5, 0.9), fused=True)
