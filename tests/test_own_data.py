"""Nodes with data of their own, and the certificates of a deployment."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, RecordDict
from PIL import Image

from fl_wb.app.config import compose
from fl_wb.app.factories import factories
from fl_wb.client_app import app, place
from fl_wb.data.datasets import load_own
from fl_wb.data.readers import DataError
from fl_wb.testing.in_process_grid import InProcessGrid
from tests.deployment import make_certificates


def folder_of(path: Path, seed: int, size: int = 8) -> Path:
    rng = np.random.default_rng(seed)
    for label in (0, 1):
        (path / str(label)).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 255, (size, size), np.uint8)
            Image.fromarray(pixels).save(path / str(label) / f"{number}.png")
    return path


def node(**node_config: str) -> Context:
    return Context(7, 11, dict(node_config), RecordDict(), {})


def test_own_data_needs_no_partition_and_its_number_says_nothing_of_them(
    tmp_path: Path,
) -> None:
    config = compose("data.shape=[1,8,8]")
    first, other = folder_of(tmp_path / "a", 0), folder_of(tmp_path / "b", 1)
    found = [place(node(role="source", data=str(f)), config) for f in (first, first, other)]
    assert found[0] == found[1]
    assert found[0].index == found[2].index == 0
    assert place(node(data=str(first)), config).role == "both"
    assert place(node(data=str(first), device="cuda:1"), config).device == "cuda:1"


def test_who_keeps_something_back_is_a_source_alone_unless_it_says_more(tmp_path: Path) -> None:
    data = str(folder_of(tmp_path / "a", 0))
    for limit in ("epsilon", "min-memorization"):
        kept = Context(7, 11, {"data": data, limit: 1.0}, RecordDict(), {})
        assert place(kept, compose("data.shape=[1,8,8]")).role == "source"
        told = Context(7, 11, {"data": data, limit: 1.0, "role": "both"}, RecordDict(), {})
        assert place(told, compose("data.shape=[1,8,8]")).role == "both"


def test_what_a_nodes_own_data_fail_with_stays_in_its_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl_wb.clients.discretion.log.propagate", True)
    folder = folder_of(tmp_path / "a", 0)
    (folder / "0" / "jane-doe.png").write_bytes(b"no picture")
    grid = InProcessGrid(app, run_config={"overrides": "data.shape=[1,8,8]", "output": "/tmp/none"})
    grid.add({"data": str(folder), "role": "source"})
    generator, _ = factories(compose("data.shape=[1,8,8]"))
    arrays = ArrayRecord(generator().state_dict())
    message = Message(RecordDict({"arrays": arrays}), 11, "train")
    (reply,) = grid.send_and_receive([message])
    assert "its own log says why" in str(reply.error.reason)
    assert "jane-doe" not in str(reply.error.reason) and "jane-doe" in caplog.text


def test_data_of_another_shape_or_a_relative_folder_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", 0, size=9)
    with pytest.raises(DataError, match=r"images \(1, 9, 9\), but those of this run are \(1, 8"):
        load_own(str(folder), compose().data)
    with pytest.raises(ValueError, match="data='here' must be an absolute folder"):
        place(node(role="source", data="here"), compose())


def test_certificates_are_private_and_never_replaced(tmp_path: Path) -> None:
    make_certificates(tmp_path / "keys", nodes=1)
    files = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "keys").iterdir()}
    assert files.pop("node-0.pub") & 0o022 == 0
    assert files == dict.fromkeys(("ca.crt", "server.pem", "server.key", "node-0"), 0o600)
    authority, certificate = (tmp_path / "keys" / name for name in ("ca.crt", "server.pem"))
    # As Python checks it from 3.13 on.
    strictly = ["openssl", "verify", "-x509_strict", "-verify_ip", "127.0.0.1", "-CAfile"]
    subprocess.run([*strictly, authority, certificate], check=True)
    with pytest.raises(subprocess.CalledProcessError) as raised:
        make_certificates(tmp_path / "keys", nodes=1)
    assert "exists" in raised.value.stderr


def test_what_a_node_says_of_itself_is_no_hash_of_its_data(tmp_path: Path) -> None:
    config = compose("data.shape=[1,8,8]")
    data = str(folder_of(tmp_path / "a", 0))
    assert place(node(data=data), config).number is None
    context = Context(7, 11, {"data": data, "partition-id": 4}, RecordDict(), {})
    assert place(context, config).number == 4


def test_a_node_with_data_of_its_own_sends_pictures_only_if_it_says_so_itself(
    tmp_path: Path,
) -> None:
    config = compose("data.shape=[1,8,8] client.send_few_pictures=true")
    data = str(folder_of(tmp_path / "a", 0))
    for answer in ({}, {"send-few-pictures": False}, {"send-few-pictures": "true"}):
        with pytest.raises(ValueError, match="node 11 has data of its own, of which"):
            place(Context(7, 11, {"data": data, **answer}, RecordDict(), {}), config)
    context = Context(7, 11, {"data": data, "send-few-pictures": True}, RecordDict(), {})
    assert place(context, config).role == "both"


@pytest.mark.parametrize(("role", "asked"), [("target", "train"), ("source", "evaluate")])
def test_a_node_refuses_what_its_role_does_not_do(role: str, asked: str) -> None:
    grid = InProcessGrid(app, run_config={"overrides": "", "output": "/tmp/none"})
    grid.add({"partition-id": 0, "role": role})
    message = Message(RecordDict({"arrays": ArrayRecord()}), 11, asked)
    (reply,) = grid.send_and_receive([message])
    assert f"node 11 has the role '{role}', not" in str(reply.error.reason)


def test_a_mistyped_role_is_an_error_of_that_node() -> None:
    grid = InProcessGrid(app, run_config={"overrides": "", "output": "/tmp/none"})
    grid.add({"partition-id": 0, "role": "soruce"})
    (reply,) = grid.send_and_receive([Message(RecordDict(), 11, "query")])
    assert "node 11: role='soruce' is not one of source, target" in str(reply.error.reason)


@pytest.mark.parametrize(("epsilon", "trained"), [(None, 8), (8.0, 10)])
def test_a_private_source_trains_on_all_of_its_own_data(
    epsilon: float | None, trained: int, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "a", 0)
    for label in (0, 1):
        pixels = np.zeros((8, 8), np.uint8) + label
        Image.fromarray(pixels).save(folder / str(label) / "more.png")
    brief = "client.source.iterations=1 client.source.batch_size=4 data.held_out=0.2"
    privacy = "" if epsilon is None else f" client.privacy.epsilon={epsilon}"
    grid = InProcessGrid(
        app, run_config={"overrides": f"data.shape=[1,8,8] {brief}{privacy}", "output": "/tmp/none"}
    )
    grid.add({"data": str(folder), "role": "source"})
    generator, _ = factories(compose("data.shape=[1,8,8]"))
    arrays = ArrayRecord(generator().state_dict())
    (reply,) = grid.send_and_receive([Message(RecordDict({"arrays": arrays}), 11, "train")])
    assert reply.content["metrics"]["num-examples"] == trained
