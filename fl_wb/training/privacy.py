"""Training a critic with differential privacy: DP-SGD (Abadi et al., CCS 2016), by Opacus.

A generator learns of the data through its critic alone, so what protects the critic protects both.
In each step every sample x is drawn with probability q = batch_size / n, by itself (Poisson
subsampling, which is what the accountant assumes), and compared with a fake y of its own; the
gradients of psi(y) - psi(x) are clipped to one norm, added up, and get Gaussian noise.

The gradient penalty is taken between two fakes. Between a fake and a real sample, as WGAN-GP has
it, it would be part of that sample's loss: clipped with it, it neither bounds the critic nor
leaves anything of the difference. Between fakes it touches no sample, and needs neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fl_wb.settings import Settings, above
from fl_wb.training.wgan import CriticSteps, Sampler, Training, gradient_penalty


@dataclass
class Privacy(Settings):
    """What a source's training may tell of one sample: (epsilon, delta)-differential privacy.

    Attributes
    ----------
    epsilon
        Of one training; the noise is made as large as that takes. None: no such promise.
    delta
        The probability with which the promise may fail; less than one in the samples there are.
    max_gradient
        Norm to which one sample's gradient is clipped.
    """

    epsilon: Annotated[float, above(0, below=1000)] | None = None
    delta: Annotated[float, above(0, below=1)] = 1e-5
    max_gradient: Annotated[float, above(0)] = 1.0


@dataclass(frozen=True)
class Mechanism:
    """A subsampled Gaussian mechanism, and how often it is used.

    Attributes
    ----------
    rate
        Probability with which a sample is part of a step.
    steps
        Of the critic, in the whole training.
    noise
        Standard deviation of the noise, in units of ``max_gradient``.
    epsilon, delta, max_gradient
        What it keeps, by the accounting of Renyi divergences (Mironov et al., 2019).
    """

    rate: float
    steps: int
    noise: float
    epsilon: float
    delta: float
    max_gradient: float


def mechanism(privacy: Privacy, training: Training, n: int) -> Mechanism:
    """Return the mechanism that keeps a training on n samples as private as is asked.

    Raises
    ------
    ValueError
        If delta is not less than 1 / n: it would let a whole sample be published.
    ImportError
        If Opacus is not installed, naming the extra.
    """
    if privacy.epsilon is None or privacy.delta * n >= 1:
        raise ValueError(
            f"epsilon={privacy.epsilon} and delta={privacy.delta} must be given, delta less than "
            f"{1 / n:.2g}: one in {n} samples"
        )
    try:
        from opacus.accountants import RDPAccountant
        from opacus.accountants.utils import get_noise_multiplier
    except ImportError as error:
        raise ImportError(
            'epsilon needs Opacus, which is not installed: pip install "fl-wb[privacy]"'
        ) from error
    rate = min(1.0, training.batch_size / n)
    steps = max(1, training.warmup + training.iterations * training.critic_steps)
    noise = get_noise_multiplier(
        target_epsilon=privacy.epsilon,
        target_delta=privacy.delta,
        sample_rate=rate,
        steps=steps,
        epsilon_tolerance=privacy.epsilon / 1000,
    )
    accountant = RDPAccountant()
    accountant.history = [(noise, rate, steps)]
    spent = accountant.get_epsilon(delta=privacy.delta)
    return Mechanism(rate, steps, noise, spent, privacy.delta, privacy.max_gradient)


def poisson(samples: Tensor) -> Sampler:
    """Sampler that draws each of `samples` (n, ...) by itself: as many as asked for on average."""

    def draw(expected: int, rng: torch.Generator) -> Tensor:
        chance = torch.rand(len(samples), generator=rng, device=rng.device)
        return samples[chance < expected / len(samples)]

    return draw


def private_critic_steps(mechanism: Mechanism) -> CriticSteps:
    """Return what takes the place of `fl_wb.training.wgan.critic_steps`.

    It is to be called with a `poisson` sampler and batches of `batch_size` fakes, and a random
    generator whose seed is a secret: who knows the noise can take it off again. What it returns
    is the penalty, not the loss, which would tell of the samples.

    Raises
    ------
    ValueError
        When called, if the critic has a layer that mixes samples, such as batch normalisation.
    """
    from opacus.optimizers import DPOptimizer
    from opacus.validators import ModuleValidator

    def steps(
        critic: nn.Module,
        adam: torch.optim.Optimizer,
        real: Sampler,
        fakes: Sequence[Tensor],
        penalty: float,
        rng: torch.Generator,
    ) -> Tensor:
        if wrong := ModuleValidator.validate(critic, strict=False):
            raise ValueError(f"the critic cannot be trained with epsilon: {wrong[0]}")
        private = DPOptimizer(
            adam,
            noise_multiplier=mechanism.noise,
            max_grad_norm=mechanism.max_gradient,
            expected_batch_size=len(fakes[0]),
            generator=rng,
        )
        parameters = [p for p in critic.parameters() if p.requires_grad]
        for y in fakes:
            private.zero_grad()
            of_each = gradients(critic, real(len(y), rng), y, rng)
            for parameter, gradient in zip(parameters, of_each, strict=True):
                parameter.grad_sample = gradient  # type: ignore[attr-defined]
            private.pre_step()  # clips, adds up, adds noise
            mix = torch.rand(len(y), *[1] * (y.dim() - 1), generator=rng, device=rng.device)
            loss = penalty * gradient_penalty(critic, torch.lerp(y, y.flip(0), mix))
            loss.backward(inputs=parameters)  # onto what is there
            adam.step()
        private.zero_grad()
        return loss.detach()

    return steps


def gradients(critic: nn.Module, real: Tensor, fakes: Tensor, rng: torch.Generator) -> list[Tensor]:
    """Return the gradient (k, ...) of psi(y) - psi(x) by each parameter, for each of k samples x.

    Each has a y drawn from the fakes by itself, so that none bears on another's.
    """
    parameters = {n: p for n, p in critic.named_parameters() if p.requires_grad}
    if len(real) == 0:
        return [value.new_zeros(0, *value.shape) for value in parameters.values()]
    partners = torch.randint(len(fakes), (len(real),), generator=rng, device=rng.device)

    def difference(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        scores = functional_call(critic, values, (torch.stack([y, x]),)).reshape(-1)
        found: Tensor = scores[0] - scores[1]
        return found

    values = {name: value.detach() for name, value in parameters.items()}
    each = vmap(grad(difference), in_dims=(None, 0, 0), randomness="different")
    of_each = each(values, real, fakes[partners])
    return [of_each[name] for name in parameters]
