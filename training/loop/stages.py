"""The stages of a run: the VAE, then, with `[restoration]`, the recognition model of corrupted images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from service.contract.corruption import FAMILIES
from training.config import Optimisation, Restoration, Run
from training.data import as_float, binarise
from training.distributions.noise import corrupt
from training.errors import CheckpointError, ConfigError
from training.loop.checkpoint import Module, read_trained, trained_epochs
from training.loop.pictures import restoration_blocks, vae_blocks
from training.loop.trainer import Stage
from training.models.ladder import LadderVAE
from training.models.restoration import Recognition, restoration_bound, simulate
from training.models.vae import VAE, Bound
from training.networks.ladder import Down, Up
from training.objectives.elbo import importance_weighted, monte_carlo_elbo
from training.objectives.wake_sleep import wake_sleep

VaeBound = Callable[[VAE, Tensor, Tensor, torch.Generator], Bound]

BOUNDS: dict[str, VaeBound] = {
    "elbo": lambda model, x, eps, _: model.bound(x, eps),
    "monte_carlo_elbo": lambda model, x, eps, _: monte_carlo_elbo(model, x, eps),
    "importance_weighted": lambda model, x, eps, _: importance_weighted(model, x, eps),
    "wake_sleep": wake_sleep,
}


def denoising(settings: Optimisation) -> VaeBound:
    """The denoising bound: its posteriors are those of images corrupted with the settings' family and level.

    Source: Im et al. (2015), "Denoising criterion for variational auto-encoding framework", equation 5.
    """
    column = FAMILIES.index(settings.corruption)

    def bound(model: VAE, x: Tensor, eps: Tensor, generator: torch.Generator) -> Bound:
        level = torch.zeros(len(x), len(FAMILIES), device=x.device)
        level[:, column] = settings.corruption_level
        return model.bound(x, eps, model.posterior(corrupt(x, level, generator)))

    return bound


def build_vae(run: Run, shape: tuple[int, int, int]) -> VAE:
    """A VAE with initial weights, a function of the run's seed.

    Raises:
        ConfigError: The network does not take images of that shape.
    """
    torch.manual_seed(run.seed)
    network, latent_dim = run.model.network, run.model.latent_dim
    step = network.multiple_of
    if step is not None and any(side % step for side in shape[1:]):
        raise ConfigError(
            f"this network takes images whose height and width are multiples of {step}, not {shape[1]} x {shape[2]}; "
            "change the size in [data], or the number of levels in channels"
        )
    encoder, decoder = network.encoder(shape, latent_dim), network.decoder(latent_dim, shape)
    if run.model.initial_std is not None:
        for parameter in (*encoder.parameters(), *decoder.parameters()):
            nn.init.normal_(parameter, std=run.model.initial_std)
    prior = run.model.prior.build(network.latent_shape(latent_dim, shape), shape, encoder)
    pixels = shape if step is None else (shape[0], 1, 1)  # a place in a crop is none in the picture
    likelihood = run.model.likelihood.build(pixels)
    if isinstance(encoder, Up) and isinstance(decoder, Down):
        return LadderVAE(encoder, decoder, likelihood, prior, run.train.free_nats)
    return VAE(encoder, decoder, likelihood, prior)


def build_recognition(run: Run, shape: tuple[int, int, int]) -> Recognition:
    """The recognition model of corrupted images with initial weights, a function of the run's seed.

    Raises:
        CheckpointError: The run's TOML has no `[restoration]`.
    """
    if run.restoration is None:
        raise CheckpointError(f"run {run.name} has no [restoration] table")
    return recognition_of(run.restoration, run.seed, shape, run.model.latent_dim)


def recognition_of(settings: Restoration, seed: int, shape: tuple[int, int, int], latent_dim: int) -> Recognition:
    """The recognition model of corrupted images with initial weights, a function of the seed."""
    torch.manual_seed(seed + 1)
    channels, height, width = shape
    planes = 2 * channels + len(FAMILIES)
    size = (height, width) if settings.network.multiple_of is None else None
    return Recognition(
        settings.network.encoder((planes, height, width), latent_dim),
        settings.level_network.encoder((2 * channels, height, width), len(FAMILIES)),
        settings.correction.network(planes + 2 * channels, 2 * channels, size),
    )


def vae_stage(run: Run, shape: tuple[int, int, int], device: torch.device) -> Stage:
    """The stage that trains the VAE on the run's objective."""
    bound = denoising(run.train) if run.train.objective == "denoising" else BOUNDS[run.train.objective]

    def objective(model: VAE, images: Tensor, generator: torch.Generator) -> Bound:
        x = binarise(images, generator) if run.binary else as_float(images)
        return bound(model, x, model.noise(run.train.draws, len(x), generator), generator)

    def show(model: VAE, x: Tensor) -> dict[str, Tensor]:
        return vae_blocks(model, x, run.seed)

    vae = placed(build_vae(run, shape), device)
    return Stage("vae", vae, objective, run.train, run.seed, _vae_identity(run), show=show)


def restoration_stage(run: Run, vae: VAE, shape: tuple[int, int, int], device: torch.device) -> Stage:
    """The stage that trains the recognition model of corrupted images on the bound of clean ones; the VAE is fixed."""
    recognition = placed(build_recognition(run, shape), device)
    settings = run.restoration.train  # type: ignore[union-attr]  # build_recognition has refused None
    return recognition_stage(recognition, vae, settings, run.seed, _restoration_identity(run))


def recognition_stage(
    recognition: Recognition, vae: VAE, settings: Optimisation, seed: int, identity: dict[str, Any]
) -> Stage:
    """The stage that trains this recognition model; the VAE is fixed."""
    vae.requires_grad_(False)

    def objective(model: Recognition, images: Tensor, generator: torch.Generator) -> Bound:
        x = as_float(images)
        eps = vae.noise(settings.draws, len(x), generator)
        return restoration_bound(model, vae, x, simulate(x, generator), eps)

    def show(model: Recognition, x: Tensor) -> dict[str, Tensor]:
        return restoration_blocks(model, vae, x, seed)

    # Operators on images are computed by numpy, which no GPU can replay.
    return Stage(
        "restoration",
        recognition,
        objective,
        settings,
        seed + 1,
        identity,
        show=show,
        replayable=False,
        lengthening="--restoration-epochs",
    )


def as_trained(run: Run, folder: Path, *, longer: bool = False) -> Run:
    """The run with the numbers of epochs of its checkpoints in `folder`; `longer`: or its own where they are larger."""
    changed: dict[str, Any] = {"train": counted(run.train, folder / "vae.pt", longer=longer)}
    if run.restoration is not None:
        train = counted(run.restoration.train, folder / "restoration.pt", longer=longer)
        changed["restoration"] = run.restoration.model_copy(update={"train": train})
    return run.model_copy(update=changed)


def counted(settings: Optimisation, checkpoint: Path, *, longer: bool) -> Optimisation:
    """The settings with a checkpoint's number of epochs; `longer`: or their own where it is larger."""
    found = trained_epochs(checkpoint) or settings.epochs
    return settings.model_copy(update={"epochs": max(found, settings.epochs) if longer else found})


def trained_vae(run: Run, shape: tuple[int, int, int], folder: Path, device: torch.device) -> VAE:
    """The VAE with the weights that the checkpoint keeps.

    Raises:
        CheckpointError: There is no checkpoint of these settings.
    """
    return read_trained(folder / "vae.pt", _vae_identity(run), placed(build_vae(run, shape), device))


def trained_recognition(run: Run, shape: tuple[int, int, int], folder: Path, device: torch.device) -> Recognition:
    """The recognition model of corrupted images with the weights that the checkpoint keeps.

    Raises:
        CheckpointError: There is no checkpoint of these settings.
    """
    module = placed(build_recognition(run, shape), device)
    return read_trained(folder / "restoration.pt", _restoration_identity(run), module)


def placed(module: Module, device: torch.device) -> Module:
    """The module on the device, with channels last, which makes convolutions 1.5 times as fast on a CPU."""
    return module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _vae_identity(run: Run) -> dict[str, Any]:
    said = _said(run, {"seed", "data", "model", "train"})
    # The first checkpoints were all of binary pixels, and did not say so.
    return said if run.binary else {**said, "binarise": False}


def _restoration_identity(run: Run) -> dict[str, Any]:
    # "roughness" is not a setting: checkpoints without it are of another network.
    return {**_vae_identity(run), **_said(run, {"restoration"}), "roughness": 1}


def _said(run: Run, tables: set[str]) -> dict[str, Any]:
    """Settings that differ from their defaults: a checkpoint outlives new settings, but not changed defaults.

    Numbers of epochs are left out, because a finished stage may be trained longer.
    """
    return run.model_dump(
        mode="json",
        include=tables,
        exclude={"train": {"epochs": True}, "restoration": {"train": {"epochs": True}}},
        exclude_defaults=True,
    )
