"""What the server checks before anything is trained: that networks and arrays fit together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from logging import WARNING

import torch
from flwr.app import ArrayRecord
from flwr.common.logger import log
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from fl_wb.federation.model import own_arrays
from fl_wb.generators.copies import seeded
from fl_wb.generators.latents import Draw, Latents
from fl_wb.generators.networks import MLPCritic
from fl_wb.generators.sampling import Labels, check_function, driven, latents_of, sampling
from fl_wb.messages import numpy_client, records
from fl_wb.private_apis import caller_of_kind
from fl_wb.training.wgan import critic_loss

WRAPPERS = (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)


def check_whole(least: int, **settings: int | None) -> None:
    """Raise ValueError if a setting is no whole number of so much or more, nor None."""
    for name, value in settings.items():
        if value is not None and not (isinstance(value, int) and value >= least):
            raise ValueError(f"{name}={value!r} must be an integer of {least} or more")


def check_screening(screening: float | None) -> None:
    """Raise ValueError if uploads cannot be screened so, naming what is allowed."""
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
    labels: Labels = None,
    latents: str | Draw = "normal",
) -> nn.Module:
    """Return a generator that is seen to fit the arrays, the latents and the critic.

    Raises
    ------
    ValueError
        Saying what does not fit.
    """
    network = _made("generator", generator)
    own = network.state_dict()
    _check_weights(network, own)
    try:
        state = records.validate(own_arrays(arrays, own), own)
    except records.InvalidUpload as error:
        raise ValueError(
            f"initial_arrays do not fit the generator: {error}{_hint(arrays, own)}"
        ) from error
    one = driven(network, latent_dim, labels, latents)
    law = latents_of(one, latent_dim)
    network.load_state_dict(state)
    samples = _sampled(one, law)
    if not any(p.requires_grad for p in network.parameters()):
        raise ValueError("the generator has no parameter that can be trained")
    shape = samples.shape[1:]
    _check_critic(_made("critic", critic or (lambda: MLPCritic(shape))), samples)
    return network


def _check_weights(network: nn.Module, own: Mapping[str, Tensor]) -> None:
    lazy = [
        name
        for name, value in own.items()
        if isinstance(value, UninitializedParameter | UninitializedBuffer)
    ]
    if lazy:
        raise ValueError(
            f"the generator has lazy layers ({lazy[0]!r} has no shape yet): let its factory "
            "call it once, or give the layers their sizes"
        )
    for name, parameter in network.named_parameters():
        if parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise ValueError(
                f"the generator's {name!r} is {kind}, and latents are float32: let its factory "
                "return network.float() (arrays of any floating type are converted)"
            )


def _hint(arrays: ArrayRecord, own: Mapping[str, Tensor]) -> str:
    """Return what probably is the cause where names differ, or nothing."""
    if numpy_client.is_list(arrays):
        return (
            " (they are a list, taken in the order of the generator's state dict: where it has "
            f"more than the generator's {len(own)}, give generator_keys=slice(...))"
        )
    if 0 < len(arrays) < len(own) and all(name in own for name in arrays):
        return (
            f" ({len(arrays)} of its {len(own)} arrays: if clients train adapters alone, have them "
            "send the whole state, base included; a barycenter has no base in common)"
        )
    if len(arrays) != len(own):
        return (
            f" ({len(arrays)} arrays, of which the generator has {len(own)}: generator_keys says "
            "which are the generator's part of a larger model)"
        )
    return ""


def _sampled(network: nn.Module, latents: Latents) -> Tensor:
    """Return 4 samples of a generator that is seen to be a function of its latents."""
    dim, z = latents.dim, latents.draw(4, torch.Generator().manual_seed(0))
    labels = " and labels (4,)" if latents.labels else ""
    try:
        with torch.random.fork_rng(), sampling(network):
            samples = network(z)
    except Exception as error:
        raise ValueError(
            f"generator takes no latents (4, {dim}){labels}: {error}. If it wants another "
            "latent_dim, set that; if it wants a label, too, set labels; if latents of another "
            "form, reshape them in a subclass's forward"
        ) from error
    if not isinstance(samples, Tensor):
        raise ValueError(
            f"the generator makes a {type(samples).__name__} of latents (4, {dim}), not one tensor "
            "of samples: return that alone in a subclass's forward"
        )
    if not samples.is_floating_point() or len(samples) != 4 or samples.dim() < 2:
        raise ValueError(
            f"the generator makes {str(samples.dtype).removeprefix('torch.')} samples "
            f"{tuple(samples.shape)} of latents (4, {dim}); it must make floating ones (4, ...)"
        )
    check_function(network, latents)
    scale = float(samples.abs().max())
    try:
        with sampling(network):
            alone = torch.cat([network(row) for row in z.split(1)])
        same = torch.allclose(samples, alone, rtol=0, atol=1e-3 * scale, equal_nan=True)
    except Exception:  # a normalisation may refuse a batch of one
        same = False
    if not same:
        log(
            WARNING,
            "the generator makes a sample of its latent and of those beside it (batch statistics, "
            "such as of BatchNorm with track_running_stats=False): it is only ever called with "
            "batches, and its samples differ from batch to batch",
        )
    return samples


def check_not_wrapped() -> None:
    """Refuse to run inside Flower's wrappers for central differential privacy.

    They scale their noise to the sensitivity of a weighted average, and a barycenter is none.

    Raises
    ------
    ValueError
        If one of them is among the callers.
    """
    if (wrapper := caller_of_kind(*WRAPPERS)) is not None:
        raise ValueError(
            f"AdaptiveCoalescence cannot run inside {type(wrapper).__name__}: the wrapper scales "
            "its noise to how much one node can move a weighted average, and a barycenter is no "
            "average, so the privacy that it promises would not be there. Use local "
            "differential privacy instead: flwr.clientapp.mod.LocalDpMod on the clients"
        )


def _made(name: str, factory: Callable[[], nn.Module]) -> nn.Module:
    network = seeded(factory, 0)
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
