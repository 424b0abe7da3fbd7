"""Images in memory: exact grey levels, seeded splits, and a named cause for whatever cannot be read."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from training.datasets import Digits, Folder, ImageSet, Mnist, as_float, binarise
from training.datasets.images import split_off, to_uint8
from training.datasets.mnist import read_images
from training.errors import DataError


@pytest.mark.parametrize("level", [1, 51, 128, 254])
def test_binarised_pixel_is_on_as_often_as_it_is_bright(level: int) -> None:
    """P(b = 1) is level / 255: over a million draws within four standard errors."""
    n, p = 1_000_000, level / 255.0
    images = torch.full((n, 1, 1, 1), level, dtype=torch.uint8)
    share = float(binarise(images, torch.Generator().manual_seed(level)).mean())
    assert abs(share - p) < 4.0 * math.sqrt(p * (1.0 - p) / n)


def test_black_is_never_on_and_white_always() -> None:
    """Levels 0 and 255 are exact: not one pixel in a million is wrong."""
    images = torch.tensor([0, 255], dtype=torch.uint8).repeat(1_000_000).view(-1, 1, 1, 2)
    found = binarise(images, torch.Generator().manual_seed(1))
    assert found.dtype == torch.float32
    assert found.sum((0, 1, 2)).tolist() == [0.0, 1_000_000.0]


def test_binarisation_is_the_generator_s_alone() -> None:
    """The same seed draws the same image; the next draw is another one."""
    images, generator = torch.full((4, 1, 8, 8), 100, dtype=torch.uint8), torch.Generator().manual_seed(2)
    first, second = binarise(images, generator), binarise(images, generator)
    assert torch.equal(first, binarise(images, torch.Generator().manual_seed(2)))
    assert not torch.equal(first, second)


def test_grey_levels_are_255ths() -> None:
    """255 is 1, 0 is 0, and every level survives the way to float and back."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert as_float(levels).flatten()[[0, 255]].tolist() == [0.0, 1.0]
    assert np.array_equal(to_uint8(as_float(levels).numpy(), "levels"), levels.numpy())


@pytest.mark.parametrize("values", [[-0.01, 0.5], [0.5, 1.01], [0.5, math.nan], [0.0, math.inf], [0.0, 255.0]], ids=str)
def test_values_outside_0_to_1_are_named(values: list[float]) -> None:
    """Whatever is not in [0, 1], NaN included, is a DataError naming its source and the range."""
    with pytest.raises(DataError, match=r"picture\.tif.*\[0, 1\]"):
        to_uint8(np.array(values), "picture.tif")


def test_split_is_seeded_disjoint_and_complete() -> None:
    """Every image is in one part; the same seed gives the same parts; at least one image goes into each."""
    images = torch.arange(100, dtype=torch.uint8).view(-1, 1, 1, 1)
    rest, part = split_off(images, 0.2, 3)
    assert (len(rest), len(part)) == (80, 20)
    assert sorted([*rest.flatten().tolist(), *part.flatten().tolist()]) == list(range(100))
    assert torch.equal(split_off(images, 0.2, 3)[1], part)
    assert not torch.equal(split_off(images, 0.2, 4)[1], part)
    assert len(split_off(images[:3], 0.01, 0)[1]) == 1


@pytest.mark.parametrize("split", [torch.zeros(0, 1, 2, 2, dtype=torch.uint8), torch.zeros(2, 1, 2, 2), torch.zeros(2)])
def test_split_that_is_no_set_of_images_is_refused(split: torch.Tensor) -> None:
    """An empty split, floats, or another number of axes is a DataError."""
    good = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(DataError, match="uint8"):
        ImageSet(good, good, split)


def test_digits_are_scikit_learn_s() -> None:
    """1,797 images of 8 x 8 with 17 grey levels: 20 % for the test, 10 % of the rest for validation."""
    images = Digits(dataset="digits").load(Path("nowhere"))
    assert images.shape == (1, 8, 8)
    assert [len(part) for part in (images.train, images.validation, images.test)] == [1294, 144, 359]
    levels = torch.cat([images.train, images.validation, images.test]).unique()
    assert levels.tolist() == [round(255 * level / 16) for level in range(17)]


# MNIST


def test_real_mnist_is_read_gzipped_or_not(real_data: Path, tmp_path: Path) -> None:
    """The IDX files are found in DIR/mnist, packed, and in DIR itself, unpacked; the last 2,000 are held out."""
    packed = Mnist(dataset="mnist").load(real_data)
    assert packed.shape == (1, 28, 28)
    assert [len(part) for part in (packed.train, packed.validation, packed.test)] == [58_000, 2_000, 10_000]
    for name in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"):
        (tmp_path / name).write_bytes(gzip.decompress((real_data / "mnist" / f"{name}.gz").read_bytes()))
    unpacked = Mnist(dataset="mnist", validation=1).load(tmp_path)
    assert torch.equal(unpacked.test, packed.test)
    assert torch.equal(unpacked.train[:58_000], packed.train)
    # The average brightness of the training images, as everybody's normalisation has it.
    assert float(torch.cat([packed.train, packed.validation]).double().mean() / 255.0) == pytest.approx(
        0.1307, abs=5e-5
    )


def damaged(content: bytes, how: str) -> bytes:
    """A gzip file as a broken download leaves it."""
    packed = gzip.compress(content)
    middle = len(packed) // 2
    return {
        "other": packed,
        "cut": packed[:middle],
        "garbled": packed[:middle] + bytes(b ^ 0xFF for b in packed[middle : middle + 64]) + packed[middle + 64 :],
        "html": b"<html>not found</html>",
        "empty": b"",
    }[how]


@pytest.mark.parametrize("how", ["other", "cut", "garbled", "html", "empty"])
def test_damaged_mnist_is_named(how: str, tmp_path: Path) -> None:
    """A file that is not the original, cut short, garbled or something else is a DataError naming it."""
    path = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    path.parent.mkdir()
    path.write_bytes(damaged(np.random.default_rng(1).integers(0, 4, 20_000, np.uint8).tobytes(), how))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz.*fetch it again"):
        Mnist(dataset="mnist").load(tmp_path)


def test_garbled_gzip_is_what_zlib_refuses() -> None:
    """The garbled file of the test above is one on which gzip raises zlib.error, which is no OSError."""
    with pytest.raises(zlib.error):
        gzip.decompress(damaged(np.random.default_rng(1).integers(0, 4, 20_000, np.uint8).tobytes(), "garbled"))


def test_unpacked_mnist_is_checked_too(tmp_path: Path) -> None:
    """A raw IDX file of another content is a DataError with both checksums."""
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(bytes(16 + 784))
    with pytest.raises(DataError, match=r"md5 .* expected 2646ac647ad5339dbf082846283269ea"):
        read_images(tmp_path, "t10k-images-idx3-ubyte")


def test_missing_mnist_names_the_downloader(tmp_path: Path) -> None:
    """Without the files the message gives the command that fetches them; nothing is fetched unasked."""
    with pytest.raises(DataError, match="download mnist --data"):
        Mnist(dataset="mnist").load(tmp_path)
    assert not list(tmp_path.iterdir())


# A directory of images


def folder(**settings: Any) -> Folder:
    """The table `[data]` of a run on a directory."""
    return Folder.model_validate({"dataset": "folder", "height": 6, "width": 5, **settings})


def plain(mode: str, colour: Any) -> Image.Image:
    """An image of one colour, 13 x 9."""
    return Image.new(mode, (13, 9), colour)


def deep(dtype: type[np.generic], value: float) -> Image.Image:
    """An image of one level in a mode of more than 8 bits."""
    return Image.fromarray(np.full((9, 13), value, dtype))


def palette() -> Image.Image:
    """Mode P, its only colour (10, 20, 30)."""
    image = Image.new("P", (13, 9), 0)
    image.putpalette([10, 20, 30])
    return image


MODES: dict[str, tuple[Image.Image, str, tuple[int, int, int]]] = {
    "1": (plain("1", 1), "png", (255, 255, 255)),
    "L": (plain("L", 100), "png", (100, 100, 100)),
    "LA": (plain("LA", (200, 51)), "png", (40, 40, 40)),
    "P": (palette(), "gif", (10, 20, 30)),
    "RGB": (plain("RGB", (10, 20, 30)), "bmp", (10, 20, 30)),
    "RGBA": (plain("RGBA", (250, 100, 0, 51)), "png", (50, 20, 0)),
    "CMYK": (plain("CMYK", (0, 0, 0, 0)), "tiff", (255, 255, 255)),
    "I;16": (deep(np.uint16, 0x8080), "png", (128, 128, 128)),
    "F": (deep(np.float32, 0.2), "tiff", (51, 51, 51)),
}


@pytest.mark.parametrize("fit", ["crop", "pad", "resize"])
@pytest.mark.parametrize("mode", MODES)
def test_image_of_any_mode_is_read_in_colour_and_grey(mode: str, fit: str, tmp_path: Path) -> None:
    """One colour stays that colour: transparency on black, 16 bit by 65,535, float as it is; grey by ITU-R 601."""
    image, suffix, colour = MODES[mode]
    for i in range(3):
        image.save(tmp_path / f"{i}.{suffix}")
    found = folder(mode="RGB", fit=fit).load(tmp_path)
    assert found.shape == (3, 6, 5)
    middle = found.train[0, :, 3, 2].int()
    assert (middle - torch.tensor(colour)).abs().max() <= (1 if "A" in mode else 0)
    grey = folder(mode="L", fit=fit).load(tmp_path)
    assert grey.shape == (1, 6, 5)
    luma = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    assert abs(float(grey.train[0, 0, 3, 2]) - luma) <= 1.0


def test_directory_is_read_whole(tmp_path: Path) -> None:
    """Images of every size, in folders below too and with suffixes in capitals; other files are left alone."""
    rng = np.random.default_rng(1)
    for i, (height, width) in enumerate([(1, 1), (5, 200), (200, 5), (64, 64), (7, 6)] * 4):
        path = tmp_path / f"class {i % 2}" / f"{i}.{('PNG', 'jpg', 'webp')[i % 3]}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path)
    (tmp_path / "notes.txt").write_text("not an image")
    images = folder(validation=0.25, test=0.5).load(tmp_path)
    assert [len(part) for part in (images.train, images.validation, images.test)] == [8, 2, 10]


def stripes() -> Image.Image:
    """30 x 10: a third red, a third green, a third blue."""
    pixels = np.zeros((10, 30, 3), np.uint8)
    for i in range(3):
        pixels[:, 10 * i : 10 * (i + 1), i] = 255
    return Image.fromarray(pixels)


def fitted(fit: str, root: Path) -> torch.Tensor:
    """The stripes brought to 10 x 10, (3, 10, 10)."""
    for i in range(3):
        stripes().save(root / f"{i}.png")
    return folder(height=10, width=10, fit=fit).load(root).train[0]


def test_crop_fills_the_size_and_cuts(tmp_path: Path) -> None:
    """Of three stripes side by side only the middle one is left."""
    red, green, blue = fitted("crop", tmp_path)
    assert bool((green == 255).all())
    assert int(red.max()) == int(blue.max()) == 0


def test_pad_keeps_all_and_fills_with_black(tmp_path: Path) -> None:
    """Three stripes become three or four rows high; above and below all is black."""
    image = fitted("pad", tmp_path)
    rows = image.amax((0, 2)) > 0
    assert 3 <= int(rows.sum()) <= 4
    assert not rows[0]
    assert not rows[-1]
    middle = image[:, 5].argmax(0).tolist()
    assert (middle[0], middle[5], middle[-1]) == (0, 1, 2)


def test_resize_stretches(tmp_path: Path) -> None:
    """All three stripes are left, over the whole height."""
    image = fitted("resize", tmp_path)
    assert [image[:, row].argmax(0).tolist()[i] for row in (0, 9) for i in (0, 5, 9)] == [0, 1, 2] * 2


def test_missing_directory_is_named(tmp_path: Path) -> None:
    """A path that is no directory is a DataError naming it."""
    with pytest.raises(DataError, match="nowhere is not a directory"):
        folder().load(tmp_path / "nowhere")


def test_empty_directory_is_named(tmp_path: Path) -> None:
    """A directory without images is a DataError naming it and what it would read."""
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(DataError, match=r"holds 0 images.*\.png"):
        folder().load(tmp_path)


def two_good_ones(root: Path) -> None:
    """All but the one that a test is about."""
    for i in range(2):
        plain("RGB", (1, 2, 3)).save(root / f"good{i}.png")


@pytest.mark.parametrize("kind", ["text", "empty", "cut png", "cut jpg", "garbled png"])
def test_corrupt_image_is_named(kind: str, tmp_path: Path) -> None:
    """A file that only looks like an image, or is cut short, is a DataError naming the file."""
    two_good_ones(tmp_path)
    suffix = "jpg" if kind.endswith("jpg") else "png"
    path = tmp_path / f"bad.{suffix}"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    whole = path.read_bytes()
    half = len(whole) // 2
    path.write_bytes({"text": b"hello", "empty": b""}.get(kind, whole[:half]))
    if kind.startswith("garbled"):
        path.write_bytes(whole[:half] + bytes(64) + whole[half + 64 :])
    with pytest.raises(DataError, match=r"bad\.(png|jpg) .*remove or replace it"):
        folder().load(tmp_path)


@pytest.mark.parametrize("value", [1.5, -0.1, 255.0, math.nan])
def test_float_image_outside_0_to_1_is_named(value: float, tmp_path: Path) -> None:
    """A float image with a value outside [0, 1] is a DataError naming the file, not silently cut."""
    two_good_ones(tmp_path)
    deep(np.float32, value).save(tmp_path / "bad.tiff")
    with pytest.raises(DataError, match=r"bad\.tiff .*\[0, 1\]"):
        folder(mode="L").load(tmp_path)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("kind", [np.int32, np.int16, np.uint32])
def test_grey_whose_white_is_unknown_is_named(tmp_path: Path, kind: Any, mode: Any) -> None:
    """An integer TIFF of 32 bits, or of 16 with a sign, is not divided by 65,535."""
    two_good_ones(tmp_path)
    (tmp_path / "bad.tiff").write_bytes(tiff(np.full((6, 5), 200, kind)))
    with pytest.raises(DataError, match=r"bad\.tiff .*8 or 16 bits"):
        folder(mode=mode).load(tmp_path)


def test_16_bit_grey_of_any_format_is_scaled_alike(tmp_path: Path) -> None:
    """PNG, TIFF of both byte orders, and PGM, which Pillow opens as 32-bit."""
    values = np.full((6, 5), 0x8080, np.uint16)
    deep(np.uint16, 0x8080).save(tmp_path / "a.png")
    (tmp_path / "b.tiff").write_bytes(tiff(values))
    (tmp_path / "c.tiff").write_bytes(tiff(values.astype(">u2")))
    (tmp_path / "d.pgm").write_bytes(b"P5 5 6 65535\n" + values.astype(">u2").tobytes())
    found = folder(mode="L", fit="resize").load(tmp_path)
    assert {*found.train.unique().tolist(), *found.validation.unique().tolist(), *found.test.unique().tolist()} == {128}


def tiff(values: Any) -> bytes:
    """An uncompressed grey TIFF of one strip."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    height, width = values.shape
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    size = values.dtype.itemsize * 8
    tags = [(256, width), (257, height), (258, size), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    tags += [(279, values.nbytes), (339, kind)]
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    head = (b"MM" if order == ">" else b"II") + struct.pack(f"{order}HI", 42, 8 + values.nbytes)
    return head + values.tobytes() + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
