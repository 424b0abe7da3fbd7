"""Data sets by name; a new one is one file and one name here. The table `[data]` of a run's TOML is one of these."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from training.datasets.digits import Digits
from training.datasets.folder import Folder
from training.datasets.frey import Frey
from training.datasets.images import ImageSet, as_float, binarise
from training.datasets.mnist import Mnist
from training.datasets.mnist_static import MnistStatic

Dataset = Annotated[Digits | Folder | Frey | Mnist | MnistStatic, Field(discriminator="dataset")]

__all__ = ["Dataset", "Digits", "Folder", "Frey", "ImageSet", "Mnist", "MnistStatic", "as_float", "binarise"]
