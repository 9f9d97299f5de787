"""A gate fitted to a few samples: which of what a generator makes they ask for, without labels.

Ours; not in the paper. Sources of several classes know no class apart, and a target with some of
them wants parts of what they make. These are found among the generator's samples, by
`fl_wb.adaptation.likeness`; what makes them is then said of the latents
(`fl_wb.generators.gate`).
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from fl_wb.adaptation.anchor import COMPARED, JUDGED
from fl_wb.adaptation.likeness import WALKED, likeness, strange
from fl_wb.adaptation.samples import check_samples
from fl_wb.adaptation.variation import affordable
from fl_wb.adaptation.weights import fit_weights
from fl_wb.generators.code import Code
from fl_wb.generators.gate import LOGS, Gate
from fl_wb.generators.reweighted import Reweighted, reweighted
from fl_wb.generators.sampling import device_of, generate, latents_of, sampling
from fl_wb.picks import spread_out
from fl_wb.transport import energy_distance

LATENTS = 48_000
"""From which the gate learns."""

NOTICED = 0.1
"""Less of the latents than this would only be moved by chance."""

AMONG = 8000
"""Of a generator's samples, by which it is seen whether any is like the few at all."""

NEAR = 0.05
"""Weights that move no more of the latents than this are the shares, as far as anybody sees."""

NEARER = 0.75
"""Times the energy distance of the shared barycenter, at most: with a hundred digits of each of all
its classes, a fitted one had .9 to 1.2 times as much to them, and 1.1 to 1.4 times to others."""

WIDTH, ITERATIONS, BATCH, RATE = 64, 1500, 512, 1e-2


def own_start(
    generator: nn.Module,
    code: Code,
    samples: Tensor,
    *,
    method: str = "fitted",
    without: Collection[int] = (),
    seed: int = 0,
    latent_dim: int | None = None,
) -> nn.Module:
    """Return a target's own barycenter, for the arguments of `fit_weights`.

    Fitted, it has a gate, too, where samples ask for it. It shares the generator; where there is no
    gate, and the weights are next to the code's shares, it is the generator. So it is, too, where
    `JUDGED` samples or more are no nearer to the fitted one (`NEARER`): many say of a generator of
    all their classes, too, that it makes too much of something.
    """
    own = _weighed(generator, code, samples, method, without, seed, latent_dim)
    if own is generator or method != "fitted" or without or len(samples) < JUDGED:
        return own
    some = samples[spread_out(len(samples), min(len(samples), COMPARED), seed)].cpu()
    n = affordable(COMPARED, some[0])
    made, before = (generate(g, n, seed=seed, latent_dim=latent_dim) for g in (own, generator))
    nearer = energy_distance(made, some) <= NEARER * energy_distance(before, some)
    return own if nearer else generator


def _weighed(
    generator: nn.Module,
    code: Code,
    samples: Tensor,
    method: str,
    without: Collection[int],
    seed: int,
    latent_dim: int | None,
) -> nn.Module:
    weights = fit_weights(
        generator, code, samples, method=method, without=without, seed=seed, latent_dim=latent_dim
    )
    shares = torch.tensor(code.shares, dtype=torch.float64)
    near = not without and (weights - shares).abs().sum().item() / 2 <= NEAR
    own = reweighted(generator, code, shares if near else weights, latent_dim=latent_dim)
    if method == "fitted":
        own.gate = fit_gate(own, samples, seed=seed, latent_dim=own.latent_dim)
    return generator if own.gate is None and near else own


def fit_gate(
    generator: nn.Module, samples: Tensor, *, seed: int = 0, latent_dim: int | None = None
) -> Gate | None:
    """Return the gate by which a generator makes what a few samples ask for; None if it does.

    None, too, if it makes nothing like them: then the parts that are nearest say nothing.

    Only of latents N(0, I), which a gate rolls and turns round.

    Parameters
    ----------
    generator : nn.Module
        Left alone.
    samples : Tensor
        A few real samples (n, ...), n >= 1, of the shape that it makes. One says nothing.
    seed : int
    latent_dim : int, optional
        For a generator without the attribute.

    Raises
    ------
    TypeError, ValueError
        As by `check_samples`, where the samples say anything.
    """
    law, device = latents_of(generator, latent_dim), device_of(generator)
    if len(samples) == 1 or not law.plain:
        return None
    parts = law.draw(LATENTS, torch.Generator().manual_seed(seed)).to(device).split(1000)
    with sampling(generator):
        made = torch.cat([generator(z) for z in parts[: WALKED // 1000]])
        check_samples(samples, made)
        asked = likeness(made, samples)
        if not _notable(asked(made)):
            return None
        some = parts[WALKED // 1000 : AMONG // 1000]
        if strange(torch.cat([made, *map(generator, some)]), samples):
            return None
        ratio = torch.cat([asked(generator(z)) for z in parts])
    return _learned(torch.cat(parts), ratio.clamp(max=math.exp(LOGS[1])).float().to(device), seed)


def asked_for(gated: Reweighted, samples: Tensor, n: int, *, seed: int = 0) -> Tensor | None:
    """Return n samples, drawn as often as a few ask for them, of what no gate has chosen.

    None if the few ask for nothing in particular, as very few do. What a gate lets through is off
    in its own way, and what it keeps back cannot be asked for.

    Parameters
    ----------
    gated : Reweighted
        Of its cells, weighted as they are.
    samples : Tensor
        The few real samples (m, ...).
    n : int
        As many are made, and drawn of these.
    seed : int
    """
    inside, dim = gated.generator, gated.latent_dim
    ungated = reweighted(inside, gated.code, gated.weights, latent_dim=dim)
    made = generate(ungated, n, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    ratio = likeness(made, samples)(made)
    if not _notable(ratio):
        return None
    drawn = ratio.multinomial(n, replacement=True, generator=rng)
    return made[drawn.to(made.device)]


def _notable(ratio: Tensor) -> bool:
    """Whether ratios (n,) move more of the samples than chance alone might."""
    return bool((ratio - 1).abs().mean() / 2 > NOTICED)


def _learned(z: Tensor, ratio: Tensor, seed: int) -> Gate:
    """Learn a gate of latents (n, d) and how much likelier each is wanted (n,).

    E[ratio * softplus(-f) + softplus(f)] is least where exp f is the ratio.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Linear(z.shape[1], WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, 1),
        ).to(z.device)
    adam = torch.optim.Adam(network.parameters(), RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, ITERATIONS)
    rng = torch.Generator(z.device).manual_seed(seed)
    for _ in range(ITERATIONS):
        some = torch.randint(len(z), (BATCH,), generator=rng, device=z.device)
        wanted, logit = ratio[some], network(z[some]).squeeze(1)
        softplus = nn.functional.softplus
        loss = (wanted * softplus(-logit) + softplus(logit)).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
    linear = [layer for layer in network if isinstance(layer, nn.Linear)]
    return Gate([torch.cat([x.weight, x.bias.unsqueeze(1)], 1) for x in linear])
