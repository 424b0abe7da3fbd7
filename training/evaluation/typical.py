"""Bounds of the figures by which the service tells images that are far from a model's training images.

See service/contract/typical.py for the figures. The bounds are set on one half of the held-out images, and measured on
the other half and on images of other kinds, with every kind of noise that the model removes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from service.contract.images import Pixels, fit
from service.contract.manifest import FarFromTraining, Manifest, digest
from service.contract.typical import STATISTICS, Figures, far, figures
from training.data import Dataset, Folder, Frey, Mnist
from training.errors import DataError
from training.evaluation.served import Answer
from training.evaluation.tasks import SUBJECTS, Task, chosen

MOST_HELD_OUT, LEAST_CAUGHT = 0.01, 0.95
"""Shares of images with the note, over all conditions: of held-out images at most, of each other kind at least."""
TAILS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.2, 0.15, 0.12, 0.1, 0.07, 0.05, 0.0)
"""Percent of the figures beyond each bound that are tried, the tightest bounds first."""
HELD_OUT = 1000
"""Held-out images at least, of those that there are: a share of 1 % cannot be measured on few."""
PHOTOGRAPHS = Path("photos/dev")
"""Folder of photographs below the data."""
PARTS = 4
"""A photograph becomes so many pictures along each side."""
OTHERS: dict[str, tuple[Dataset, frozenset[str]]] = {
    "faces": (Frey(dataset="frey"), frozenset({"frey"})),
    "digits": (Mnist(dataset="mnist"), frozenset({"mnist", "digits"})),
}
"""Other kinds of images: their data set, and the subjects of that kind, for which they are not others."""
MADE: dict[str, Callable[[Pixels], Pixels]] = {
    "inverted": lambda x: 1.0 - x,
    "2x - 1": lambda x: 2.0 * x - 1.0,
    "black": np.zeros_like,
    "white": np.ones_like,
}
"""Images of other kinds that are made of held-out ones."""


class Condition(NamedTuple):
    """How images are sent: the task, None for clean images, and whether the service estimates the level."""

    task: Task | None
    auto: bool = False

    def can_be(self, kind: str) -> bool:
        """Whether images of a kind can be sent so: negative ones are not counts."""
        return not (kind == "2x - 1" and self.task is not None and self.task.family == "poisson")


@dataclass(frozen=True)
class Typical:
    """The figures of images as a served model answers them.

    Attributes:
        ask: Restores images, as `Client.images` does.
        manifest: The model's manifest.
        seed: Seed of corruptions and draws.
        kept: Folder for figures until the calibration is complete.
    """

    ask: Callable[..., Answer]
    manifest: Manifest
    seed: int
    kept: Path

    def figures(self, x: Pixels, condition: Condition) -> Figures:
        """The figures of images under a condition, (n,) each.

        Args:
            x: Clean images, (n, c, h, w).
            condition: How they are sent.
        """
        task = condition.task
        if task is None:
            return figures(x, x)
        y = task.seen(x, self.seed).y

        def asked() -> Figures:
            options = {**task.asked(auto=condition.auto), "seed": self.seed}
            answer = self.ask(self.manifest.name, "denoise", y, None, **options)
            level = None if answer.level is None else answer.level.astype(np.float32)
            if level is None or len(level) != len(y):  # a header does not hold the levels of many images
                level = np.full(len(y), task.level, np.float32)
            return figures(y, answer.outputs["images"], task.family, level)

        name = digest(np.ascontiguousarray(y).tobytes() + str(condition).encode())[:16]
        return kept(self.kept / f"far-{name}.npz", asked)


def kept(path: Path, compute: Callable[[], dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Arrays from a file or, where there is none, computed and written to it."""
    if path.exists():
        with np.load(path) as file:
            return dict(file)
    found = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part.npz")
    np.savez(partial, **found)  # type: ignore[arg-type]  # numpy's stubs: allow_pickle has another type
    partial.replace(path)
    return found


def clean_figures(x: Pixels, _condition: Condition) -> Figures:
    """The figures of clean images, whatever is asked: those that need no model."""
    return figures(x, x)


def far_from_training(
    of: Callable[[Pixels, Condition], Figures], x: Pixels, tasks: list[Task], others: dict[str, Pixels], seed: int
) -> FarFromTraining:
    """Set the bounds, and measure how well they tell images of other kinds.

    Args:
        of: Figures of images (n, c, h, w) under a condition: `Typical.figures` or `clean_figures`.
        x: Held-out images, (n, c, h, w).
        tasks: Corruptions; those that `denoise` removes without a blur are used.
        others: Images of other kinds, (k, c, h, w), by kind. Without any, the statistic is not called sound.
        seed: Seed of the choice of images and of their corruptions, for the manifest.
    """
    noisy = [task for task in tasks if task.operation == "denoise" and not task.blur]
    conditions = [Condition(None), *(Condition(task, auto) for task in noisy for auto in (False, True))]
    kinds = {**{kind: make(x[1::2]) for kind, make in MADE.items()}, **others}
    bar = tqdm(conditions, desc="far from training", unit="answer")
    set_on, measured = [], []
    of_kinds: dict[str, list[Figures]] = {kind: [] for kind in kinds}
    for condition in bar:
        bar.set_postfix_str("clean" if condition.task is None else condition.task.name)
        set_on.append(of(x[::2], condition))
        measured.append(of(x[1::2], condition))
        for kind, images in kinds.items():
            if condition.can_be(kind):
                of_kinds[kind].append(of(images, condition))
    bounds = bounds_of(set_on)
    held_out = share_of(measured, bounds)
    caught = {kind: share_of(found, bounds) for kind, found in of_kinds.items()}
    sound = bool(others) and held_out <= MOST_HELD_OUT and min(caught.values()) >= LEAST_CAUGHT
    shares = {kind: round(share, 4) for kind, share in caught.items()}
    return FarFromTraining(
        sound=sound, bounds=bounds, held_out=round(held_out, 4), caught=shares, images=len(x), seed=seed
    )


def bounds_of(found: list[Figures]) -> dict[str, list[float]]:
    """The tightest bounds that at most a third of `MOST_HELD_OUT` is beyond, equally far out in every figure.

    Args:
        found: The figures of held-out images under each condition.
    """
    whole = {name: np.concatenate([one[name] for one in found]) for name in STATISTICS}
    for tail in TAILS:
        bounds = {name: [float(end) for end in np.percentile(all_, (tail, 100 - tail))] for name, all_ in whole.items()}
        if share_of(found, bounds) <= MOST_HELD_OUT / 3:
            break
    return {name: [float(f"{low:.5g}"), float(f"{high:.5g}")] for name, (low, high) in bounds.items()}


def share_of(found: list[Figures], bounds: dict[str, list[float]]) -> float:
    """The share of images beyond the bounds, over all conditions."""
    return float(np.mean([far(one, bounds).mean() for one in found]))


def other_images(data: Path, model: dict[str, Any], count: int = 200) -> dict[str, Pixels]:
    """Images of other kinds than a model's, in its shape, from the data sets that are there.

    Args:
        data: Folder of the data sets.
        model: Description of the model, as `GET /v1/models/{model}` returns it.
        count: Most images of a kind.

    Returns:
        Images (n, c, h, w) in [0, 1] by kind.
    """
    own = {name for name, subject in SUBJECTS.items() if model["dataset"] in subject.served_as}
    channels, *size = (axis if isinstance(axis, int) else 64 for axis in model["input_shape"])
    wanted = {kind: dataset for kind, (dataset, kin) in OTHERS.items() if not own & kin}
    found = {}
    for kind, dataset in wanted.items():
        try:
            images = dataset.load(data).validation
        except DataError:
            continue
        found[kind] = as_shape(chosen(images, count, 0), channels, (size[0], size[1]))
    if own and (data / PHOTOGRAPHS).is_dir():
        large = Folder(dataset="folder", height=PARTS * size[0], width=PARTS * size[1])
        sets = large.load(data / PHOTOGRAPHS)
        images = torch.cat([sets.train, sets.validation, sets.test])
        n, colours, height, width = images.shape
        parts = images.reshape(n, colours, PARTS, height // PARTS, PARTS, width // PARTS).permute(0, 2, 4, 1, 3, 5)
        tiles = parts.reshape(-1, colours, height // PARTS, width // PARTS)
        found["photographs"] = as_shape(chosen(tiles, count, 0), channels, (size[0], size[1]))
    return found


def as_shape(images: Pixels, channels: int, size: tuple[int, int]) -> Pixels:
    """Images (n, k, h, w) in other channels and of another size, stretched."""
    if images.shape[1] != channels:
        images = np.repeat(images.mean(1, keepdims=True), channels, axis=1)
    return images if images.shape[2:] == size else fit(images, size, "resize")
