"""What travels in messages: the keys of records, generators as arrays, and the check of strangers'.

`strategies/` and `clients/` meet here and nowhere else. Arrays that a node sends are decoded by
`validate`, never by ``Array.numpy()``: it looks at what an array *declares* before it touches the
bytes, so an odd or hostile upload costs no memory beyond its own size, and every way in which it
can be wrong ends in one `InvalidUpload` with one sentence.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor, nn

from fl_wb.generators.sampling import generate

_STYPE = "numpy.ndarray"
_HEADER = 10_000  # bytes; numpy refuses longer .npy headers too
_WIDEST = 8  # bytes of the widest element (float64, int64)
ROUNDING = 1e-6  # of a float32, relative: eight of its last digits
_KINDS = {"f": "floating", "i": "integer", "u": "integer", "b": "boolean"}


class InvalidUpload(ValueError):
    """Arrays that do not make a usable generator; the text says why in one sentence."""


def to_arrays(module: nn.Module) -> ArrayRecord:
    """Put a module's state (parameters and buffers) into an ArrayRecord."""
    return ArrayRecord(dict(module.state_dict()))


def like(state: Mapping[str, Tensor], record: ArrayRecord) -> ArrayRecord:
    """Put a state into an ArrayRecord with the names, order and dtypes of another one."""
    return ArrayRecord(
        {
            name: Array(state[name].detach().cpu().numpy().astype(array.dtype))
            for name, array in record.items()
        }
    )


def to_tensors(arrays: ArrayRecord) -> dict[str, Tensor]:
    """Decode named floating tensors of any shape, up to a million numbers each.

    Raises
    ------
    InvalidUpload
        As `validate`.
    """
    state = {}
    for name, array in arrays.items():
        if len(array.shape) > 8 or not 0 < math.prod(array.shape) <= 1_000_000:
            raise InvalidUpload(f"array {name[:80]!r} has shape {_short(array.shape)}")
        state[name] = _tensor(name, array, torch.empty(array.shape, device="meta"))
    return state


def load(arrays: ArrayRecord, module: nn.Module) -> nn.Module:
    """Load arrays into a module and return it.

    Raises
    ------
    InvalidUpload
        If names, shapes or dtypes differ, naming the first array that does.
    """
    module.load_state_dict(validate(arrays, module.state_dict()))
    return module


def validate(arrays: ArrayRecord, template: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Decode arrays that have to fit a template.

    Floating arrays of any width fit a floating template; integers do not. Integer buffers
    (a batch normalisation's counter) take integers and, rounded, the floating numbers into
    which averaging and clipping turn them.

    Parameters
    ----------
    arrays : ArrayRecord
        What a node sent.
    template : mapping of str to Tensor
        A state dict with the names, shapes and dtypes that are expected.

    Returns
    -------
    dict of str to Tensor
        New CPU tensors with the template's names, order, shapes and dtypes.

    Raises
    ------
    InvalidUpload
        If an array is missing, extra, mis-shaped, of the wrong dtype, undecodable or not finite.
    """
    state = {}
    for name, expected in template.items():
        if name not in arrays:
            raise InvalidUpload(f"array {name!r} {tuple(expected.shape)} is missing")
        state[name] = _tensor(name, arrays[name], expected)
    for name in arrays:
        if name not in template:
            raise InvalidUpload(f"array {name[:80]!r} is not part of the generator")
    return state


def check_samples(generator: nn.Module, *, latent_dim: int | None = None, seed: int = 0) -> None:
    """Draw 64 samples from a generator and refuse it if they are useless.

    Raises
    ------
    InvalidUpload
        If it fails, or the samples are not finite, or in no coordinate do they vary by more than
        float32's rounding of it: a domain's scale is unknown, and each coordinate may have its own.
    """
    try:
        samples = generate(generator, 64, seed=seed, latent_dim=latent_dim).flatten(1).double()
    except Exception as error:  # what a stranger's numbers do inside a network, nobody knows
        raise InvalidUpload(f"the generator fails to generate: {_first_line(error)}") from error
    if not bool(samples.isfinite().all()):
        raise InvalidUpload("the generator makes samples that are not finite")
    if bool((samples.std(dim=0) <= ROUNDING * samples.abs().amax(dim=0)).all()):
        raise InvalidUpload("the generator makes the same sample from every latent")


def _tensor(name: str, array: Array, expected: Tensor) -> Tensor:
    shape = tuple(expected.shape)
    declared = bool(array.dtype)  # a NumPyClient's arrays declare nothing but in their bytes
    if declared and tuple(array.shape) != shape:
        raise InvalidUpload(f"array {name!r} has shape {_short(array.shape)} instead of {shape}")
    if array.stype != _STYPE:
        raise InvalidUpload(f"array {name!r} is serialized as {array.stype[:40]!r}, not {_STYPE!r}")
    if len(array.data) > expected.numel() * _WIDEST + _HEADER:
        raise InvalidUpload(f"array {name!r} has {len(array.data)} bytes, too many for {shape}")
    try:
        values = _decode(array.data, shape)
    except Exception as error:  # numpy's parser raises many kinds on hostile bytes
        raise InvalidUpload(f"array {name!r} cannot be decoded: {_first_line(error)}") from error
    if declared and array.dtype not in {str(values.dtype.newbyteorder("=")), str(values.dtype)}:
        raise InvalidUpload(
            f"array {name!r} declares {array.dtype[:40]!r} but holds {str(values.dtype)!r}"
        )
    wanted = str(expected.dtype).removeprefix("torch.")
    if expected.is_floating_point() and values.dtype.kind != "f":
        raise InvalidUpload(f"array {name!r} is {values.dtype} instead of {wanted}")
    # Also after the cast: a finite float64 may be too large for the network's float32.
    tensor = _native(values, whole=not expected.is_floating_point()).to(expected.dtype)
    if not (np.isfinite(values).all() and bool(tensor.isfinite().all())):
        raise InvalidUpload(f"array {name!r} has values that are not finite")
    return tensor


def _native(values: np.ndarray, whole: bool) -> Tensor:
    """Copy numbers of any width and byte order into a tensor."""
    if values.dtype.kind == "f":
        values = np.asarray(np.rint(values)) if whole else values  # rint unpacks 0-d
        width = np.float32 if values.dtype.itemsize <= 4 else np.float64
        return torch.from_numpy(values.astype(width))
    return torch.from_numpy(values.astype(np.int64))


def _decode(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Read .npy bytes: plain numbers only, and no more than they say they are."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"unknown .npy version {version}")
    found, fortran, dtype = readers[version](stream, max_header_size=_HEADER)
    if dtype.kind not in _KINDS or dtype.itemsize > _WIDEST:
        raise ValueError(f"elements of type {str(dtype)[:40]!r}")
    if tuple(found) != shape:
        raise ValueError(f"declared as {shape} but holds {_short(found)}")
    if len(data) - stream.tell() != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
        raise ValueError("its bytes are fewer or more than its shape needs")
    flat = np.frombuffer(data, dtype=dtype, offset=stream.tell())
    return flat.reshape(shape, order="F" if fortran else "C")


def _short(shape: tuple[int, ...]) -> str:
    return str(tuple(shape)) if len(shape) <= 8 else f"of {len(shape)} dimensions"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
