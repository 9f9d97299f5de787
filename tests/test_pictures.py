"""Pictures and folders as people have them: read as they are seen, left out aloud, or refused."""

from __future__ import annotations

import gzip
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fl_wb.data import pictures, readers
from fl_wb.data.datasets import DataConfig, image_shape, load
from fl_wb.data.pictures import pixels_of, seen
from fl_wb.data.readers import DataError, read_picture_folders
from tests.test_datasets import idx

RAMP = np.linspace(0, 1, 96).reshape(8, 12)
GREY = (RAMP * 255).round().astype(np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], 2)


def saved(tmp_path: Path, image: Image.Image, name: str = "a.png", **options: Any) -> np.ndarray:
    image.save(tmp_path / name, **options)
    return pixels_of(tmp_path / name)


def clear(pixels: np.ndarray, alpha: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack([pixels, alpha]).astype(np.uint8))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.PGM", "a.TIFF"])
def test_sixteen_bits_keep_their_greys(tmp_path: Path, name: str) -> None:
    if name.endswith("PGM"):
        body = (RAMP * 65535).round().astype(">u2").tobytes()
        (tmp_path / name).write_bytes(b"P5 12 8 65535\n" + body)
        found = pixels_of(tmp_path / name)
    else:
        found = saved(tmp_path, Image.fromarray((RAMP * 65535).astype(np.uint16)), name)
    assert found.shape == (8, 12, 1)
    assert np.abs(found[..., 0].astype(int) - GREY).max() <= 1
    assert (found.min(), found.max()) == (0, 255)


def test_floats_from_0_to_1_are_scaled_and_others_refused(tmp_path: Path) -> None:
    found = saved(tmp_path, Image.fromarray(RAMP.astype(np.float32)), "a.tiff")
    assert np.array_equal(found[..., 0], GREY)
    for values in (RAMP * 255, RAMP - 0.5, RAMP * np.nan):
        with pytest.raises(DataError, match=r"b.tiff .* floating-point values go from"):
            saved(tmp_path, Image.fromarray(values.astype(np.float32)), "b.tiff")
    with pytest.raises(DataError, match="integers of 32 bits, whose range is not known"):
        saved(tmp_path, Image.fromarray((RAMP * 1000).astype(np.int32)), "c.tiff")


def test_one_bit_and_colour_keep_their_values(tmp_path: Path) -> None:
    found = saved(tmp_path, Image.fromarray(GREY > 100), "a.png")
    assert np.array_equal(found[..., 0], np.where(GREY > 100, 255, 0))
    assert np.array_equal(saved(tmp_path, Image.fromarray(COLOUR), "b.webp", lossless=True), COLOUR)
    palette = saved(tmp_path, Image.fromarray(COLOUR).quantize(256), "c.png")
    assert palette.shape == (8, 12, 3)
    assert np.abs(palette.astype(int) - COLOUR).mean() < 12
    grey = saved(tmp_path, Image.fromarray(GREY).convert("P"), "d.png")
    assert np.array_equal(grey[..., 0], GREY)
    assert grey.shape[2] == 1
    cmyk = saved(tmp_path, Image.fromarray(COLOUR).convert("CMYK"), "e.tif")
    assert np.array_equal(cmyk, COLOUR)


def test_what_is_transparent_shows_the_ground(tmp_path: Path) -> None:
    shown = np.zeros((8, 12))
    shown[2:5, 3:9] = 255
    drawing = shown > 0
    black, white = np.zeros((8, 12, 3)), np.full((8, 12, 3), 255)
    red = np.dstack([white[..., 0], black[..., :2]])
    # dark and coloured drawings on white, white ones on black
    found = saved(tmp_path, clear(black, shown))
    assert np.array_equal(found, np.where(drawing, 0, 255)[..., None].repeat(3, 2))
    found = saved(tmp_path, clear(white, shown))
    assert np.array_equal(found, np.where(drawing, 255, 0)[..., None].repeat(3, 2))
    found = saved(tmp_path, clear(red, shown))
    assert np.array_equal(found, np.where(drawing[..., None], red, 255))
    half = saved(tmp_path, clear(black[..., :1], shown / 2), "half.png")  # LA
    assert np.array_equal(np.unique(half), [128, 255])
    assert half.shape[2] == 1
    palette = Image.fromarray(np.where(drawing, 1, 0).astype(np.uint8)).convert("P")
    palette.putpalette([9, 9, 9, 10, 200, 10])
    found = saved(tmp_path, palette, "p.png", transparency=0)
    assert np.array_equal(found, np.where(drawing[..., None], [10, 200, 10], 255))
    # opaque ones stay as they are
    assert np.array_equal(saved(tmp_path, clear(COLOUR, shown * 0 + 255)), COLOUR)


@pytest.mark.parametrize("turned", range(1, 9))
def test_exif_orientation_is_followed(tmp_path: Path, turned: int) -> None:
    upright = np.zeros((16, 24), np.uint8)
    upright[:8, :8] = 255
    stored: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
        5: np.transpose, 6: np.rot90, 7: lambda a: np.rot90(a, 2).T, 8: lambda a: np.rot90(a, 3),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = turned
    image = Image.fromarray(np.ascontiguousarray(stored[turned](upright)))
    found = saved(tmp_path, image, "a.jpg", exif=exif, quality=100)
    assert np.abs(found[..., 0].astype(int) - upright).max() < 20


def test_moving_pictures_and_large_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    for name in ("a.gif", "a.png", "a.webp", "a.tif"):
        with pytest.raises(DataError, match=rf"{name} .* it has several frames"):
            saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:])
    mpo = saved(tmp_path, Image.fromarray(GREY), "a.mpo", save_all=True, append_images=frames[1:])
    assert np.abs(mpo[..., 0].astype(int) - GREY).max() < 20  # a camera's preview is no frame
    monkeypatch.setattr(pictures, "MOST_PIXELS", 95)
    with pytest.raises(DataError, match=r"big.png .* 12x8 pixels are more than 95"):
        saved(tmp_path, Image.fromarray(GREY), "big.png")


def test_a_small_file_of_a_large_picture_takes_no_memory(tmp_path: Path) -> None:
    Image.new("RGB", (12_000, 12_000)).save(tmp_path / "bomb.png")
    with pytest.raises(DataError, match="12000x12000 pixels are more than"):
        pixels_of(tmp_path / "bomb.png")


def test_all_pictures_together_have_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "0").mkdir()
    for number in range(3):
        Image.fromarray(GREY).save(tmp_path / "0" / f"{number}.png")
    assert len(read_picture_folders(tmp_path)[0][0]) == 3
    monkeypatch.setattr(pictures, "MOST_BYTES", 200)
    with pytest.raises(DataError, match=r"2.png: the pictures up to it take more than 200 bytes"):
        read_picture_folders(tmp_path)


def folders(root: Path, *names: str, shade: int = 7) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 3), shade).save(path, "PNG")
    return root


def test_every_form_in_any_spelling_and_below_folders_is_read(tmp_path: Path) -> None:
    names = ["a/1.PNG", "a/deep/er/2.png", "a/3.Jpg", "b/4.JPEG", "b/5.jfif", "b/6.DIB", "b/7.tga"]
    found, labels = read_picture_folders(folders(tmp_path, *names))[0]
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert found.shape == (7, 1, 3, 4)


def test_litter_is_passed_over_and_the_rest_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders(tmp_path, "cat/0.png", "dog/0.png", ".cache/x/0.png", "__MACOSX/cat/0.png")
    for name in ("cat/._0.png", "cat/.DS_Store", "dog/Thumbs.db", "dog/desktop.ini", ".DS_Store"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7litter")
    with caplog.at_level(logging.WARNING, "flwr"):
        assert read_picture_folders(tmp_path)[0][1].tolist() == [0, 1]
    assert not caplog.records
    for name in ("cat/notes.txt", "cat/0.xcf", "labels.csv"):
        (tmp_path / name).write_bytes(b"others")
    with caplog.at_level(logging.WARNING, "flwr"):
        assert len(read_picture_folders(tmp_path)[0][0]) == 2
    assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [
        "left out, in no class folder: labels.csv",
        "left out, no picture by name: 0.xcf, notes.txt",
    ]


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["0007", "12"], [7, 12]),
        (["007", "7", "70"], [0, 1, 2]),  # two of one number: by their places
        (["3", "three"], [0, 1]),
        (["²", "5"], [1, 0]),
        (["9223372036854775807", "0"], [9223372036854775807, 0]),
    ],
)
def test_folders_are_as_many_classes(tmp_path: Path, names: list[str], classes: list[int]) -> None:
    _, labels = read_picture_folders(folders(tmp_path, *(f"{name}/0.png" for name in names)))[0]
    assert sorted(labels.tolist()) == sorted(classes)


def test_what_is_no_folder_of_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="9223372036854775808 as a folder's name is too large"):
        read_picture_folders(folders(tmp_path / "a", "9223372036854775808/0.png"))
    with pytest.raises(DataError, match=r"pack is the only folder .* are they the classes"):
        read_picture_folders(folders(tmp_path / "b", "pack/cat/0.png", "pack/dog/0.png"))
    (folders(tmp_path / "c", "cat/0.png") / "dog").mkdir()
    with pytest.raises(DataError, match=r"dog holds no pictures \(such as"):
        read_picture_folders(tmp_path / "c")
    (tmp_path / "c" / "dog" / "0.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"dog holds no pictures .* only 0.heic"):
        read_picture_folders(tmp_path / "c")


def test_links_are_followed_once_and_what_is_no_file_is_refused(tmp_path: Path) -> None:
    root = folders(tmp_path / "a", "cat/0.png")
    folders(tmp_path, "elsewhere/1.png")
    (root / "cat" / "2.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "circle").symlink_to(root / "cat")
    assert read_picture_folders(root)[0][1].tolist() == [0, 0, 1]
    (root / "cat" / "3.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"3.png is no file, or a link to none"):
        read_picture_folders(root)
    (root / "cat" / "3.png").unlink()
    os.mkfifo(root / "cat" / "3.png")
    with pytest.raises(DataError, match=r"3.png is no file"):
        read_picture_folders(root)


def test_a_training_and_a_test_folder_are_the_two_parts(tmp_path: Path) -> None:
    names = ["Train/ape/0.png", "Train/bee/0.png", "Train/cow/0.png", "test/cow/0.png"]
    root = folders(tmp_path / "a", *names)
    (_, train), (_, test) = read_picture_folders(root)
    assert (train.tolist(), test.tolist()) == ([0, 1, 2], [2])
    data = DataConfig(name="images", root=str(root))
    assert [len(part) for part in load(data)] == [3, 1]
    assert image_shape(data) == (1, 3, 4)
    folders(root, "test/dog/0.png")
    with pytest.raises(DataError, match=r"test/dog is of a class that the training part has not"):
        read_picture_folders(root)
    with pytest.raises(DataError, match=r"holds the parts test, val; it needs one .* called train"):
        read_picture_folders(folders(tmp_path / "b", "test/a/0.png", "val/a/0.png"))
    # classes may have such names
    (part,) = read_picture_folders(folders(tmp_path / "c", "test/0.png", "train/0.png"))
    assert part[1].tolist() == [0, 1]


@pytest.mark.parametrize("coloured", ["train", "test"])
def test_one_colour_picture_of_either_part_makes_both_rgb(tmp_path: Path, coloured: str) -> None:
    root = folders(tmp_path, "train/a/0.png", "train/b/0.png", "test/a/0.png", "test/b/0.png")
    grey = [pixels for pixels, _ in read_picture_folders(root)]
    Image.new("RGB", (4, 3)).save(root / coloured / "b" / "1.png")
    found = [pixels for pixels, _ in read_picture_folders(root)]
    data = DataConfig(name="images", root=str(root))
    assert [tuple(part.images.shape[1:]) for part in load(data)] == [image_shape(data)] * 2
    assert image_shape(data) == (3, 3, 4)
    other = ["test", "train"].index(coloured)
    assert np.array_equal(found[other], grey[other].repeat(3, 1))


def test_one_header_tells_the_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folders(tmp_path / "a", "cat/0.png", "dog/0.png")
    assert image_shape(DataConfig(name="images", root=str(root))) == (1, 3, 4)
    Image.new("RGB", (4, 3)).save(root / "dog" / "1.png")
    data = DataConfig(name="images", root=str(root), held_out=0.5)
    assert image_shape(data) == (3, 3, 4) == tuple(load(data)[0].images.shape[1:])
    (tmp_path / "images-idx3-ubyte").write_bytes(idx(np.zeros((9, 5, 6)))[:-1])  # never read
    (tmp_path / "labels-idx1-ubyte").write_bytes(b"")
    assert image_shape(DataConfig(name="idx", root=str(tmp_path))) == (1, 5, 6)
    monkeypatch.setattr(readers, "read_digits", lambda: pytest.fail("digits need not be read"))
    assert image_shape(DataConfig()) == (1, 8, 8)


def pair(folder: Path, prefix: str, number: int, shape: tuple[int, ...] = (4, 4)) -> None:
    kind = f"idx{len(shape) + 1}-ubyte"
    images = np.arange(number * np.prod(shape)).reshape(number, *shape) % 251
    (folder / f"{prefix}images-{kind}").write_bytes(idx(images))
    (folder / f"{prefix}labels-idx1-ubyte").write_bytes(idx(np.arange(number) % 2))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("train-", "contest-"),
        ("fastest-train-", ""),
        ("", "T10K-"),
        ("emnist-letters-train-", "emnist-letters-test-"),
        ("protest_", "protest_test_"),
        ("my.training.", "greatest."),
    ],
)
def test_the_words_of_names_tell_the_parts(tmp_path: Path, first: str, second: str) -> None:
    pair(tmp_path, first, 8)
    pair(tmp_path, second, 3)
    assert [len(labels) for _, labels in readers.read_idx_folder(tmp_path)] == [8, 3]


@pytest.mark.parametrize(
    "prefixes",
    [
        ("latest-", "contest-"),
        ("train-", "train-test-train2-", "a-"),
        ("train-a-", "train-b-"),
        ("test-", "t10k-"),
    ],
)
def test_names_that_tell_no_parts_are_refused(tmp_path: Path, prefixes: tuple[str, ...]) -> None:
    for prefix in prefixes:
        pair(tmp_path, prefix, 4)
    with pytest.raises(DataError, match="more than one data set"):
        readers.read_idx_folder(tmp_path)


def test_idx_files_of_a_mac_and_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pair(tmp_path, "train-", 6)
    (tmp_path / "._train-images-idx3-ubyte").write_bytes(b"\0\5\x16\7")
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros(6))))
    with caplog.at_level(logging.WARNING, "flwr"):
        ((_, labels),) = readers.read_idx_folder(tmp_path)
    assert labels.tolist() == [0, 1] * 3
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(str(tmp_path / "train-labels-idx1-ubyte.gz") + " is left out")


def test_colour_idx(tmp_path: Path) -> None:
    for folder, shape in (("last", (5, 4, 3)), ("first", (3, 5, 4))):
        (tmp_path / folder).mkdir()
        pair(tmp_path / folder, "", 4, shape)
        data = DataConfig(name="idx", root=str(tmp_path / folder))
        assert image_shape(data) == (3, 5, 4)
        ((found, _),) = readers.read_idx_folder(tmp_path / folder)
        written = np.arange(240).reshape(4, *shape) % 251
        expected = written if folder == "first" else written.transpose(0, 3, 1, 2)
        assert np.array_equal(found, expected)
    (tmp_path / "odd").mkdir()
    pair(tmp_path / "odd", "", 4, (5, 4, 2))
    with pytest.raises(DataError, match=r"which of \[4, 5, 4, 2\] are the 1 or 3 channels"):
        readers.read_idx_folder(tmp_path / "odd")


def test_idx_of_other_types_are_named(tmp_path: Path) -> None:
    path = tmp_path / "images-idx3-float"
    path.write_bytes(bytes([0, 0, 13, 3]) + bytes(12 + 4 * 4))
    with pytest.raises(DataError, match=r"no IDX file of bytes .* as IDX file of 32-bit floats"):
        readers.read_idx(path, ndim=3)


def test_a_small_gz_does_not_grow_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "FREE", 1 << 16)
    path = tmp_path / "images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.zeros((300, 100, 100)))))
    with pytest.raises(DataError, match=r"3000000 bytes, and it grows beyond \d+ bytes from \d+"):
        readers.read_idx(path, ndim=3)
    noisy = np.random.default_rng(0).integers(0, 8, (300, 20, 20))
    path.write_bytes(gzip.compress(idx(noisy)))
    assert np.array_equal(readers.read_idx(path, ndim=3), noisy)


def test_a_picture_made_in_memory_is_seen_alike() -> None:
    assert np.array_equal(np.asarray(seen(Image.fromarray(COLOUR))), COLOUR)
