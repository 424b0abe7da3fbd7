"""The compared restorers, this service and other methods, behind one interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from experiments.comparisons import classical
from experiments.comparisons.gaussian_conditional import ImageGaussian
from experiments.comparisons.unet import Denoiser
from service.contract.images import Pixels, fit
from training.data import ImageSet, as_float
from training.evaluation.measures import psnr
from training.evaluation.served import Client
from training.evaluation.tasks import Seen, Task
from training.extras import installed

RIDGES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
CHOOSERS = 50
"""Validation images on which the ridge is chosen."""
QUALITIES: dict[str, dict[str, object]] = {
    "fast": {"quality": "fast"},
    "refined": {"quality": "refined"},
    "refined 16 draws": {"quality": "refined", "draws": 16},
}
"""Options of this service by the method's name; all requests have `uncertainty`."""


class Restored(NamedTuple):
    """Restored images.

    Attributes:
        images: The images, (n, c, h, w), in [0, 1].
        std: Posterior standard deviations, (n, c, h, w); None if the method gives none.
        level: Estimated noise levels, (n,); None if the method gives none.
        draws: Posterior draws, (draws, n, c, h, w); None if the method gives none.
    """

    images: Pixels
    std: Pixels | None = None
    level: NDArray[np.float64] | None = None
    draws: Pixels | None = None


Restore = Callable[[Task, Seen, float], Restored]
"""(task, observation, setting) -> restored images."""


@dataclass(frozen=True)
class Method:
    """A restorer.

    Attributes:
        name: Its name.
        does: Whether it handles a task.
        restore: Restores the images of a task with a setting.
        settings: Candidate settings. The one with the highest PSNR on a task's images is used.
        batched: Whether an image takes less time in a batch.
        kept: Part of the key of cached results, besides the observation; None caches none between runs.
    """

    name: str
    does: Callable[[Task], bool]
    restore: Restore
    settings: tuple[float, ...] = (0.0,)
    batched: bool = True
    kept: str | None = None


def ours(client: Client, model: str, seed: int) -> list[Method]:
    """Make the methods of this service: each quality with known and with estimated level, and a plain reconstruction.

    Args:
        client: A client of the service.
        model: Name of the model.
        seed: Seed of the requests.
    """

    def restore(asked: dict[str, object], auto: bool, task: Task, seen: Seen, _setting: float) -> Restored:
        options = {**asked, **task.asked(auto=auto), "uncertainty": True, "seed": seed}
        answer = client.images(model, task.operation, seen.y, seen.mask, **options)
        return Restored(answer.outputs["images"], answer.outputs["std"], answer.level if auto else None)

    def reconstruct(_task: Task, seen: Seen, _setting: float) -> Restored:
        return Restored(client.images(model, "reconstruct", seen.y.clip(0.0, 1.0)).outputs["images"])

    methods = [Method("encode and decode", is_noise, reconstruct)]
    for name, asked in QUALITIES.items():
        methods.append(Method(f"ours {name}", lambda _: True, partial(restore, asked, False)))
        if "draws" not in asked:
            methods.append(Method(f"ours {name} auto", is_noise, partial(restore, asked, True)))
    return methods


def rivals(images: ImageSet, seed: int) -> list[Method]:
    """Make the classical methods. They get the family and level of the noise.

    Args:
        images: The data set; the Gaussian conditional is fitted to its training images.
        seed: Seed of the images on which the ridge is chosen.
    """
    size = images.shape
    gaussian = cache(lambda: ImageGaussian.of(as_float(images.train).numpy()))
    chosen: dict[str, float] = {}

    def conditional(task: Task, seen: Seen, _setting: float) -> Restored:
        if task.name not in chosen:
            x = as_float(images.validation[:CHOOSERS]).numpy()
            trial = task.seen(x, seed + 1)
            reached = {
                ridge: psnr(_conditional(gaussian(), task, trial, size, ridge), x, trial.missing).mean()
                for ridge in RIDGES
            }
            chosen[task.name] = max(reached, key=lambda ridge: reached[ridge])
        return Restored(_conditional(gaussian(), task, seen, size, chosen[task.name]))

    skimage, scipy = (f"{name} {installed(name)}" for name in ("scikit-image", "scipy"))
    planes = (
        (
            "total variation",
            is_noise,
            classical.total_variation,
            (0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7, 1.0),
            skimage,
        ),
        ("non-local means", is_gaussian, classical.non_local_means, (0.3, 0.45, 0.6, 0.8, 1.0, 1.3), skimage),
        ("Wiener", is_gaussian, classical.wiener, (3.0, 5.0, 7.0), scipy),
        ("median", is_flips, classical.median, (3.0, 5.0), scipy),
    )
    methods = [
        Method(name, does, by_plane(function), settings, batched=False, kept=f"{library} {settings}")
        for name, does, function, settings, library in planes
    ]
    if min(size[1:]) >= classical.LEAST_BM3D:
        kept = f"bm3d {installed('bm3d')}"
        methods.append(Method("BM3D", is_gaussian, by_plane(classical.bm3d), batched=False, kept=kept))
    linear = f"{RIDGES} {CHOOSERS} {seed}"
    return [
        Method("as it was seen", is_noise, lambda _, seen, __: Restored(seen.y.clip(0.0, 1.0)), batched=False),
        *methods,
        Method("biharmonic", is_inpainting, biharmonic, batched=False, kept=skimage),
        Method("bicubic", is_enlarging, partial(bicubic, size), batched=False, kept=f"pillow {installed('pillow')}"),
        Method("Gaussian conditional", is_linear, conditional, batched=False, kept=linear),
    ]


def by_unet(module: Denoiser) -> Method:
    """Make the method of a trained U-Net. It gets the level of the noise."""

    @torch.inference_mode()
    def restore(task: Task, seen: Seen, _setting: float) -> Restored:
        parts = torch.from_numpy(seen.y).split(100)
        found = [module(part, torch.full((len(part),), task.level)) for part in parts]
        return Restored(torch.cat(found).clamp(0.0, 1.0).numpy())

    return Method("U-Net", is_gaussian, restore)


def is_noise(task: Task) -> bool:
    """Whether pixels are noisy or blurred, and none is missing."""
    return task.operation == "denoise"


def is_gaussian(task: Task) -> bool:
    """Whether the noise is additive and Gaussian."""
    return task.family == "gaussian"


def is_flips(task: Task) -> bool:
    """Whether pixels at unknown places are replaced by other values."""
    return is_noise(task) and not is_gaussian(task)


def is_inpainting(task: Task) -> bool:
    """Whether pixels are missing."""
    return task.operation == "inpaint"


def is_enlarging(task: Task) -> bool:
    """Whether means of blocks are observed."""
    return task.operation == "super-resolve"


def is_linear(task: Task) -> bool:
    """Whether the observation is linear in the image plus Gaussian noise."""
    return not is_flips(task)


def by_plane(function: Callable[[NDArray[Any], float, float], NDArray[Any]]) -> Restore:
    """Make a restorer that applies a function to each plane, and clips its output to [0, 1].

    Args:
        function: (plane, level, setting) -> restored plane.
    """

    def restore(task: Task, seen: Seen, setting: float) -> Restored:
        planes = seen.y.reshape(-1, *seen.y.shape[2:]).astype(np.float64)
        found = np.stack([function(plane, task.level, setting) for plane in planes])
        return Restored(found.reshape(seen.y.shape).clip(0.0, 1.0).astype(np.float32))

    return restore


def biharmonic(_task: Task, seen: Seen, _setting: float) -> Restored:
    """Fill in missing pixels by biharmonic equations, and clip them to [0, 1]."""
    assert seen.mask is not None
    pairs = zip(seen.y.reshape(-1, *seen.y.shape[2:]), seen.mask.reshape(-1, *seen.y.shape[2:]), strict=True)
    found = np.stack([classical.biharmonic(y.astype(np.float64), mask) for y, mask in pairs])
    return Restored(found.reshape(seen.y.shape).clip(0.0, 1.0).astype(np.float32))


def bicubic(size: tuple[int, int, int], _task: Task, seen: Seen, _setting: float) -> Restored:
    """Interpolate bicubically between pixel areas, which aligns with means of blocks, and clip to [0, 1]."""
    return Restored(fit(seen.y, size[1:], "resize").clip(0.0, 1.0))


def _conditional(gaussian: ImageGaussian, task: Task, seen: Seen, size: tuple[int, int, int], ridge: float) -> Pixels:
    noise = ridge + (task.level**2 if is_gaussian(task) else 0.0)
    if task.missing == "scattered":  # every image has its own operator
        rows = [
            gaussian.given(y[None], operator, noise)
            for y, operator in (task.linear(seen, k, size) for k in range(len(seen.y)))
        ]
        found = np.concatenate(rows)
    else:
        _, operator = task.linear(seen, 0, size)
        found = gaussian.given(np.stack([task.linear(seen, k, size)[0] for k in range(len(seen.y))]), operator, noise)
    return found.reshape(len(seen.y), *size).clip(0.0, 1.0).astype(np.float32)
