"""Generators as arrays, and what is said of arrays that are no generator."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from torch import nn

from fl_wb.messages.records import InvalidUpload, check_samples, like, load, to_arrays, validate


def network() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    module.latent_dim = 3  # type: ignore[assignment]
    return module


def test_a_generator_survives_the_journey() -> None:
    # Prepare
    sent, received = network(), network()
    sent(torch.randn(8, 3))  # moves BatchNorm's buffers

    # Execute
    load(to_arrays(sent), received)

    # Assert
    for name, value in sent.state_dict().items():
        assert torch.equal(value, received.state_dict()[name]), name


def test_like_keeps_names_order_and_dtypes() -> None:
    state = {"b": torch.ones(2), "a": torch.tensor(3)}
    record = like(state, _record(a=np.int64(1), b=np.ones(2)))
    assert [(k, v.dtype, v.shape) for k, v in record.items()] == [
        ("a", "int64", ()),
        ("b", "float64", (2,)),
    ]


def _record(**arrays: object) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in arrays.items()})


def _npy(array: np.ndarray, **options: object) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)  # type: ignore[arg-type]
    return stream.getvalue()


TEMPLATE = {"w": torch.zeros(2, 3), "count": torch.tensor(0)}
GOOD = {"w": np.ones((2, 3), np.float32), "count": np.int64(4)}


@pytest.mark.parametrize(
    "w", [np.ones((2, 3), ">f4"), np.ones((2, 3), np.float16), np.ones((3, 2)).T, np.ones((2, 3))]
)
def test_any_floating_array_of_the_right_shape_is_fine(w: np.ndarray) -> None:
    state = validate(_record(**{**GOOD, "w": w}), TEMPLATE)
    assert state["w"].dtype == torch.float32
    assert torch.equal(state["w"], torch.ones(2, 3))


def test_a_counter_that_averaging_made_a_float_is_rounded() -> None:
    state = validate(_record(**{**GOOD, "count": np.float64(3.9999999)}), TEMPLATE)
    assert state["count"] == 4
    assert state["count"].dtype == torch.int64


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"w": None}, r"array 'w' \(2, 3\) is missing"),
        ({"other": np.ones(1)}, "array 'other' is not part"),
        ({"w": np.ones((3, 2))}, r"array 'w' has shape \(3, 2\) instead of \(2, 3\)"),
        ({"w": np.ones((2, 3), np.int64)}, "array 'w' is int64 instead of float32"),
        ({"w": np.ones((2, 3), bool)}, "array 'w' is bool instead of float32"),
        ({"w": np.ones((2, 3), complex)}, "array 'w' .*complex128"),
        ({"w": np.full((2, 3), "x")}, "array 'w'"),
        ({"w": np.full((2, 3), np.nan)}, "array 'w' has values that are not finite"),
        ({"w": np.full((2, 3), -np.inf)}, "array 'w' has values that are not finite"),
        ({"w": np.full((2, 3), 1e300)}, "array 'w' has values that are not finite"),
        ({"count": np.float32(np.nan)}, "array 'count' has values that are not finite"),
        ({"count": np.ones(1)}, r"array 'count' has shape \(1,\) instead of \(\)"),
    ],
)
def test_arrays_that_do_not_fit_are_named(change: dict[str, object], reason: str) -> None:
    arrays = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    with pytest.raises(InvalidUpload, match=reason):
        validate(_record(**arrays), TEMPLATE)


@pytest.mark.parametrize(
    ("dtype", "stype", "data"),
    [
        ("float32", "numpy.ndarray", b""),
        ("float32", "numpy.ndarray", b"\x93NUMPY\x01\x00"),
        ("float32", "numpy.ndarray", _npy(np.ones((2, 3), np.float32))[:-1]),
        ("float32", "numpy.ndarray", _npy(np.ones((2, 3), np.float32)) + b"\x00"),
        ("float32", "numpy.ndarray", _npy(np.ones((2, 2), np.float32))),
        ("float32", "numpy.ndarray", pickle.dumps(np.ones((2, 3), np.float32))),
        ("object", "numpy.ndarray", _npy(np.full((2, 3), None), allow_pickle=True)),
        ("float64", "numpy.ndarray", _npy(np.ones((2, 3), np.float32))),
        ("float32", "torch.pickle", _npy(np.ones((2, 3), np.float32))),
        ("float32", "numpy.ndarray", _npy(np.ones((2, 3), np.float32)) + b"\x00" * 1_000_000),
        ("float32", "numpy.ndarray", b"\x93NUMPY\x02\x00" + b"\xff\xff\xff\xff" + b"(" * 9000),
        # a header that asks for 8 TB:
        (
            "float32",
            "numpy.ndarray",
            _npy(np.ones((2, 3), np.float32)).replace(b"(2, 3), }", b"(2000000000000,)}"),
        ),
    ],
)
def test_bytes_that_lie_are_refused(dtype: str, stype: str, data: bytes) -> None:
    arrays = _record(**GOOD)
    arrays["w"] = Array(dtype=dtype, shape=(2, 3), stype=stype, data=data)
    with pytest.raises(InvalidUpload, match="array 'w'"):
        validate(arrays, TEMPLATE)


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 1e3])  # metres, of a wavelength
def test_a_generator_that_varies_passes(scale: float) -> None:
    module = network()
    with torch.no_grad():
        module[2].weight.mul_(scale)  # type: ignore[operator]
        module[2].bias.mul_(scale)  # type: ignore[operator]
    check_samples(module)


@pytest.mark.parametrize(
    ("weight", "bias", "reason"),
    [
        (0.0, 0.0, "the same sample"),
        (0.0, 0.7, "the same sample"),
        (1e-7, 0.7, "the same sample"),
        (1e38, 0.0, "not finite"),
    ],
)
def test_a_generator_that_is_no_use_is_refused(weight: float, bias: float, reason: str) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for layer in (module[0], module[1]):
        nn.init.constant_(layer.weight, weight)
        nn.init.constant_(layer.bias, bias)
    with pytest.raises(InvalidUpload, match=reason):
        check_samples(module, latent_dim=3)


@pytest.mark.parametrize(
    ("offset", "scale"),
    [([2024.0, 0, 0], [0, 0.15, 0.15]), ([90210.0, 0, 0], [0, 1.5, 1.5]), ([1.7e9], [25_000.0])],
    ids=["a year", "a ZIP code", "times of a day"],
)
def test_one_coordinate_that_varies_is_enough(offset: list[float], scale: list[float]) -> None:
    module = nn.Linear(4, len(offset))
    with torch.no_grad():
        module.weight.mul_(torch.tensor(scale)[:, None])
        module.bias.copy_(torch.tensor(offset))
    check_samples(module, latent_dim=4)


def test_a_network_that_fails_in_any_way_is_an_invalid_upload() -> None:
    class Odd(nn.Linear):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            raise IndexError("of a stranger's making")

    with pytest.raises(InvalidUpload, match="fails to generate: of a stranger's making"):
        check_samples(Odd(3, 2), latent_dim=3)
