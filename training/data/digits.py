"""The 8 x 8 digits bundled with scikit-learn: no file, no download; for tests and first steps."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import torch

from training.data.images import DatasetSettings, ImageSet, Share, split_off, to_uint8


class Digits(DatasetSettings):
    """1,797 images of 8 x 8 with 17 grey levels, split at random by `seed`."""

    stochastic: ClassVar[bool] = True
    about: ClassVar[str] = (
        "Optical Recognition of Handwritten Digits, by Alpaydin and Kaynak (1998); the test part, as scikit-learn has "
        "it: <https://archive.ics.uci.edu/dataset/80>."
    )
    licence: ClassVar[str] = "CC BY 4.0."
    dataset: Literal["digits"]
    """The digits of scikit-learn."""
    validation: Share = 0.1
    """Share of the images for validation, of those that are not for testing."""
    test: Share = 0.2
    """Share of all images for testing."""
    seed: int = 0
    """Seed of the splits."""

    def load(self, root: Path) -> ImageSet:  # noqa: ARG002  # as every data set
        """Load the three splits; `root` is not read."""
        from sklearn.datasets import load_digits  # noqa: PLC0415  # takes longer to import than torch

        values, _ = load_digits(return_X_y=True)
        images = torch.from_numpy(to_uint8(values / 16.0, "digits").reshape(-1, 1, 8, 8))
        rest, test = split_off(images, self.test, self.seed)
        train, validation = split_off(rest, self.validation, self.seed)
        return ImageSet(train, validation, test)
