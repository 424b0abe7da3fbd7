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
from training.export.export import GOLDEN_ROWS, Exportable, golden_images, restoring_parts, version_folder
from training.export.pair import MODULE_PARITY, Encode, export_vae
from training.export.tiling import tiles
from training.importing.autoencoder_kl import VALUE_RANGE, read_autoencoder_kl
from training.loop.checkpoint import read_trained
from training.loop.randomness import keyed_generator
from training.loop.stages import placed, recognition_of, recognition_stage
from training.loop.trainer import Stage, train
from training.models.frozen import Frozen
from training.models.restoration import Recognition, simulate


class Source(NamedTuple):
    """An imported VAE.

    Attributes:
        encoder: Encoder, as `export_vae` takes it.
        decoder: Decoder, likewise.
        value_range: Black and white in both.
        multiple_of: What divides height and width; None for images of one size.
        told: Further keys of the manifest.
    """

    encoder: nn.Module
    decoder: nn.Module
    value_range: tuple[float, float]
    multiple_of: int | None
    told: dict[str, Any]


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
    source, images = _source(run.imported), run.data.load(data).to(device)
    vae = _frozen(source, images, device)
    stage = _stage(run, vae, source, images.shape, device)
    train(stage, images.train, folder, held_out=images.validation, crops=images.crops)
    recognition = _recognition(run, vae, source, images.shape, device)
    recognition = read_trained(folder / "restoration.pt", stage.identity, recognition)
    figures = restoration(vae, recognition, images.test, run.seed)
    report(figures)
    vae, recognition = vae.cpu(), recognition.cpu()
    x = golden_images(as_float(images.test[:GOLDEN_ROWS].cpu()), source.multiple_of)
    told = {
        **source.told,
        "dataset": run.data.dataset,
        "noise_families": list(FAMILIES),
        "training": {**source.told.get("training", {}), "settings": _said(run)},
        "quality": {"restoration": figures},
    }
    if source.multiple_of is not None:
        told.setdefault("tiles", tiles(vae.encoder, vae.decoder, recognition, x.shape[1], source.multiple_of))
    low, high = source.value_range
    return export_vae(
        source.encoder, source.decoder, low + (high - low) * x, models, run.name, run.version,
        value_range=source.value_range, multiple_of=source.multiple_of, prior=run.imported.prior, told=told,
        further=_further(vae, recognition, x), replace=replace, key=key,
    )  # fmt: skip


def _source(imported: Imported) -> Source:
    """The VAE that the settings name.

    Raises:
        ModelFileError: Its file or folder cannot be used.
        DependencyError: It is an AutoencoderKL, and diffusers is not installed.
    """
    if imported.folder is not None:
        found = read_autoencoder_kl(imported.folder)
        return Source(found.encoder, found.decoder, VALUE_RANGE, found.multiple_of, found.told())
    path = imported.file
    if path is None or not path.is_file():
        raise ModelFileError(f"cannot read {path}: there is no such file")
    try:
        names = runpy.run_path(str(path))
    except Exception as error:
        raise ModelFileError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    encoder, decoder = (names.get(name) for name in ("encoder", "decoder"))
    if not (isinstance(encoder, nn.Module) and isinstance(decoder, nn.Module)):
        raise ModelFileError(f"{path} must define the modules encoder and decoder; see docs/importing.md")
    told = {"training": {"imported": path.name}}
    low, high = imported.value_range
    return Source(encoder, decoder, (low, high), imported.multiple_of, told)


@torch.no_grad()
def _frozen(source: Source, images: ImageSet, device: torch.device) -> Frozen:
    """The VAE for training.

    Raises:
        ConfigError: It does not take these images.
    """
    encoder, decoder = (module.to(device).eval() for module in (Encode(source.encoder), source.decoder))
    x = as_float(images.train[:2])
    try:
        mean = Frozen(encoder, decoder, (), source.value_range).posterior(x).mean
        made = decoder(mean)
    except RuntimeError as error:
        raise ConfigError(f"the VAE does not take the images of [data], of {list(images.shape)}: {error}") from error
    if made.shape != x.shape:
        raise ConfigError(f"the VAE makes images of {list(made.shape[1:])} of those of [data], of {list(x.shape[1:])}")
    return Frozen(encoder, decoder, tuple(mean.shape[1:]), source.value_range)


def _recognition(
    run: RestoringRun, vae: Frozen, source: Source, shape: tuple[int, int, int], device: torch.device
) -> Recognition:
    """The recognition model with initial weights.

    Raises:
        ConfigError: Its latents are not those of the VAE, or it is for one size of images and the VAE for any.
    """
    network, step = run.restoration.network, source.multiple_of
    found = network.latent_shape(vae.latent_shape[0], shape)
    if found != vae.latent_shape:
        raise ConfigError(
            f"restoration.network makes latents of {list(found)}, the VAE of {list(vae.latent_shape)}; change its "
            'levels, or set latents = "spatial" for latents with height and width'
        )
    if step is not None and (network.multiple_of is None or run.restoration.level_network.multiple_of is None):
        raise ConfigError(
            'images of any size need restoration.network with latents = "spatial" and restoration.level_network with '
            'latents = "pooled"'
        )
    if step is not None and step % 2 ** (len(run.restoration.correction.channels) - 1):
        raise ConfigError(f"restoration.correction has too many levels for images of multiples of {step}")
    return placed(recognition_of(run.restoration, run.seed, shape, vae.latent_shape[0]), device)


def _stage(run: RestoringRun, vae: Frozen, source: Source, shape: tuple[int, int, int], device: torch.device) -> Stage:
    weights = b"".join(weight.cpu().numpy().tobytes() for weight in vae.state_dict().values())
    identity = {**_said(run), "weights": digest(weights)}
    recognition = _recognition(run, vae, source, shape, device)
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
    parts = restoring_parts(vae, recognition, simulate(x, keyed_generator(torch.device("cpu"), 5)))
    return {name: Exportable(*part, GRAPHS[name], parity=MODULE_PARITY) for name, part in parts.items()}
