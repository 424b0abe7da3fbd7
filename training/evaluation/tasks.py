"""Restoration tasks: data sets, their corruptions, and the corrupted images that restorers get."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from service.contract.corruption import FAMILIES, NoiseFamily, OperatorName, operator_of
from training.data import Dataset, Digits, Frey, Mnist, as_float
from training.distributions.noise import corrupt
from training.errors import ConfigError
from training.evaluation.served import Pixels
from training.loop.randomness import keyed_generator

SCATTERED = 0.5
"""Share of the pixels that are missing where they are scattered."""


class Seen(NamedTuple):
    """Corrupted images: y (n, c, seen h, seen w), and for inpainting the mask, 1 where a pixel is observed."""

    y: Pixels
    mask: Pixels | None

    @property
    def missing(self) -> Pixels | None:
        """1 where a pixel is to be filled in, else 0; None where all are to be restored."""
        return None if self.mask is None else 1.0 - self.mask

    def rows(self, which: slice) -> Seen:
        """A slice of the images."""
        return Seen(self.y[which], None if self.mask is None else self.mask[which])


@dataclass(frozen=True)
class Task:
    """One corruption, and the operation of the service that undoes it."""

    name: str
    operation: Literal["denoise", "inpaint", "super-resolve"]
    family: NoiseFamily | Literal["none"] = "none"
    level: float = 0.0
    missing: Literal["", "scattered", "bottom"] = ""
    factor: int = 1
    blur: float = 0.0
    """Standard deviation of a blur in pixels, without noise; 0 for none."""

    def asked(self, *, auto: bool = False) -> dict[str, object]:
        """Options of the service's operation; with `auto` it estimates the noise level."""
        if self.operation == "super-resolve":
            return {"factor": self.factor}
        if self.blur:
            return {"noise": "none", "blur": self.blur}
        return {"noise": self.family, "level": "auto" if auto else self.level} if self.operation == "denoise" else {}

    def seen(self, x: Pixels, seed: int) -> Seen:
        """Corrupt images x (n, c, h, w), a function of them, the seed and the task's name. Noise is not clipped."""
        generator = keyed_generator(torch.device("cpu"), seed, 12, zlib.crc32(self.name.encode()))
        if self.operator_name(x.shape[2:]):
            return Seen(self.operator(x.shape[2:]).seen(x), None)
        if self.operation == "inpaint":
            mask = self._mask(x, generator)
            return Seen(x * mask, mask)
        level = torch.zeros(len(x), len(FAMILIES))
        if self.family != "none":
            level[:, FAMILIES.index(self.family)] = self.level
        return Seen(corrupt(torch.from_numpy(x), level, generator).numpy(), None)

    def operator_name(self, size: tuple[int, ...]) -> OperatorName | None:
        """The operator on images of that size, means of blocks or a blur; None where there is none."""
        height, width = size
        if self.operation == "super-resolve":
            return "shrink", self.factor, height, width
        return ("blur", self.blur, height, width) if self.blur else None

    def operator(self, size: tuple[int, ...]) -> Any:
        """The operator of `operator_name`."""
        name = self.operator_name(size)
        assert name is not None
        return operator_of(name)

    def _mask(self, x: Pixels, generator: torch.Generator) -> Pixels:
        mask = np.ones_like(x)
        if self.missing == "bottom":
            mask[:, :, x.shape[2] // 2 :] = 0.0
        else:
            mask *= (torch.rand(len(x), 1, *x.shape[2:], generator=generator) >= SCATTERED).numpy()
        return mask

    def linear(self, seen: Seen, row: int, size: tuple[int, int, int]) -> tuple[NDArray[Any], NDArray[Any]]:
        """One row as y (k,) and a matrix (k, d), such that y = matrix @ x before noise."""
        channels, *plane = size
        y = seen.y[row].reshape(-1)
        if self.operation == "super-resolve":
            rows, columns = self.operator(tuple(plane))
            return y, np.kron(np.eye(channels), np.kron(rows, columns))
        eye = np.eye(channels * plane[0] * plane[1])
        if seen.mask is None:
            return y, eye
        known = seen.mask[row].reshape(-1) > 0
        return y[known], eye[known]


INPAINTING = (
    Task("scattered pixels missing", "inpaint", missing="scattered"),
    Task("bottom half missing", "inpaint", missing="bottom"),
)
ENLARGING = tuple(Task(f"super-resolution x{factor}", "super-resolve", factor=factor) for factor in (2, 4))
FLIPS = tuple(Task(f"salt and pepper {level}", "denoise", "salt-and-pepper", level) for level in (0.1, 0.3))
MASKING = Task("masking 0.5", "denoise", "masking", 0.5)
POISSON = tuple(Task(f"Poisson {level}", "denoise", "poisson", level) for level in (0.1, 0.3))
BLURRING = Task("blur 1", "denoise", blur=1.0)


def noise(*said: str) -> tuple[Task, ...]:
    """Gaussian noise of levels such as "0.25" or "25/255"."""
    parts = [text.partition("/") for text in said]
    levels = [float(above) / float(below or 1) for above, _, below in parts]
    return tuple(
        Task(f"Gaussian {text}", "denoise", "gaussian", level) for text, level in zip(said, levels, strict=True)
    )


@dataclass(frozen=True)
class Subject:
    """A data set, its tasks, the epochs of its U-Net, and the task on which speed is measured, `timed`."""

    dataset: Dataset
    tasks: tuple[Task, ...]
    timed: str
    unet_epochs: int
    served_as: frozenset[str] = field(default_factory=frozenset)
    """Values of a manifest's `dataset` whose images are of this kind."""


SUBJECTS = {
    "mnist": Subject(
        Mnist(dataset="mnist"),
        (*noise("0.1", "0.25", "0.5"), *FLIPS, MASKING, *INPAINTING, *ENLARGING),
        "Gaussian 0.25",
        8,
        frozenset({"mnist", "mnist_static"}),
    ),
    "frey": Subject(
        Frey(dataset="frey", split="contiguous"),
        (*noise("25/255", "50/255"), *FLIPS, MASKING, *INPAINTING, *ENLARGING),
        "Gaussian 50/255",
        40,
        frozenset({"frey"}),
    ),
    "digits": Subject(
        Digits(dataset="digits"),
        (*noise("0.25"), *FLIPS, MASKING, *INPAINTING, ENLARGING[0]),
        "Gaussian 0.25",
        100,
        frozenset({"digits"}),
    ),
}
"""Data sets with tasks of their own."""
TASKS = (*noise("0.1", "0.25"), *FLIPS, MASKING, *INPAINTING, *ENLARGING)
"""Tasks of any other data set, as far as its images can be shrunk."""
UNET_IMAGES = 400_000
"""Images that the U-Net of any other data set is trained on, with repetition."""


def subject_of(model: dict[str, Any]) -> tuple[str, Subject]:
    """The data set that a model was trained on.

    Args:
        model: The model as `GET /v1/models/{model}` describes it.

    Returns:
        A name and the subject.

    Raises:
        ConfigError: The model's manifest does not name its data set.
    """
    for name, subject in SUBJECTS.items():
        if model["dataset"] in subject.served_as:
            return name, subject
    settings = model.get("training", {}).get("settings", {})
    try:
        dataset: Dataset = TypeAdapter(Dataset).validate_python(settings.get("data"))
    except ValidationError as error:
        raise ConfigError(
            f"model {model['model']} does not name its data set in training.settings.data of its manifest; "
            "only models that this trainer exported can be asked for their images"
        ) from error
    _, height, width = model["input_shape"]
    tasks = tuple(task for task in TASKS if height % task.factor == 0 and width % task.factor == 0)
    images = model["training"].get("train_images") or UNET_IMAGES
    return model["model"], Subject(dataset, tasks, "Gaussian 0.25", max(1, min(400, UNET_IMAGES // images)))


def chosen(images: torch.Tensor, count: int, seed: int) -> Pixels:
    """At most `count` images (n, c, h, w) in [0, 1], at random by the seed."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    return np.asarray(as_float(images[order]).numpy())
