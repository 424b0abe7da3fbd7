"""Comparison of this service's restorations, over HTTP, with classical restorers and a U-Net."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.comparisons import unet
from experiments.comparisons.methods import Method, Restored, by_unet, is_gaussian, is_noise, ours, rivals
from service.contract.graphs import at_size
from service.contract.images import Pixels
from service.contract.manifest import digest
from training.data import ImageSet
from training.errors import ConfigError, DataError, RefusedError
from training.evaluation.measures import coverage, psnr, ssim
from training.evaluation.served import ROWS, Client, ServiceOptions, offering, served
from training.evaluation.tasks import SUBJECTS, Seen, Subject, Task, chosen, subject_of
from training.extras import needed
from training.loop.checkpoint import stage_seconds

REPEATS = 5
"""Maximum calls behind a median time."""
PATIENCE_S = 10.0
"""Time after which no further call is made."""
EXAMPLE = 0
"""Row of the image in the picture."""


@dataclass(frozen=True, kw_only=True)
class RestoreOptions(ServiceOptions):
    """Options of `restore`.

    Attributes:
        runs: Folder for cached results and the U-Net's checkpoints.
        unet_epochs: Epochs of the U-Net; None uses the data set's own number.
        tasks: Patterns of the tasks' names.
        methods: Patterns of the methods' names.
    """

    runs: Path
    unet_epochs: int | None = None
    tasks: tuple[str, ...] = ("*",)
    methods: tuple[str, ...] = ("*",)


@dataclass
class Findings:
    """Results of one run: a row for each task and method, pictures of one image by (data set, task), and remarks."""

    plan: RestoreOptions
    rows: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[tuple[str, str], dict[str, Pixels]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    models: dict[str, str] = field(default_factory=dict)
    """Model, version and fingerprint by data set."""
    timed: dict[str, str] = field(default_factory=dict)
    """Name of the task on which speed is measured, by data set."""
    seconds: float = 0.0

    def note(self, text: str) -> None:
        """Record a remark once."""
        if text not in self.notes:
            self.notes.append(text)


def compare(plan: RestoreOptions) -> Findings:
    """Run every task of every data set for which a model is served.

    Results of other methods are cached in `plan.runs`.

    Args:
        plan: The options.

    Returns:
        The results.

    Raises:
        ConfigError: No task and method match.
        DependencyError: A package of the extra `evaluation` is not installed.
        ServiceError: The service does not answer.
        DataError: The images cannot be loaded.
        TrainingError: Training the U-Net fails.
    """
    needed("skimage")
    findings, began = Findings(plan), time.monotonic()
    with served(plan.url, plan.models) as client:
        for name, subject, model in _chosen_models(client.models(), findings):
            try:
                images = subject.dataset.load(plan.data)
            except DataError as error:
                findings.note(f"{name}: {error}")
                continue
            if images.shape != at_size(model["input_shape"], *images.shape[1:]):
                findings.note(f"{name}: model {model['model']} takes {model['input_shape']}, not {list(images.shape)}")
                continue
            findings.models[name] = f"{model['model']} {model['version']}, {model['fingerprint']}"
            findings.timed[name] = subject.timed
            _compare_on(name, subject, images, client, model["model"], findings)
    if not findings.rows:
        notes = [] if findings.models else findings.notes
        raise ConfigError(f"nothing to compare: {'; '.join(notes) or 'no task and method has such a name'}")
    findings.seconds = time.monotonic() - began
    return findings


def _chosen_models(told: Iterable[dict[str, Any]], findings: Findings) -> Iterator[tuple[str, Subject, dict[str, Any]]]:
    """Choose for every data set the first model that restores and whose name matches."""
    seen: set[str] = set()
    for model in offering("denoise", findings.plan.names, told):
        try:
            name, subject = subject_of(model)
        except ConfigError as error:
            findings.note(str(error))
            continue
        if name not in seen:
            seen.add(name)
            yield name, subject, model
    for name in (name for name in SUBJECTS if name not in seen):
        findings.note(f"{name}: no model of it that restores is served")


def _compare_on(name: str, subject: Subject, images: ImageSet, client: Client, model: str, findings: Findings) -> None:
    plan = findings.plan
    x = chosen(images.test, plan.images, plan.seed)
    methods = [*rivals(images, plan.seed), *ours(client, model, plan.seed)]
    if _wanted(["U-Net"], plan.methods) and any(map(is_gaussian, _tasks(subject, plan))):
        epochs = plan.unet_epochs or subject.unet_epochs
        folder = plan.runs / f"unet-{name}-{epochs}"
        methods.insert(0, by_unet(unet.trained(images, folder, epochs, {"dataset": name})))
        seconds = stage_seconds(folder)[unet.NAME]
        findings.note(f"{name}: the U-Net was trained in {epochs} passes over the training images, {seconds:.0f} s")
    wanted = _wanted([method.name for method in methods], plan.methods)
    cells = [
        (task, method)
        for task in _tasks(subject, plan)
        for method in methods
        if method.name in wanted and method.does(task)
    ]
    training = digest(images.train.numpy().tobytes())
    bar = tqdm(cells, desc=name, unit="answer")
    for task, method in bar:
        bar.set_postfix_str(f"{task.name}: {method.name}")
        seen = task.seen(x, plan.seed)
        try:
            row, restored = _cell(task, method, seen, x, plan.runs, training, timed=task.name == subject.timed)
        except RefusedError as error:
            findings.note(f"{name}: {method.name}: {error}")
            continue
        about = {"dataset": name, "task": task.name, "method": method.name, "images": len(x), "seed": plan.seed}
        findings.rows.append({**about, **row})
        shown = findings.pictures.setdefault((name, task.name), {"clean": x[EXAMPLE], "seen": seen.y[EXAMPLE]})
        shown[method.name] = restored.images[EXAMPLE]


def _tasks(subject: Subject, plan: RestoreOptions) -> list[Task]:
    wanted = _wanted([task.name for task in subject.tasks], plan.tasks)
    return [task for task in subject.tasks if task.name in wanted]


def _wanted(names: Iterable[str], patterns: tuple[str, ...]) -> set[str]:
    return {name for name in names for pattern in patterns if fnmatch(name, pattern)}


def _cell(
    task: Task, method: Method, seen: Seen, x: Pixels, runs: Path, training: str, *, timed: bool
) -> tuple[dict[str, Any], Restored]:
    """Compute the figures of one method on one task, and its restored images."""
    path = None if method.kept is None else _path(task, method, seen, x, runs, training)
    if path is not None and path.exists():
        with np.load(path) as file:
            setting, restored = float(file["setting"]), Restored(file["images"])
            times = {key: float(file[key]) for key in file.files if key.startswith("ms_")}
    else:
        setting, restored = _best(task, method, seen, x)
        times = {}
    if timed and not times:
        times = dict(_times(task, method, seen, setting))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part.npz")
        np.savez(partial, images=restored.images, setting=setting, **times)  # type: ignore[arg-type]
        partial.replace(path)
    said = {"setting": setting} if len(method.settings) > 1 else {}
    return {**figures(task, seen, restored, x), **said, **times}, restored


def _path(task: Task, method: Method, seen: Seen, x: Pixels, runs: Path, training: str) -> Path:
    """File of cached results, named after a digest of everything on which they depend."""
    arrays = [seen.y, x] if seen.mask is None else [seen.y, x, seen.mask]
    everything = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
    key = digest(everything + f"{task} {method.name} {method.kept} {training}".encode())
    return runs / f"{method.name}-{task.name}-{key[:16]}.npz".replace("/", "_").replace(" ", "-")


def _best(task: Task, method: Method, seen: Seen, x: Pixels) -> tuple[float, Restored]:
    """Choose the setting with the highest PSNR on the test images (which favours other methods), and its result."""
    tried = [(setting, method.restore(task, seen, setting)) for setting in method.settings]
    return max(tried, key=lambda one: psnr(one[1].images, x, seen.missing).mean())


def _times(task: Task, method: Method, seen: Seen, setting: float) -> Iterator[tuple[str, float]]:
    """Measure milliseconds for each image, the median of several calls."""
    for rows in (1, ROWS) if method.batched else (1,):
        taken: list[float] = []
        end = time.perf_counter() + PATIENCE_S
        while len(taken) < REPEATS and (not taken or time.perf_counter() < end):
            first = len(taken) * rows % max(1, len(seen.y) - rows + 1)
            part = seen.rows(slice(first, first + rows))
            began = time.perf_counter()
            method.restore(task, part, setting)
            taken.append(1e3 * (time.perf_counter() - began) / len(part.y))
        yield f"ms_batch_{rows}", round(median(taken), 3)


def figures(task: Task, seen: Seen, restored: Restored, x: Pixels) -> dict[str, float]:
    """Compute PSNR, SSIM, coverage, and the error of the level.

    Args:
        task: The corruption.
        seen: The corrupted images.
        restored: The restored images.
        x: The true images, (n, c, h, w).

    Returns:
        Figures by name, as in the CSV. PSNR (dB) and coverage of inpainting count the missing pixels alone.
    """
    reached = psnr(restored.images, x, seen.missing)
    found = {
        "psnr_db": reached.mean(),
        "psnr_standard_error": reached.std(ddof=1) / np.sqrt(len(reached)) if len(reached) > 1 else 0.0,
        "ssim": ssim(restored.images, x).mean(),
    }
    if is_noise(task):
        found["worse"] = (reached < psnr(seen.y.clip(0.0, 1.0), x)).mean()
    if restored.std is not None:
        found["coverage"] = coverage(restored.images, restored.std, x, seen.missing)
    if restored.level is not None:
        found["level_error"] = np.abs(restored.level / task.level - 1.0).mean()
    return {name: round(float(value), 4) for name, value in found.items()}
