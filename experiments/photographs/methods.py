"""The compared restorers of photographs: classical ones, and a service that answers over HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from experiments.comparisons import classical
from experiments.comparisons.methods import (
    Method,
    Restored,
    bicubic,
    biharmonic,
    is_enlarging,
    is_gaussian,
    is_inpainting,
    is_noise,
)
from experiments.photographs.camera import png
from experiments.photographs.cases import gaussian
from experiments.photographs.sets import PHOTOGRAPHS, choosers
from training.evaluation.measures import psnr
from training.evaluation.served import Client
from training.evaluation.tasks import Seen, Task
from training.extras import installed
from training.files import write_whole

SENT = "as sent"
OURS = "ours"
"""First word of the names of this service's methods."""
DRAWS = 8
"""Posterior draws an image of `ours draws`."""
CHOOSERS, CHOOSER_SIDE = 10, 256
"""Number and height and width of the photographs on which settings are chosen."""
WEIGHTS = (0.3, 0.45, 0.6, 0.8, 1.0, 1.25, 1.5, 1.8)
"""Weights of total variation, in units of sigma."""
STRENGTHS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Strengths of non-local means, in units of sigma."""
PNG = "image/png"


def rivals() -> list[Method]:
    """Make the methods that need no service. They get the level of the noise."""
    skimage = f"scikit-image {installed('scikit-image')}"
    return [
        Method(SENT, is_noise, lambda _task, seen, _: Restored(seen.y.clip(0.0, 1.0)), kept=SENT),
        Method("total variation", is_gaussian, jointly(_total_variation), WEIGHTS, kept=skimage),
        Method("non-local means", is_gaussian, jointly(classical.non_local_means), STRENGTHS, kept=skimage),
        Method("BM3D", is_gaussian, jointly(classical.bm3d), kept=f"bm3d {installed('bm3d')}"),
        Method("biharmonic", is_inpainting, biharmonic, kept=skimage),
        Method("bicubic", is_enlarging, _bicubic, kept=f"pillow {installed('pillow')}"),
    ]


def ours(client: Client, model: str, fingerprint: str, seed: int) -> list[Method]:
    """Make the methods of a service: with the level of the noise known, estimated, refined, and posterior draws.

    Args:
        client: A client of the service.
        model: Name of the model.
        fingerprint: Its fingerprint, part of the key of cached results.
        seed: Seed of the requests.
    """

    def told(quality: str, task: Task, seen: Seen, _setting: float) -> Restored:
        asked = {**task.asked(), "quality": quality, "uncertainty": True, "seed": seed}
        answer = client.images(model, task.operation, seen.y, seen.mask, **asked)
        return Restored(answer.outputs["images"], answer.outputs["std"])

    def auto(task: Task, seen: Seen, _setting: float) -> Restored:
        asked = {"uncertainty": True, "seed": seed}
        if is_gaussian(task):
            answer = client.images(model, task.operation, seen.y, None, **asked)
        else:
            answer = client.picture(model, task.operation, png(seen.y[0]), PNG, **asked)
        return Restored(answer.outputs["images"], answer.outputs["std"], answer.level)

    def drawn(task: Task, seen: Seen, _setting: float) -> Restored:
        asked: dict[str, object] = {**task.asked(), "uncertainty": True}
        mean = client.images(model, task.operation, seen.y, None, **asked, seed=seed).outputs
        one = partial(client.images, model, task.operation, seen.y, None, **task.asked(), draws=1)
        draws = [one(seed=seed + k).outputs["images"] for k in range(DRAWS)]
        return Restored(mean["images"], mean["std"], draws=np.stack(draws))

    return [
        Method(OURS, _is_told, partial(told, "fast"), kept=fingerprint),
        Method(f"{OURS} refined", _is_told, partial(told, "refined"), kept=fingerprint),
        Method(f"{OURS} auto", is_noise, auto, kept=fingerprint),
        Method(f"{OURS} draws", is_gaussian, drawn, kept=f"{fingerprint} {DRAWS}"),
    ]


def jointly(function: Callable[[NDArray[Any], float, float], NDArray[Any]]) -> Callable[[Task, Seen, float], Restored]:
    """Make a restorer of whole images, whose channels a function restores jointly; its output is cut to [0, 1].

    Args:
        function: (plane (h, w) or RGB image (3, h, w), level, setting) -> restored.
    """

    def restore(task: Task, seen: Seen, setting: float) -> Restored:
        images = seen.y.astype(np.float64)
        found = [function(y[0] if len(y) == 1 else y, task.level, setting).reshape(y.shape) for y in images]
        return Restored(np.stack(found).clip(0.0, 1.0).astype(np.float32))

    return restore


def _is_told(task: Task) -> bool:
    """Whether the request can say everything about the task."""
    return is_gaussian(task) or not is_noise(task)


def _total_variation(y: NDArray[Any], sigma: float, weight: float) -> NDArray[Any]:
    return classical.total_variation(y, sigma, weight * sigma)


def _bicubic(task: Task, seen: Seen, setting: float) -> Restored:
    channels, height, width = seen.y.shape[1:]
    return bicubic((channels, height * task.factor, width * task.factor), task, seen, setting)


class Settings:
    """The setting of each method by noise and number of channels, chosen on photographs of no test set, and kept.

    Args:
        data: Folder of the data sets.
        path: JSON file of the choices.
        seed: Seed of the noise.
    """

    def __init__(self, data: Path, path: Path, seed: int) -> None:
        self._data, self._path, self._seed = data, path, seed
        self._chosen: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def of(self, method: Method, task: Task, channels: int) -> float:
        """Return the setting with the highest mean PSNR.

        Args:
            method: The method.
            task: The task.
            channels: Channels of the images, 1 or 3.

        Raises:
            DataError: The photographs are not in the folder.
        """
        if len(method.settings) == 1:
            return method.settings[0]
        key = f"{method.name}, {task.name}, {channels} channels, {method.kept}, {method.settings}, seed {self._seed}"
        if key not in self._chosen:
            self._chosen[key] = self._best(method, task, channels)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, json.dumps(self._chosen, indent=1).encode())
        return self._chosen[key]

    def _best(self, method: Method, task: Task, channels: int) -> float:
        case = gaussian(round(task.level * 255.0, 6))
        mode = PHOTOGRAPHS["BSD68" if channels == 1 else "CBSD68"]
        spoilt = [case.spoilt(one, self._seed) for one in choosers(self._data, mode, CHOOSERS, CHOOSER_SIDE)]
        reached = {}
        for setting in tqdm(method.settings, desc=f"choosing: {method.name}, {task.name}", leave=False):
            tried = [psnr(method.restore(task, one.seen, setting).images, one.x).mean() for one in spoilt]
            reached[setting] = float(np.mean(tried))
        return max(reached, key=lambda setting: reached[setting])
