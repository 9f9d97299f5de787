"""The edge: size, loading, sampling and memory of a generator, full precision against ternary.

    python benchmarks/edge.py [--network mlp]

Every row is the median of `REPETITIONS` processes of one thread, in core time: to load the file
once the libraries are imported, and a sample in batches of one and of 100; and the peak memory of
the whole process (Linux's VmHWM), of which the libraries take most.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

SHAPES = {"mlp": (1, 8, 8), "conv": (1, 28, 28), "dcgan": (1, 32, 32)}
READER = Path(__file__).parents[1] / "fl_wb" / "ternary" / "numpy_reader.py"
REPETITIONS = 5
RUNTIMES = ("torch, full precision", "torch, ternary", "numpy, ternary")


def prepare(network: str, folder: Path) -> None:
    """Write both files of one generator."""
    from fl_wb import ternary
    from fl_wb.generators.networks import make_generator
    from fl_wb.persistence.tensor_files import save_tensors

    generator = make_generator(network, SHAPES[network])
    save_tensors(folder / "full.safetensors", generator.state_dict())
    ternary.save(ternary.ternarize(generator, iterations=1), folder / "ternary.flwb")


def measure(runtime: str, network: str, folder: Path) -> dict[str, float]:
    """Load and sample in this process."""
    import numpy as np

    shape = SHAPES[network]
    sample: Callable[[int], object]
    if runtime.startswith("numpy"):
        sys.path.insert(0, str(READER.parent))  # alone, as a device has it: the package wants torch
        PackedGenerator = importlib.import_module(READER.stem).PackedGenerator

        path = folder / "ternary.flwb"
        began = time.process_time()
        reader = PackedGenerator(path, shape)
        loaded = time.process_time() - began
        latents = np.random.default_rng(0).standard_normal((100, reader.latent_dim), np.float32)
        sample = lambda n: reader(latents[:n])  # noqa: E731
    else:
        import torch

        from fl_wb import ternary
        from fl_wb.generators.networks import make_generator
        from fl_wb.persistence.tensor_files import load_tensors

        torch.set_num_threads(1)
        path = folder / ("full.safetensors" if "full" in runtime else "ternary.flwb")
        began = time.process_time()
        generator = make_generator(network, shape)
        if "full" in runtime:
            generator.load_state_dict(load_tensors(path)[0])
        else:
            generator = ternary.load(path, generator)
        loaded = time.process_time() - began
        generator.eval().requires_grad_(False)
        z = torch.randn(100, generator.latent_dim)
        sample = lambda n: generator(z[:n])  # noqa: E731
    figures = {"kB": path.stat().st_size / 1000, "load ms": loaded * 1e3}
    for n in (1, 100):
        sample(n)
        repeats, began = 200 // n + 5, time.process_time()
        for _ in range(repeats):
            sample(n)
        figures[f"us a sample, {n}"] = (time.process_time() - began) / repeats / n * 1e6
    figures["peak MB"] = _peak() / 1000
    return figures


def _peak() -> float:
    """Return this process's peak memory in kB; `ru_maxrss` would count its parent's too."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=SHAPES, default="mlp")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one[0], given.network, Path(given.one[1]))))
        return
    from fl_wb.reporting.tables import columns  # brings torch, which numpy's row is without

    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(given.network, Path(folder))
        for runtime in RUNTIMES:
            command = [sys.executable, __file__, "--network", given.network]
            found = []
            for _ in range(REPETITIONS):
                done = subprocess.run(
                    [*command, "--one", runtime, folder],
                    env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                    capture_output=True,
                    text=True,
                    check=True,
                )
                found.append(json.loads(done.stdout))
            rows[runtime] = {name: median(figures[name] for figures in found) for name in found[0]}
    names = list(rows[RUNTIMES[0]])
    cells = [[runtime, *(f"{f[name]:.1f}" for name in names)] for runtime, f in rows.items()]
    print(columns([[given.network, *names], *cells]))


if __name__ == "__main__":
    main()
