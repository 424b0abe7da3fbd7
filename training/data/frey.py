"""Frey Face: 1,965 grey frames of one face, 28 x 20, in the file that Sam Roweis published."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from scipy.io import loadmat
from torch import Tensor

from training.data.images import DatasetSettings, ImageSet
from training.errors import DataError

FILE = "frey_rawface.mat"
FRAMES = 1965
SIZES = {"author": (1600, 0, 365), "random": (1565, 200, 200), "contiguous": (1565, 200, 200)}


class Frey(DatasetSettings):
    """Frey Face with one of three splits.

    `author`: shuffled, 1,600 to train, the other 365 both validation and test, as the paper's first author did.
    `random`: shuffled, 1,565, 200 and 200. Both leak: the frames are a film, and a test frame's neighbours are trained
    on. `contiguous`: the same sizes in the order of the film, so that only the frames at the borders leak.
    """

    about: ClassVar[str] = (
        "Frey Face, 1,965 frames of a film of one man's face, by Brendan Frey; published by Sam Roweis. Neighbours in "
        "the film are nearly alike."
    )
    licence: ClassVar[str] = "Its source states none: research use, not to be redistributed."
    dataset: Literal["frey"]
    """Frey Face."""
    split: Literal["author", "random", "contiguous"] = "contiguous"
    """Which frames are in which split."""
    seed: int = 0
    """Seed of the random splits."""

    def load(self, root: Path) -> ImageSet:
        """Read DIR/frey_rawface.mat or DIR/freyfaces/frey_rawface.mat.

        Raises:
            DataError: The file is missing or is not the original.
        """
        frames = read_frames(root)
        if self.split != "contiguous":
            frames = frames[torch.randperm(FRAMES, generator=torch.Generator().manual_seed(self.seed))]
        train, validation, test = frames.split(SIZES[self.split])
        return ImageSet(train, validation if len(validation) else test, test)


def read_frames(root: Path) -> Tensor:
    """Read all frames in their order, uint8 (1965, 1, 28, 20)."""
    path = next((p for p in (root / FILE, root / "freyfaces" / FILE) if p.is_file()), None)
    if path is None:
        raise DataError(f"no {FILE} in {root} or {root / 'freyfaces'}; no licence lets us fetch it, place it there")
    try:
        pixels = loadmat(path)["ff"]
    except Exception as error:  # scipy's reader raises whatever its parts raise
        raise DataError(f"{path} cannot be read ({type(error).__name__}); place the original there") from error
    if pixels.shape != (560, FRAMES) or pixels.dtype != np.uint8:
        raise DataError(f"{path} holds {pixels.dtype} {pixels.shape}, not uint8 (560, {FRAMES})")
    return torch.from_numpy(np.ascontiguousarray(pixels.T)).reshape(FRAMES, 1, 28, 20)
