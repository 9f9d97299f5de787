"""Fitting an encoder to a decoder without data: the sleep phase of the wake-sleep algorithm.

Coalescing replaces a VAE's decoder by another one, whose latents mean something else; the average
of encoders that were trained with other decoders does not know. A decoder can teach an encoder
by itself: draw z ~ N(0, I), generate x, and have the encoder find z from x (Hinton, Dayan, Frey,
Neal, "The wake-sleep algorithm for unsupervised neural networks", Science 268, 1995).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fl_wb.training.random_numbers import own_random_numbers
from fl_wb.training.wgan import Progress


def fit_encoder(
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    decode: Callable[[Tensor], Tensor],
    parameters: Iterable[nn.Parameter],
    *,
    latent_dim: int,
    noise: float = 0.0,
    iterations: int = 1000,
    batch_size: int = 128,
    lr: float = 1e-3,
    seed: int = 0,
    callback: Progress | None = None,
) -> float:
    """Train an encoder, in place, to recover the latents from which a decoder generates.

    The loss is E -log q(z | decode(z) + noise), z ~ N(0, I), where q is the Gaussian whose mean
    and log-variance the encoder makes.

    Parameters
    ----------
    encode : callable
        Samples (n, ...) to mean and log-variance, (n, latent_dim) each.
    decode : callable
        Latents (n, latent_dim) to samples (n, ...); called without a graph.
    parameters : iterable of nn.Parameter
        The encoder's. No others change, nor do those that require no gradient.
    latent_dim : int
        Dimension of z.
    noise : float
        Standard deviation of the noise on generated samples: how far real samples lie from
        what the decoder can make. 0 has the encoder sure of every latent.
    iterations, batch_size, lr
        Of Adam; a batch is drawn anew each time.
    seed : int
        The same arguments give the same encoder.
    callback : optional
        Told (iterations done, in all, losses).

    Returns
    -------
    float
        The last loss.

    Raises
    ------
    ValueError
        If no parameter requires a gradient.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("parameters: none requires a gradient, so that nothing could be fitted")
    device = trained[0].device
    rng = torch.Generator(device).manual_seed(seed)
    adam = torch.optim.Adam(trained, lr=lr)
    value = float("nan")
    for iteration in range(1, iterations + 1):
        z = torch.randn(batch_size, latent_dim, generator=rng, device=device)
        with own_random_numbers(seed + iteration):
            with torch.no_grad():
                samples = decode(z)
                samples = samples + noise * torch.randn(samples.shape, generator=rng, device=device)
            mean, log_variance = encode(samples)
        log_variance = log_variance.clamp(-12, 12)  # an encoder that is sure has no bottom
        loss = 0.5 * (log_variance + (z - mean).square() / log_variance.exp()).sum(1).mean()
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        adam.step()
        adam.zero_grad()
        value = loss.item()
        if callback:
            callback(iteration, iterations, {"pairing": value})
    return value
