"""A directory of images of any size and mode."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from service.pixels import fit, to_array
from training.datasets.images import ImageSet, Share, split_off, to_uint8
from training.errors import DataError
from training.strict import Positive, Strict

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm"}
CHANNELS = {"L": 1, "RGB": 3}
LEAST = 3  # one image a split


class Folder(Strict):
    """Every image below the directory, brought to one size and mode.

    Transparent pixels are laid on black. 16-bit grey is scaled by 65,535; a float image must lie in [0, 1]; 32-bit
    integer grey is refused.
    """

    dataset: Literal["folder"]
    """Every image below `--data`."""
    height: Positive
    """Pixels to which every image is brought."""
    width: Positive
    """Likewise."""
    mode: Literal["L", "RGB"] = "RGB"
    """Grey or colour."""
    fit: Literal["crop", "pad", "resize"] = "crop"
    """`crop` fills the size and cuts what stands out, `pad` keeps all and fills with black, `resize` stretches."""
    validation: Share = 0.05
    """Share of the images, of those that are not for testing."""
    test: Share = 0.1
    """Share of all images."""
    seed: int = 0
    """Of the splits."""

    def load(self, root: Path) -> ImageSet:
        """The three splits, at random by `seed`.

        Raises: DataError for a missing or empty directory, an unreadable image, values outside [0, 1].
        """
        paths = self._paths(root)
        progress = tqdm(paths, desc="reading images", unit="image", leave=False)
        images = torch.from_numpy(np.stack([self._read(path) for path in progress]))
        rest, test = split_off(images, self.test, self.seed)
        train, validation = split_off(rest, self.validation, self.seed)
        return ImageSet(train, validation, test)

    def _paths(self, root: Path) -> list[Path]:
        if not root.is_dir():
            raise DataError(f"{root} is not a directory; --data must name a directory of images")
        paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
        if len(paths) < LEAST:
            raise DataError(
                f"{root} holds {len(paths)} images; at least {LEAST} are needed ({', '.join(sorted(SUFFIXES))})"
            )
        return paths

    def _read(self, path: Path) -> NDArray[np.uint8]:
        try:
            with Image.open(path) as file:
                values = to_array(file, CHANNELS[self.mode])
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{path} cannot be read as an image ({error}); remove or replace it") from error
        checked = to_uint8(values, str(path)).astype(np.float32) / np.float32(255.0)
        return to_uint8(fit(checked[None], (self.height, self.width), self.fit)[0], str(path))
