"""Loading, splitting and dealing out data."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fl_wb.data.datasets import (
    DataConfig,
    DataError,
    held_out,
    load,
    source_samples,
    target_samples,
)
from fl_wb.data.readers import read_idx


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_pair(folder: Path, prefix: str, labels: list[int], *, packed: bool = False) -> None:
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 6, 5))
    names = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    for name, array in zip(names, (images, np.array(labels)), strict=True):
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_digits_are_scaled_images():
    train, test = load(DataConfig())
    assert train.images.shape[1:] == test.images.shape[1:] == (1, 8, 8)
    assert train.images.dtype == torch.float32
    assert train.labels.dtype == torch.int64
    assert (train.images.min(), train.images.max()) == (-1, 1)
    assert len(train) + len(test) == 1797
    assert abs(len(test) - 540) <= 10


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("counts", [[5, 1, 2], [1], [40, 3], [2, 2, 2, 2]])
def test_split_is_stratified_and_disjoint(tmp_path, counts, share):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    write_pair(tmp_path, "some", labels)
    train, test = load(DataConfig(name="idx", root=str(tmp_path), held_out=share))
    assert len(train) + len(test) == len(labels)
    assert not rows(train.images) & rows(test.images)
    for label, count in enumerate(counts):
        kept = int((test.labels == label).sum())
        assert int((train.labels == label).sum()) == count - kept >= 1
        assert abs(kept - share * count) <= 1
        assert kept >= 1 or count == 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("sources", "targets", "samples_per_class"),
    [
        ([[0, 1, 2], [2, 3, 4], [2]], [[2, 4], [0, 2]], 3),
        ([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], [list(range(10))], 10),
        ([[0], [0], [0], [0]], [[0], [0], [0]], 1),
    ],
)
def test_no_two_nodes_share_an_image(sources, targets, samples_per_class, seed):
    data = DataConfig(
        sources=sources, targets=targets, samples_per_class=samples_per_class, seed=seed
    )
    train, test = load(data)
    given = [source_samples(data, i) for i in range(len(sources))]
    given += [target_samples(data, i) for i in range(len(targets))]
    for samples, classes in zip(given, sources + targets, strict=True):
        assert set(samples.labels.tolist()) == set(classes)
    seen = [row for samples in given for row in rows(samples.images)]
    assert len(seen) == len(set(seen)) == sum(map(len, given))
    assert set(seen) <= rows(train.images)
    assert not set(seen) & rows(test.images)
    for samples, classes in zip(given[len(sources) :], targets, strict=True):
        counts = [int((samples.labels == label).sum()) for label in classes]
        assert counts == [samples_per_class] * len(classes)
    for label in {label for classes in sources for label in classes}:
        shares = [int((s.labels == label).sum()) for s in given[: len(sources)]]
        shares = [share for share in shares if share]
        assert max(shares) - min(shares) <= 1  # the sources share fairly


def test_partition_depends_on_the_seed_alone():
    first, again = (target_samples(DataConfig(seed=3), 0) for _ in range(2))
    other = target_samples(DataConfig(seed=4), 0)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert torch.equal(load(DataConfig(seed=3))[1].images, load(DataConfig(seed=4))[1].images)


def test_one_sample_in_all_is_enough():
    samples = target_samples(DataConfig(targets=[[7]], samples_per_class=1), 0)
    assert samples.labels.tolist() == [7]


def test_held_out_keeps_to_its_classes():
    samples = held_out(DataConfig(), [8, 9])
    assert set(samples.labels.tolist()) == {8, 9}


@pytest.mark.parametrize(
    ("call", "changes", "words"),
    [
        (lambda data, _: source_samples(data, 2), {}, ["data.sources[2]", "does not exist"]),
        (source_samples, {"sources": [[0, 11]]}, ["data.sources[0]", "class 11", "0: "]),
        (target_samples, {"samples_per_class": 500}, ["data.targets[0]", "class 0", "500"]),
        (target_samples, {"name": "idx"}, ["idx", "data.root"]),
        (target_samples, {"name": "idx", "root": "/no/such"}, ["/no/such"]),
        (lambda data, _: held_out(data, [12]), {}, ["class 12", "9: "]),
        (lambda data, _: held_out(data, []), {}, ["no class"]),
    ],
)
def test_errors_name_node_class_and_what_is_there(call, changes, words):
    with pytest.raises(DataError) as error:
        call(DataConfig(**changes), 0)
    for word in words:
        assert word in str(error.value)


def test_hungry_target_starves_nobody_else():
    data = DataConfig(targets=[[0], list(range(10))], samples_per_class=130)
    assert len(source_samples(data, 0)) > 500


@pytest.mark.parametrize("packed", [False, True])
def test_idx_pairs_of_training_and_test(tmp_path, packed):
    write_pair(tmp_path, "train", [0, 1, 2, 1], packed=packed)
    write_pair(tmp_path, "t10k", [1, 0], packed=packed)
    train, test = load(DataConfig(name="idx", root=str(tmp_path)))
    assert train.images.shape == (4, 1, 6, 5)
    assert sorted(test.labels.tolist()) == [0, 1]
    written = np.random.default_rng(0).integers(0, 256, (4, 6, 5)) / 127.5 - 1
    for image, label in zip(train.images, train.labels, strict=True):
        places = [i for i in range(4) if np.allclose(image[0].numpy(), written[i], atol=1e-6)]
        assert [[0, 1, 2, 1][i] for i in places] == [label]


def test_the_first_images_are_a_fair_sample(tmp_path):
    write_pair(tmp_path, "train", [0] * 200 + [1] * 200)
    write_pair(tmp_path, "t10k", [0] * 200 + [1] * 200)
    for part in load(DataConfig(name="idx", root=str(tmp_path))):
        assert 0.35 < part.labels[:100].float().mean() < 0.65


@pytest.mark.parametrize("names", [("images.idx3-ubyte", "labels.idx1-ubyte")])
def test_idx_other_spellings(tmp_path, names):
    (tmp_path / f"train-{names[0]}").write_bytes(idx(np.zeros((4, 2, 2))))
    (tmp_path / f"train-{names[1]}").write_bytes(idx(np.zeros(4)))
    train, test = load(DataConfig(name="idx", root=str(tmp_path), held_out=0.5))
    assert (len(train), len(test)) == (2, 2)


def test_idx_folder_errors(tmp_path):
    data = DataConfig(name="idx", root=str(tmp_path))
    with pytest.raises(DataError, match="no IDX files"):
        load(data)
    write_pair(tmp_path, "letters", [0, 0])
    (tmp_path / "letters-labels-idx1-ubyte").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="no labels file"):
        load(data)
    write_pair(tmp_path, "letters", [0, 0])
    write_pair(tmp_path, "digits", [0, 0])
    with pytest.raises(DataError, match="more than one data set"):
        load(data)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no IDX file"),
        (b"\x00\x00\x08", "no IDX file"),
        (b"not an IDX file at all", "no IDX file"),
        (idx(np.zeros(16)), "no IDX file"),  # labels where images belong
        (bytes([0, 0, 13, 3]) + idx(np.zeros((2, 2, 2)))[4:], "no IDX file"),  # floats
        (idx(np.zeros((2, 3, 3)))[:-1], "17 bytes"),
        (idx(np.zeros((2, 3, 3))) + b"x", "holds more"),
        (idx(np.zeros((0, 3, 3))), "empty"),
        # 2^96 bytes: refused for what is there, with nothing of that size allocated.
        (bytes([0, 0, 8, 3]) + b"\xff" * 12 + b"abc", "3 bytes"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_damaged_idx_is_refused_by_name(tmp_path, content, words, packed):
    path = tmp_path / f"images-idx3-ubyte{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataError, match=words) as error:
        read_idx(path, ndim=3)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("cut", [5, 30, -4])
def test_damaged_gzip_is_refused(tmp_path, cut):
    path = tmp_path / "images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.random.default_rng(0).integers(0, 256, (9, 5, 5))))[:cut])
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(path, ndim=3)


def test_label_count_must_match(tmp_path):
    (tmp_path / "images-idx3-ubyte").write_bytes(idx(np.zeros((3, 2, 2))))
    (tmp_path / "labels-idx1-ubyte").write_bytes(idx(np.zeros(2)))
    with pytest.raises(DataError, match=r"3 images, but .* 2 labels"):
        load(DataConfig(name="idx", root=str(tmp_path)))


def write_pictures(root: Path, classes: list[str], mode: str, size: tuple[int, int]) -> None:
    for name in classes:
        (root / name).mkdir(exist_ok=True)
        for number in range(2):
            Image.new(mode, size, 255).save(root / name / f"{mode}{number}.png")


def test_pictures_of_class_folders(tmp_path):
    write_pictures(tmp_path, ["10", "9"], "L", (4, 3))
    data = DataConfig(name="images", root=str(tmp_path), held_out=0.5)
    train, test = load(data)
    assert train.images.shape == (2, 1, 3, 4)
    assert sorted(train.labels.tolist()) == sorted(test.labels.tolist()) == [9, 10]
    assert bool((train.images == 1).all())


def test_one_colour_picture_makes_all_of_them_rgb(tmp_path):
    write_pictures(tmp_path, ["cat", "dog"], "L", (4, 4))
    write_pictures(tmp_path, ["dog"], "RGB", (4, 4))
    train, test = load(DataConfig(name="images", root=str(tmp_path)))
    assert train.images.shape[1:] == test.images.shape[1:] == (3, 4, 4)
    assert set(train.labels.tolist()) == {0, 1}


def test_picture_errors(tmp_path):
    data = DataConfig(name="images", root=str(tmp_path))
    with pytest.raises(DataError, match="no class folders"):
        load(data)
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="cat holds no pictures"):
        load(data)
    write_pictures(tmp_path, ["cat"], "L", (4, 4))
    write_pictures(tmp_path, ["dog"], "L", (5, 4))
    with pytest.raises(DataError, match=r"dog.* is 5x4 pixels"):
        load(data)
    (tmp_path / "cat" / "L0.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(DataError, match=r"L0.png cannot be read"):
        load(data)
