"""A SuperLink and SuperNodes on loopback, as processes of their own, for tests.

With TLS and node authentication, on free ports, in a Flower home of their own; whatever a test
does to them, every process ends with the deployment, by its own id, also when pytest is killed.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

import fl_wb

PACKAGE = str(Path(fl_wb.__file__).parents[1])  # also where FL-WB is not installed
DOCUMENT = Path(__file__).parents[1] / "docs" / "deployment.md"
PATIENCE = 240.0  # seconds; a machine under test may be slow
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>


class Deployment:
    """A SuperLink, its SuperNodes, and the runs that are started on them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        self.certificates = folder / "certificates"
        self.nodes: dict[str, psutil.Process] = {}
        self._processes: list[psutil.Popen] = []
        self.home.mkdir(parents=True)
        scripts = [str(Path(sys.executable).parent), sysconfig.get_path("scripts")]
        paths = [PACKAGE, os.environ.get("PYTHONPATH", "")]
        self.environment = os.environ | {
            "FLWR_HOME": str(self.home),
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
            "OMP_NUM_THREADS": "1",
            "PATH": os.pathsep.join([*scripts, os.environ.get("PATH", os.defpath)]),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
        }

    def __enter__(self) -> Self:
        """Make certificates and start the SuperLink."""
        make_certificates(self.certificates, nodes=4)
        try:
            self._start_superlink()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """End every process."""
        self.end()

    def end(self) -> None:
        """End every process of the deployment, whatever state it is in."""
        family = []
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                family += [*process.children(recursive=True), process]
        for way in ("terminate", "kill"):
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    getattr(process, way)()
            _, family = psutil.wait_procs(family, timeout=10)

    def _start_superlink(self) -> None:
        for _ in range(3):  # another program may take the port first
            self.address = f"127.0.0.1:{free_port()}"
            self.start_superlink()
            if self.superlink.poll() is None:
                break
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "lab"\n\n[superlink.lab]\naddress = "{self.address}"\n'
            f'root-certificates = "{self._files("ca.crt")[0]}"\n',
            encoding="utf-8",
        )

    def start_superlink(self) -> None:
        """Start the SuperLink, or start it again: its database knows the nodes still."""
        ca, certificate, key = self._files("ca.crt", "server.pem", "server.key")
        self.superlink = self.start(
            "superlink",
            *("flower-superlink", "--port", self.address.split(":")[1], "--enable-supernode-auth"),
            *("--ssl-ca-certfile", ca, "--ssl-certfile", certificate, "--ssl-keyfile", key),
            *("--database", str(self.folder / "superlink.db")),
            "--disable-runtime-dependency-installation",
        )
        wait(partial(_answers, self.superlink, f"https://{self.address}/health", ca))

    def add(self, name: str, key: int, node_config: str, *, address: str = "") -> None:
        """Register a node's key and start its SuperNode, on the SuperLink's address or another."""
        public, private, ca = self._files(f"node-{key}.pub", f"node-{key}", "ca.crt")
        self.flwr("supernode", "register", public, "lab")
        self.nodes[name] = self.start(
            name,
            *("flower-supernode", "--superlink", address or self.address),
            *("--root-certificates", ca),
            *("--auth-supernode-private-key", private, "--port", str(free_port())),
            *("--node-config", node_config),
        )

    def run(self, name: str, *overrides: str) -> psutil.Popen:
        """Start `fl-wb superlink=lab` in the background; see `log` for what it prints."""
        command = (sys.executable, "-m", "fl_wb.commands.cli", "superlink=lab", *overrides)
        return self.start(name, *command)

    def flwr(self, *arguments: str) -> str:
        """Run the `flwr` command and return what it prints."""
        done = self.try_flwr(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def try_flwr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the `flwr` command, which may fail."""
        return subprocess.run(
            ["flwr", *arguments],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    def stop(self, name: str) -> None:
        """Run `flwr stop` for a run that `run` started."""
        found = re.search(r"Successfully started run (\d+)", self.log(name))
        assert found, self.log(name)
        self.flwr("stop", found[1], "lab")

    def log(self, name: str) -> str:
        """Return what a process has printed."""
        return (self.folder / f"{name}.log").read_text("utf-8", errors="replace")

    def kill(self, *processes: psutil.Process) -> None:
        """Kill processes (SIGKILL) and all that they started."""
        family = [m for process in processes for m in (process, *process.children(recursive=True))]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        for member in family:
            wait(partial(ended, member))

    def serverapp(self, output: Path) -> psutil.Process | None:
        """Return the process of the ServerApp that writes to a folder, if there is one."""
        for process in self.superlink.children(recursive=True):
            with suppress(psutil.Error):
                if any(Path(file.path).is_relative_to(output) for file in process.open_files()):
                    return process
        return None

    def start(self, name: str, *command: str) -> psutil.Popen:
        """Start a process that ends with the deployment; see `log` for what it prints."""
        with (self.folder / f"{name}.log").open("ab") as sink:
            process = psutil.Popen(
                command,
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
                preexec_fn=_end_with_us,
            )
        self._processes.append(process)
        return process

    def _files(self, *names: str) -> list[str]:
        return [str(self.certificates / name) for name in names]


class Recorder:
    """Stands between the nodes and a SuperLink, with its certificate, and keeps what nodes say."""

    def __init__(self, deployment: Deployment) -> None:
        ca, certificate, key = deployment._files("ca.crt", "server.pem", "server.key")
        self.heard = bytearray()
        self._upstream = deployment.address.split(":")
        self._ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._ours.load_cert_chain(certificate, key)
        self._its = ssl.create_default_context(cafile=ca)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        port = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        self.address = f"127.0.0.1:{port}"

    async def _listen(self) -> int:
        server = await asyncio.start_server(self._node, "127.0.0.1", 0, ssl=self._ours)
        return int(server.sockets[0].getsockname()[1])

    async def _node(self, said: asyncio.StreamReader, told: asyncio.StreamWriter) -> None:
        host, port = self._upstream
        try:
            answers, there = await asyncio.open_connection(host, int(port), ssl=self._its)
        except OSError:  # the SuperLink is gone
            told.close()
            return
        await asyncio.gather(self._pass(said, there, self.heard), self._pass(answers, told))

    @staticmethod
    async def _pass(
        source: asyncio.StreamReader, sink: asyncio.StreamWriter, heard: bytearray | None = None
    ) -> None:
        with suppress(OSError):
            while data := await source.read(1 << 16):
                if heard is not None:
                    heard += data
                sink.write(data)
                await sink.drain()
        sink.close()


def documented(language: str, within: str) -> str:
    """Return the block of docs/deployment.md that holds a text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)
    (block,) = (block for block in blocks if within in block)
    return str(block)


def make_certificates(folder: Path, nodes: int) -> None:
    """Make certificates and keys as docs/deployment.md does, in another folder.

    Raises
    ------
    CalledProcessError
        If there are certificates already.
    """
    script = documented("bash", "openssl req").replace("~/lab-certificates", f"'{folder}'")
    script = script.replace("0 1 2;", " ".join(map(str, range(nodes))) + ";")
    subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True)


def _end_with_us() -> None:
    """Have this process terminated when the one that started it ends, however that happens."""
    if LIBC is not None:
        LIBC.prctl(DEATH_SIGNAL, signal.SIGTERM)


def _answers(superlink: psutil.Popen, url: str, ca: str) -> bool:
    """Whether a SuperLink answers over TLS, or has ended."""
    context = ssl.create_default_context(cafile=ca)
    handlers = (urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    with suppress(OSError), urllib.request.build_opener(*handlers).open(url, timeout=2):
        return True
    return superlink.poll() is not None


def ended(process: psutil.Process) -> bool:
    """Whether a process is no more, or only its parent does not know yet."""
    with suppress(psutil.NoSuchProcess):
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True


def find(process: psutil.Process, program: str) -> psutil.Process | None:
    """Return a descendant of a process that runs a program."""
    for child in process.children(recursive=True):
        with suppress(psutil.Error):
            if any(program in part for part in child.cmdline()[:2]):
                return child
    return None


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait(happened: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """Wait until something is true, and return it."""
    deadline = time.monotonic() + patience
    while not (found := happened()):
        assert time.monotonic() < deadline, f"{happened} did not happen in {patience:.0f} s"
        time.sleep(0.05)
    return found
