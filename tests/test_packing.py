"""The packed file: small, the same samples bit for bit."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fl_wb.generators.code import Code
from fl_wb.generators.networks import make_generator
from fl_wb.generators.reweighted import reweighted
from fl_wb.generators.sampling import driven, generate
from fl_wb.ternary import (
    PackedFileError,
    Ternary,
    load,
    numpy_reader,
    pack,
    save,
    ternarize,
    unpack,
)
from fl_wb.ternary.numpy_reader import parse
from tests.packed import QUICK, Row, crafted, network, packed, parts, ternary
from tests.points import same


@pytest.mark.parametrize("name", ["mlp", "conv", "dcgan"])
def test_a_loaded_generator_makes_the_same_samples_bit_for_bit(tmp_path: Path, name: str):
    path = save(ternary(name), str(tmp_path / "new" / "generator.tern"))

    other = make_generator(name, (1, 8, 8), latent_dim=4, width=8)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    loaded = load(path, other.train())

    assert generate(loaded, 50).equal(generate(ternary(name), 50))
    assert same(loaded, ternary(name)) and not loaded.training
    assert other.training  # left alone
    assert all(value.equal(before[key]) for key, value in other.state_dict().items())


def test_the_default_generator_packs_to_a_twelfth():
    generator = make_generator("mlp", (1, 8, 8))
    floats = sum(4 * value.numel() for value in generator.state_dict().values())
    assert 12 * len(pack(ternarize(generator, settings=QUICK))) <= floats


def test_packing_is_deterministic():
    assert pack(ternary()) == packed()
    assert pack(unpack(packed(), network())) == packed()


def test_the_format_is_readable_from_its_description_with_numpy_alone():
    header, payload = parts()
    state = ternary().state_dict()
    assert [entry["name"] for entry in header["tensors"]] == list(state)
    for entry in header["tensors"]:
        shape, n = entry["shape"], int(np.prod(entry["shape"], dtype=int))
        if entry["kind"] == "ternary":
            size, array = 0, np.zeros(n, np.float32)
            for alpha in entry["alphas"]:
                values = np.array([0.0, alpha, -alpha], np.float32)
                plane = payload[size : size + -(-n // 4)]
                array += [values[plane[i // 4] >> 2 * (i % 4) & 3] for i in range(n)]
                size += len(plane)
        else:
            dtype = {"float32": "<f4", "int64": "<i8"}[entry["kind"]]
            size = n * int(dtype[-1])
            array = np.frombuffer(payload[:size], dtype)
        payload = payload[size:]
        array = np.reshape(np.array(array, dtype=state[entry["name"]].numpy().dtype), shape)
        assert np.array_equal(array, state[entry["name"]].numpy())
    assert not payload


def test_read_gives_plain_arrays():
    arrays = parse(packed())[1]
    assert list(arrays) == list(ternary().state_dict())
    for name, value in ternary().state_dict().items():
        assert type(arrays[name]) is np.ndarray
        assert np.array_equal(arrays[name], value.numpy())


@pytest.mark.parametrize("n", range(1, 10))
def test_any_number_of_weights_packs(n: int):
    row, empty = Row(0.3 * (torch.arange(n) % 3 - 1.0)), Row(torch.zeros(n))
    assert unpack(pack(row), empty).weight.equal(row.weight)


def test_half_precision_packs():
    half = unpack(packed(), network()).bfloat16()
    assert same(unpack(pack(half), network().bfloat16()), half)


def test_a_generator_in_full_precision_is_refused():
    with pytest.raises(ValueError, match="no weight of this MLPGenerator is ternary"):
        pack(network())


def test_a_save_that_is_refused_leaves_the_old_file(tmp_path: Path):
    path = save(ternary(), tmp_path / "file")
    with pytest.raises(ValueError, match="ternarize it"):
        save(network(), path)
    assert path.read_bytes() == packed()


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_planes_come_back_bit_for_bit_at_two_bits_a_weight_each(planes: int):
    weight = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    row = Row(Ternary(weight, planes)(weight).detach())
    data = pack(row)
    assert unpack(data, Row(weight)).weight.equal(row.weight)
    assert len(data) - 1000 * planes < 250
    assert len(row.weight.unique()) > 3 ** (planes - 1)


def test_a_weight_of_too_many_values_is_stored_as_it_is():
    other = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item()
    for values in ([0.5, other] * 2, [0.5, 0.25, 0.125, 0.0625, 0.75]):
        row = Row(torch.tensor(values))
        row.three = nn.Parameter(torch.tensor([[-1.0, 0.0, 1.0]]))
        assert same(unpack(pack(row), row), row)


def test_a_file_of_version_1_is_read():
    entries = [
        {"name": "weight", "shape": [1, 3], "kind": "ternary", "alpha": 0.5},
        {"name": "bias", "shape": [1], "kind": "float32"},
    ]
    payload = bytes([0b100100]) + np.array([0.25], "<f4").tobytes()
    loaded = unpack(crafted({"network": "Linear", "tensors": entries}, payload, 1), nn.Linear(3, 1))
    assert loaded.weight.tolist() == [[0.0, 0.5, -0.5]] and loaded.bias.tolist() == [0.25]


# other weights of the sources


SHARES = (0.1, 0.3, 0.2, 0.1, 0.3)
WEIGHTS = (0.5, 0.0, 0.1, 0.3, 0.1)


@cache
def recoded(weights: tuple[float, ...] = WEIGHTS) -> nn.Module:
    return ternarize(reweighted(network(), Code(SHARES), weights), settings=QUICK)


def test_other_weights_come_back_bit_for_bit(tmp_path: Path):
    path = save(recoded(), tmp_path / "file")
    for other in (network(), reweighted(network(), Code((1, 1)), (1, 1))):
        loaded = load(path, other)
        assert same(loaded, recoded())
        assert generate(loaded, 500).equal(generate(recoded(), 500))
    assert not generate(loaded.generator, 500).equal(generate(loaded, 500))
    with pytest.raises(PackedFileError, match=r"another network: .*shape \(8, 4\)"):
        load(path, network(width=12))


@pytest.mark.parametrize(
    ("shares", "weights"),
    [
        (SHARES, WEIGHTS),
        (SHARES, SHARES),
        ((1.0,), (3.0,)),
        ((1e-7, 1.0, 1e-3), (1.0, 0.0, 1e-9)),
        ([1.0] * 40, [*range(40)]),  # deeper than the latent has coordinates
        ([2.0**-k for k in range(12)], [1.0] * 12),
        ((1.0, 1.0), (1.0, 0.0)),  # Phi(9) is 1, where nothing lies to the right
    ],
)
def test_numpy_moves_latents_as_torch_does(shares: list[float], weights: list[float]):
    z = torch.randn(2000, 4, generator=torch.Generator().manual_seed(1))
    z[0], z[1], z[2] = 7.0, -7.0, 9.0
    code = Code(shares)
    expected = code.recode(z, weights).numpy()
    made = numpy_reader.recoded(z.numpy(), np.array(code.shares), np.array(weights, float))
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, expected, atol=1e-5)


def test_numpy_makes_the_samples_of_other_weights(tmp_path: Path):
    reader = numpy_reader.PackedGenerator(save(recoded(), tmp_path / "file"), (1, 8, 8))
    z = torch.randn(1000, reader.latent_dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = recoded()(z).numpy()
    np.testing.assert_allclose(reader(z.numpy()), expected, atol=1e-5)


FORGED_CODES: dict[str, list[list[float]]] = {
    "shares": [[0.0, 1.0], [-1.0, 1.0], [np.nan, 1.0], [np.inf, 1.0], [1.0], [], [1.0] * 2000],
    "weights": [[0.0, 0.0], [-1.0, 1.0], [np.nan, 1.0], [np.inf, 1.0], [1.0, 1.0, 1.0]],
}


@pytest.mark.parametrize("field", FORGED_CODES)
def test_a_forged_code_is_refused(field: str, tmp_path: Path):
    good = reweighted(network(), Code((1, 1)), (1, 1))
    good = unpack(pack(ternarize(good, settings=QUICK)), good)
    for values in FORGED_CODES[field]:
        good.register_buffer(field, torch.tensor(values, dtype=torch.float64))
        path = tmp_path / "file"
        path.write_bytes(pack(good))
        with pytest.raises(PackedFileError, match="no code"):
            load(path, network())
        with pytest.raises(PackedFileError, match="no code"):
            numpy_reader.PackedGenerator(path, (1, 8, 8))


def test_numpy_refuses_cells_of_a_law_that_no_file_holds(tmp_path: Path):
    def law(n: int, rng: torch.Generator) -> torch.Tensor:
        return torch.rand(n, 4, generator=rng).log().neg()

    own = reweighted(driven(network(), latents=law), Code((0.5, 0.5)), (0.0, 1.0))
    path = save(ternarize(own, settings=QUICK), tmp_path / "file")
    with pytest.raises(PackedFileError, match="a law that no file holds"):
        numpy_reader.PackedGenerator(path, (1, 8, 8))
