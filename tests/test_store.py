"""The store of stages, and a barycenter that is killed and resumed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fl_wb.barycenter import Stage, recursive_barycenter
from fl_wb.generators.networks import MLPCritic, make_generator
from fl_wb.persistence import stage_store
from fl_wb.persistence.stage_store import StageStore
from fl_wb.persistence.tensor_files import load_tensors, save_tensors
from fl_wb.training.distillation import Distillation
from fl_wb.training.wgan import Progress, Training
from tests.points import Killed, critic, kill_at, same

STAGE = Stage(
    distillation=Distillation(iterations=4, batch_size=8),
    training=Training(iterations=3, batch_size=8, critic_steps=1, warmup=1),
)
PER_STAGE = 4 + 3
STATE = {"a": torch.ones(2), "b": torch.tensor(3)}


@pytest.fixture(autouse=True)
def _checkpoint_every_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_store, "SECONDS_BETWEEN_CHECKPOINTS", 0)


def normalised() -> nn.Module:
    """Make a generator with BatchNorm, whose statistics are state as well."""
    return make_generator("mlp", (2,), latent_dim=4, width=8)


def sources(k: int = 3, make: Callable[[], nn.Module] = normalised) -> list[nn.Module]:
    torch.manual_seed(0)
    return [make() for _ in range(k)]


def merge(
    folder: Path | StageStore | None,
    k: int = 3,
    callback: Progress | None = None,
    stage: Stage = STAGE,
) -> nn.Module:
    return recursive_barycenter(
        sources(k), critic=critic, stage=stage, fan_in=2, store=folder, callback=callback
    )


def count(folder: Path | StageStore | None, k: int = 3) -> tuple[nn.Module, int]:
    """Merge, and count the iterations that it takes."""
    told = []
    nu = merge(folder, k, lambda done, total, losses: told.append(done))
    return nu, len(told)


def files(folder: Path) -> list[str]:
    return sorted(path.suffix for path in (folder / "stages").iterdir())


# kill and resume


@pytest.mark.parametrize("killed_at", range(1, 2 * PER_STAGE + 1))
def test_a_killed_barycenter_resumes_as_if_nothing_had_happened(tmp_path: Path, killed_at: int):
    unbroken = merge(None)

    with pytest.raises(Killed):
        merge(tmp_path, callback=kill_at(killed_at))
    resumed, iterations = count(tmp_path)

    assert same(resumed, unbroken)
    assert iterations == 2 * PER_STAGE - killed_at
    assert files(tmp_path) == [".safetensors"] * 2  # no checkpoint stays behind


@pytest.mark.parametrize("geodesic", ["two_critics", "displacement"])
def test_every_geodesic_resumes(tmp_path: Path, geodesic: str):
    stage = Stage(geodesic, distillation=STAGE.distillation, training=STAGE.training)
    for killed_at in (3, PER_STAGE - 1):
        with pytest.raises(Killed):
            merge(tmp_path, callback=kill_at(killed_at), stage=stage)
    assert same(merge(tmp_path, stage=stage), merge(None, stage=stage))


def test_a_barycenter_killed_again_and_again_ends_all_the_same(tmp_path: Path):
    for _ in range(2 * PER_STAGE):
        with pytest.raises(Killed):
            merge(tmp_path, callback=kill_at(1))
    resumed, iterations = count(tmp_path)
    assert iterations == 0 and same(resumed, merge(None))


def test_between_checkpoints_only_what_was_not_saved_is_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(stage_store, "SECONDS_BETWEEN_CHECKPOINTS", 1e9)
    with pytest.raises(Killed):
        merge(tmp_path, callback=kill_at(PER_STAGE + 2))
    resumed, iterations = count(tmp_path)
    assert iterations == PER_STAGE and same(resumed, merge(None))


# finished stages


@pytest.mark.parametrize("memory", [True, False])
def test_finished_stages_are_not_trained_again(tmp_path: Path, memory: bool):
    kept = StageStore(None if memory else tmp_path)
    first, trained = count(kept)
    again, nothing = count(kept)
    assert (trained, nothing) == (2 * PER_STAGE, 0)
    assert same(first, again)


def test_a_further_generator_costs_one_stage(tmp_path: Path):
    count(tmp_path, 3)
    extended, iterations = count(tmp_path, 4)
    assert iterations == PER_STAGE
    assert same(extended, merge(None, 4))


@pytest.mark.parametrize(
    "changed",
    [
        {"weights": [1, 1, 2]},
        {"seed": 1},
        {"geodesic": "displacement"},
        {"iterations": 5},
        {"critic": lambda: MLPCritic((2,), width=32)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_other_inputs_never_meet_an_old_result(tmp_path: Path, changed: dict[str, object]):
    merge(tmp_path)
    arguments = {"critic": critic, "stage": STAGE, "fan_in": 2, **changed}
    with_store = recursive_barycenter(sources(), store=tmp_path, **arguments)
    assert same(with_store, recursive_barycenter(sources(), **arguments))
    assert not same(with_store, merge(None))


def test_the_result_is_not_the_store_s_own():
    kept = StageStore()
    nu = merge(kept)
    with torch.no_grad():
        for parameter in nu.parameters():
            parameter.zero_()
    assert same(merge(kept), merge(None))


def test_a_store_holds_the_last_chain_and_no_more(tmp_path: Path):
    kept = StageStore(tmp_path)
    merge(kept, 4)
    merge(kept, 3)
    assert files(tmp_path) == [".safetensors"] * 2
    recursive_barycenter(sources()[::-1], critic=critic, stage=STAGE, fan_in=2, store=kept)
    assert files(tmp_path) == [".safetensors"] * 2


def test_what_others_wrote_into_the_folder_stays(tmp_path: Path):
    # Prepare: a user's own file, another barycenter's stages, and its work in progress
    save_tensors(tmp_path / "mine.safetensors", STATE)
    with pytest.raises(Killed):
        recursive_barycenter(
            sources()[::-1],
            critic=critic,
            stage=STAGE,
            fan_in=2,
            store=tmp_path,
            callback=kill_at(PER_STAGE + 2),
        )
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    assert len(before) == 3

    # Execute
    merge(tmp_path, 3)

    # Assert
    assert {path: path.read_bytes() for path in before} == before


class Louder(nn.Module):
    """What it is made of, but for its last step."""

    def __init__(self, inner: nn.Module, by: float) -> None:
        super().__init__()
        self.inner, self.by = inner, by
        self.latent_dim = 4

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.by * self.inner(x)
        return y


@pytest.mark.parametrize("what", ["generator", "critic"])
def test_the_same_state_with_another_forward_meets_no_old_result(tmp_path: Path, what: str):
    def run(by: float, store: Path | None) -> nn.Module:
        judge = (lambda: Louder(critic(), by)) if what == "critic" else critic
        networks = [Louder(g, by) for g in sources()] if what == "generator" else sources()
        return recursive_barycenter(networks, critic=judge, stage=STAGE, store=store)

    first = run(1.0, tmp_path)
    second = run(2.0, tmp_path)
    assert same(second, run(2.0, None)) and not same(second, first)


@pytest.mark.parametrize("odd", ["rng", "no rng", "slot", "slots missing", "iteration"])
def test_a_checkpoint_that_does_not_fit_is_set_aside(tmp_path: Path, caplog, odd: str):
    # Prepare: a checkpoint of the WGAN, whose optimizers have slots
    with pytest.raises(Killed):
        merge(tmp_path, 2, kill_at(PER_STAGE - 1))
    paths = sorted((tmp_path / "stages").glob("*-unfinished.safetensors"))
    path = next(p for p in paths if any("critic" in n for n in load_tensors(p)[0]))
    state, _ = load_tensors(path)
    slot = next(n for n in state if "/slot/" in n and n.endswith("exp_avg"))
    if odd == "rng":  # a GPU's is 16 bytes
        state["rng"] = torch.zeros(16, dtype=torch.uint8)
    elif odd == "no rng":
        del state["rng"]
    elif odd == "slot":
        state[slot] = torch.zeros(99)
    elif odd == "slots missing":
        del state[slot]
    else:
        state["iteration"] = torch.zeros(2)
    save_tensors(path, state)

    # Execute
    nu, _ = count(tmp_path, 2)

    # Assert
    assert same(nu, merge(None, 2))
    assert "set aside" in caplog.text


def test_a_stage_says_what_it_is(tmp_path: Path):
    merge(tmp_path, 2)
    (path,) = (tmp_path / "stages").iterdir()
    _, metadata = load_tensors(path)
    assert json.loads(metadata["settings"]) == asdict(STAGE)


# faults of the disk


@pytest.mark.parametrize("damage", ["truncated", "altered", "flipped", "empty"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_damaged_file_is_set_aside_and_made_anew(tmp_path, caplog, damage, finished):
    if finished:
        merge(tmp_path, 2)
    else:
        with pytest.raises(Killed):
            merge(tmp_path, 2, kill_at(2))
    (path,) = (tmp_path / "stages").iterdir()
    data = path.read_bytes()
    path.write_bytes(
        {
            "truncated": data[: len(data) // 2],
            "altered": b"\xff" * 9 + data[9:],
            "flipped": data[:-1] + bytes([data[-1] ^ 0x40]),
            "empty": b"",
        }[damage]
    )

    nu, iterations = count(tmp_path, 2)

    assert iterations == PER_STAGE and same(nu, merge(None, 2))
    assert files(tmp_path) == [".damaged", ".safetensors"]
    assert "set aside" in caplog.text


@pytest.mark.parametrize("finished", [True, False])
def test_an_entry_of_other_networks_is_set_aside_and_made_anew(tmp_path, caplog, finished):
    if finished:
        merge(tmp_path, 2)
    else:
        with pytest.raises(Killed):
            merge(tmp_path, 2, kill_at(2))
    (path,) = (tmp_path / "stages").iterdir()
    save_tensors(path, {"net.weight": torch.zeros(7)})

    nu, iterations = count(tmp_path, 2)

    assert iterations == PER_STAGE and same(nu, merge(None, 2))
    assert files(tmp_path) == [".damaged", ".safetensors"]
    assert "set aside" in caplog.text


def test_a_full_disk_costs_the_entries_and_not_the_run(tmp_path, monkeypatch, caplog):
    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stage_store, "save_tensors", disk_full)
    nu = merge(tmp_path)
    assert same(nu, merge(None))
    assert "could not be saved" in caplog.text and "No space left" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_costs_the_entries_and_not_the_run(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    nu = merge(tmp_path / "file" / "store")
    assert same(nu, merge(None))
    assert "could not be saved" in caplog.text


def test_a_folder_turned_read_only_costs_no_run(tmp_path, monkeypatch, caplog):
    merge(tmp_path, 2)

    def read_only(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    for name in ("unlink", "replace"):
        monkeypatch.setattr(Path, name, read_only)
    monkeypatch.setattr(stage_store, "save_tensors", read_only)
    nu, iterations = count(tmp_path, 3)
    assert iterations == PER_STAGE and same(nu, merge(None, 3))


# the store itself


@pytest.fixture(params=["memory", "folder"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> StageStore:
    return StageStore(tmp_path if request.param == "folder" else None)


def equal(one: dict[str, Tensor] | None, other: dict[str, Tensor]) -> bool:
    return (
        one is not None
        and one.keys() == other.keys()
        and all(one[name].equal(other[name]) for name in other)
    )


def test_entries_are_copies_that_can_be_replaced_and_dropped(empty: StageStore):
    state = {name: value.clone() for name, value in STATE.items()}
    assert empty.get("key") is None
    empty.put("key", state)
    state["a"].zero_()
    assert equal(empty.get("key"), STATE)
    empty.put("key", {"c": torch.zeros(1)})
    assert equal(empty.get("key"), {"c": torch.zeros(1)})
    empty.drop("key")
    empty.drop("key")
    assert empty.get("key") is None


def test_keep_only(empty: StageStore):
    for key in "abc":
        empty.put(key, STATE)
    empty.keep_only(["a", "c", "unknown"])
    assert [empty.get(key) is not None for key in "abc"] == [True, False, True]


def test_what_is_claimed_is_its_own(tmp_path: Path):
    StageStore(tmp_path).put("claimed", STATE)
    StageStore(tmp_path).put("foreign", STATE)
    heir = StageStore(tmp_path)
    heir.claim(["claimed"])
    assert heir.own == ["claimed"]
    heir.keep_only(())
    assert [path.stem for path in (tmp_path / "stages").iterdir()] == ["foreign"]


def test_set_aside(empty: StageStore, caplog):
    caplog.set_level(logging.WARNING)
    empty.put("key", STATE)
    empty.set_aside("key", "because")
    assert empty.get("key") is None
    assert ("because" in caplog.text) is (empty.folder is not None)


def test_a_checkpoint_is_due_after_some_seconds(empty: StageStore, monkeypatch):
    now = 0.0
    monkeypatch.setattr(stage_store.time, "monotonic", lambda: now)
    monkeypatch.setattr(stage_store, "SECONDS_BETWEEN_CHECKPOINTS", 10.0)
    checkpoint = empty.checkpoint("key")
    assert checkpoint.load() is None and not checkpoint.due()
    now = 10.0
    assert checkpoint.due()
    checkpoint.save(STATE)
    assert not checkpoint.due() and equal(checkpoint.load(), STATE)
    assert empty.get("key") is None  # work in progress is no finished entry
    checkpoint.clear()
    assert checkpoint.load() is None


def test_stores_on_one_folder_share_their_entries(tmp_path: Path):
    StageStore(tmp_path).put("key", STATE)
    assert equal(StageStore(str(tmp_path)).get("key"), STATE)
