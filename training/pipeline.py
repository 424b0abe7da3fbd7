"""One training run, from settings to a model version: data, stages, evaluation, export."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor, nn

from service.contract.cores import cpu_count
from service.contract.corruption import FAMILIES
from service.contract.manifest import digest
from training.config import ConditionalRun, NoisyRun, Run
from training.data import ImageSet, as_float
from training.errors import CheckpointError, ConfigError, DiskError
from training.evaluation.evaluate import ALL, Share, likelihood, report, restoration
from training.evaluation.scoring import held_out
from training.export.export import GOLDEN_ROWS, Exportable, export, exportables, golden_images, packed, version_folder
from training.export.pair import shapes_told
from training.export.tiling import tiles
from training.export.weights import rounded
from training.extras import needed
from training.loop.checkpoint import stage_seconds, trained_epochs
from training.loop.pictures import PICTURES
from training.loop.processes import ALONE, Processes
from training.loop.randomness import keyed_generator
from training.loop.stages import as_trained, restoration_stage, trained_recognition, trained_vae, vae_stage
from training.loop.trainer import Stage, train
from training.models.restoration import Corrupted, Recognition, simulate
from training.models.vae import VAE
from training.progress import tell

LOOK_S = 0.25
"""Seconds over which idle time is measured."""


def device(wanted: str) -> torch.device:
    """Choose the device, and set torch's process-wide switches.

    Args:
        wanted: `auto`, `cpu` or `cuda`; `auto` is CUDA if there is a device.

    Returns:
        The device.

    Raises:
        ConfigError: `cuda` is wanted and torch finds no CUDA device.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but torch finds no CUDA device; use --device cpu")
    torch.backends.cudnn.benchmark = True  # batches have one size, so one search for the fastest convolution is enough
    torch.backends.cudnn.allow_tf32 = False  # TF32 would round convolutions of an evaluation to 10 bits
    return torch.device(wanted)


def clear(folder: Path) -> None:
    """Delete checkpoints, partial evaluations, log, pictures and TensorBoard's files of a run."""
    for path in folder.glob("*"):
        if path.suffix in {".pt", ".jsonl", ".part", ".sha256"} or path.name in PICTURES:
            path.unlink()
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run's folder against a second trainer while the block runs. The lock also ends with the process.

    Args:
        folder: The folder; it is created if absent.

    Raises:
        CheckpointError: Another process holds the lock.
        DiskError: The folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise DiskError(f"cannot write into {folder} ({error.strerror}); choose another --run") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(
                f"another process trains in {folder}; wait for it, or choose another --run"
            ) from error
        yield


def threads(wanted: int | None) -> None:
    """Set torch's number of CPU threads.

    With more threads than idle cores, threads wait for each other: two threads on two busy cores make a run 30 times
    slower.

    Args:
        wanted: The number; None is one for each core that is idle now, or the value of OMP_NUM_THREADS.
    """
    if wanted is None and "OMP_NUM_THREADS" in os.environ:
        return  # set by torchrun, and read by torch
    torch.set_num_threads(wanted or free_cores())


def free_cores() -> int:
    """Number of idle cores that this process may use, at least one, measured over `LOOK_S`."""
    with suppress(OSError, ValueError, ZeroDivisionError):
        before = _ticks()
        time.sleep(LOOK_S)
        idle, total = (now - then for now, then in zip(_ticks(), before, strict=True))
        return max(1, min(cpu_count(), round(idle / total * (os.cpu_count() or 1))))
    return cpu_count()  # no /proc/stat: not Linux


def _ticks() -> tuple[int, int]:
    """Clock ticks of all cores since the start of the machine: (idle, total)."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


AnyModule = TypeVar("AnyModule", bound=nn.Module)
Settings = TypeVar("Settings", Run, ConditionalRun, NoisyRun)


@dataclass(frozen=True)
class AnyWorkshop(ABC, Generic[Settings]):
    """A run of any kind with its data in memory.

    Attributes:
        run: The settings.
        images: Training, validation and test images.
        folder: Folder of checkpoints and log.
        device: The device of images and models.
        processes: The processes that train together.
        tensorboard: Whether training also writes for TensorBoard.
    """

    run: Settings
    images: ImageSet
    folder: Path
    device: torch.device
    processes: Processes = ALONE
    tensorboard: bool = False

    @classmethod
    def open(
        cls,
        run: Settings,
        data: Path,
        folder: Path,
        device: torch.device,
        processes: Processes = ALONE,
        *,
        tensorboard: bool = False,
    ) -> Self:
        """Load the data onto the device.

        Args:
            run: The settings.
            data: Folder of the data sets.
            folder: Folder of checkpoints and log.
            device: The device.
            processes: The processes that train together.
            tensorboard: Whether training also writes for TensorBoard.

        Returns:
            The run, ready to train.

        Raises:
            DataError: The data are missing or unreadable.
            DependencyError: TensorBoard is asked for and not installed.
        """
        if tensorboard:
            needed("torch.utils.tensorboard", "tensorboard")  # before the data are read
        return cls(run, cls.read(run, data).to(device), folder, device, processes, tensorboard)

    @staticmethod
    def read(run: Any, data: Path) -> ImageSet:
        """Read the images of a run from the folder of the data sets."""
        found: ImageSet = run.data.load(data)
        return found

    def clear(self) -> None:
        """Delete what `clear` deletes."""
        clear(self.folder)

    def fit(self, models: Path, *, replace: bool = False, key: Ed25519PrivateKey | None = None) -> Path:
        """Train the stages that are not finished; then the first process evaluates and exports.

        Args:
            models: The model repository.
            replace: Whether an existing version is replaced.
            key: Signs the version; None leaves it unsigned.

        Returns:
            The folder of the new version.

        Raises:
            TrainingError: A subclass for each cause.
        """
        target = version_folder(models, self.run.name, self.run.version, replace=replace)
        if not self.processes.first:
            self.train()
            return target
        with locked(self.folder):
            self._check_images()
            self.train()
            return self.export(models, replace=replace, key=key)

    @abstractmethod
    def train(self) -> None:
        """Train the stages that are not finished. A finished stage continues if the run has more epochs."""

    @abstractmethod
    def evaluate(self, share: Share = ALL) -> dict[str, Any]:
        """Evaluate on the test images, or on a share of them.

        Returns:
            The manifest's `quality`, with the settings that repeat it.
        """

    @abstractmethod
    def export(self, models: Path, *, replace: bool = False, key: Ed25519PrivateKey | None = None) -> Path:
        """Evaluate and write the model version.

        Args:
            models: The model repository.
            replace: Whether an existing version is replaced.
            key: Signs the version; None leaves it unsigned.

        Returns:
            The folder of the version.

        Raises:
            ExportError: The version exists, or a graph differs from torch.
            DiskError: The folder cannot be written.
            CheckpointError: The run is not trained, or its checkpoints have other settings.
        """

    def train_stage(self, stage: Stage, folder: Path) -> None:
        """Train one stage on the images, with its checkpoint in `folder`."""
        images = self.images
        train(
            stage,
            images.train,
            folder,
            self.processes,
            images.validation,
            crops=images.crops,
            tensorboard=self.tensorboard,
        )

    def stored(self, module: AnyModule) -> AnyModule:
        """The module with the weights that the version will have."""
        return module if self.run.export.weights == "float32" else rounded(module)

    def drop_stale(self, first: Path, epochs: int, stale: Path, told: str) -> None:
        """Delete the checkpoint of a stage that builds on another, if that one is to be trained longer.

        Args:
            first: Checkpoint of the stage that it builds on.
            epochs: Epochs that this stage is to have.
            stale: Checkpoint of the stage.
            told: What the user is told.
        """
        known = trained_epochs(first)
        self.processes.wait()
        if known is not None and known < epochs and self.processes.first and stale.exists():
            tell(told)
            stale.unlink()
        self.processes.wait()

    def told_training(self, settings: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, Any]:
        """The manifest's `training`: settings, seconds of each stage, and where it was trained."""
        return {
            "settings": settings,
            **({"card": notes} if (notes := self.run.card.model_dump(exclude_none=True)) else {}),
            "train_images": len(self.images.train),
            "seconds": seconds,
            "device": self.device.type,
            "cpus": os.cpu_count(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }

    def _check_images(self) -> None:
        """Refuse training images that differ from those of the folder's checkpoints."""
        path = self.folder / "images.sha256"
        found = digest(self.images.train.cpu().numpy().tobytes())
        try:
            if not path.exists():
                path.write_text(found)
            known = path.read_text()
        except OSError as error:
            raise DiskError(f"cannot write {path} ({error.strerror}); make room and run again") from error
        if known != found:
            raise CheckpointError(f"{self.folder} was trained on other images; use --fresh or another --run")


class Workshop(AnyWorkshop[Run]):
    """A run of a VAE with its data in memory."""

    def train(self) -> None:
        """Train both stages. A finished stage continues if the run has more epochs."""
        shape = self.images.shape
        run = as_trained(self.run, self.folder, longer=True)
        told = "training of the VAE continues, so restoration is trained again from the start"
        self.drop_stale(self.folder / "vae.pt", run.train.epochs, self.folder / "restoration.pt", told)
        self.train_stage(vae_stage(run, shape, self.device), self.folder)
        if run.restoration is None:
            return
        self.train_stage(restoration_stage(run, self.vae(), shape, self.device), self.folder)

    def vae(self) -> VAE:
        """Load the trained VAE."""
        return trained_vae(self.run, self.images.shape, self.folder, self.device)

    def recognition(self) -> Recognition | None:
        """Load the trained recognition model of corrupted images; None if the run has none."""
        if self.run.restoration is None:
            return None
        return trained_recognition(self.run, self.images.shape, self.folder, self.device)

    def evaluate(self, share: Share = ALL) -> dict[str, Any]:
        """Figures in nats per image; and in decibels where the run restores."""
        return self._quality(*self._stored(), share)

    def _quality(self, vae: VAE, recognition: Recognition | None, share: Share = ALL) -> dict[str, Any]:
        settings, test = self.run.evaluation, self.images.test
        if settings.images is not None and settings.images < len(test):
            order = torch.randperm(len(test), generator=torch.Generator().manual_seed(self.run.seed))
            test = test[order[: settings.images].to(test.device)]
        quality: dict[str, Any] = likelihood(
            vae,
            test,
            settings.draws,
            self.run.seed,
            self.folder / "evaluation.pt",
            dynamic=self.run.binary,
            precision=settings.precision,
            share=share,
        )
        if recognition is not None and share == ALL:
            quality["restoration"] = restoration(vae, recognition, test, self.run.seed)
            report(quality["restoration"])
        return quality

    def export(self, models: Path, *, replace: bool = False, key: Ed25519PrivateKey | None = None) -> Path:
        """Evaluate and write the model version, as `AnyWorkshop.export`."""
        version_folder(models, self.run.name, self.run.version, replace=replace)
        vae, recognition = self._stored()
        about = {
            **self._sizes(vae, recognition),
            "value_range": [0.0, 1.0],
            "groups": packed(vae.group_shapes),
            "likelihood": self.run.model.likelihood.likelihood,
            "prior": self.run.model.prior.prior,
            "dataset": self.run.data.dataset,
            "tileable": self.run.tileable,
            "noise_families": [] if self.run.restoration is None else list(FAMILIES),
            "training": self._training(),
            "quality": self._quality(vae, recognition),
            "scoring": held_out(vae, self.images.validation, self.run.seed, dynamic=self.run.binary),
        }
        tell("exporting; tracing the graphs and replaying them takes up to a minute")
        graphs = self._exportables(vae, recognition)
        if self.run.export.weights == "float16":
            exact = self._exportables(self.vae(), self.recognition())
            graphs = {name: replaced(graph, exact=exact[name].module) for name, graph in graphs.items()}
        return export(graphs, models, self.run.name, self.run.version, about, replace=replace, key=key)

    def _stored(self) -> tuple[VAE, Recognition | None]:
        """The trained models with the weights that the version will have."""
        vae, recognition = self.vae(), self.recognition()
        return self.stored(vae), None if recognition is None else self.stored(recognition)

    def _exportables(self, vae: VAE, recognition: Recognition | None) -> dict[str, Exportable]:
        """The graphs, traced on the CPU, where onnxruntime's outputs are compared with torch's."""
        return exportables(vae.cpu(), None if recognition is None else recognition.cpu(), *self._golden_rows())

    def _sizes(self, vae: VAE, recognition: Recognition | None) -> dict[str, Any]:
        """Shapes of images and latents for the manifest, and, where sizes are free, how images are cut into tiles."""
        step, shape = self.run.model.network.multiple_of, self.images.shape
        told = shapes_told((1, *shape), (1, *vae.latent_shape), step)
        return told if step is None else {**told, "tiles": tiles(vae.encoder, vae.decoder, recognition, shape[0], step)}

    def _golden_rows(self) -> tuple[Tensor, Corrupted]:
        x = as_float(self.images.test[:GOLDEN_ROWS].cpu())
        rows = golden_images(x, self.run.model.network.multiple_of)
        return rows, simulate(rows, keyed_generator(x.device, self.run.seed, 5))

    def _training(self) -> dict[str, Any]:
        seconds, run = stage_seconds(self.folder), as_trained(self.run, self.folder)
        told = run.model_dump(
            mode="json",
            exclude={"name", "version", "evaluation", "export", "tileable", "card"},
            exclude_none=True,
        )
        return self.told_training({**told, "binarise": run.binary}, seconds)
