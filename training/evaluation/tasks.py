"""Restoration tasks: data sets, their corruptions, and the corrupted images."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from service.contract.corruption import FAMILIES, NoiseFamily, OperatorName, operator_of
from service.contract.images import Pixels
from training.data import Dataset, Digits, Folder, Frey, Mnist, as_float
from training.distributions.noise import corrupt
from training.errors import ConfigError
from training.loop.randomness import keyed_generator

SCATTERED = 0.5
"""Share of missing pixels in tasks with scattered ones."""


class Seen(NamedTuple):
    """Corrupted images.

    Attributes:
        y: The images, (n, c, h, w); for super-resolution h and w are divided by the factor.
        mask: For inpainting, 1 where a pixel is observed, else 0, of the shape of y; None otherwise.
    """

    y: Pixels
    mask: Pixels | None

    @property
    def missing(self) -> Pixels | None:
        """1 where a pixel is missing, else 0, (n, c, h, w); None without a mask."""
        return None if self.mask is None else 1.0 - self.mask

    def rows(self, which: slice) -> Seen:
        """Select a slice of the images."""
        return Seen(self.y[which], None if self.mask is None else self.mask[which])


@dataclass(frozen=True)
class Task:
    """One corruption, and the operation of the service that restores it.

    Attributes:
        name: Name of the task. It is part of the seed of the corruption.
        operation: The operation.
        family: Family of the noise; `none` without noise.
        level: Level of the noise.
        missing: Places of missing pixels: none, scattered ones, or the bottom half.
        factor: Height and width of averaged blocks, in pixels.
        blur: Standard deviation of a blur without noise, in pixels; 0 for none.
    """

    name: str
    operation: Literal["denoise", "inpaint", "super-resolve"]
    family: NoiseFamily | Literal["none"] = "none"
    level: float = 0.0
    missing: Literal["", "scattered", "bottom"] = ""
    factor: int = 1
    blur: float = 0.0

    def asked(self, *, auto: bool = False) -> dict[str, object]:
        """Options of the service's operation.

        Args:
            auto: Whether the service estimates the level of the noise.
        """
        if self.operation == "super-resolve":
            return {"factor": self.factor}
        if self.blur:
            return {"noise": "none", "blur": self.blur}
        return {"noise": self.family, "level": "auto" if auto else self.level} if self.operation == "denoise" else {}

    def seen(self, x: Pixels, seed: int) -> Seen:
        """Corrupt images. Noisy values are not clipped.

        Args:
            x: Images, (n, c, h, w).
            seed: Seed of noise and masks, together with the task's name.

        Returns:
            The corrupted images, a function of the arguments and the task alone.
        """
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
        """Name of the linear operator on images of a size (h, w): means of blocks, or a blur; None without one."""
        height, width = size
        if self.operation == "super-resolve":
            return "shrink", self.factor, height, width
        return ("blur", self.blur, height, width) if self.blur else None

    def operator(self, size: tuple[int, ...]) -> Any:
        """The linear operator on images of a size (h, w); the task must have one."""
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
        """Express the observation of one image as y = A x plus noise.

        Args:
            seen: The corrupted images.
            row: Index of the image.
            size: Shape (c, h, w) of the clean image, of d = c h w values.

        Returns:
            y, (k,), and A, (k, d).
        """
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
    """Make tasks with Gaussian noise.

    Args:
        *said: Levels, such as "0.25" or "25/255".

    Returns:
        One task for each level.
    """
    parts = [text.partition("/") for text in said]
    levels = [float(above) / float(below or 1) for above, _, below in parts]
    return tuple(
        Task(f"Gaussian {text}", "denoise", "gaussian", level) for text, level in zip(said, levels, strict=True)
    )


@dataclass(frozen=True)
class Subject:
    """A data set and its tasks.

    Attributes:
        dataset: The data set.
        tasks: Its tasks.
        timed: Name of the task on which speed is measured.
        unet_epochs: Epochs of the U-Net that is trained on it.
        served_as: Values of a manifest's `dataset` that mean this data set.
    """

    dataset: Dataset
    tasks: tuple[Task, ...]
    timed: str
    unet_epochs: int
    served_as: frozenset[str] = field(default_factory=frozenset)


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
"""Tasks of any other data set; those whose factor does not divide its image size are left out."""
UNET_IMAGES = 400_000
"""Images on which the U-Net of any other data set is trained, repetitions counted."""


def subject_of(model: dict[str, Any]) -> tuple[str, Subject]:
    """Find the data set that a model was trained on.

    Args:
        model: Description of the model, as `GET /v1/models/{model}` returns it.

    Returns:
        Name of the data set, or of the model for an unknown one; and the subject.

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
    size = (dataset.height, dataset.width) if isinstance(dataset, Folder) else model["input_shape"][1:]
    tasks = tuple(task for task in TASKS if not any(side % task.factor for side in size))
    images = model["training"].get("train_images") or UNET_IMAGES
    return model["model"], Subject(dataset, tasks, "Gaussian 0.25", max(1, min(400, UNET_IMAGES // images)))


def chosen(images: torch.Tensor, count: int, seed: int) -> Pixels:
    """Choose images at random by a seed.

    Args:
        images: uint8 (n, c, h, w).
        count: Maximum number of chosen images.
        seed: The seed.

    Returns:
        At most `count` images (k, c, h, w), in [0, 1].
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    return np.asarray(as_float(images[order]).numpy())
