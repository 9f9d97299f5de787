"""What the server keeps of nodes that come, go and come back: it does not grow with them."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, Message
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Result

from fl_wb.barycenter import recursive_barycenter
from fl_wb.federation import uploads as uploads_module
from fl_wb.federation.uploads import KEPT, Uploads
from fl_wb.strategies import AdaptiveCoalescence
from fl_wb.testing.in_process_grid import InProcessGrid
from tests.toys import (
    STAGE,
    critic,
    evaluates,
    generator,
    initial_arrays,
    seeded_state,
    uploads,
)


def held() -> int:
    """Count the bytes of all tensors and arrays that are alive."""
    gc.collect()
    alive = gc.get_objects()
    tensors = sum(thing.nbytes for thing in alive if type(thing) is torch.Tensor)
    return tensors + sum(len(thing.data) for thing in alive if type(thing) is Array)


@dataclass
class Sizes:
    """What there is after each round."""

    kept: list[int] = field(default_factory=list)  # generators
    stages: list[int] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)  # bytes
    messages: set[tuple[str, int]] = field(default_factory=set)  # type, bytes of arrays


def come_and_go(store: Path | None, rounds: int) -> tuple[AdaptiveCoalescence, Result, Sizes]:
    """Run with four nodes at a time, of which three are replaced before every round."""
    app = ClientApp()
    uploads(app)
    evaluates(app)
    grid, sizes = InProcessGrid(app), Sizes()
    coalescence = AdaptiveCoalescence(
        generator=generator, critic=critic, stage=STAGE, store=store, min_available_nodes=1
    )

    def weigh(messages: list[Message]) -> None:
        for message in messages:
            records = message.content.array_records.values()
            arrays = [array for record in records for array in record.values()]
            size = sum(len(array.data) for array in arrays)
            sizes.messages.add((message.metadata.message_type, size))

    def move(server_round: int, arrays: ArrayRecord) -> None:
        for node_id in sorted(grid.nodes)[1:]:  # the first stays for ever
            del grid.nodes[node_id]
        while len(grid.nodes) < 4:
            grid.add({}, node_id=100 * (server_round + 1) + len(grid.nodes))
        kept = coalescence._coalescence
        sizes.kept.append(len(kept.uploads.ordered()) if kept else 0)
        sizes.stages.append(
            len(list(store.glob("*"))) if store else len(coalescence.merger.store._memory)
        )
        sizes.memory.append(held())
        assert len(coalescence._roles) <= 4

    grid.before_send = weigh
    grid.add({}, node_id=11)
    result = coalescence.start(
        grid=grid, initial_arrays=initial_arrays(), num_rounds=rounds, evaluate_fn=move
    )
    return coalescence, result, sizes


@pytest.mark.parametrize("folder", [True, False])
def test_nothing_grows_while_nodes_come_and_go(
    folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Prepare
    monkeypatch.setattr("fl_wb.federation.uploads.KEPT", 3)

    # Execute
    coalescence, result, sizes = come_and_go(tmp_path / "store" if folder else None, 10)

    # Assert: 1 + 10 x 3 nodes are merged, though few are kept: the fold, four that are there,
    # four that left, and as many stages
    assert result.train_metrics_clientapp[10]["uploads-merged"] == 31
    assert max(sizes.kept) <= 1 + 4 + 4
    assert max(sizes.stages) <= 4 + 4
    model = sum(len(array.data) for array in initial_arrays().values())
    assert sizes.messages == {("query", 0), ("train", model), ("evaluate", model)}
    assert max(sizes.memory[7:]) <= max(sizes.memory[3:7]) + model // 2
    weights = [upload.weight for upload in coalescence._coalescence.uploads.ordered()]
    assert sum(weights) == 31
    assert max(weights) > 1  # folded


def put(kept: Uploads, weights: dict[int, float], server_round: int = 1) -> None:
    """Keep uploads of these weights, by node."""
    kept.put(
        server_round,
        {
            node: (weight, f"digest {node}", {"name": torch.tensor(float(node))})
            for node, weight in weights.items()
        },
    )


def test_folding_keeps_the_weights_and_the_order() -> None:
    # Prepare
    kept, merged = Uploads(), []
    put(kept, {index: index + 1.0 for index in range(KEPT + 3)})

    def merge(parts: Any) -> dict[str, torch.Tensor]:
        merged.append([part.weight for part in parts])
        return {"name": torch.tensor(0.0)}

    # Execute and assert: as many as are kept may be gone, one more is too many
    assert kept.fold([0, 1, 2], merge) == 0
    assert kept.fold([0, 1], merge) == KEPT + 1
    assert merged == [[float(w) for w in range(KEPT + 3, 2, -1)]]
    assert [u.weight for u in kept.ordered()] == [sum(merged[0]), 2, 1]
    assert len(kept) == KEPT + 3

    # A second fold goes on from the first
    put(kept, {100 + index: 1.0 for index in range(KEPT + 1)}, server_round=2)
    assert kept.fold([0, 1], merge) == KEPT + 1
    assert merged[1] == [sum(merged[0]), *[1.0] * (KEPT + 1)]
    assert math.isclose(sum(u.weight for u in kept.ordered()), sum(merged[1]) + 3)


def test_the_barycenter_of_a_folded_beginning_is_that_of_its_parts() -> None:
    networks = []
    for seed in range(4):
        networks.append(generator())
        networks[-1].load_state_dict(seeded_state(seed))
    settings: dict[str, Any] = {"critic": critic, "stage": STAGE, "fan_in": 2}
    whole = recursive_barycenter(networks, [4, 3, 2, 1], **settings)
    beginning = recursive_barycenter(networks[:2], [4, 3], **settings)
    folded = recursive_barycenter([beginning, *networks[2:]], [7, 2, 1], **settings)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, folded.state_dict()[name])


def test_a_fold_that_fails_keeps_everything() -> None:
    kept = Uploads()
    put(kept, {index: 1.0 for index in range(KEPT + 1)})
    assert kept.fold([], lambda parts: None) == 0
    assert len(kept.ordered()) == KEPT + 1


def test_a_node_keeps_its_place_and_newcomers_come_behind_the_heaviest_first() -> None:
    kept = Uploads()
    put(kept, {11: 1.0, 12: 3.0, 13: 2.0})
    assert [int(u.key) for u in kept.ordered()] == [12, 13, 11]
    put(kept, {15: 9.0, 11: 50.0, 14: 10.0}, server_round=2)
    assert [int(u.key) for u in kept.ordered()] == [12, 13, 11, 14, 15]
    assert [int(u.key) for u in kept.latest()] == [11, 14, 15]
    kept.drop(13)
    kept.drop(13)
    assert [int(u.key) for u in kept.ordered()] == [12, 11, 14, 15]


def test_many_bytes_go_to_disk_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads_module, "MEMORY", 10)  # two numbers of four bytes, not three
    kept = Uploads()
    put(kept, {1: 1.0, 2: 1.0})
    assert kept._on_disk is None
    put(kept, {3: 1.0})
    assert kept._on_disk is not None and kept._on_disk.get("3") is not None
    assert kept._states.get("3") is None and kept._on_disk.get("1") is None
    for upload in kept.ordered():
        assert kept.state(upload)["name"] == float(upload.key)
    folder = kept._on_disk.folder
    kept.drop(3)
    assert kept._on_disk.get("3") is None
    del kept
    gc.collect()
    assert not folder.exists()


@pytest.mark.parametrize("refuses", ["files", "the folder"])
def test_a_full_disk_costs_no_upload(
    refuses: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    at = {"files": "persistence.stage_store.save_tensors"}.get(
        refuses, "federation.uploads.tempfile.TemporaryDirectory"
    )
    monkeypatch.setattr(f"fl_wb.{at}", full)
    monkeypatch.setattr(uploads_module, "MEMORY", 10)
    kept = Uploads()
    put(kept, dict.fromkeys(range(1, 6), 1.0))
    put(kept, {5: 2.0}, server_round=2)
    assert [float(kept.state(upload)["name"]) for upload in kept.ordered()] == [1, 2, 3, 4, 5]
    assert "No space left" in caplog.text


def test_what_counts_as_a_change() -> None:
    kept = Uploads()
    assert not kept.changed
    for weights, changed in (({1: 1.0}, True), ({1: 1.0}, False), ({1: 2.0}, True)):
        kept.changed = False
        put(kept, weights, server_round=2)
        assert kept.changed is changed


def test_who_was_merged_leaves_a_trace_until_a_merge_from_scratch() -> None:
    kept = Uploads()
    put(kept, {1: 1.0, 2: 1.0, 3: 1.0})
    kept.leave_out(1)  # before anything was merged
    kept.merged(afresh=True)
    assert not kept.forget(1) and not kept.changed

    put(kept, {2: 2.0}, server_round=2)
    kept.leave_out(2)
    kept.leave_out(3)
    kept.merged(afresh=False)
    assert kept.traces == {2, 3}
    assert kept.forget(2) and kept.changed and not kept.forget(2)

    kept.merged(afresh=True)
    assert not kept.traces and not kept.forget(3)


def test_who_left_weighs_in_a_fold_what_max_share_lets_it() -> None:
    kept = Uploads()
    said = {n: 1e12 if n == 20 else 100.0 for n in range(11, 21)}
    kept.put(1, {n: (weight, f"{n}", seeded_state(n)) for n, weight in said.items()}, [])
    assert kept.fold([], lambda parts: seeded_state(0)) == 10
    (folded,) = kept.ordered()
    assert folded.weight == pytest.approx(900 * (1 + 3 / 9))  # three times the mean of the others


def test_whose_weight_is_a_lie_has_no_more_of_the_labels_of_a_fold() -> None:
    kept = Uploads()
    said = {n: 1e12 if n == 20 else 100.0 for n in range(11, 21)}
    often = {n: (1.0, 0.0) if n == 20 else (0.5, 0.5) for n in said}
    kept.put(1, {n: (said[n], f"{n}", seeded_state(n)) for n in said}, [], often)
    assert kept.fold([], lambda parts: seeded_state(0)) == 10
    (folded,) = kept.ordered()
    assert folded.labels == pytest.approx((0.625, 0.375))  # it weighs a quarter of all


def leave_after_the_first(nodes: int, **arguments: Any) -> AdaptiveCoalescence:
    """Run three rounds: these nodes in the first one, two others in the next."""
    app = ClientApp()
    uploads(app)
    evaluates(app)
    grid = InProcessGrid(app)
    for node in range(11, 11 + nodes):
        grid.add({}, node_id=node)

    def move(server_round: int, arrays: ArrayRecord) -> None:
        if server_round == 1:
            grid.nodes.clear()
            for node in (91, 92):
                grid.add({}, node_id=node)

    run = AdaptiveCoalescence(generator=generator, critic=critic, stage=STAGE, **arguments)
    run.start(grid=grid, initial_arrays=initial_arrays(), num_rounds=3, evaluate_fn=move)
    return run


def test_what_is_too_old_is_not_folded_and_kept_for_ever() -> None:
    assert len(leave_after_the_first(KEPT + 1).shares) == 3
    assert len(leave_after_the_first(KEPT + 1, max_age=0).shares) == 2
