"""The static binarised MNIST of the density-estimation literature: one binarisation, drawn once for all."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch

from training.data.images import DatasetSettings, ImageSet
from training.distributions.interface import Support
from training.errors import DataError

FILE = "binarized_mnist.npz"
SIZES = {"train": 50_000, "valid": 10_000, "test": 10_000}


class MnistStatic(DatasetSettings):
    """50,000, 10,000 and 10,000 images of 28 x 28, black or white (Salakhutdinov and Murray; Larochelle's split)."""

    support: ClassVar[Support] = Support.BINARY
    about: ClassVar[str] = (
        "MNIST, each pixel drawn once as black or white by its grey level: the draw of Salakhutdinov and Murray (2008) "
        "in the split of Larochelle and Murray (2011)."
    )
    licence: ClassVar[str] = (
        "As MNIST's: copyright of Yann LeCun and Corinna Cortes, a work derived from NIST's; made available under "
        "CC BY-SA 3.0."
    )
    dataset: Literal["mnist_static"]
    """Static binarised MNIST."""

    def load(self, root: Path) -> ImageSet:
        """Read DIR/binarized_mnist.npz or DIR/mnist_static/binarized_mnist.npz.

        Raises:
            DataError: The file is missing or is not the original.
        """
        path = next((p for p in (root / FILE, root / "mnist_static" / FILE) if p.is_file()), None)
        if path is None:
            raise DataError(f"no {FILE} in {root} or {root / 'mnist_static'}; place it there")
        try:
            with np.load(path, allow_pickle=False) as file:
                splits = {name: file[name] for name in SIZES}
        except Exception as error:  # numpy's reader raises whatever its parts raise
            raise DataError(f"{path} cannot be read ({type(error).__name__}); place the original there") from error
        for name, size in SIZES.items():
            if splits[name].shape != (size, 784) or splits[name].max() != 1:
                raise DataError(f"{path}: {name} is {splits[name].shape}, not ({size}, 784) of 0 and 1")
        parts = (torch.from_numpy(splits[name] * np.uint8(255)).reshape(-1, 1, 28, 28) for name in SIZES)
        return ImageSet(*parts)
