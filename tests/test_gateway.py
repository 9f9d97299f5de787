"""Who may do what on a SuperLink: a stranger on its own port, and behind the documented gateway."""

from __future__ import annotations

import shutil
import ssl
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError

import pytest

from tests.deployment import Deployment, documented, free_port, wait
from tests.fresh import app_toml

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx"),
]


APP = """
from pathlib import Path
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()


@server.main()
def main(grid, context):
    Path(context.run_config["output"]).touch()
"""


class Guarded(Deployment):
    """A deployment with a gateway before its SuperLink."""

    gateway = ""


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """Start a SuperLink, and the gateway of docs/deployment.md before it."""
    with Guarded(tmp_path_factory.mktemp("gateway") / "flower") as made:
        made.gateway = f"127.0.0.1:{free_port()}"
        text = documented("nginx", "/v1/fleet/").replace("8443", made.gateway.split(":")[1])
        text = text.replace("127.0.0.1:8000", made.address)
        configuration = made.certificates / "gateway.conf"
        configuration.write_text(f"pid {made.folder}/nginx.pid;\nerror_log stderr;\n{text}")
        made.start("nginx", "nginx", "-c", str(configuration), "-g", "daemon off;")
        with (made.home / "config.toml").open("a") as connections:
            ca = made.certificates / "ca.crt"
            for name, address in (("gateway", made.gateway), ("stranger", made.address)):
                connections.write(f'\n[superlink.{name}]\naddress = "{address}"\n')
                connections.write(f'root-certificates = "{ca}"\n')
        wait(lambda: status(made, "/") == 403)
        yield made


def status(deployment: Guarded, path: str) -> int:
    """Return what the gateway answers to an empty POST; 0 if nobody listens."""
    context = ssl.create_default_context(cafile=str(deployment.certificates / "ca.crt"))
    handlers = (urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    request = urllib.request.Request(f"https://{deployment.gateway}{path}", data=b"")
    with suppress(OSError):
        try:
            with urllib.request.build_opener(*handlers).open(request, timeout=10) as reply:
                return int(reply.status)
        except HTTPError as error:
            return error.code
    return 0


def test_on_the_superlinks_own_port_a_stranger_with_ca_crt_is_a_user(
    deployment: Guarded, tmp_path: Path
) -> None:
    key = str(deployment.certificates / "node-3.pub")
    assert "registered" in deployment.flwr("supernode", "register", key, "stranger").lower()
    app, ran = tmp_path / "strange", tmp_path / "ran"
    app.mkdir()
    (app / "strange.py").write_text(APP)
    (app / "pyproject.toml").write_text(app_toml("strange", "output"))
    deployment.flwr("run", str(app), "stranger", "--run-config", f'output="{ran}"')
    wait(ran.exists)


def test_behind_the_gateway_nodes_work_and_strangers_do_not(
    deployment: Guarded, tmp_path: Path
) -> None:
    deployment.add("node", 0, "partition-id=0", address=deployment.gateway)
    wait(lambda: "online" in deployment.flwr("supernode", "list", "lab"))
    key = str(deployment.certificates / "node-1.pub")
    for command in (("supernode", "register", key), ("list",), ("supernode", "list")):
        assert deployment.try_flwr(*command, "gateway").returncode != 0, command


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/runtime/pull-task-input",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/..%2fcontrol/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "//v1/control/start-run",
        "/health",
    ],
)
def test_the_gateway_forbids_all_but_the_nodes_interface(deployment: Guarded, path: str) -> None:
    assert status(deployment, path) == 403
    assert status(deployment, "/v1/fleet/pull-messages") not in (0, 403, 502)
