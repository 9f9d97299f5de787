"""Data through flwr-datasets: read in the very formats of the Hub, made on the spot."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fl_wb.app.config import compose
from fl_wb.app.overrides import ConfigError
from fl_wb.data.datasets import DataConfig, DataError, load, source_samples, target_samples
from tests.test_datasets import rows
from tests.test_simulation import check_results, run_in_process

RNG = np.random.default_rng(0)


def pictures(number: int, size: tuple[int, ...]) -> list[Image.Image]:
    return [Image.fromarray(RNG.integers(0, 256, size).astype(np.uint8)) for _ in range(number)]


class Part:
    """What a `datasets.Dataset` is to its reader: columns by name, features by class."""

    def __init__(self, features: dict[str, str], columns: dict[str, list[Any]]) -> None:
        self.features = {name: type(kind, (), {})() for name, kind in features.items()}
        self.columns = columns

    def __len__(self) -> int:  # noqa: D105
        return len(next(iter(self.columns.values())))

    def __getitem__(self, name: str) -> list[Any]:  # noqa: D105
        return self.columns[name]

    def select(self, indices: range) -> Part:
        columns = {name: [values[i] for i in indices] for name, values in self.columns.items()}
        return Part({n: type(f).__name__ for n, f in self.features.items()}, columns)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Part]:
    """Stand in for flwr-datasets, which need not be installed, by its documented interface."""
    parts: dict[str, Part] = {}

    class FederatedDataset:
        def __init__(self, *, dataset: str, partitioners: dict[str, Any], **_: Any) -> None:
            if not parts:
                self.load_split = lambda split: (_ for _ in ()).throw(OSError(f"no {dataset}\n!"))

        def load_split(self, split: str) -> Part:
            if split not in parts:
                raise ValueError(f"The given split: '{split}' is not present.")
            return parts[split]

    module = ModuleType("flwr_datasets")
    module.FederatedDataset = FederatedDataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flwr_datasets", module)
    return parts


CIFAR100 = {"img": "Image", "fine_label": "ClassLabel", "coarse_label": "ClassLabel"}


def test_cifar_is_dealt_out_like_any_data(hub: dict[str, Part]) -> None:
    # Prepare
    for split, number in (("train", 40), ("test", 12)):
        labels = [i % 4 for i in range(number)]
        columns = {"img": pictures(number, (32, 32, 3)), "fine_label": labels}
        hub[split] = Part(CIFAR100, {**columns, "coarse_label": [7] * number})
    config = compose(
        "data=cifar100 data.sources=[[0,1],[2,3]] data.targets=[[0,3]] data.samples_per_class=2"
    )

    # Execute
    train, test = load(config.data)

    # Assert
    assert config.network.generator == "dcgan"
    assert (len(train), len(test)) == (40, 12)
    assert train.images.shape[1:] == (3, 32, 32)
    written = [np.asarray(picture) for picture in hub["train"]["img"]]
    for image, label in zip(train.images[:5], train.labels[:5], strict=True):
        pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        (place,) = (i for i, other in enumerate(written) if np.array_equal(other, pixels))
        assert place % 4 == label
    few, source = target_samples(config.data, 0), source_samples(config.data, 0)
    assert len(few) == 4
    assert len(source) == 18
    assert not rows(few.images) & rows(source.images)


def test_cifar_makes_the_whole_journey_with_the_papers_networks(
    hub: dict[str, Part], tmp_path: Path
) -> None:
    for split, number in (("train", 40), ("test", 12)):
        columns = {"img": pictures(number, (32, 32, 3)), "label": [i % 4 for i in range(number)]}
        hub[split] = Part({"img": "Image", "label": "ClassLabel"}, columns)
    setting = ("data=cifar10", "data.sources=[[0],[1]]", "data.targets=[[2,3]]", "network.width=2")
    # a bank of pictures this large, and a gate of them, take longer than all the rest
    quick = ("client.adaptation.method=plain", "client.features=pixels", "client.weights=radius")
    run_in_process(tmp_path, *setting, *quick)
    found = check_results(tmp_path, *setting)
    network = found["config"]["network"]
    assert (network["generator"], network["critic"]) == ("dcgan", "dcgan")
    assert "features" not in found["targets"]["0"]


def test_images_of_many_sizes_and_no_classes_are_brought_to_one_size(hub: dict[str, Part]) -> None:
    sizes = [(256, 341, 3), (300, 256, 3), (256, 256), (40, 32, 3)]
    hub["train"] = Part({"image": "Image"}, {"image": [pictures(1, size)[0] for size in sizes]})
    data = compose("data=lsun data.held_out=0.5 data.limit=3").data
    train, test = load(data)
    assert len(train) + len(test) == 3
    assert train.images.shape[1:] == test.images.shape[1:] == (3, 32, 32)
    assert set(train.labels.tolist()) == {0}
    with pytest.raises(DataError, match=r"'other' has images of several sizes: set data.shape"):
        load(DataConfig(name="hub", dataset="other"))


def test_grey_beside_colour_becomes_colour_in_both_parts(hub: dict[str, Part]) -> None:
    for split, sizes in (("train", [(6, 5), (6, 5)]), ("test", [(6, 5), (6, 5, 3)])):
        hub[split] = Part({"image": "Image"}, {"image": [pictures(1, size)[0] for size in sizes]})
    train, test = load(DataConfig(name="hub", dataset="half-grey"))
    assert train.images.shape == test.images.shape == (2, 3, 6, 5)


def test_what_cannot_be_had_is_named(hub: dict[str, Part], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"data.dataset='a/b' cannot be read: no a/b$"):
        load(DataConfig(name="hub", dataset="a/b"))
    hub["train"] = Part({"text": "Value"}, {"text": ["a"]})
    with pytest.raises(DataError, match="'a/c' has no column of images, only text"):
        load(DataConfig(name="hub", dataset="a/c"))
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    with pytest.raises(DataError, match=r"'a/d' is read by .* pip install \"fl-wb\[datasets\]\""):
        load(DataConfig(name="hub", dataset="a/d"))
    with pytest.raises(ConfigError, match=r"data.dataset must be given"):
        compose("data=cifar10 data.dataset=null")


def test_flwr_datasets_itself_reads_such_a_folder(tmp_path: Path) -> None:
    """The same through the real package, where it is installed."""
    pytest.importorskip("flwr_datasets")
    import datasets

    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    for split, number in (("train", 12), ("test", 6)):
        columns = {"img": pictures(number, (32, 32, 3)), "label": [i % 2 for i in range(number)]}
        made = datasets.Dataset.from_dict(columns, features=features)
        made.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    train, test = load(DataConfig(name="hub", dataset=str(tmp_path)))
    assert train.images.shape == (12, 3, 32, 32)
    assert test.images.shape == (6, 3, 32, 32)
    assert sorted(train.labels.tolist()) == [0] * 6 + [1] * 6
