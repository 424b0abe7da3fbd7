"""Calibration of served models: measures the coverage of `std` on held-out images, and writes factors to manifests."""

from __future__ import annotations

import shutil
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from tqdm import tqdm

from service.contract import manifest as manifests
from service.contract.calibration import calibrated, ways, widened
from service.contract.corruption import Observation
from service.contract.images import Pixels
from service.contract.manifest import (
    FILE_NAME,
    QUALITIES,
    Calibration,
    Manifest,
    ManifestError,
    digest,
)
from training.errors import ConfigError
from training.evaluation.card import renewed
from training.evaluation.measures import LEAST_STD, coverage
from training.evaluation.served import Answer, Client, ServiceOptions, offering, served
from training.evaluation.tasks import BLURRING, POISSON, Seen, Task, chosen, subject_of
from training.evaluation.typical import HELD_OUT, Typical, far_from_training, kept, other_images
from training.signing import check_key, write_manifest

PROMISED = 0.9
"""Share of the pixels within mean +- 1.645 std after calibration."""
FACTORS = np.geomspace(0.25, 16.0, 417)
"""Candidate factors of `std`, one per cent apart."""
FEWEST = 200
"""Minimum uncertain pixels to estimate a factor; a way with fewer gets none."""


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(ServiceOptions):
    """Options of `calibrate`, which writes the manifests in `models`.

    Attributes:
        runs: Folder for answers of an interrupted calibration.
        key: Signs the versions anew; None calibrates unsigned ones alone.
    """

    runs: Path
    key: Ed25519PrivateKey | None = None


class Told(NamedTuple):
    """Posterior mean and std of restored pixels as the service returns them, and true values x, (k,) each."""

    mean: NDArray[Any]
    std: NDArray[Any]
    x: NDArray[Any]

    def covered(self, factor: float) -> float:
        """Share of the uncertain pixels within mean +- 1.645 std, after `std` is widened by the factor."""
        return coverage(self.mean, widened(self.std, np.float32(factor)), self.x)


@dataclass(frozen=True)
class Asking:
    """One served model and its held-out images.

    Attributes:
        ask: Restores images, as `Client.images` does.
        manifest: The model's manifest.
        applied: Factors that the service already applies, by quality and way.
        x: The images, (n, c, h, w).
        seed: Seed of corruptions and draws.
        kept: Folder for answers until the calibration is complete.
    """

    ask: Callable[..., Answer]
    manifest: Manifest
    applied: dict[str, dict[str, float]]
    x: Pixels
    seed: int
    kept: Path

    def pixels(self, task: Task, quality: str) -> Iterator[tuple[str, Told]]:
        """Restore the images of one task.

        Args:
            task: The corruption.
            quality: `fast` or `refined`.

        Yields:
            Each way of observation with its pixels. Their `std` is that of the graphs, without earlier factors.
        """
        seen = task.seen(self.x, self.seed)
        observation = self._observation(task, seen)
        mean, std = self._answer(task, quality, seen, observation)
        for way, where in ways(observation, self.manifest.noise_families).items():
            of_it = np.broadcast_to(where, self.x.shape)
            yield way, Told(mean[of_it], std[of_it], self.x[of_it])

    def _answer(self, task: Task, quality: str, seen: Seen, observation: Observation) -> tuple[Pixels, Pixels]:
        """Posterior mean and std, (n, c, h, w) each, from an earlier answer to the same request if there is one."""
        everything = b"".join(np.ascontiguousarray(array).tobytes() for array in (self.x, seen.y, observation.mask))

        def asked() -> dict[str, Pixels]:
            options = {**task.asked(), "quality": quality, "uncertainty": True, "seed": self.seed}
            answer = self.ask(self.manifest.name, task.operation, seen.y, seen.mask, **options)
            inverse = {way: 1 / by for way, by in self.applied.get(quality, {}).items()}
            std = calibrated(answer.outputs["std"], observation, self.manifest.noise_families, inverse)
            return {"mean": answer.outputs["images"], "std": std}

        found = kept(self.kept / f"{quality}-{digest(everything + str(task).encode())[:16]}.npz", asked)
        return found["mean"], found["std"]

    def _observation(self, task: Task, seen: Seen) -> Observation:
        """The observation that the service makes of the request, with levels of 0."""
        families = self.manifest.noise_families
        level = np.zeros((len(seen.y), len(families)), np.float32)
        family = None if task.family == "none" else families.index(task.family)
        mask = np.ones_like(seen.y) if seen.mask is None else seen.mask
        return Observation(seen.y, mask, level, family, True, task.operator_name(self.x.shape[2:]))


def calibrate(plan: CalibrateOptions) -> list[Path]:
    """Calibrate every served model whose name matches, on validation images of its data set.

    Args:
        plan: The options.

    Returns:
        Paths of the written manifests. Factors over the noise level, which a version was exported with, stay.

    Raises:
        ConfigError: No such model is served, or `plan.models` does not hold it.
        ServiceError: The service fails.
        DataError: The images cannot be loaded.
        DiskError: A manifest cannot be written.
    """
    with served(plan.url, plan.models) as client:
        found = offering("denoise", plan.names, client.models())
        if not found:
            raise ConfigError(f"no model {plan.names} is served that restores images")
        return [_calibrate(plan, client, model) for model in found]


def _calibrate(plan: CalibrateOptions, client: Client, model: dict[str, Any]) -> Path:
    _, subject = subject_of(model)
    path = plan.models / model["model"] / model["version"] / FILE_NAME
    manifest = _manifest(path, model["fingerprint"])
    check_key(path.parent, plan.key)
    held_out = subject.dataset.load(plan.data).validation
    x = chosen(held_out, plan.images, plan.seed)
    applied, place = model.get("calibration", {}), plan.runs / model["fingerprint"]
    asking = Asking(client.images, manifest, applied, x, plan.seed, place)
    tasks = [task for task in (*subject.tasks, *POISSON, BLURRING) if task.family in {"none", *manifest.noise_families}]
    qualities = QUALITIES if "refinement" in manifest.graphs else QUALITIES[:1]
    calibration = manifest.calibration
    if calibration is None or not calibration.curves:  # curves, which are finer than factors, are the exporter's
        found = {quality: _factors(asking, tasks, quality) for quality in qualities}
        calibration = Calibration(factors=found, images=len(x), seed=plan.seed)
    typical = Typical(client.images, manifest, plan.seed, place)
    many = chosen(held_out, max(plan.images, HELD_OUT), plan.seed)
    far = far_from_training(typical.figures, many, tasks, other_images(plan.data, model), plan.seed)
    changed = manifest.model_copy(update={"calibration": calibration, "far_from_training": far})
    write_manifest(path.parent, renewed(changed, path.parent), plan.key)
    shutil.rmtree(place)
    return path


def _factors(asking: Asking, tasks: list[Task], quality: str) -> dict[str, float]:
    """Estimate a factor for each way from the pixels of all tasks."""
    parts: dict[str, list[Told]] = {}
    bar = tqdm(tasks, desc=f"{asking.manifest.name} {quality}", unit="answer")
    for task in bar:
        bar.set_postfix_str(task.name)
        for way, told in asking.pixels(task, quality):
            parts.setdefault(way, []).append(told)
    whole = {way: Told(*map(np.concatenate, zip(*some, strict=True))) for way, some in parts.items()}
    return {way: factor_of(told) for way, told in whole.items() if (told.std > LEAST_STD).sum() >= FEWEST}


def factor_of(told: Told) -> float:
    """Find the least factor of `FACTORS` with which the share `PROMISED` of the pixels is covered."""
    return least_factor(told.covered)


def least_factor(covered: Callable[[float], float]) -> float:
    """Find the least of `FACTORS` with which the share `PROMISED` is covered, or the largest factor.

    Args:
        covered: Share of the pixels that intervals hold, by the factor.
    """
    place = bisect_left(FACTORS, PROMISED, hi=len(FACTORS) - 1, key=covered)
    return round(float(FACTORS[place]), 3)


def _manifest(path: Path, fingerprint: str) -> Manifest:
    """Read the manifest at `path`, and check that the service has loaded the same model."""
    try:
        manifest = manifests.read(path.parent)
    except ManifestError as error:
        raise ConfigError(f"{error}; --models names the folder whose models are served") from error
    if manifest.fingerprint != fingerprint:
        raise ConfigError(
            f"{path.parent} holds {manifest.fingerprint}, but {fingerprint} is served; restart the service"
        )
    return manifest
