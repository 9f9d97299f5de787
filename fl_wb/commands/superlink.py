"""A Flower home and a SuperLink for one run alone, apart from whatever else the machine does."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fl_wb.commands.watchdog import end, watched

STARTUP_SECONDS = 60.0
ATTEMPTS = 3  # another program may take the free port before the SuperLink does
LONGEST = 24  # bytes: a Unix socket's path has 107, and Ray's below a home in this folder 83 more
LOOPBACK = ("127.0.0.1", "localhost")


class RunFailed(RuntimeError):
    """A run that could not be started or did not complete; the text says what Flower said."""


@contextmanager
def flower_home() -> Iterator[Path]:
    """Make a temporary Flower home: connection, unpacked bundle, run config, Ray's sockets."""
    parent = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(os.fsencode(parent)) > LONGEST:
        parent = "/tmp"
    home = Path(tempfile.mkdtemp(prefix="fl-wb-", dir=parent))
    with watched(home):
        yield home


def environment_of(home: Path) -> dict[str, str]:
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
def own_superlink(home: Path, environment: dict[str, str], log: Path) -> Iterator[None]:
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
