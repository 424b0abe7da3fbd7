"""Test sets of photographs and micrographs, read from the data folder."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from service.contract.images import Pixels
from training.errors import DataError

PHOTOGRAPHS = {"Set12": "L", "BSD68": "L", "CBSD68": "RGB", "Kodak24": "RGB", "McMaster": "RGB"}
"""Pillow's mode by set of photographs."""
MICROGRAPHS = "W2S"
SETS = (*PHOTOGRAPHS, MICROGRAPHS)
W2S = Path("micrographs/w2s")
DEV = Path("photos/dev/cid22")
"""Photographs on which settings of methods are chosen."""


class Picture(NamedTuple):
    """An image of a set.

    Attributes:
        set: Name of its set.
        name: Its name in the set.
        x: The true image, (c, h, w), in [0, 1].
        y: The image as it was taken, of the shape of x; None where noise is made.
    """

    set: str
    name: str
    x: Pixels
    y: Pixels | None = None

    @property
    def place(self) -> str:
        """Set and name, on which seeds depend."""
        return f"{self.set}/{self.name}"


def load(data: Path, name: str, limit: int | None = None) -> list[Picture]:
    """Read a set.

    Args:
        data: Folder of the data sets.
        name: One of `SETS`.
        limit: Maximum number of images, spread evenly over the set; None reads all.

    Raises:
        DataError: The set is not in the folder.
    """
    if name == MICROGRAPHS:
        paths = _found(data / W2S / "test" / "target", "*.png", limit)
        return [Picture(name, path.stem, read(path, "L"), read(data / W2S / "test/noisy" / path.name, "L"))
                for path in paths]  # fmt: skip
    paths = _found(data / "photos" / "test" / name, "*.png", limit)
    return [Picture(name, path.stem, read(path, PHOTOGRAPHS[name])) for path in paths]


def size(data: Path, name: str) -> int:
    """Number of images of a set; 0 where it is absent."""
    folder = data / W2S / "test" / "target" if name == MICROGRAPHS else data / "photos" / "test" / name
    return len(list(folder.glob("*.png")))


def choosers(data: Path, mode: str, count: int, side: int) -> list[Picture]:
    """Middles of photographs that belong to no test set, on which settings are chosen.

    Args:
        data: Folder of the data sets.
        mode: Pillow's mode, L or RGB.
        count: Number of images.
        side: Their height and width at most.

    Raises:
        DataError: The photographs are not in the folder.
    """
    found = []
    for path in _found(data / DEV, "*", count):
        x = read(path, mode)
        top, left = (max(length - side, 0) // 2 for length in x.shape[1:])
        found.append(Picture("dev", path.stem, x[:, top : top + side, left : left + side]))
    return found


def read(path: Path, mode: str) -> Pixels:
    """Read a picture file as (c, h, w) in [0, 1].

    Args:
        path: The file.
        mode: Pillow's mode to which it is converted, L or RGB.
    """
    with Image.open(path) as image:
        levels = np.asarray(image.convert(mode), np.float32) / np.float32(255.0)
    return levels[None] if mode == "L" else np.ascontiguousarray(levels.transpose(2, 0, 1))


def _found(folder: Path, pattern: str, limit: int | None) -> list[Path]:
    paths = sorted(path for path in folder.glob(pattern) if path.is_file())
    if not paths:
        raise DataError(f"no images {pattern} in {folder}; --data (or VAE_DATA) names the folder of the data sets")
    count = min(len(paths), limit or len(paths))
    return [paths[k * len(paths) // count] for k in range(count)]
