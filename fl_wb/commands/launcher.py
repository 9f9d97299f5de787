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
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from fl_wb.commands.watchdog import end, watched

STARTUP_SECONDS = 60.0
STATUS_SECONDS = 30.0
ATTEMPTS = 3  # another program may take the free port before the SuperLink does
LONGEST = 24  # bytes: a Unix socket's path has 107, and Ray's below a home in this folder 83 more
LOOPBACK = ("127.0.0.1", "localhost")
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


class RunFailed(RuntimeError):
    """A run that could not be started or did not complete; the text says what Flower said."""


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
    with _home() as home, _interruptible():
        environment = _environment(home)
        with _superlink(home, environment, log):
            folder = _own_app(home) if app is None else app
            settings = _settings(home, run_config)
            size = f"num-supernodes={nodes} client-resources-num-cpus=1"
            if gpus:
                size += f" client-resources-num-gpus={gpus}"
            command = ["flwr", "run", str(folder), "--stream", "--run-config", settings]
            run_id, cause = _stream([*command, "--federation-config", size], environment)
            _check_completed(run_id, cause, environment)


def submit(run_config: Mapping[str, str], superlink: str, *, app: Path | None = None) -> None:
    """Run an app on the nodes of a SuperLink; show its log; return when it has completed.

    Interrupted, it leaves the run alone: `flwr log` goes on showing it, `flwr stop` ends it.

    Parameters
    ----------
    run_config : mapping of str to str
        The values of Flower's run config.
    superlink : str
        Name of a connection in Flower's own configuration (``flwr config list``).
    app : path, optional
        Folder of the app; by default FL-WB itself, which the SuperLink's machine and the nodes
        then need to have installed.

    Raises
    ------
    RunFailed
        If the run did not complete.
    """
    with _home() as home, _interruptible():
        environment = _environment(home)
        del environment["FLWR_HOME"]  # the connection stands in the user's
        environment |= {k: v for k, v in os.environ.items() if k == "FLWR_HOME"}
        folder = _own_app(home) if app is None else app
        command = ["flwr", "run", str(folder), superlink, "--stream"]
        settings = _settings(home, run_config)
        run_id, cause = _stream([*command, "--run-config", settings], environment)
        _check_completed(run_id, cause, environment, superlink)


def _settings(home: Path, run_config: Mapping[str, str]) -> str:
    """Write a run config to a file that `flwr run` reads."""
    settings = home / "run.toml"
    # A JSON string is a TOML string; `--run-config key="..."` could hold no quotation mark.
    lines = [f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in run_config.items()]
    settings.write_text("".join(lines), encoding="utf-8")
    return str(settings)


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


def _check_completed(run_id: str, cause: str, environment: dict[str, str], *superlink: str) -> None:
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
def _home() -> Iterator[Path]:
    """Make a temporary Flower home: connection, unpacked bundle, run config, Ray's sockets."""
    parent = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(os.fsencode(parent)) > LONGEST:
        parent = "/tmp"
    home = Path(tempfile.mkdtemp(prefix="fl-wb-", dir=parent))
    with watched(home):
        yield home


def _own_app(home: Path) -> Path:
    folder = home / "app"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(APP, encoding="utf-8")
    return folder


def _environment(home: Path) -> dict[str, str]:
    """Return the environment of Flower's processes."""
    # They start each other by name, also where this environment's scripts are not on the PATH.
    scripts = [str(Path(sys.executable).parent), sysconfig.get_path("scripts")]
    inherited = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}  # a cluster's, not ours
    return (
        inherited
        | _no_proxy()
        | {
            "FLWR_HOME": str(home),
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": os.environ.get("FLWR_TELEMETRY_ENABLED", "0"),
            "PATH": os.pathsep.join([*scripts, os.environ.get("PATH", os.defpath)]),
            "PYTHONUNBUFFERED": "1",
            "RAY_DEDUP_LOGS": "0",  # nodes' lines of progress are alike, and all wanted
            # Ray would otherwise hide GPUs from nodes that claim none, and warn about it each time.
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_TMPDIR": str(home),
        }
    )


def _no_proxy() -> dict[str, str]:
    """Return the variables that keep what is on this machine from its proxy, for HTTP and gRPC."""
    found = (os.environ.get(name) for name in ("no_grpc_proxy", "no_proxy", "NO_PROXY"))
    hosts = [host.strip() for text in found if text for host in text.split(",") if host.strip()]
    text = "*" if "*" in hosts else ",".join(dict.fromkeys([*hosts, *LOOPBACK]))
    return dict.fromkeys(("no_grpc_proxy", "no_proxy", "NO_PROXY"), text)


@contextmanager
def _superlink(home: Path, environment: dict[str, str], log: Path) -> Iterator[None]:
    """Keep a SuperLink for simulations running, and name it as this Flower home's default."""
    program = shutil.which("flower-superlink", path=environment["PATH"])
    if program is None:
        raise RunFailed("flower-superlink is not installed; install flwr[simulation]")
    for _ in range(ATTEMPTS):
        port = _free_port()
        with log.open("ab") as sink:
            process = subprocess.Popen(
                [
                    *(program, "--insecure", "--simulation", "--host", "127.0.0.1"),
                    *("--port", str(port), "--disable-runtime-dependency-installation"),
                ],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
        try:
            if _healthy(process, port):
                (home / "config.toml").write_text(
                    '[superlink]\ndefault = "own"\n\n[superlink.own]\n'
                    f'address = "127.0.0.1:{port}"\ninsecure = true\n',
                    encoding="utf-8",
                )
                yield
                return
        finally:
            end(home)
            process.kill()  # for a system that shows no process's environment
            process.wait()
    raise RunFailed(f"the SuperLink did not start; see {log}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _healthy(process: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until a SuperLink answers; False if it ended or stays silent."""
    deadline = time.monotonic() + STARTUP_SECONDS
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), direct.open(f"http://127.0.0.1:{port}/health", timeout=1):
            return process.poll() is None
        time.sleep(0.1)
    return False


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
