"""What the server checks before anything is trained: that networks and arrays fit together."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

from fl_wb.barycenter import Stage
from fl_wb.generators.networks import MLPCritic
from fl_wb.generators.sampling import generate, latent_dim_of
from fl_wb.messages import generator_part, records
from fl_wb.training.wgan import critic_loss


def check_settings(
    stage: Stage | None,
    geodesic: str | None,
    iterations: int | None,
    seed: int,
    patience: int | None,
    screening: float | None,
) -> None:
    """Raise ValueError if a setting of the strategy is none, naming what is allowed."""
    if geodesic is not None:
        replace(stage or Stage(), geodesic=geodesic)
    for name, value, least in (
        ("iterations", iterations, 0),
        ("seed", seed, 0),
        ("patience", patience, 1),
    ):
        if value is not None and not (isinstance(value, int) and value >= least):
            raise ValueError(f"{name}={value!r} must be an integer of {least} or more")
    if screening is not None and not screening > 1:
        raise ValueError(f"screening={screening!r} must be more than 1: typical uploads have 1")


def check_device(device: str) -> None:
    """Raise ValueError if nothing can be trained on a device."""
    try:
        torch.empty(1, device=device)
    except Exception as error:  # torch raises many kinds
        raise ValueError(f"device={device!r} cannot be used: {error}") from error


def check_networks(
    arrays: ArrayRecord,
    generator: Callable[[], nn.Module],
    critic: Callable[[], nn.Module] | None,
    latent_dim: int | None,
) -> nn.Module:
    """Return a generator that is seen to fit the arrays, the latents and the critic.

    Raises
    ------
    ValueError
        Saying what does not fit.
    """
    network = _made("generator", generator)
    own = network.state_dict()
    try:
        state = records.validate(generator_part.own(arrays, own)[0], own)
    except records.InvalidUpload as error:
        hint = ""
        if len(arrays) != len(own):
            hint = (
                f" ({len(arrays)} arrays, of which the generator has {len(own)}: generator_keys "
                "says which are the generator's part of a larger model)"
            )
        raise ValueError(f"initial_arrays do not fit the generator: {error}{hint}") from error
    dim = latent_dim_of(network, latent_dim)
    network.load_state_dict(state)
    try:
        samples = generate(network, 4, latent_dim=dim)
    except Exception as error:
        raise ValueError(
            f"generator takes no latents (4, {dim}): {error}. If it wants another latent_dim, set "
            "that; if it wants latents of another form, reshape them in a subclass's forward"
        ) from error
    if not samples.is_floating_point() or len(samples) != 4 or samples.dim() < 2:
        raise ValueError(
            f"the generator makes {str(samples.dtype).removeprefix('torch.')} samples "
            f"{tuple(samples.shape)} of latents (4, {dim}); it must make floating ones (4, ...)"
        )
    if not any(p.requires_grad for p in network.parameters()):
        raise ValueError("the generator has no parameter that can be trained")
    shape = samples.shape[1:]
    _check_critic(_made("critic", critic or (lambda: MLPCritic(shape))), samples)
    return network


def check_not_wrapped() -> None:
    """Refuse to run inside Flower's wrappers for central differential privacy.

    They scale their noise to the sensitivity of a weighted average, and a barycenter is none.
    A wrapped strategy has no other sign of it than who calls.

    Raises
    ------
    ValueError
        If one of them is among the callers.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = type(frame.f_locals.get("self"))
        if any(kind.__name__.startswith("DifferentialPrivacy") for kind in caller.__mro__):
            raise ValueError(
                f"AdaptiveCoalescence cannot run inside {caller.__name__}: the wrapper scales its "
                "noise to how much one node can move a weighted average, and a barycenter is no "
                "average, so the privacy that it promises would not be there. Use local "
                "differential privacy instead: flwr.clientapp.mod.LocalDpMod on the clients"
            )
        frame = frame.f_back


def _made(name: str, factory: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # what the caller draws next is none of our business
        network = factory()
    if not isinstance(network, nn.Module):
        raise ValueError(f"the {name}'s factory made a {type(network).__name__}, not an nn.Module")
    return network


def _check_critic(critic: nn.Module, samples: Tensor) -> None:
    shape = tuple(samples.shape)
    try:
        with torch.no_grad():
            scores = critic(samples)
    except Exception as error:
        raise ValueError(f"the critic does not take samples {shape}: {error}") from error
    if not isinstance(scores, Tensor) or tuple(scores.shape) not in {(len(samples),), (4, 1)}:
        made = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"the critic makes scores {made} of samples {shape}, "
            f"not ({len(samples)},) or ({len(samples)}, 1)"
        )
    try:  # the gradient penalty differentiates twice, which not every layer can
        critic_loss(critic, samples, samples.flip(0), 10.0, torch.Generator()).backward()
    except Exception as error:
        raise ValueError(f"the critic cannot be trained on samples {shape}: {error}") from error
