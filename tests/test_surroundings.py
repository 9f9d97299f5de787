"""What a run is started in, and what is left of it: proxies, deep folders, a cluster, SIGKILL."""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest

from fl_wb.commands import cli, launcher, superlink
from tests.deployment import wait
from tests.fresh import app_toml

APP = """
import os
import time
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

NODES = 3  # as many as the default configuration has
client = ClientApp()
server = ServerApp()


@client.query()
def answer(message, context):
    return Message(RecordDict(), reply_to=message)


@server.main()
def main(grid, context):
    output = Path(context.run_config["output"])
    while len(nodes := list(grid.get_node_ids())) < NODES:
        time.sleep(0.1)
    asked = [Message(RecordDict(), node, "query") for node in nodes]
    answered = [not reply.has_error() for reply in grid.send_and_receive(asked)]
    names = ("FLWR_TELEMETRY_ENABLED", "FLWR_HOME")
    (output / "answered").write_text("\\n".join([str(answered), *map(os.environ.get, names)]))
    while (output / "wait").exists():
        time.sleep(0.1)
"""
LAUNCH = """
import sys
from pathlib import Path
from fl_wb.commands.launcher import launch

folder = Path(sys.argv[1])
launch({"output": str(folder)}, nodes=3, log=folder / "log", app=folder / "asks")
"""
CHAIN = """\
Traceback (most recent call last):
  File "old.py", line 1, in old
ValueError: another node's, long ago
INFO :      going on
Traceback (most recent call last):
  File "a.py", line 3, in lay_out
    raise OSError(
OSError: no room on /scratch

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "b.py", line 4, in run
RuntimeError: Simulation Runtime crashed.

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "c.py", line 5, in run
RuntimeError: An error was encountered. Ending simulation.
"""


def app_in(folder: Path, end: str = "") -> Path:
    """Make the folder of an app whose server asks both nodes, and then does something more."""
    (folder / "asks").mkdir()
    (folder / "asks" / "asks.py").write_text(APP + end)
    settings = ("config", "overrides", "output")
    (folder / "asks" / "pyproject.toml").write_text(app_toml("asks", *settings))
    return folder


@dataclass
class Story:
    """What came of a run of this module, and where it left it."""

    folder: Path
    deep: Path
    failure: str
    left: list[psutil.Process]  # that still ran when the command had ended


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Run `fl-wb`, in surroundings made for other programs, with an app that fails in the end."""
    end = '\n    raise RuntimeError("told to \\"fail\\"") from OSError(28, "the disk is full")\n'
    folder = app_in(tmp_path_factory.mktemp("story"), end)
    deep = folder / ("job" * 20) / ("scratch" * 8)
    deep.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy"):
            for variable in (name, name.upper()):
                patch.setenv(variable, "http://192.0.2.1:3128")
        for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy", "FLWR_TELEMETRY_ENABLED"):
            patch.delenv(name, raising=False)
        patch.setenv("TMPDIR", str(deep))
        patch.setattr(tempfile, "tempdir", None)  # as a new process finds it
        patch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
        patch.setenv("FL_WB_TEST", str(folder))
        patch.chdir(folder)
        patch.setattr(cli, "launch", partial(launcher.launch, app=folder / "asks"))
        patch.setattr(cli, "_failures", [])
        patch.setattr(sys, "argv", ["fl-wb", "hydra.run.dir=out"])
        with pytest.raises(SystemExit) as raised:
            cli.main()
        left = [process for process in _family(folder) if process.pid != os.getpid()]
    return Story(folder, deep, str(raised.value), left)


def test_a_run_goes_its_way_in_surroundings_made_for_others(story: Story) -> None:
    answered, telemetry, home = (story.folder / "out" / "answered").read_text().splitlines()
    assert (answered, telemetry) == ("[True, True, True]", "0")
    assert Path(home).parent == Path("/tmp") and not Path(home).exists()
    assert not list(story.deep.iterdir())


def test_the_cause_stands_in_the_last_line(story: Story) -> None:
    assert re.search(r"(?s)finished:failed.*the disk is full", story.failure)
    assert story.failure.count('told to "fail"') == 1


def test_a_failed_run_exits_non_zero_and_leaves_nothing_running(story: Story) -> None:
    assert re.search(r'(?s)finished:failed.*told to "fail"', story.failure)
    assert "Started server process" in (story.folder / "out" / "superlink.log").read_text()
    assert not story.left


def test_nothing_is_left_of_a_run_whose_launcher_was_killed(tmp_path: Path) -> None:
    # Prepare
    folder = app_in(tmp_path)
    (folder / "wait").touch()
    environment = os.environ | {"FL_WB_TEST": str(folder), "RAY_TMPDIR": "/tmp"}
    started = psutil.Popen([sys.executable, "-c", LAUNCH, str(folder)], env=environment)
    wait((folder / "answered").exists)
    family = _family(folder)
    homes = {home for process in family if (home := process.environ().get("FLWR_HOME"))}
    (home,) = (Path(home) for home in homes if Path(home).name.startswith("fl-wb-"))
    assert len(family) > 4 and home.is_dir()

    # Execute
    started.send_signal(signal.SIGKILL)
    started.wait()

    # Assert
    wait(lambda: not _family(folder), patience=60)
    assert not home.exists()


def test_a_failure_says_its_first_cause() -> None:
    command = [sys.executable, "-c", f"print('Successfully started run 5')\nprint({CHAIN!r})"]
    run_id, cause = launcher._stream(command, dict(os.environ))
    assert (run_id, cause) == ("5", "OSError: no room on /scratch")


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        ({}, "127.0.0.1,localhost"),
        ({"NO_PROXY": "a.org, .b.org"}, "a.org,.b.org,127.0.0.1,localhost"),
        (
            {"no_proxy": "a.org,localhost", "no_grpc_proxy": "c.org"},
            "c.org,a.org,localhost,127.0.0.1",
        ),
        ({"no_proxy": "*"}, "*"),
    ],
)
def test_hosts_that_are_kept_from_the_proxy_stay_so(
    theirs: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_grpc_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    found = superlink.environment_of(Path("/home"))
    assert {found[name] for name in ("no_grpc_proxy", "no_proxy", "NO_PROXY")} == {expected}


def test_telemetry_is_the_users_to_turn_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    assert superlink.environment_of(Path("/home"))["FLWR_TELEMETRY_ENABLED"] == "1"


def _family(folder: Path) -> list[psutil.Process]:
    """Return the processes that a test started and that still run."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("FL_WB_TEST") == str(folder):
                found.append(process)
    return found
