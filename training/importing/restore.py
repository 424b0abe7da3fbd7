"""Restoration of corrupted images, trained for a VAE that others have trained."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor, nn

from service.contract.corruption import FAMILIES
from service.contract.graphs import GRAPHS
from service.contract.manifest import digest
from training.config import Imported, RestoringRun
from training.data import ImageSet, as_float
from training.errors import ConfigError, ModelFileError
from training.evaluation.evaluate import report, restoration
from training.export.export import GOLDEN_ROWS, Exportable, restoring_parts, version_folder
from training.export.pair import MODULE_PARITY, Encode, export_vae
from training.loop.checkpoint import read_trained
from training.loop.randomness import keyed_generator
from training.loop.stages import placed, recognition_of, recognition_stage
from training.loop.trainer import Stage, train
from training.models.frozen import Frozen
from training.models.restoration import Recognition, simulate


class Pair(NamedTuple):
    """Modules that a Python file defines."""

    encoder: nn.Module
    decoder: nn.Module


def restore_only(
    run: RestoringRun,
    data: Path,
    folder: Path,
    models: Path,
    device: torch.device,
    *,
    replace: bool = False,
    key: Ed25519PrivateKey | None = None,
) -> Path:
    """Train restoration for an imported VAE, which stays as it is, and write both as a version.

    Args:
        run: The settings.
        data: Folder of the data sets.
        folder: Folder of checkpoint and log; an interrupted training goes on from there.
        models: The model repository.
        device: The device.
        replace: Whether an existing version is replaced.
        key: Signs the version; None leaves it unsigned.

    Returns:
        The folder of the version.

    Raises:
        TrainingError: A subclass for each cause.
    """
    version_folder(models, run.name, run.version, replace=replace)
    pair, images = _pair(run.imported.file), run.data.load(data).to(device)
    vae = _frozen(run.imported, pair, images, device)
    stage = _stage(run, vae, images.shape, device)
    train(stage, images.train, folder, held_out=images.validation)
    recognition = read_trained(folder / "restoration.pt", stage.identity, _recognition(run, vae, images.shape, device))
    figures = restoration(vae, recognition, images.test, run.seed)
    report(figures)
    told = {
        "dataset": run.data.dataset,
        "noise_families": list(FAMILIES),
        "training": {"imported": run.imported.file.name, "settings": _said(run)},
        "quality": {"restoration": figures},
    }
    x = as_float(images.test[:GOLDEN_ROWS].cpu())
    low, high = run.imported.value_range
    return export_vae(
        pair.encoder, pair.decoder, low + (high - low) * x, models, run.name, run.version,
        value_range=run.imported.value_range, prior=run.imported.prior, told=told,
        further=_further(vae.cpu(), recognition.cpu(), x), replace=replace, key=key,
    )  # fmt: skip


def _pair(path: Path) -> Pair:
    """The modules of a Python file.

    Raises:
        ModelFileError: It cannot be run, or does not define them.
    """
    if not path.is_file():
        raise ModelFileError(f"cannot read {path}: there is no such file")
    try:
        names = runpy.run_path(str(path))
    except Exception as error:
        raise ModelFileError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    encoder, decoder = (names.get(name) for name in Pair._fields)
    if not (isinstance(encoder, nn.Module) and isinstance(decoder, nn.Module)):
        raise ModelFileError(f"{path} must define the modules encoder and decoder; see docs/importing.md")
    return Pair(encoder, decoder)


@torch.no_grad()
def _frozen(settings: Imported, pair: Pair, images: ImageSet, device: torch.device) -> Frozen:
    """The VAE for training.

    Raises:
        ConfigError: Its latents are no vectors, or it does not take these images.
    """
    encoder, decoder = (module.to(device).eval() for module in (Encode(pair.encoder), pair.decoder))
    vae = Frozen(encoder, decoder, 0, settings.value_range)
    x = as_float(images.train[:2])
    try:
        mean = vae.posterior(x).mean
        made = decoder(mean)
    except RuntimeError as error:
        raise ConfigError(
            f"{settings.file} does not take the images of [data], of {list(images.shape)}: {error}"
        ) from error
    if mean.ndim != 2 or made.shape != x.shape:
        raise ConfigError(
            f"{settings.file} makes latents of shape {list(mean.shape[1:])} and images of {list(made.shape[1:])}; "
            f"restoration is trained for latents that are vectors, and images as in [data], of {list(x.shape[1:])}"
        )
    vae.latent_dim = mean.shape[1]
    return vae


def _recognition(run: RestoringRun, vae: Frozen, shape: tuple[int, int, int], device: torch.device) -> Recognition:
    return placed(recognition_of(run.restoration, run.seed, shape, vae.latent_dim), device)


def _stage(run: RestoringRun, vae: Frozen, shape: tuple[int, int, int], device: torch.device) -> Stage:
    weights = b"".join(weight.cpu().numpy().tobytes() for weight in vae.state_dict().values())
    identity = {**_said(run), "weights": digest(weights)}
    recognition = _recognition(run, vae, shape, device)
    return recognition_stage(recognition, vae, run.restoration.train, run.seed, identity)


def _said(run: RestoringRun) -> dict[str, Any]:
    """Settings that a checkpoint must have been made with."""
    return run.model_dump(
        mode="json",
        include={"seed", "data", "imported", "restoration"},
        exclude={"restoration": {"train": {"epochs": True}}},
        exclude_defaults=True,
    )


def _further(vae: Frozen, recognition: Recognition, x: Tensor) -> dict[str, Exportable]:
    """The graphs that restore, with golden rows from clean images x in [0, 1]."""
    rows = x.repeat(-(-GOLDEN_ROWS // len(x)), 1, 1, 1)[:GOLDEN_ROWS]
    parts = restoring_parts(vae, recognition, simulate(rows, keyed_generator(torch.device("cpu"), 5)))
    return {name: Exportable(*part, GRAPHS[name], parity=MODULE_PARITY) for name, part in parts.items()}
