"""A tree of merges on real Ray: killed and resumed, the same generator as in one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
import torch
from torch import Tensor, nn

from fl_wb.barycenter import Stage, recursive_barycenter
from fl_wb.persistence.tensor_files import load_tensors, save_tensors
from fl_wb.training.distillation import Distillation
from fl_wb.training.wgan import Training
from tests.points import Gaussian, critic

STAGE = Stage(
    distillation=Distillation(iterations=20, batch_size=8),
    training=Training(iterations=2, batch_size=8, critic_steps=1, warmup=1),
)
MERGES = 3 + 1  # of seven in groups of up to three: 3 + 2 + 2, and what comes of them
SECONDS = 400.0  # that Ray may take to start and to end, on a slow machine that does more


class Slow(Gaussian):
    """A source whose student takes its time: a merge that goes on when the process is killed."""

    def __init__(self, x: float, pause: float) -> None:
        super().__init__((x, 0.0))
        self.pause = pause

    def forward(self, z: Tensor) -> Tensor:
        if self.training:
            time.sleep(self.pause)
        return super().forward(z)


def merge(pause: float, store: Path | None, executor: str | None) -> nn.Module:
    """Merge seven sources; all merges but the first take their time."""
    sources = [Slow(float(k), pause if k > 2 else 0.0) for k in range(7)]
    return recursive_barycenter(
        sources, stage=STAGE, critic=critic, fan_in=3, executor=executor, store=store
    )


def on_ray(pause: float, store: Path) -> subprocess.Popen[bytes]:
    """Merge in a process of its own, which leaves the generator beside the store."""
    work = "import sys; from tests import test_ray; test_ray.main(float(sys.argv[1]), sys.argv[2])"
    return subprocess.Popen([sys.executable, "-c", work, str(pause), str(store)])


def main(pause: float, store: str) -> None:
    """Run what `on_ray` starts."""
    torch.set_num_threads(1)
    ray.init(num_cpus=1, log_to_driver=False, include_dashboard=False)
    nu = merge(pause, Path(store), "ray")
    save_tensors(Path(store) / "nu.safetensors", dict(nu.state_dict()))
    ray.shutdown()


def finished(store: Path) -> dict[str, tuple[int, int]]:
    """Return the finished merges of a store, and of each the file as it was written once."""
    found = (store / "stages").glob("*.safetensors")
    stats = {path.name: path.stat() for path in found if "unfinished" not in path.name}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def test_a_killed_tree_resumes_without_redoing_a_finished_merge(tmp_path: Path) -> None:
    # Prepare: killed while the second merge is trained, once the first is in the store
    victim = on_ray(1.0, tmp_path)
    until = time.monotonic() + SECONDS
    while not (done := finished(tmp_path)):
        assert victim.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    os.kill(victim.pid, signal.SIGKILL)
    assert victim.wait(SECONDS) == -signal.SIGKILL
    assert len(done) == 1

    # Execute
    assert on_ray(0.0, tmp_path).wait(SECONDS) == 0

    # Assert: the first is as it was written then, and all bits are those of an unbroken merge
    after = finished(tmp_path)
    assert len(after) == MERGES and done.items() <= after.items()
    nu, _ = load_tensors(tmp_path / "nu.safetensors")
    expected = merge(0.0, None, None).state_dict()
    assert nu.keys() == expected.keys()
    assert all(torch.equal(nu[name], expected[name]) for name in nu)


def test_there_is_no_other_executor() -> None:
    with pytest.raises(ValueError, match="executor='spark' is not one of None, ray"):
        merge(0.0, None, "spark")
