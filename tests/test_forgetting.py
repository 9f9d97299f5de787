"""Forgetting a source: its cell is sampled by nobody at once, and the next merge is without it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fl_wb.adaptation import WEIGHTS, fit_weights, own_start
from fl_wb.clients.received import received_code
from fl_wb.generators.code import Code
from fl_wb.generators.reweighted import Reweighted
from fl_wb.messages import keys
from fl_wb.testing.in_process_grid import InProcessGrid
from tests.test_adaptive_coalescence import app, same, start, strategy
from tests.test_weights_fit import CENTRES, LINE, SHARES, draws
from tests.toys import evaluates, initial_arrays


@pytest.mark.parametrize("method", WEIGHTS)
def test_no_method_gives_a_forgotten_cell_any_weight(method: str):
    few = draws(CENTRES, [10, 10, 10, 10])
    weights = fit_weights(LINE, LINE.code, few, method=method, without=[1, 3])
    assert weights[1] == weights[3] == 0 and weights[[0, 2]].min() > 0
    torch.testing.assert_close(weights.sum(), torch.ones((), dtype=torch.float64))
    if method == "shares":
        assert weights[0] / weights[2] == pytest.approx(SHARES[0] / SHARES[2])


def test_one_cell_that_is_left_has_all_the_weight_and_none_is_refused():
    few = draws(CENTRES, [10, 0, 0, 0])
    assert fit_weights(LINE, LINE.code, few, without=[0, 1, 3]).tolist() == [0, 0, 1, 0]
    with pytest.raises(ValueError, match="all 4 cells are to be forgotten"):
        fit_weights(LINE, LINE.code, few, without=range(4))


def test_a_target_never_samples_a_forgotten_cell():
    own = own_start(LINE, LINE.code, draws(CENTRES, [40, 30, 20, 10]), without=[2])
    assert isinstance(own, Reweighted) and own.weights[2] == 0
    z = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
    cell, _ = LINE.code.place(LINE.code.recode(z, own.weights.tolist()))
    assert set(cell.tolist()) == {0, 1, 3}


def message(forgotten: Any) -> Any:
    code = ConfigRecord({keys.SHARES: [0.5, 0.25, 0.25], keys.FORGOTTEN: forgotten})
    return SimpleNamespace(content=RecordDict({keys.CODE: code}))


def context() -> Context:
    return Context(1, 7, {}, RecordDict(), {})


def test_a_target_reads_what_is_forgotten():
    code, without = received_code(message([2, 0]), context())
    assert isinstance(code, Code) and without == [2, 0]


@pytest.mark.parametrize("forgotten", [[3], [-1], [0, 1, 2], [0.5], "all", 1])
def test_forgotten_cells_that_are_none_are_refused(forgotten: Any):
    with pytest.raises(ValueError, match="node 7 has forgotten cells"):
        received_code(message(forgotten), context())


def grid_of(app: ClientApp, *nodes: int) -> InProcessGrid:
    grid = InProcessGrid(app)
    for node in nodes:
        grid.add({}, node)
    return grid


def merged_of(*nodes: int) -> ArrayRecord:
    return start(strategy(), grid_of(app(evaluates), *nodes)).arrays


def test_the_server_tells_targets_at_once_and_merges_without():
    # Prepare
    grid, run = grid_of(app(evaluates), 1, 2, 3), strategy()
    result = start(run, grid)

    # Execute
    run.forget(2)
    sent = list(run.configure_evaluate(2, result.arrays, ConfigRecord(), grid))

    # Assert
    ordered = [upload.key for upload in run._coalescence.uploads.ordered()]
    assert sorted(ordered) == ["1", "3"]
    (forgotten,) = sent[0].content.config_records[keys.CODE][keys.FORGOTTEN]
    assert run._coalescence._cells[forgotten] == "2"
    assert sorted([*run.cells.values(), forgotten]) == [0, 1, 2] and set(run.cells) == {1, 3}
    arrays = run._coalescence.merged(2, [1, 2, 3])
    assert arrays is not None and same(arrays, merged_of(1, 3))
    assert not run._coalescence.forgotten


def test_an_unknown_node_is_no_matter():
    run = strategy()
    run.forget(9)
    start(run, grid_of(app(evaluates), 1, 2))
    run.forget(9)
    assert len(run._coalescence.uploads) == 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_between_two_runs_a_node_is_forgotten_for_good(when: str, tmp_path: Path):
    # Prepare
    first = strategy(store=tmp_path)
    start(first, grid_of(app(evaluates), 1, 2, 3))
    then = strategy(store=tmp_path)

    (made,) = (tmp_path / "stages").iterdir()

    # Execute
    (first if when == "after" else then).forget(2)

    # Assert
    again = start(then, grid_of(app(evaluates), 1, 3))
    assert not made.exists()
    assert same(again.arrays, merged_of(1, 3))


def test_nothing_of_it_is_on_disk_as_soon_as_it_is_forgotten(tmp_path: Path):
    run = strategy(store=tmp_path)
    start(run, grid_of(app(evaluates), 1, 2, 3))
    run.forget(2)
    assert not list((tmp_path / "stages").iterdir())
    assert len(list((tmp_path / "nodes").glob("*.safetensors"))) == 2


@pytest.mark.parametrize("restarted", [False, True])
def test_who_counts_no_more_is_forgotten_as_well(restarted: bool, tmp_path: Path):
    # Prepare: the second merge is without node 2, and starts at the first one's barycenter
    weights = {3: 1.0}  # node 3 is the first in both merges, and stays it as the heaviest
    there = app(evaluates, weights=weights)
    grid, run = grid_of(there, 1, 2, 3), strategy(store=tmp_path, max_age=0)

    def leave(server_round: int, arrays: ArrayRecord) -> None:
        if server_round == 1:
            del grid.nodes[2]
            weights[3] = 2.0

    arguments = {"initial_arrays": initial_arrays(), "num_rounds": 2, "evaluate_fn": leave}
    result = run.start(grid=grid, **arguments)
    without = start(strategy(), grid_of(there, 1, 3)).arrays
    assert set(run.cells) == {1, 3} and not same(result.arrays, without)

    # Execute
    if restarted:
        run = strategy(store=tmp_path, max_age=0)
    run.forget(2)

    # Assert
    found = start(run, grid).arrays if restarted else run._coalescence.merged(2, [1, 3])
    assert found is not None and same(found, without)


def test_a_node_whose_upload_was_lost_is_forgotten_as_well(tmp_path: Path):
    start(strategy(store=tmp_path), grid_of(app(evaluates), 1, 2, 3))
    index = json.loads((tmp_path / "nodes" / "index.json").read_text())
    (tmp_path / "nodes" / f"{index['uploads']['2']['file']}.safetensors").unlink()
    run = strategy(store=tmp_path)
    run.forget(2)
    assert same(start(run, grid_of(app(evaluates), 1, 3)).arrays, merged_of(1, 3))


def test_a_node_that_leaves_may_ask_for_it(tmp_path: Path):
    def leaves(made: ClientApp) -> None:
        @made.query()
        def query(message: Message, context: Context) -> Message:
            gone = context.node_id == 2
            role = ConfigRecord({"role": "none" if gone else "both", "forget": gone})
            return Message(RecordDict({"config": role}), reply_to=message)

    start(strategy(store=tmp_path), grid_of(app(evaluates), 1, 2, 3))
    again = start(strategy(store=tmp_path), grid_of(app(evaluates, leaves), 1, 2, 3))
    assert same(again.arrays, merged_of(1, 3))
