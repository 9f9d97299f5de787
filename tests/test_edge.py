"""The edge: packed generators by numpy alone and by torch.export make the same samples."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fl_wb import ternary
from fl_wb.generators.networks import make_generator
from fl_wb.ternary import PackedFileError, Ternarization, numpy_reader
from fl_wb.ternary.numpy_reader import PackedGenerator

# What is packed needs only to be ternary here, not good.
QUICK = Ternarization(iterations=1)
BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "edge.py"
SHIPPED = [("mlp", (1, 8, 8)), ("conv", (3, 28, 32)), ("dcgan", (1, 32, 24))]


def packed(folder: Path, name: str, shape: tuple[int, ...]) -> tuple[Path, nn.Module]:
    """Write a packed generator with statistics of its own; return it as torch loads it."""
    torch.manual_seed(0)
    network = make_generator(name, shape, latent_dim=6, width=8)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features)
            module.running_var = torch.rand(module.num_features) + 0.5
    path = ternary.save(ternary.ternarize(network, settings=QUICK), folder / f"{name}.flwb")
    return path, ternary.load(path, network)


@pytest.mark.parametrize(("name", "shape"), SHIPPED)
def test_numpy_makes_the_same_samples(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    path, network = packed(tmp_path, name, shape)
    reader = PackedGenerator(path, shape)
    z = np.random.default_rng(1).standard_normal((5, reader.latent_dim), np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(z)).numpy()
    np.testing.assert_allclose(reader(z), expected, atol=2e-6)
    assert reader.samples(3).shape == (3, *shape)


@pytest.mark.parametrize(("name", "shape"), SHIPPED)
def test_exported_programs_make_the_same_samples(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    # Prepare
    _, network = packed(tmp_path, name, shape)
    n = torch.export.Dim("n", min=1, max=4096)

    # Execute
    program = torch.export.export(network, (torch.zeros(2, 6),), dynamic_shapes=({0: n},))
    torch.export.save(program, tmp_path / "generator.pt2")
    loaded = torch.export.load(tmp_path / "generator.pt2").module()

    # Assert
    z = torch.randn(7, 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded(z), network(z))


def test_the_benchmark_s_numpy_row_is_of_a_process_without_torch(tmp_path: Path) -> None:
    path, _ = packed(tmp_path, "mlp", (1, 8, 8))
    path.rename(tmp_path / "ternary.flwb")
    one = ["--network", "mlp", "--one", "numpy, ternary", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), *one], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["peak MB"] < 100  # torch alone takes 200


def test_the_reader_is_one_file_that_needs_numpy_alone(tmp_path: Path) -> None:
    path, _ = packed(tmp_path, "mlp", (1, 8, 8))
    copy = tmp_path / "numpy_reader.py"
    copy.write_bytes(Path(numpy_reader.__file__).read_bytes())
    code = (
        "import sys; from numpy_reader import PackedGenerator\n"
        f"print(PackedGenerator({str(path)!r}, (1, 8, 8)).samples(2).shape)\n"
        "assert not {'torch', 'fl_wb', 'flwr'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "(2, 1, 8, 8)"


def test_another_network_or_shape_is_refused(tmp_path: Path) -> None:
    path, _ = packed(tmp_path, "conv", (1, 28, 28))
    with pytest.raises(PackedFileError, match=r"holds no ConvGenerator of \(1, 27, 28\)"):
        PackedGenerator(path, (1, 27, 28))
    with pytest.raises(PackedFileError, match=r"makes samples \(1, 28, 28\), not \(3, 28, 28\)"):
        PackedGenerator(path, (3, 28, 28))
    other = nn.Sequential(nn.Linear(2, 4))
    own = ternary.save(
        ternary.ternarize(other, settings=QUICK, latent_dim=2), tmp_path / "own.flwb"
    )
    with pytest.raises(PackedFileError, match="holds a 'Sequential', not one of"):
        PackedGenerator(own, (4,))
