"""A small packed file, and what a forger would make of it."""

from __future__ import annotations

import hashlib
import json
import struct
from functools import cache
from typing import Any

import torch
from torch import nn

from fl_wb.generators.networks import make_generator
from fl_wb.ternary import (
    Ternarization,
    pack,
    ternarize,
)

SHA = 32
QUICK = Ternarization(iterations=3, planes=1)


def network(width: int = 8, name: str = "mlp") -> nn.Module:
    torch.manual_seed(0)
    return make_generator(name, (1, 8, 8), latent_dim=4, width=width)


@cache
def ternary(name: str = "mlp") -> nn.Module:
    return ternarize(network(name=name), settings=QUICK)


@cache
def packed() -> bytes:
    return pack(ternary())


def sealed(body: bytes) -> bytes:
    """Append the checksum that a forger would."""
    return body + hashlib.sha256(body).digest()


def crafted(header: object, payload: bytes = b"", version: int = 2) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return sealed(struct.pack("<8sII", b"FLWBTERN", version, len(text)) + text + payload)


def parts() -> tuple[dict[str, Any], bytes]:
    """Take the header and the payload out of a good file."""
    (length,) = struct.unpack_from("<I", packed(), 12)
    return json.loads(packed()[16 : 16 + length]), packed()[16 + length : -SHA]


class Row(nn.Module):
    """One weight, of two dimensions."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values.unsqueeze(0))
