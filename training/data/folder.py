"""A directory of images of any size and mode."""

from __future__ import annotations

import filecmp
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import Field, model_validator
from tqdm import tqdm

from service.contract.images import DECODER_ERRORS, WHITE, draw, fit, to_array, upright
from service.contract.manifest import digest
from training.data.crops import LEAST, LEAST_HELD_OUT, Crops, CropSettings, Picture, Visits
from training.data.images import DatasetSettings, ImageSet, Share, split_off, to_uint8
from training.errors import DataError
from training.progress import tell
from training.strict import Positive

FORMATS = (
    "AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "PSD", "QOI", "TIFF", "WEBP",
)  # fmt: skip
"""Formats that are read. Pillow's other decoders accept files that are no pictures, or go by the suffix alone."""
SEQUENCES = {"AVIF", "GIF", "PNG", "TIFF", "WEBP"}
"""Formats whose frames are images; the further ones of a JPEG are previews, those of a PSD layers."""
SUFFIXES = {
    ".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
    ".jxl", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".qoi", ".tga", ".tif", ".tiff", ".webp",
}  # fmt: skip
SIGNATURE = re.compile(
    rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|II\*\0|MM\0\*|RIFF....WEBP|\xff\x4f\xff\x51|8BPS|qoif"
    rb"|\0\0\0\x0c(jP  |JXL )|....ftyp(avi[fs]|he[iv][a-z]|mif1|msf1)",
    re.DOTALL,
)
"""First bytes of files that must be images, whatever their suffix."""
HIDDEN = {"__macosx", "desktop.ini", "thumbs.db"}
CHANNELS = {"L": 1, "RGB": 3}
EIGHT_BIT = {"L", "RGB"}
"""Modes of Pillow whose pixels need no conversion to numbers and back."""
LEAST_FILES = 3  # one a split
NAMED = 20  # bad files, in one message


class Folder(DatasetSettings):
    """Every image below the directory, brought to one size and mode.

    Files are recognised by content, whatever their suffix; links are followed, hidden files and folders left out. Of
    images that are equal at that size the first is kept, so that none is in two splits. With `[data.crops]`, of files
    that are equal byte for byte.

    Transparent pixels are blended with black. A float image must lie in [0, 1]; 32-bit integer grey is refused.
    """

    dataset: Literal["folder"]
    """Every image below `--data`."""
    height: Positive
    """Height of every image in pixels; of a crop, with `[data.crops]`."""
    width: Positive
    """Width of every image in pixels; of a crop, with `[data.crops]`."""
    mode: Literal["L", "RGB"] = "RGB"
    """Grey or colour."""
    fit: Literal["crop", "pad", "resize"] = "crop"
    """`crop` fills the size and cuts off the rest, `pad` keeps the whole image on black, `resize` stretches it."""
    crops: CropSettings | None = None
    """Crops of that size in place of whole images, others in every epoch. Files are opened when they are needed, so
    that the folder may be larger than memory."""
    frames: Literal["first", "all"] = "first"
    """Of each file the first page or frame, or all of them, in one split."""
    bits: Annotated[int, Field(ge=1, le=16)] = 16
    """16-bit grey is divided by 2^bits - 1, except in PGM and JPEG 2000, whose files name their white."""
    on_error: Literal["stop", "skip"] = "stop"
    """Whether an image that cannot be read stops the run or is left out."""
    validation: Share = 0.05
    """Share of the files for validation, of those that are not for testing."""
    test: Share = 0.1
    """Share of all files with images for testing."""
    seed: int = 0
    """Seed of the splits."""

    @model_validator(mode="after")
    def _fits_together(self) -> Folder:
        if self.crops is not None and self.fit != "crop":
            raise ValueError(f'fit = "{self.fit}" brings whole images to one size; leave it out, or [data.crops]')
        if self.crops is not None and self.crops.rotations and self.height != self.width:
            raise ValueError("rotations = true needs height = width")
        return self

    def load(self, root: Path) -> ImageSet:
        """Load the three splits, at random by `seed`, and report the number of images on standard error.

        Raises:
            DataError: The directory is missing, or has too few images or unreadable ones; one message names them all.
        """
        if not root.is_dir():
            raise DataError(f"{root} is not a directory; --data must name a directory of images")
        found = _Found()
        for path in tqdm(files_below(root, found.refuse), desc="reading images", unit="file", leave=False):
            try:
                if self.crops is None:
                    found.add(self._images(path))
                else:
                    found.enter(path, self._frames(path))
            except DataError as error:
                found.refuse(path, str(error))
        if found.bad and self.on_error == "stop":
            raise DataError(f'{found.named()}; replace or remove them, or set on_error = "skip" in [data]')
        if found.bad:
            tell(f"left out {found.named()}")
        if found.files < LEAST_FILES:
            raise DataError(
                f"{root} holds {found}, in {_count(found.files, 'file')}; "
                f"at least {LEAST_FILES} files with images are needed ({', '.join(FORMATS)})"
            )
        tell(f"read {found}" if self.crops is None else f"found {found}")
        return self._split(found) if self.crops is None else self._cropped(found)

    def _images(self, path: Path) -> list[NDArray[np.uint8]] | None:
        """Read the images of one file; None where it is no image.

        Raises:
            DataError: An image cannot be read; the message is the reason alone.
        """
        file = opened(path)
        if file is None:
            return None
        try:
            with file:
                return [self._image(file, frame) for frame in range(self._count(file))]
        except DECODER_ERRORS as error:
            raise DataError(reason_of(error)) from error

    def _count(self, file: Image.Image) -> int:
        """Number of its frames that are images."""
        every = self.frames == "all" and file.format in SEQUENCES
        return getattr(file, "n_frames", 1) if every else 1

    def _image(self, file: Image.Image, frame: int) -> NDArray[np.uint8]:
        file.seek(frame)
        checked = self._levels(file).astype(np.float32) / np.float32(255.0)
        return to_uint8(fit(checked[None], (self.height, self.width), self.fit)[0], "it")

    def _levels(self, image: Image.Image) -> NDArray[np.uint8]:
        """The pixels, (c, h, w), upright."""
        if image.mode in EIGHT_BIT:
            image = upright(image)
            levels = np.empty((CHANNELS[self.mode], image.height, image.width), np.uint8)
            draw(image, levels)
            return levels
        scaled = image.mode.startswith("I;16") and image.format != "JPEG2000"
        values = to_array(image, CHANNELS[self.mode], 2**self.bits - 1 if scaled else WHITE)
        if scaled and values.max() > 1.0:
            raise DataError(f"its 16-bit grey has values above 2^{self.bits} - 1; set a larger `bits` in [data]")
        return to_uint8(values, "it")

    def _frames(self, path: Path) -> int | None:
        """Number of the images of one file, of which only the head is read; None where it is no image.

        Raises:
            DataError: It cannot be read, or is too small; the message is the reason alone.
        """
        file = opened(path)
        if file is None:
            return None
        try:
            with file:
                self._check_size(file)
                return self._count(file)
        except DECODER_ERRORS as error:
            raise DataError(reason_of(error)) from error

    def _check_size(self, file: Image.Image) -> None:
        assert self.crops is not None
        if not self.crops.usable((self.height, self.width), file.size[::-1]):
            raise DataError(f"its {file.height} x {file.width} pixels hold no crop of {self.height} x {self.width}")

    def cut(self, path: Path, frame: int, count: int, rng: Generator) -> NDArray[np.uint8]:
        """Cut random crops of one image, (count, c, h, w).

        Args:
            path: Its file.
            frame: Number of the frame in the file.
            count: Number of crops.
            rng: Source of places, scales and orientations.

        Raises:
            DataError: It cannot be read; the message is the reason alone.
        """
        assert self.crops is not None
        file = opened(path)
        if file is None:
            raise DataError("no image any more")
        try:
            with file:
                file.seek(frame)
                whole = upright(file)
                self._check_size(whole)
                picture = Picture(whole.size[::-1], lambda box: self._levels(_part(whole, box, file.format)))
                return np.stack([self.crops.cut(picture, (self.height, self.width), rng) for _ in range(count)])
        except DECODER_ERRORS as error:
            raise DataError(reason_of(error)) from error

    def _cropped(self, found: _Found) -> ImageSet:
        """Crops of the images of each split; those held out stay the same, and are as large a share as their files."""
        assert self.crops is not None
        workers, count = torch.get_num_threads(), self.crops.per_epoch
        sizes = (count, math.ceil(self.validation * count), math.ceil(self.test * count))
        parts = zip(self._parts(found), sizes, (LEAST, LEAST_HELD_OUT, LEAST_HELD_OUT), strict=True)
        train, *held_out = (
            Crops(
                Visits(FolderPictures(self, [found.pictures[row] for row in rows]), size, least, (self.seed, split)),
                workers,
                skip=self.on_error == "skip",
            )
            for split, (rows, size, least) in enumerate(parts)
        )
        order = torch.Generator().manual_seed(self.seed)  # otherwise the crops of one picture are neighbours
        validation, test = (crops.first()[torch.randperm(crops.visits.count, generator=order)] for crops in held_out)
        return ImageSet(train.first(), validation, test, crops=train)

    def _parts(self, found: _Found) -> list[NDArray[np.intp]]:
        """The images of each split, at random by file."""
        rest, test = split_off(torch.arange(found.files), self.test, self.seed)
        parts = (*split_off(rest, self.validation, self.seed), test)
        return [np.flatnonzero(np.isin(found.owners, part.numpy())) for part in parts]

    def _split(self, found: _Found) -> ImageSet:
        images = np.frombuffer(found.pixels, np.uint8).reshape(-1, CHANNELS[self.mode], self.height, self.width)
        train, *held_out = self._parts(found)
        others = [images[rows] for rows in held_out]
        for new, old in enumerate(train):  # in place, because a copy would take the memory twice
            images[new] = images[old]
        return ImageSet(*(torch.from_numpy(part) for part in (images[: len(train)], *others)))


@dataclass(frozen=True)
class FolderPictures:
    """Images of a folder of which crops are cut.

    Attributes:
        folder: The settings.
        places: File and frame of each image.
    """

    folder: Folder
    places: list[tuple[Path, int]]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of a crop."""
        return CHANNELS[self.folder.mode], self.folder.height, self.folder.width

    @property
    def dtype(self) -> torch.dtype:
        """Of a pixel."""
        return torch.uint8

    def __len__(self) -> int:
        """Their number."""
        return len(self.places)

    def crops(self, place: int, count: int, rng: Generator) -> NDArray[np.uint8]:
        """Cut crops of one image, (count, c, h, w).

        Raises:
            DataError: It cannot be read. The message names it, with the reason.
        """
        path, frame = self.places[place]
        try:
            return self.folder.cut(path, frame, count, rng)
        except DataError as error:
            raise DataError(named(path, str(error))) from error


@dataclass
class _Found:
    """The images of a directory that have been read so far, and the files that were not."""

    pixels: bytearray = field(default_factory=bytearray)
    pictures: list[tuple[Path, int]] = field(default_factory=list)
    """Files and frames of images that are to be read later."""
    sizes: dict[int, list[Path]] = field(default_factory=dict)
    """Their files by size in bytes."""
    owners: list[int] = field(default_factory=list)
    """The number of the file that each image comes from."""
    files: int = 0
    digests: set[str] = field(default_factory=set)
    bad: list[str] = field(default_factory=list)
    duplicates: int = 0
    others: int = 0

    def add(self, images: list[NDArray[np.uint8]] | None) -> None:
        """Add the images of one more file, without duplicates."""
        if images is None:
            self.others += 1
            return
        before = len(self.owners)
        for content in (image.tobytes() for image in images):
            known = digest(content)
            if known in self.digests:
                self.duplicates += 1
                continue
            self.digests.add(known)
            self.pixels += content
            self.owners.append(self.files)
        self.files += len(self.owners) > before

    def enter(self, path: Path, frames: int | None) -> None:
        """Count one more file whose images are read later, unless it equals an earlier one byte for byte."""
        if frames is None:
            self.others += 1
            return
        alike = self.sizes.setdefault(path.stat().st_size, [])
        if any(filecmp.cmp(path, other, shallow=False) for other in alike):
            self.duplicates += 1
            return
        alike.append(path)
        self.pictures += [(path, frame) for frame in range(frames)]
        self.owners += [self.files] * frames
        self.files += 1

    def refuse(self, path: Path, reason: str) -> None:
        """Count one more file that cannot be read."""
        self.bad.append(named(path, reason))

    def named(self) -> str:
        """The bad files with their reasons."""
        more = [f"and {len(self.bad) - NAMED} more"] if len(self.bad) > NAMED else []
        return f"{_count(len(self.bad), 'bad file')}: {'; '.join(self.bad[:NAMED] + more)}"

    def __str__(self) -> str:
        """The counts in words."""
        counts = {"duplicate": self.duplicates, "bad file": len(self.bad), "other file": self.others}
        *most, last = ["", *(_count(n, noun) for noun, n in counts.items() if n)]
        left_out = " and ".join(part for part in (", ".join(most[1:]), last) if part)
        return _count(len(self.owners), "image") + (f" ({left_out} left out)" if left_out else "")


def files_below(root: Path, refuse: Callable[[Path, str], None]) -> list[Path]:
    """Every file below `root` that is not hidden, sorted; a folder with several links to it is read once."""
    found, tops, seen = [], [root], set()
    for top in tops:  # grows by links to folders
        for name, folders, names in os.walk(top, onerror=lambda error: refuse(Path(error.filename), reason_of(error))):
            folder = Path(name)
            if folder.resolve() in seen:
                folders.clear()
                continue
            seen.add(folder.resolve())
            folders[:] = sorted(name for name in folders if not _is_hidden(name))
            tops += [folder / name for name in folders if (folder / name).is_symlink()]
            found += [folder / name for name in names if not _is_hidden(name)]
    return sorted(found)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in HIDDEN


def opened(path: Path) -> Image.Image | None:
    """The image in a file, which is not decoded yet; None where it is none.

    Raises:
        DataError: It is an image that cannot be read; the message is the reason alone.
    """
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
            return None
        return Image.open(path, formats=FORMATS)
    except DECODER_ERRORS as error:
        if not (isinstance(error, Image.DecompressionBombError) or _is_image(path)):
            return None
        raise DataError(reason_of(error)) from error


def _is_image(path: Path) -> bool:
    """Whether a file that cannot be opened is an image by its suffix or first bytes."""
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            return SIGNATURE.match(file.read(16)) is not None
    except OSError:
        return True


def reason_of(error: Exception) -> str:
    """Why an image cannot be read, in words."""
    if isinstance(error, UnidentifiedImageError):
        return "no image that Pillow can decode; convert it to PNG"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def named(path: Path, reason: str) -> str:
    """A bad file and the reason, on one line."""
    return " ".join(f"{path} ({reason})".split())


def _part(image: Image.Image, box: tuple[int, int, int, int], form: str | None) -> Image.Image:
    """A part of an image that is upright, with what its conversion needs to know and no orientation."""
    part = image.crop(box)
    part.format = form
    part.info = {key: value for key, value in image.info.items() if key == "transparency"}
    return part


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
