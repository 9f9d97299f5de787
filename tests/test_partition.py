"""Who gets what: the partitions that people use, by flwr-datasets' names and with its counts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fl_wb.app.config import compose
from fl_wb.app.overrides import ConfigError
from fl_wb.data.datasets import (
    DataConfig,
    DataError,
    load,
    source_samples,
    target_samples,
    who_has_what,
)
from fl_wb.data.partition import deal, piles, serve
from fl_wb.reporting.bars import stacked_bars
from fl_wb.reporting.tables import partition_table
from tests.test_datasets import rows
from tests.test_simulation import TINY, check_results, run_in_process

LABELS = np.random.default_rng(5).choice([0, 1, 2, 3, 7], size=937, p=[0.1, 0.3, 0.2, 0.15, 0.25])


def counts(partition: str, number: int, seed: int, **changes: Any) -> list[dict[int, int]]:
    settings = {"alpha": 0.5, "per_source": 2, **changes}
    dealt = deal(piles(LABELS, seed), partition, [], number, seed=seed, **settings)
    return [{label: len(pile) for label, pile in own.items() if len(pile)} for own in dealt]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("partition", "changes", "name", "theirs"),
    [
        ("dirichlet", {"alpha": 0.3}, "Dirichlet", {"alpha": 0.3}),
        ("dirichlet", {"alpha": 5.0}, "Dirichlet", {"alpha": 5.0}),
        ("shards", {"per_source": 3}, "Shard", {"num_shards_per_partition": 3}),
        ("pathological", {"per_source": 2}, "Pathological", {"num_classes_per_partition": 2}),
    ],
)
@pytest.mark.filterwarnings("ignore:The specified min_partition_size")
def test_each_source_has_as_many_of_each_class_as_flwr_datasets_gives_it(
    partition: str, changes: dict[str, Any], name: str, theirs: dict[str, Any], seed: int
) -> None:
    partitioners = pytest.importorskip("flwr_datasets.partitioner")
    import datasets

    number = 9
    made = getattr(partitioners, f"{name}Partitioner")(
        num_partitions=number, partition_by="label", seed=seed, **theirs
    )
    made.dataset = datasets.Dataset.from_dict({"label": LABELS})
    for index, found in enumerate(counts(partition, number, seed, **changes)):
        labels, those = np.unique(made.load_partition(index)["label"], return_counts=True)
        assert found == dict(zip(labels.tolist(), those.tolist(), strict=True))


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("partition", ["iid", "dirichlet", "shards", "pathological"])
def test_no_two_nodes_share_an_image_and_a_seed_deals_anew(partition: str, seed: int) -> None:
    data = DataConfig(partition=partition, num_sources=12, targets=[[0, 4], [4, 9]], seed=seed)
    train, test = load(data)
    given = [source_samples(data, index) for index in range(12)]
    given += [target_samples(data, index) for index in range(2)]
    seen = [row for samples in given for row in rows(samples.images)]
    assert len(seen) == len(set(seen)) <= len(train)
    assert set(seen) <= rows(train.images)
    assert not set(seen) & rows(test.images)
    table = who_has_what(data)
    assert list(table) == [*(f"source {i}" for i in range(12)), "target 0", "target 1"]
    for samples, found in zip(given, table.values(), strict=True):
        labels, those = np.unique(samples.labels.numpy(), return_counts=True)
        assert found == dict(zip(labels.tolist(), those.tolist(), strict=True))
    other = DataConfig(
        partition=partition, num_sources=12, targets=[[0, 4], [4, 9]], seed=seed + 10
    )
    assert rows(source_samples(other, 0).images) != rows(given[0].images)


def test_iid_deals_everything_and_evenly() -> None:
    found = counts("iid", 10, seed=1)
    assert sorted(sum(own.values()) for own in found) == [93] * 3 + [94] * 7
    whole = {label: int((label == LABELS).sum()) for label in np.unique(LABELS).tolist()}
    assert {label: sum(own.get(label, 0) for own in found) for label in whole} == whole
    for own in found:
        for label, count in whole.items():
            assert abs(own[label] - count / 10) < 4 * (count / 10) ** 0.5


def test_alpha_says_how_uneven() -> None:
    def largest_share(alpha: float) -> float:
        found = counts("dirichlet", 5, seed=0, alpha=alpha)
        return float(np.mean([max(own.values()) / sum(own.values()) for own in found]))

    assert largest_share(0.1) > 0.6 > 0.35 > largest_share(1000.0)


def test_a_source_with_few_images_of_a_class_keeps_no_more_than_it_may() -> None:
    data = DataConfig(partition="iid", num_sources=3, source_samples_per_class=[5, 9, 1])
    found = who_has_what(data)
    assert found["source 0"] == dict.fromkeys(range(10), 5)
    assert found["source 1"] == dict.fromkeys(range(10), 9)
    assert sum(found["source 2"].values()) == 10


def test_targets_are_served_first() -> None:
    few, rest = serve(piles(LABELS, 0), [[0, 7], [7], [0]], 60)
    assert [set(own) for own in few] == [{0, 7}, {7}, set()]  # class 0 has some 90
    assert len(rest[7]) == np.sum(LABELS == 7) - 120


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"partition": "dirichlet", "alpha": 0.001}, "left a source with fewer than 10 of the"),
        ({"partition": "shards", "per_source": 500}, "cannot be cut into 10000 shards"),
        ({"partition": "pathological", "per_source": 11}, "per_source=11 must be at most 10"),
        ({"partition": "by_name"}, "must be one of: classes, iid, dirichlet, shards, pathological"),
    ],
)
def test_what_cannot_be_dealt_is_said(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        source_samples(DataConfig(num_sources=20, **changes), 0)


def test_more_sources_than_images_and_sources_that_are_not_there() -> None:
    data = DataConfig(partition="iid", num_sources=2000)
    assert len(source_samples(data, 0)) == 1
    with pytest.raises(DataError, match="no training image is left for source 1999 of 2000"):
        source_samples(data, 1999)
    with pytest.raises(DataError, match="source 2000 does not exist"):
        source_samples(data, 2000)


def test_settings_of_partitions_are_checked() -> None:
    for overrides, number in (
        ("data.partition=dirichlet data.alpha=0.3 data.num_sources=20", 20),
        ("data.partition=iid", 2),
        ("data.partition=iid data.num_sources=9 strategy=full_data", 1),
    ):
        assert compose(overrides).data.source_count == number
    for overrides, words in (
        ("data.num_sources=3", "data.num_sources=3 is for the other partitions"),
        ("data.partition=some", "data.partition='some' must be"),
        ("data.partition=iid data.num_sources=0", "data.num_sources=0 must be"),
        ("data.partition=dirichlet data.alpha=0", r"data.alpha=0.0 must be"),
        ("data.partition=iid data.num_sources=3 strategy.source=3", "must be less than 3"),
        ("data.partition=iid data.num_sources=3 data.source_samples_per_class=[9,9]", "3 sources"),
    ):
        with pytest.raises(ConfigError, match=words):
            compose(overrides)


def test_the_table_and_the_picture_say_who_has_what() -> None:
    nodes = {"source 0": {3: 30, 5: 10}, "target 0": {5: 20}}
    assert partition_table(nodes).splitlines() == [
        "          images   3   5",
        "------------------------",
        "source 0      40  30  10",
        "target 0      20   -  20",
    ]
    many = partition_table({"source 0": dict.fromkeys(range(100), 2)})
    assert many.splitlines()[-1].split() == ["source", "0", "200", "100"]
    picture = np.asarray(Image.open(io.BytesIO(stacked_bars(nodes))).convert("RGB")).astype(int)
    coloured = (np.ptp(picture, axis=2) > 60).sum(axis=1)
    longest, other = coloured[5], coloured[5 + 18]
    assert longest == 480  # three quarters of the first bar are of class 3
    assert other == 240
    assert len(np.unique(picture[5][np.ptp(picture[5], axis=1) > 60], axis=0)) == 2
    with pytest.raises(ValueError, match="no node has anything"):
        stacked_bars({"source 0": {}})


def test_a_run_says_who_has_what(tmp_path: Path) -> None:
    dealt = "data.partition=dirichlet data.alpha=0.5 data.num_sources=3"
    setting = (*dealt.split(), "data.targets=[[0,1]]")
    run_in_process(tmp_path, *setting, nodes=4)
    found = check_results(tmp_path, *setting)
    table = who_has_what(compose([*TINY, *setting]).data)
    assert found["partition"] == json.loads(json.dumps(table))
    assert set(found["sources"]) == {"0", "1", "2"}
    for index in range(3):
        images = sum(table[f"source {index}"].values())
        assert found["sources"][str(index)]["num-examples"] == images
    assert Image.open(tmp_path / "partition.png").size[0] > 480
