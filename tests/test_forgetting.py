"""Forgetting a source: its cell is sampled by nobody at once, and the next merge is without it."""

from __future__ import annotations

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
from tests.toys import evaluates


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
