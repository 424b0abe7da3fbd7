"""Images in memory: exact grey levels, seeded splits, and a named cause for whatever cannot be read."""

from __future__ import annotations

import gzip
import math
import os
import re
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from training.data import Digits, Folder, ImageSet, Mnist, as_float, binarise
from training.data.images import split_off, to_uint8
from training.data.mnist import read_images
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


@pytest.mark.parametrize(
    "split", [torch.zeros(0, 1, 2, 2, dtype=torch.uint8), torch.zeros(2, 1, 2, 2, dtype=torch.float64), torch.zeros(2)]
)
def test_split_that_is_no_set_of_images_is_refused(split: torch.Tensor) -> None:
    """An empty split, numbers of another type, or another number of axes is a DataError."""
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


def everything(images: ImageSet) -> torch.Tensor:
    """The images of all splits."""
    return torch.cat([images.train, images.validation, images.test])


def read(root: Path, **settings: Any) -> torch.Tensor:
    """The images of a directory to which two are added, so that there is one a split, without those two."""
    for level in (253, 254):
        plain("L", level).save(root / f"zz {level}.png")
    found = everything(folder(**settings).load(root))
    return found[~torch.isin(found.amax((1, 2, 3)), torch.tensor([253, 254]))]


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
    image.save(tmp_path / f"a.{suffix}")
    found = read(tmp_path, mode="RGB", fit=fit)
    assert found.shape == (1, 3, 6, 5)
    middle = found[0, :, 3, 2].int()
    assert (middle - torch.tensor(colour)).abs().max() <= (1 if "A" in mode else 0)
    grey = read(tmp_path, mode="L", fit=fit)
    assert grey.shape == (1, 1, 6, 5)
    luma = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    assert abs(float(grey[0, 0, 3, 2]) - luma) <= 1.0


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
    stripes().save(root / "stripes.png")
    return read(root, height=10, width=10, fit=fit)[0]


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
    with pytest.raises(DataError, match=r"holds 0 images \(1 other file left out\).*PNG"):
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
    with pytest.raises(DataError, match=r"bad\.(png|jpg) \(.*replace or remove"):
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
    assert read(tmp_path, mode="L", fit="resize").tolist() == [[[[128] * 5] * 6]]  # the others are duplicates


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


# The folders that people have


def numbered(root: Path, count: int, first: int = 0) -> None:
    """Grey images 000.png, 001.png ..., each of the level that its name says."""
    root.mkdir(exist_ok=True)
    for level in range(first, first + count):
        plain("L", level).save(root / f"{level:03}.png")


def levels(images: torch.Tensor) -> list[int]:
    """Of grey images of one level each."""
    return images[:, 0, 0, 0].tolist()


def today(root: Path, **settings: Any) -> list[list[int]]:
    """The levels of the three splits as the first version of the reader made them."""
    data = folder(mode="L", **settings)
    images = torch.tensor([np.asarray(Image.open(path))[0, 0] for path in sorted(root.rglob("*.png"))])
    rest, test = split_off(images, data.test, data.seed)
    return [part.tolist() for part in (*split_off(rest, data.validation, data.seed), test)]


@pytest.mark.parametrize("seed", [0, 7])
def test_splits_stay_what_they_were(seed: int, tmp_path: Path) -> None:
    """Without duplicates the splits, and the order in each, are a function of the seed and the sorted paths alone."""
    for i in range(4):
        numbered(tmp_path / f"class {3 - i}", 10, 10 * i)
    found = folder(mode="L", seed=seed, test=0.2).load(tmp_path)
    expected = today(tmp_path, seed=seed, test=0.2)
    assert [levels(part) for part in (found.train, found.validation, found.test)] == expected


def test_what_systems_leave_behind_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hidden files and folders, and those of macOS and Windows, are neither images nor bad files."""
    numbered(tmp_path, 4)
    for name in (".ipynb_checkpoints", "__MACOSX", ".git"):
        numbered(tmp_path / name, 2, 100)
    for name in ("._000.png", ".DS_Store", "Thumbs.db", "desktop.ini", "Desktop.ini"):
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07")
    assert sorted(levels(everything(folder(mode="L").load(tmp_path)))) == [0, 1, 2, 3]
    assert capsys.readouterr().err.splitlines()[-1].endswith("read 4 images")


def test_links_are_followed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Links to files and folders elsewhere are read; loops end, and a second way to a folder brings nothing."""
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    numbered(root, 3)
    numbered(root / "below", 2, 10)
    numbered(elsewhere, 2, 20)
    numbered(tmp_path / "files", 1, 30)
    (root / "file").symlink_to(tmp_path / "files" / "030.png")
    (root / "a").symlink_to(elsewhere)
    (root / "b").symlink_to(elsewhere)
    (root / "below" / "up").symlink_to(root)
    (elsewhere / "self").symlink_to(elsewhere)
    found = everything(folder(mode="L").load(root))
    assert sorted(levels(found)) == [0, 1, 2, 10, 11, 20, 21, 30]
    assert capsys.readouterr().err.splitlines()[-1].endswith("read 8 images")


def test_link_within_the_directory_moves_no_image(tmp_path: Path) -> None:
    """A folder is read where it lies, not where an earlier link shows it, so the splits stay."""
    numbered(tmp_path, 10, 10)
    numbered(tmp_path / "z", 10)
    before = today(tmp_path)
    (tmp_path / "0").symlink_to(tmp_path / "z")  # sorts before all
    found = folder(mode="L").load(tmp_path)
    assert [levels(part) for part in (found.train, found.validation, found.test)] == before


def test_broken_link_and_unreadable_file_are_bad(tmp_path: Path) -> None:
    """What cannot be opened is named with the system's reason."""
    two_good_ones(tmp_path)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    with pytest.raises(DataError, match=r"gone \(No such file or directory\); .*self\.png \(Too many levels"):
        folder().load(tmp_path)


@pytest.mark.skipif(os.getuid() == 0, reason="root may list every folder")
def test_folder_that_may_not_be_listed_is_bad(tmp_path: Path) -> None:
    """Its images are not left out in silence."""
    two_good_ones(tmp_path)
    (tmp_path / "locked").mkdir(0)
    with pytest.raises(DataError, match=r"locked \(Permission denied\)"):
        folder().load(tmp_path)


FILES = [
    ("jfif", "JPEG"), ("jpe", "JPEG"), ("avif", "AVIF"), ("jp2", "JPEG2000"), ("j2k", "JPEG2000"), ("WEBP", "WEBP"),
    ("tif", "TIFF"), ("ico", "ICO"), ("psd.png", "BMP"), ("png", "JPEG"), ("dat", "PNG"), ("txt", "GIF"), ("", "PNG"),
    ("", "JPEG"), ("", "WEBP"), ("", "PPM"), ("", "QOI"),
]  # fmt: skip


@pytest.mark.parametrize(("suffix", "form"), FILES)
def test_image_is_known_by_its_content(suffix: str, form: str, tmp_path: Path) -> None:
    """Any suffix, a wrong one and none: what Pillow decodes is read."""
    image = plain("RGB", (200, 100, 50)).resize((16, 16))
    image.save(tmp_path / f"image{'.' if suffix else ''}{suffix}", form)
    found = read(tmp_path)
    assert found.shape == (1, 3, 6, 5)
    assert (found[0, :, 3, 2].int() - torch.tensor([200, 100, 50])).abs().max() <= 4


def test_other_files_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text, tables, archives and arrays are no bad files, even where they begin as a weak signature does."""
    numbered(tmp_path, 3)
    for name, content in {
        "README.txt": b"Pictures of cats.",
        "labels.csv": b"P1,P2,P3\n1,2,3\n",
        "cars.csv": b"BMW,4\nVW,6\n" * 20,
        "labels.json": b'{"000.png": 1}',
        "LICENSE": b"",
        "data.npy": b"\x93NUMPY\x01\0" + bytes(200),
        "more.zip": b"PK\x05\x06" + bytes(18),
        "clip.mp4": b"\0\0\0\x18ftypmp42" + bytes(100),
        "data.h5": b"\x89HDF\r\n\x1a\n" + bytes(100),
        "figure.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    }.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe.png")
    folder(mode="L").load(tmp_path)
    assert capsys.readouterr().err.splitlines()[-1].endswith("read 3 images (11 other files left out)")


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("photo.heic", HEIC),
        ("photo.jpg", HEIC),
        ("photo", HEIC),
        ("photo", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50)),
        ("photo.tga", b"not an image"),
    ],
)
def test_image_that_is_not_decoded_names_what_to_do(name: str, content: bytes, tmp_path: Path) -> None:
    """HEIC and JPEG XL under any name, and what only a suffix calls an image."""
    two_good_ones(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"1 bad file: .*{re.escape(name)} \(.*convert it to PNG\); replace or remove"):
        folder().load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"\x89PNG\r\n\x1a\n" + bytes(50),
        b"\xff\xd8\xff\xe0" + bytes(50),
        b"RIFF\x24\0\0\0WEBPVP8 " + bytes(20),
        b"II*\0" + b"\xff" * 30,
        b"GIF89a" + bytes(4),
        b"\0\0\0\x18ftypavif\0\0\0\0avifmif1" + bytes(50),
        b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(50),
        b"8BPS\0\1" + bytes(50),
    ],
    ids=["PNG", "JPEG", "WebP", "TIFF", "GIF", "AVIF", "JPEG 2000", "PSD"],
)
def test_damaged_image_without_a_suffix_is_bad(content: bytes, tmp_path: Path) -> None:
    """Its signature says that it is an image."""
    two_good_ones(tmp_path)
    (tmp_path / "photo").write_bytes(content)
    with pytest.raises(DataError, match=r"1 bad file: .*photo \(.+\); replace or remove"):
        folder().load(tmp_path)


def test_cut_image_of_a_weak_signature_is_bad(tmp_path: Path) -> None:
    """A file that Pillow opens is an image, though its pixels are missing and no suffix says so."""
    two_good_ones(tmp_path)
    (tmp_path / "photo").write_bytes(b"P5 100 100 255\n" + bytes(50))
    with pytest.raises(DataError, match=r"photo \("):
        folder().load(tmp_path)


def film(path: Path, levels: list[int], form: str) -> None:
    """A file whose frames are grey images of these levels."""
    first, *others = [plain("L", level) for level in levels]
    lossless = {"lossless": True} if form == "WEBP" else {}
    first.save(path, form, save_all=True, append_images=others, **lossless)


@pytest.mark.parametrize("form", ["GIF", "PNG", "TIFF", "WEBP"])
def test_frames_are_images_where_asked(form: str, tmp_path: Path) -> None:
    """The first of a file, or all of them."""
    film(tmp_path / "film", [10, 20, 30], form)
    assert levels(read(tmp_path, mode="L")) == [10]
    assert sorted(levels(read(tmp_path, mode="L", frames="all"))) == [10, 20, 30]


def test_further_pictures_of_a_photograph_are_no_frames(tmp_path: Path) -> None:
    """Cameras keep previews and depth behind the first picture of a JPEG (MPO)."""
    film(tmp_path / "a.jpg", [10, 20], "MPO")
    assert levels(read(tmp_path, mode="L", frames="all")) == [10]


@pytest.mark.parametrize("seed", range(5))
def test_frames_of_one_file_stay_together(seed: int, tmp_path: Path) -> None:
    """No file has frames in two splits; a share is one of files."""
    for i in range(10):
        film(tmp_path / f"{i}.tif", [10 * i + j for j in range(1 + i % 3)], "TIFF")
    data = folder(mode="L", frames="all", seed=seed, test=0.3, validation=0.3).load(tmp_path)
    parts = [{level // 10 for level in levels(part)} for part in (data.train, data.validation, data.test)]
    assert [len(part) for part in parts] == [5, 2, 3]
    assert set.union(*parts) == set(range(10))
    assert len(everything(data)) == 19


def test_few_files_of_many_frames_are_refused(tmp_path: Path) -> None:
    """Three splits need three files: frames of one are not shared out."""
    film(tmp_path / "a.tif", list(range(20)), "TIFF")
    with pytest.raises(DataError, match="holds 20 images, in 1 file; at least 3 files"):
        folder(frames="all").load(tmp_path)


def test_12_bits_in_16_are_scaled_by_4095(tmp_path: Path) -> None:
    """`bits` says what white is in 16-bit PNG and TIFF of both byte orders; 8-bit images are as ever."""
    values = np.full((6, 5), 0x808, np.uint16)
    deep(np.uint16, 0x808).save(tmp_path / "a.png")
    (tmp_path / "b.tiff").write_bytes(tiff(values))
    (tmp_path / "c.tiff").write_bytes(tiff(values.astype(">u2")))
    plain("L", 77).save(tmp_path / "d.png")
    assert sorted(levels(read(tmp_path, mode="L", fit="resize", bits=12))) == [77, 128]
    assert sorted(levels(read(tmp_path, mode="L", fit="resize"))) == [8, 77]


def test_formats_that_name_their_white_need_no_bits(tmp_path: Path) -> None:
    """PGM of any maximum, and JPEG 2000, which Pillow has scaled already."""
    values = np.full((16, 16), 0x808, ">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5 16 16 4095\n" + values.tobytes())
    Image.fromarray(np.full((16, 16), 0x4040, np.uint16)).save(tmp_path / "b.jp2")
    assert sorted(levels(read(tmp_path, mode="L", fit="resize", bits=12))) == [64, 128]


def test_value_above_the_bits_names_the_key(tmp_path: Path) -> None:
    """4,096 is not in 12 bits: neither cut nor called white."""
    two_good_ones(tmp_path)
    deep(np.uint16, 4096).save(tmp_path / "bad.png")
    with pytest.raises(DataError, match=r"bad\.png \(.*2\^12 - 1; set a larger `bits`"):
        folder(bits=12).load(tmp_path)


@pytest.mark.parametrize("seed", range(5))
def test_duplicates_are_kept_once(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal files and equal pixels in another format or size are in one split, once; the others as without them."""
    numbered(tmp_path, 10)
    expected = today(tmp_path, seed=seed)
    copies = tmp_path / "copies"
    numbered(copies, 10)
    for level in range(10):
        plain("L", level).convert("RGB").resize((20, 20)).save(copies / f"{level}.bmp")
    found = folder(mode="L", seed=seed).load(tmp_path)
    assert [levels(part) for part in (found.train, found.validation, found.test)] == expected
    assert capsys.readouterr().err.splitlines()[-1].endswith("read 10 images (20 duplicates left out)")


def spoil(root: Path, count: int) -> None:
    """Files that are called PNG and are none."""
    for i in range(count):
        (root / f"bad {i:02}.png").write_text("no image")


def test_bad_files_are_named_at_once(tmp_path: Path) -> None:
    """All with path and reason up to twenty, then their number; the message names the key that leaves them out."""
    two_good_ones(tmp_path)
    spoil(tmp_path, 20)
    with pytest.raises(DataError) as some:
        folder().load(tmp_path)
    spoil(tmp_path, 23)
    with pytest.raises(DataError) as many:
        folder().load(tmp_path)
    assert str(some.value).startswith("20 bad files: ")
    assert [str(tmp_path / f"bad {i:02}.png (no image") in str(some.value) for i in range(20)] == [True] * 20
    assert "more" not in str(some.value)
    assert str(many.value).startswith("23 bad files: ")
    assert "bad 19.png" in str(many.value)
    assert "bad 20.png" not in str(many.value)
    assert "; and 3 more; " in str(many.value)
    assert str(many.value).endswith('or set on_error = "skip" in [data]')


def test_message_about_odd_names_is_one_line(tmp_path: Path) -> None:
    """A line break in a name does not break the message."""
    two_good_ones(tmp_path)
    (tmp_path / "a\nb.png").write_text("no image")
    with pytest.raises(DataError, match=r"a b\.png") as caught:
        folder().load(tmp_path)
    assert "\n" not in str(caught.value)


def test_bad_files_are_left_out_where_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`on_error = "skip"` names them in a line of its own and reads the others; one bad frame is a bad file."""
    numbered(tmp_path, 6)
    spoil(tmp_path, 1)
    film(tmp_path / "cut.tif", [100, 101], "TIFF")
    whole = (tmp_path / "cut.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(whole[: len(whole) - 80])
    found = everything(folder(mode="L", on_error="skip", frames="all").load(tmp_path))
    assert sorted(levels(found)) == list(range(6))
    warning, closing = capsys.readouterr().err.splitlines()[-2:]
    assert "left out 2 bad files: " in warning
    assert re.search(r"bad 00\.png \(.+\); .*cut\.tif \(.+\)$", warning)
    assert closing == "read 6 images (2 bad files left out)"


def test_closing_line_tells_what_was_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images, duplicates, bad and other files, each in its number."""
    numbered(tmp_path, 3)
    numbered(tmp_path / "copies", 1)
    spoil(tmp_path, 2)
    (tmp_path / "README").write_text("Levels.")
    folder(on_error="skip").load(tmp_path)
    closing = capsys.readouterr().err.splitlines()[-1]
    assert closing == "read 3 images (1 duplicate, 2 bad files and 1 other file left out)"


def test_images_are_in_memory_once(tmp_path: Path) -> None:
    """The peak of reading is far below twice what the images take."""
    rng = np.random.default_rng(1)
    for i in range(100):
        Image.fromarray(rng.integers(0, 256, (128, 128, 3), np.uint8)).save(tmp_path / f"{i}.bmp")
    data = folder(height=128, width=128)
    data.load(tmp_path)  # what the first call imports is not counted
    tracemalloc.start()
    try:
        images = data.load(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * everything(images).nbytes
