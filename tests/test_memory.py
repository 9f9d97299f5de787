"""The server's memory of its nodes: a barycenter goes on where another process left it."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from flwr.app import ArrayRecord, Message
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Result

from fl_wb.barycenter import Stage
from fl_wb.federation.memory import Memory
from fl_wb.federation.uploads import Uploads
from fl_wb.messages import keys
from fl_wb.persistence.locks import InUseError, locked
from fl_wb.strategies import AdaptiveCoalescence
from fl_wb.testing.in_process_grid import InProcessGrid
from fl_wb.training.distillation import Distillation
from fl_wb.training.wgan import Training
from tests.toys import STAGE, critic, evaluates, generator, initial_arrays, seeded_state, uploads
from tests.toys import reply as reply_with

KILLS = int(os.environ.get("FL_WB_KILLS", "3"))
LONG = Stage(
    distillation=Distillation(iterations=60, batch_size=8),
    training=Training(iterations=20, batch_size=8, critic_steps=1, warmup=1),
)
SESSIONS = ((11, 12, 13), (12, 14), (15,))


def session(
    store: Path | None, nodes: Sequence[int], stage: Stage = STAGE, **arguments: Any
) -> Result:
    """Run a process' worth: a new strategy, one round with these nodes."""
    app = ClientApp()
    uploads(app)
    evaluates(app)
    return run(app, nodes, store=store, stage=stage, **arguments)


def run(app: ClientApp, nodes: Sequence[int], **arguments: Any) -> Result:
    grid = InProcessGrid(app)
    for node in nodes:
        grid.add({}, node_id=node)
    minima = dict.fromkeys(("min_available_nodes", "min_train_nodes", "min_evaluate_nodes"), 1)
    settings: dict[str, Any] = {"generator": generator, "critic": critic, "stage": STAGE}
    coalescence = AdaptiveCoalescence(**{**settings, **minima, **arguments})
    return coalescence.start(grid=grid, initial_arrays=initial_arrays(), num_rounds=1)


def same(a: ArrayRecord, b: ArrayRecord) -> bool:
    return list(a) == list(b) and all(np.array_equal(a[k].numpy(), b[k].numpy()) for k in a)


def merged(result: Result) -> int:
    return int(result.train_metrics_clientapp[1]["uploads-merged"])  # type: ignore[call-overload]


def test_a_barycenter_of_yesterday_is_extended_and_nodes_that_left_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert merged(session(tmp_path, [11, 12])) == 2
    assert merged(session(tmp_path, [13])) == 3
    assert "Taken up: the generators of 2 nodes" in caplog.text
    assert merged(session(None, [13])) == 1


def test_what_did_not_change_is_given_as_it_was(tmp_path: Path) -> None:
    told: list[int] = []
    first = session(tmp_path, [11, 12])
    again = session(tmp_path, [11, 12], callback=lambda done, *_: told.append(done))
    assert same(first.arrays, again.arrays) and not told


def test_a_node_under_a_new_id_is_not_counted_twice(tmp_path: Path) -> None:
    # Prepare: nodes 21 and 22 upload what 11 and 12 did
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Any) -> Message:
        return reply_with(message, ArrayRecord(seeded_state(context.node_id - 10)))

    first = session(tmp_path, [11, 12])

    # Execute
    second = run(app, [21, 22], store=tmp_path)

    # Assert
    assert merged(second) == 2 and same(first.arrays, second.arrays)


def test_a_connected_node_s_generator_is_no_other_s(tmp_path: Path) -> None:
    kept, state = Uploads(), {"a": torch.zeros(1)}
    kept.put(1, {1: (1.0, "same", state)}, [1])
    kept.put(2, {2: (1.0, "same", state)}, [1, 2])
    assert len(kept) == 2
    kept.put(3, {3: (1.0, "same", state)}, [2, 3])
    assert sorted(kept.of_nodes()) == [2, 3]


@pytest.mark.parametrize("damage", ["model", "index", "upload"])
def test_a_memory_that_does_not_fit_is_set_aside(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session(tmp_path, [11, 12])
    nodes = tmp_path / "nodes"
    index = json.loads((nodes / "index.json").read_text())
    if damage == "model":
        index["model"]["net.0.weight"] = ["torch.float32", [9, 9]]
        (nodes / "index.json").write_text(json.dumps(index))
    elif damage == "index":
        (nodes / "index.json").write_text("{")
    else:
        path = nodes / (index["uploads"]["11"]["file"] + ".safetensors")
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert merged(session(tmp_path, [13])) == (2 if damage == "upload" else 1)
    reason = {"upload": "the upload of node 11 is left out"}.get(damage, "is set aside")
    assert reason in caplog.text


@pytest.mark.parametrize("what", ["barycenter", "upload"])
def test_a_damaged_file_costs_itself_alone_and_is_written_anew(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Prepare
    first = session(tmp_path, [11, 12])
    index = json.loads((tmp_path / "nodes" / "index.json").read_text())
    name = index["merged"] if what == "barycenter" else index["uploads"]["11"]["file"]
    path = tmp_path / "nodes" / f"{name}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))

    # Execute
    again = session(tmp_path, [12] if what == "barycenter" else [11, 12])

    # Assert
    assert merged(again) == 2
    if what == "barycenter":  # of the same uploads, in the same order
        assert same(first.arrays, again.arrays)
    assert path.read_bytes() == whole and path.with_suffix(".damaged").is_file()
    caplog.clear()
    assert merged(session(tmp_path, [13])) == 3
    assert "left out" not in caplog.text and "anew" not in caplog.text


def drawn(n: int, rng: torch.Generator) -> torch.Tensor:
    return torch.rand(n, 4, generator=rng)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 7},
        {"stage": replace(STAGE, geodesic="displacement"), "fan_in": 2},
        {"fan_in": 2},
        {"max_share": 1.0},
        {"latents": drawn},
    ],
    ids=lambda other: next(iter(other)),
)
def test_other_settings_make_the_barycenter_of_the_same_uploads_anew(
    other: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = ClientApp()
    uploads(app, {11: 20.0})
    evaluates(app)

    # Execute: the second run hears of one of the nodes alone
    run(app, [11, 12, 13], store=tmp_path)
    changed = run(app, [12], store=tmp_path, **other)
    again = run(app, [12], store=tmp_path, **other)

    # Assert
    assert same(changed.arrays, run(app, [11, 12, 13], **other).arrays)
    assert caplog.text.count("is made anew: it is of other settings") == 1
    assert merged(changed) == 3 and same(changed.arrays, again.arrays)


def test_a_budget_is_no_other_setting_and_an_index_that_says_none_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session(tmp_path, [11, 12])
    session(tmp_path, [11, 12], budget=1e6)
    assert "made anew" not in caplog.text
    path = tmp_path / "nodes" / "index.json"
    index = json.loads(path.read_text())
    del index["settings"]
    path.write_text(json.dumps(index))
    session(tmp_path, [11, 12])
    assert "is made anew: it is of other settings" in caplog.text


def test_rounds_count_on_and_a_fold_comes_back(tmp_path: Path) -> None:
    kept, states = Uploads(), {k: {"a": torch.tensor(float(k))} for k in range(12)}
    memory = Memory(tmp_path, states[0], {})
    kept.put(5, {k: (k + 1.0, f"digest {k}", state) for k, state in states.items()})
    kept.fold([0, 1], lambda parts: {"a": torch.tensor(-1.0)})
    memory.save(kept, {"a": torch.tensor(7.0)}, 6)

    found, barycenter = Memory(tmp_path, states[0], {}).load()

    assert barycenter is not None and float(barycenter["a"]) == 7.0
    assert len(found) == 12 and found.changed
    assert [float(found.state(u)["a"]) for u in found.ordered()] == [-1.0, 1.0, 0.0]
    assert {upload.round for upload in found.ordered()} == {-1}
    assert [u.weight for u in found.ordered()] == [u.weight for u in kept.ordered()]


def test_the_folder_holds_what_the_index_names_and_no_more(tmp_path: Path) -> None:
    for nodes in SESSIONS:
        session(tmp_path, nodes)
    assert len(list((tmp_path / "nodes").glob("*.safetensors"))) == 5 + 1
    assert len(list((tmp_path / "nodes").iterdir())) == 5 + 1 + 1


def test_stages_of_a_run_that_ended_go_with_the_next_one_s_merge(tmp_path: Path) -> None:
    foreign = tmp_path / "stages" / f"{'0' * 64}.safetensors"
    foreign.parent.mkdir()
    foreign.write_bytes(b"somebody's")
    for nodes in SESSIONS:
        session(tmp_path, nodes)
        assert len(list(foreign.parent.iterdir())) == 1 + 1
    assert foreign.read_bytes() == b"somebody's"


def test_a_second_run_in_one_store_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(InUseError, match="in use by another run"):
        session(tmp_path, [11])
    assert merged(session(tmp_path, [11])) == 1


def process(store: Path, nodes: Sequence[int], arrays: Path) -> multiprocessing.Process:
    """Start a session in a process of its own, which leaves its arrays in a file."""

    def work() -> None:
        torch.set_num_threads(1)
        found = session(store, nodes, LONG).arrays
        np.savez(arrays, **{name: array.numpy() for name, array in found.items()})
        os._exit(0)

    started = multiprocessing.get_context("fork").Process(target=work)
    started.start()
    return started  # type: ignore[return-value]


@pytest.mark.parametrize("seed", range(KILLS))
def test_sigkill_at_random_moments_changes_no_bit(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Prepare: unbroken, and how much of a core a session takes, which no other load changes
    monkeypatch.setattr("fl_wb.persistence.stage_store.SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    began = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    for nodes in SESSIONS:
        unbroken = process(tmp_path / "whole", nodes, tmp_path / "whole.npz")
        unbroken.join()
        assert unbroken.exitcode == 0
    usual = (sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - began) / len(SESSIONS)

    # Execute: every session is killed at a random moment, then run again
    rng, hit = random.Random(seed), 0
    for nodes in SESSIONS:
        victim = process(tmp_path / "killed", nodes, tmp_path / "killed.npz")
        moment, clock = rng.uniform(0, usual), psutil.Process(victim.pid)
        with suppress(psutil.NoSuchProcess):  # it ended before
            while victim.is_alive() and sum(clock.cpu_times()[:2]) < moment:
                time.sleep(0.002)
        victim.kill()
        victim.join()
        hit += victim.exitcode == -signal.SIGKILL
        again = process(tmp_path / "killed", nodes, tmp_path / "killed.npz")
        again.join()
        assert again.exitcode == 0

    # Assert
    assert hit > 0
    expected, found = np.load(tmp_path / "whole.npz"), np.load(tmp_path / "killed.npz")
    assert expected.files == found.files
    assert all(np.array_equal(expected[name], found[name]) for name in expected.files)
    whole, broken = ([*(tmp_path / k / "nodes").glob("[!.]*")] for k in ("whole", "killed"))
    assert {path.name for path in whole} == {path.name for path in broken}


def test_a_run_that_goes_on_tells_targets_the_code_of_the_barycenter_that_was(
    tmp_path: Path,
) -> None:
    told: list[list[float]] = []
    for nodes in ([11, 12], [21, 22]):  # as a simulation's, under new ids in each run
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Any) -> Message:
            return reply_with(message, ArrayRecord(seeded_state(context.node_id % 10)))

        @app.evaluate()
        def evaluate(message: Message, context: Any) -> Message:
            told.append(message.content.config_records[keys.CODE][keys.SHARES])  # type: ignore[arg-type]
            return reply_with(message, ArrayRecord())

        run(app, nodes, store=tmp_path)
    assert told == [[0.5, 0.5]] * 4


def test_files_that_the_memory_did_not_write_stay(tmp_path: Path) -> None:
    (tmp_path / "nodes").mkdir()
    mine = tmp_path / "nodes" / "mine.safetensors"
    mine.write_bytes(b"mine")
    session(tmp_path, [11, 12])
    session(tmp_path, [13])
    assert mine.read_bytes() == b"mine"


@pytest.mark.parametrize("where", ["stages", "uploads"])
def test_an_index_that_names_files_elsewhere_deletes_none(
    where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session(tmp_path / "store", [11, 12])
    theirs = tmp_path / "theirs.safetensors"
    theirs.write_bytes(b"somebody's")
    path = tmp_path / "store" / "nodes" / "index.json"
    index = json.loads(path.read_text())
    if where == "stages":
        index["stages"].append("../../theirs")
    else:
        index["uploads"]["11"]["mean"] = "../../theirs"
    path.write_text(json.dumps(index))
    session(tmp_path / "store", [13])
    session(tmp_path / "store", [14])
    assert theirs.read_bytes() == b"somebody's"
    assert "'../../theirs' is no name of its files" in caplog.text
