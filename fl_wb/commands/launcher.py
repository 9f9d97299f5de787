"""Launching one run: simulated, alone on its own SuperLink, or on a SuperLink that is there.

Plain `flwr run` shares one background SuperLink among all users of a machine: one port, the working
directory of whoever started it first, the app's dependencies installed anew for each run, and an
exit status of 0 even when the run failed. Here every run gets a SuperLink of its own, on a free
port and with a Flower home of its own, which ends with the run, also when that is interrupted or
killed. What the caller's environment holds for other programs (a proxy, a cluster of Ray's, a deep
``TMPDIR``) does not reach it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from fl_wb.commands.superlink import RunFailed, environment_of, flower_home, own_superlink

STATUS_SECONDS = 30.0
EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit|Killed)\b")

# The bundle that Flower hands to server and clients holds no code: simulated nodes share this
# machine's environment, where fl_wb is installed.
APP = """\
[project]
name = "fl-wb"
version = "0.0.0"
description = "Adaptive coalescence of generative models"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fl-wb"

[tool.flwr.app.components]
serverapp = "fl_wb.server_app:app"
clientapp = "fl_wb.client_app:app"

[tool.flwr.app.config]
config = ""
overrides = ""
output = ""
"""


def launch(
    run_config: Mapping[str, str],
    *,
    nodes: int,
    log: Path,
    gpus: float = 0.0,
    app: Path | None = None,
) -> None:
    """Run an app with ``nodes`` simulated nodes; show its log; return when it has completed.

    Parameters
    ----------
    run_config : mapping of str to str
        The values of Flower's run config.
    nodes : int
        Simulated nodes; each computes on one CPU core at a time.
    log : path
        File for what the SuperLink itself has to say.
    gpus : float
        Share of a GPU that each node takes.
    app : path, optional
        Folder of the app; by default FL-WB itself.

    Raises
    ------
    RunFailed
        If the run did not complete.
    """
    with flower_home() as home, _interruptible():
        environment = environment_of(home)
        with own_superlink(home, environment, log):
            size = f"num-supernodes={nodes} client-resources-num-cpus=1"
            if gpus:
                size += f" client-resources-num-gpus={gpus}"
            _run(run_config, app, home, environment, [], ["--federation-config", size])


def submit(run_config: Mapping[str, str], superlink: str, *, app: Path | None = None) -> None:
    """Run an app on the nodes of a SuperLink; show its log; return when it has completed.

    Interrupted, it leaves the run alone: `flwr log` goes on showing it, `flwr stop` ends it.

    Parameters
    ----------
    run_config, app
        As in `launch`; FL-WB itself is then to be installed on the SuperLink's machine and the
        nodes.
    superlink : str
        Name of a connection in Flower's own configuration (``flwr config list``).

    Raises
    ------
    RunFailed
        If the run did not complete.
    """
    with flower_home() as home, _interruptible():
        environment = environment_of(home)
        del environment["FLWR_HOME"]  # the connection stands in the user's
        environment |= {k: v for k, v in os.environ.items() if k == "FLWR_HOME"}
        _run(run_config, app, home, environment, [superlink])


def _run(
    run_config: Mapping[str, str],
    app: Path | None,
    home: Path,
    environment: dict[str, str],
    superlink: list[str],
    options: Sequence[str] = (),
) -> None:
    """Run an app as `flwr run` does, and see to the end of it."""
    # A JSON string is a TOML string; `--run-config key="..."` could hold no quotation mark.
    lines = [f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in run_config.items()]
    settings = home / "run.toml"
    settings.write_text("".join(lines), encoding="utf-8")
    if app is None:
        app = home / "app"
        app.mkdir()
        (app / "pyproject.toml").write_text(APP, encoding="utf-8")
    command = ["flwr", "run", str(app), *superlink, "--stream", "--run-config", str(settings)]
    run_id, cause = _stream([*command, *options], environment)
    _check_completed(run_id, cause, environment, superlink)


def _stream(command: list[str], environment: dict[str, str]) -> tuple[str, str]:
    """Show a run's log until it ends; return the run's id, and the cause of its last error."""
    run_id, cause = "", _Cause()
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches us alone, and we end the rest in order
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                cause.read(line)
                if line.startswith("Successfully started run "):
                    run_id = line.split()[3]
        except BaseException:
            process.kill()
            raise
    if not run_id:
        raise RunFailed("flwr run did not start the run; its message stands above")
    return run_id, cause.text


class _Cause:
    """The first cause of the last traceback in a log, where Flower says but what came of it."""

    def __init__(self) -> None:
        self.text = ""
        self._linked = False  # the next traceback is a consequence of the one before

    def read(self, line: str) -> None:
        """Take the next line of the log."""
        if line.startswith(("The above exception was", "During handling of the above")):
            self._linked = True
        elif line.startswith("Traceback (most recent call last):"):
            self.text = self.text if self._linked else ""
            self._linked = False
        elif not self.text and EXCEPTION.match(line):
            self.text = line.strip()


def _check_completed(
    run_id: str, cause: str, environment: dict[str, str], superlink: Sequence[str]
) -> None:
    """Raise unless Flower lists the run as completed (`flwr run --stream` itself exits with 0)."""
    deadline = time.monotonic() + STATUS_SECONDS
    while True:
        listing = subprocess.run(
            ["flwr", "list", *superlink, "--run-id", run_id, "--format", "json"],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        try:
            run = json.loads(listing.stdout)["runs"][0]
            status, details = run["status"], run["status-details"]
        except (ValueError, LookupError, TypeError):
            status, details = "unknown", _last_words(listing.stdout + listing.stderr)
        if status == "finished:completed":
            return
        if status.startswith("finished") or time.monotonic() > deadline:
            because = "" if cause.partition(": ")[2] in details else f" ({cause})"
            raise RunFailed(f"the run ended as {status}: {details}{because}")
        time.sleep(0.5)


def _last_words(text: str) -> str:
    """Return the last line of what a `flwr` command said, also where it said it in JSON."""
    with suppress(ValueError, LookupError, TypeError):
        text = str(json.loads(text)["error-message"])
    return text.strip().rpartition("\n")[2]


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM unwind the stack, as Ctrl-C does, so that nothing stays behind."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
