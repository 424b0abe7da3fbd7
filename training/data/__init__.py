"""Data sets by name, the table `[data]` of a run's TOML. A new one takes one file and one name here."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from training.data.digits import Digits
from training.data.folder import Folder
from training.data.frey import Frey
from training.data.images import DatasetSettings, ImageSet, as_float, binarise
from training.data.mnist import Mnist
from training.data.mnist_static import MnistStatic

Dataset = Annotated[Digits | Folder | Frey | Mnist | MnistStatic, Field(discriminator="dataset")]
KINDS: dict[str, type[DatasetSettings]] = {
    get_args(kind.model_fields["dataset"].annotation)[0]: kind for kind in get_args(get_args(Dataset)[0])
}
"""The data sets by their names."""

__all__ = ["KINDS", "Dataset", "Digits", "Folder", "Frey", "ImageSet", "Mnist", "MnistStatic", "as_float", "binarise"]
