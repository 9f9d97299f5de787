"""The command line: checks first, one run at a time, and an honest exit status."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
from PIL import Image

from fl_wb.app.config import compose, from_run_config
from fl_wb.app.overrides import ConfigError
from fl_wb.commands import cli, watchdog
from fl_wb.commands.launcher import launch, submit
from fl_wb.commands.superlink import RunFailed
from fl_wb.data.readers import DataError
from tests.fresh import app_toml

Command = Callable[..., list[dict[str, Any]]]

APP = """
from pathlib import Path
from time import sleep

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()


@server.main()
def main(grid, context):
    output = Path(context.run_config["output"])
    (output / "started").touch()
    sleep(120)
"""
# As Ray does when it is told to end.
LATE_WORKER = """
import os, signal, subprocess, sys, time

def end(number, frame):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open(os.path.join(os.environ["FLWR_HOME"], "late"), "w").close()
    sys.exit()

signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `fl-wb` in this process, with launches recorded instead of made."""
    launches: list[dict[str, Any]] = []

    def record(run_config: Mapping[str, str], **settings: Any) -> None:
        launches.append({"run_config": run_config, **settings})
        if "seed=13" in run_config["overrides"]:
            raise RunFailed("unlucky")
        final = {"barycenter": {"energy": from_run_config(run_config).seed, "kid": None}}
        metrics = json.dumps({"final": final})
        (Path(run_config["output"]) / "metrics.json").write_text(metrics, encoding="utf-8")

    def run(*arguments: str) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["fl-wb", *arguments])
        cli.main()
        return launches

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "launch", record)
    monkeypatch.setattr(cli, "_failures", [])
    monkeypatch.setattr(cli, "_outputs", [])
    run.launches = launches  # type: ignore[attr-defined]
    return run


def test_a_run_gets_its_overrides_and_hydras_folder(command: Command, tmp_path: Path) -> None:
    (launched,) = command("experiment=non_overlapping", "seed=3", "hydra.run.dir=here")

    assert launched["run_config"]["output"] == str(tmp_path / "here")
    assert launched["nodes"] == 3
    assert launched["gpus"] == 0
    theirs = from_run_config(launched["run_config"])
    theirs.output = None
    assert theirs == compose(["experiment=non_overlapping", "seed=3"])


@pytest.fixture
def mine(tmp_path: Path) -> list[str]:
    """Return the arguments for a user's own root and option, in a folder with an odd name."""
    folder = tmp_path / "it's, mine"
    (folder / "client").mkdir(parents=True)
    (folder / "client" / "slow.yaml").write_text("source: {critic_lr: 1e-4}")
    root = "defaults:\n  - config\n  - override client: slow\n  - _self_\nseed: 5\n"
    (folder / "mine.yaml").write_text(root)
    return ["--config-dir", folder.name, "--config-name", "mine"]


def test_a_users_own_files_are_what_runs(command: Command, mine: list[str]) -> None:
    (launched,) = command(*mine, "rounds=2")

    config = from_run_config(launched["run_config"])
    assert (config.seed, config.rounds, config.client.source.critic_lr) == (5, 2, 1e-4)
    assert config.client == compose("client.source.critic_lr=1e-4").client


def test_a_users_own_files_are_checked(command: Command, mine: list[str], tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match="client='slo' must be one of: default, paper, plain, slow"
    ):
        command(*mine, "client=slo")
    (tmp_path / mine[1] / "client" / "slow.yaml").write_text("source: {ema: 7}")
    with pytest.raises(SystemExit, match=r"client.source.ema=7.0 must be at least 0"):
        command(*mine)
    with pytest.raises(SystemExit, match="--config-dir=FOLDER adds one of yours"):
        command("--config-path", str(tmp_path / mine[1]))

    assert not command.launches  # type: ignore[attr-defined]
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("elsewhere", [(), ("hydra.job.chdir=true",)])
def test_relative_folders_become_absolute(
    command: Command, tmp_path: Path, elsewhere: tuple[str, ...]
) -> None:
    pictures = tmp_path / "it's data"
    for index in range(3):
        for label in ("cat", "dog"):
            _picture(pictures / label / f"{index}.png")

    (launched,) = command(
        "data=images",
        f"data.root='{pictures.name}'".replace("it's", r"it\'s"),
        *("data.sources=[[0],[1]]", "data.targets=[[0,1]]", "data.samples_per_class=1"),
        "output=out",
        *elsewhere,
    )

    config = from_run_config(launched["run_config"])
    assert (config.data.root, config.output) == (str(pictures), str(tmp_path / "out"))


def test_a_sweep_goes_on_after_a_failed_run_and_fails(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="unlucky"):
        command("-m", "seed=12,13,14")

    launched = [launch["run_config"] for launch in command.launches]  # type: ignore[attr-defined]
    assert [run["overrides"] for run in launched] == ["seed=12", "seed=13", "seed=14"]
    assert len({run["output"] for run in launched}) == 3
    assert "going on with the sweep" in capsys.readouterr().err


def test_a_sweep_ends_with_the_means_over_seeds(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    command("-m", "strategy=fedavg,paper", "rounds=2", "seed=1,2")

    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["strategy=fedavg", "barycenter", "1.500"] in lines
    assert ["strategy=paper", "barycenter", "1.500"] in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sed=1"], "fl-wb: 'sed=1': there is no key 'sed'; did you mean 'seed'?"),
        (["-m", "seed=1,2", "data=digits,mnits"], "data='mnits' must be one of"),
        (["-m", "seed=1,2", "output=x"], "set hydra.sweep.dir"),
        (["data=mnist", "data.root=nowhere"], "nowhere"),
        (["data.sources=[[0],[11]]"], "11"),
        (["data=images", "data.root=."], "fl-wb: "),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(
    command: Command, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        command(*arguments)

    assert message in str(exit_.value)
    assert not command.launches  # type: ignore[attr-defined]


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    with pytest.raises(ConfigError, match="no CUDA device here"):
        cli.check(compose("device=cuda:0"))


def test_targets_without_enough_data_are_refused() -> None:
    with pytest.raises(DataError, match=r"data.targets\[0\]"):
        cli.check(compose("data.samples_per_class=1000"))


@pytest.mark.parametrize(
    "overrides",
    [
        "data=mnist data.root=/on/the/other/machines nodes=4",
        "data.shape=[1,28,28] network=conv nodes=4",
        "device=cuda:7 data.samples_per_class=1000",
    ],
)
def test_a_superlink_may_have_what_this_machine_has_not(overrides: str) -> None:
    cli.check(compose(f"superlink=lab {overrides}"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("superlink=lab output=here", "output='here' must be an absolute folder"),
        ("superlink=lab data=mnist data.root=mnist", "data.root='mnist' must be an absolute"),
        ("superlink=lab data.shape=[1,28,28] network.generator=dcgan", "network.generator='dcgan'"),
        ("nodes=4", "nodes=... is for a superlink"),
    ],
)
def test_what_no_superlink_could_run_is_refused(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        cli.check(compose(overrides))


@pytest.fixture
def real_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run `fl-wb` in this process, with an app of ours instead of FL-WB's."""
    (tmp_path / "pyproject.toml").write_text(app_toml("fake", "config", "overrides", "output"))
    (tmp_path / "fake.py").write_text(APP)

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["fl-wb", *arguments])
        cli.main()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FL_WB_TEST", str(tmp_path))
    monkeypatch.setattr(cli, "launch", partial(launch, app=tmp_path))
    monkeypatch.setattr(cli, "_failures", [])
    return run


def test_a_superlink_that_flower_does_not_know_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    with pytest.raises(RunFailed, match="did not start the run"):
        submit({"overrides": "", "output": ""}, "nowhere")

    assert "nowhere" in capsys.readouterr().out


def test_an_interrupted_run_leaves_nothing_running(
    real_command: Callable[..., None], tmp_path: Path
) -> None:
    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out" / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=interrupt).start()
    with pytest.raises(SystemExit) as exit_:
        real_command("hydra.run.dir=out")

    assert exit_.value.code == 128 + signal.SIGTERM
    assert not _children(tmp_path)


def test_what_starts_while_it_all_ends_ends_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    monkeypatch.setenv("FL_WB_TEST", str(tmp_path))
    superlink = subprocess.Popen([sys.executable, "-c", LATE_WORKER], stdout=subprocess.PIPE)
    assert superlink.stdout is not None
    assert superlink.stdout.readline() == b"ready\n"

    watchdog.end(tmp_path)

    assert (tmp_path / "late").exists()
    assert not _children(tmp_path)


def _children(folder: Path) -> list[psutil.Process]:
    """Return the processes that a test started and that still run."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("FL_WB_TEST") == str(folder) and process.pid != os.getpid():
                found.append(process)
    return found


def _picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8)).save(path)
