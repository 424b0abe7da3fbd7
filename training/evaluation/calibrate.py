"""The `std` of served models, asked over HTTP for held-out images, and the factors it wants for their manifests."""

from __future__ import annotations

import shutil
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from service.contract import manifest as manifests
from service.contract.calibration import calibrated, ways, widened
from service.contract.corruption import Observation
from service.contract.manifest import FILE_NAME, QUALITIES, Calibration, Manifest, ManifestError, digest
from training.errors import ConfigError, DiskError
from training.evaluation.measures import LEAST_STD, coverage
from training.evaluation.served import Answer, Client, Pixels, offering, served
from training.evaluation.tasks import BLURRING, POISSON, Seen, Task, chosen, subject_of

PROMISED = 0.9
"""Of the pixels are to lie within mean +- 1.645 std."""
FACTORS = np.geomspace(0.25, 16.0, 417)
"""Those that are tried, one per cent apart."""
FEWEST = 200
"""Pixels, not counting known ones, that a factor is found from; with fewer the way has none."""


@dataclass(frozen=True)
class Plan:
    """What is asked for on the command line."""

    data: Path
    runs: Path
    url: str | None
    models: Path
    images: int = 200
    seed: int = 0
    names: str = "*"
    """Pattern of the models' names."""


class Told(NamedTuple):
    """Pixels: what is said of them, and what they are, each (k,)."""

    mean: NDArray[Any]
    std: NDArray[Any]
    x: NDArray[Any]

    def covered(self, factor: float) -> float:
        """The share within the interval, of those that are not known, once std is widened by the factor."""
        return coverage(self.mean, widened(self.std, np.float32(factor)), self.x)


@dataclass(frozen=True)
class Asking:
    """One served model, and the images that it is asked for; answers are kept in a folder until all are there."""

    ask: Callable[..., Answer]
    """As `Client.images` does."""
    manifest: Manifest
    applied: dict[str, dict[str, float]]
    """The factors that the service multiplies by already."""
    x: Pixels
    seed: int
    kept: Path

    def pixels(self, task: Task, quality: str) -> Iterator[tuple[str, Told]]:
        """By the way in which they are seen: what the graphs alone say of them."""
        seen = task.seen(self.x, self.seed)
        observation = self._observation(task, seen)
        mean, std = self._answer(task, quality, seen, observation)
        for way, where in ways(observation, self.manifest.noise_families).items():
            of_it = np.broadcast_to(where, self.x.shape)
            yield way, Told(mean[of_it], std[of_it], self.x[of_it])

    def _answer(self, task: Task, quality: str, seen: Seen, observation: Observation) -> tuple[Pixels, Pixels]:
        """Mean and std; kept ones where the very same has been asked for before."""
        everything = b"".join(np.ascontiguousarray(array).tobytes() for array in (self.x, seen.y, observation.mask))
        path = self.kept / f"{quality}-{digest(everything + str(task).encode())[:16]}.npz"
        if path.exists():
            with np.load(path) as file:
                return file["mean"], file["std"]
        options = {**task.asked(), "quality": quality, "uncertainty": True, "seed": self.seed}
        answer = self.ask(self.manifest.name, task.operation, seen.y, seen.mask, **options)
        mean, inverse = answer.outputs["images"], {way: 1 / by for way, by in self.applied.get(quality, {}).items()}
        std = calibrated(answer.outputs["std"], observation, self.manifest.noise_families, inverse)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part.npz")
        np.savez(partial, mean=mean, std=std)
        partial.replace(path)
        return mean, std

    def _observation(self, task: Task, seen: Seen) -> Observation:
        """What the service makes of the request, but for the level."""
        families = self.manifest.noise_families
        level = np.zeros((len(seen.y), len(families)), np.float32)
        family = None if task.family == "none" else families.index(task.family)
        mask = np.ones_like(seen.y) if seen.mask is None else seen.mask
        return Observation(seen.y, mask, level, family, True, task.operator_name(self.x.shape[2:]))


def calibrate(plan: Plan) -> list[Path]:
    """Ask every served model of those names for images that its training held out; the manifests that were written.

    Raises: ConfigError where no such model is served, or `plan.models` does not hold it; ServiceError, DataError,
    DiskError.
    """
    with served(plan.url, plan.models) as client:
        found = offering("denoise", plan.names, client.models())
        if not found:
            raise ConfigError(f"no model {plan.names} is served that restores images")
        return [_calibrate(plan, client, model) for model in found]


def _calibrate(plan: Plan, client: Client, model: dict[str, Any]) -> Path:
    _, subject = subject_of(model)
    path = plan.models / model["model"] / model["version"] / FILE_NAME
    manifest = _manifest(path, model["fingerprint"])
    x = chosen(subject.dataset.load(plan.data).validation, plan.images, plan.seed)
    applied, kept = model.get("calibration", {}), plan.runs / model["fingerprint"]
    asking = Asking(client.images, manifest, applied, x, plan.seed, kept)
    tasks = [task for task in (*subject.tasks, *POISSON, BLURRING) if task.family in {"none", *manifest.noise_families}]
    qualities = QUALITIES if "refinement" in manifest.graphs else QUALITIES[:1]
    found = {quality: _factors(asking, tasks, quality) for quality in qualities}
    calibration = Calibration(factors=found, images=len(x), seed=plan.seed)
    _write(manifest.model_copy(update={"calibration": calibration}), path)
    shutil.rmtree(kept)
    return path


def _factors(asking: Asking, tasks: list[Task], quality: str) -> dict[str, float]:
    """By the way in which pixels are seen, those of all tasks together."""
    parts: dict[str, list[Told]] = {}
    bar = tqdm(tasks, desc=f"{asking.manifest.name} {quality}", unit="answer")
    for task in bar:
        bar.set_postfix_str(task.name)
        for way, told in asking.pixels(task, quality):
            parts.setdefault(way, []).append(told)
    whole = {way: Told(*map(np.concatenate, zip(*some, strict=True))) for way, some in parts.items()}
    return {way: factor_of(told) for way, told in whole.items() if (told.std > LEAST_STD).sum() >= FEWEST}


def factor_of(told: Told) -> float:
    """The least factor with which as many pixels are covered as is promised."""
    place = bisect_left(FACTORS, PROMISED, hi=len(FACTORS) - 1, key=told.covered)
    return round(float(FACTORS[place]), 3)


def _manifest(path: Path, fingerprint: str) -> Manifest:
    """The manifest at `path`, if it is that of the model that is served."""
    try:
        manifest = manifests.read(path.parent)
    except ManifestError as error:
        raise ConfigError(f"{error}; --models names the folder whose models are served") from error
    if manifest.fingerprint != fingerprint:
        raise ConfigError(
            f"{path.parent} holds {manifest.fingerprint}, but {fingerprint} is served; restart the service"
        )
    return manifest


def _write(manifest: Manifest, path: Path) -> None:
    partial = path.with_suffix(".part")
    try:
        partial.write_text(manifest.to_json())
        partial.replace(path)
    except OSError as error:
        raise DiskError(f"{path} cannot be written: {error.strerror}") from error
