"""An encoder that is fitted to a decoder's own samples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fl_wb.training.encoder import fit_encoder


def test_an_encoder_finds_the_latents_of_a_linear_decoder() -> None:
    # Prepare: x = 2 z + 1, so the encoder's mean is (x - 1) / 2
    encoder = nn.Linear(2, 4)
    with torch.no_grad():  # from zero: the test must not depend on the random state
        encoder.weight.zero_()
        encoder.bias.zero_()

    def encode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_variance = encoder(x).chunk(2, dim=1)
        return mean, log_variance

    # Execute
    fit_encoder(
        encode,
        lambda z: 2 * z + 1,
        encoder.parameters(),
        latent_dim=2,
        noise=0.2,
        iterations=1600,
        lr=2e-2,
    )

    # Assert: with noise of 0.2 the latent is known up to 0.1 (the posterior's variance 0.0099)
    x = torch.tensor([[1.0, 3.0]])
    mean, log_variance = encode(x)
    assert torch.allclose(mean, torch.tensor([[0.0, 1.0]]), atol=0.05)
    assert torch.allclose(log_variance.exp(), torch.full((1, 2), 0.0099), atol=0.003)


def test_what_of_an_encoder_is_frozen_or_unused_stays() -> None:
    torch.manual_seed(0)
    encoder = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 4), nn.Linear(3, 3)])
    encoder[0].requires_grad_(False)
    before = [parameter.clone() for parameter in encoder.parameters()]

    def encode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_variance = encoder[1](encoder[0](x)).chunk(2, dim=1)
        return mean, log_variance

    fit_encoder(encode, lambda z: z, encoder.parameters(), latent_dim=2, iterations=3)

    same = [torch.equal(*pair) for pair in zip(encoder.parameters(), before, strict=True)]
    assert same == [True, True, False, False, True, True]


def test_an_encoder_that_is_frozen_is_refused() -> None:
    encoder = nn.Linear(2, 4).requires_grad_(False)
    with pytest.raises(ValueError, match="none requires a gradient"):
        fit_encoder(lambda x: (x, x), lambda z: z, encoder.parameters(), latent_dim=2)


def test_an_encoder_that_drops_out_follows_the_seed() -> None:
    last = []
    for outside in (1, 2):
        encoder = nn.Linear(2, 4)
        with torch.no_grad():
            encoder.weight.fill_(0.1)
            encoder.bias.zero_()
        torch.manual_seed(outside)
        drop, before = nn.Dropout(0.5), torch.random.get_rng_state()

        def encode(
            x: torch.Tensor, encoder: nn.Module = encoder, drop: nn.Module = drop
        ) -> tuple[torch.Tensor, torch.Tensor]:
            mean, log_variance = encoder(drop(x)).chunk(2, dim=1)
            return mean, log_variance

        last.append(
            fit_encoder(encode, lambda z: z, encoder.parameters(), latent_dim=2, iterations=5)
        )
        assert torch.random.get_rng_state().equal(before)
    assert last[0] == last[1]
