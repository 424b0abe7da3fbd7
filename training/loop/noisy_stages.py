"""The stages of a model of noisy images: the network of the posterior mean, then the VAE on its features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from training.config import NoisyRun, Optimisation
from training.data import as_float
from training.data.noisy import unpacked
from training.distributions.likelihoods.noise import UnitNoise
from training.distributions.priors.standard_normal import StandardNormal
from training.loop.checkpoint import read_trained
from training.loop.pictures import SIMULATED_SEED
from training.loop.randomness import keyed_generator
from training.loop.stages import counted, placed
from training.loop.trainer import Stage
from training.models.ladder import LadderVAE
from training.models.noisy import MeanNetwork, NoisyVAE, recorrupted_bound
from training.models.vae import Bound

STAGES = ("trunk", "vae")
"""In the order in which they are trained; files of their checkpoints are named so."""


class NoisyParts(NamedTuple):
    """The networks of a run."""

    trunk: MeanNetwork
    vae: NoisyVAE

    def each(self, function: Callable[[Any], Any]) -> NoisyParts:
        """The function of both networks."""
        return NoisyParts(*map(function, self))


def build_noisy(run: NoisyRun, images: Tensor | None = None) -> NoisyParts:
    """The networks of a run with initial weights, a function of its seed.

    Args:
        run: The run.
        images: Crops, as `unpacked` takes them, that centre and scale of the transformed images are measured on; None
            leaves both to a checkpoint.
    """
    torch.manual_seed(run.seed)
    centre, scale = (0.0, 1.0) if images is None else _centre_and_scale(images)
    network, width, size = run.model.network, run.trunk.channels[0], run.data.size
    trunk = MeanNetwork(run.trunk.build(1), UnitNoise((1, 1, 1), centre, scale))
    shape = (1, size, size)
    ladder = LadderVAE(
        network.encoder((1 + width // 4, size, size), 1),
        network.decoder(1, shape),
        UnitNoise((1, 1, 1), centre, scale),
        StandardNormal(*network.latent_shape(1, shape)),
        run.train.free_nats,
    )
    return NoisyParts(trunk, NoisyVAE(ladder, width))


def _centre_and_scale(images: Tensor) -> tuple[float, float]:
    y, noise = unpacked(as_float(images))
    t = noise.stabilised(y)
    return float(t.mean()), max(float(t.std()), 1.0)


def noisy_stage(run: NoisyRun, stage: str, parts: NoisyParts, device: torch.device) -> Stage:
    """One of the `STAGES`; the networks of earlier stages are trained."""
    parts = parts.each(lambda module: placed(module, device))
    return _trunk_stage(run, parts) if stage == "trunk" else _vae_stage(run, parts)


def _trunk_stage(run: NoisyRun, parts: NoisyParts) -> Stage:
    def objective(model: MeanNetwork, images: Tensor, generator: torch.Generator) -> Bound:
        return recorrupted_bound(model, *unpacked(images), generator)

    def show(model: MeanNetwork, images: Tensor) -> dict[str, Tensor]:
        y, noise = unpacked(images)
        return {"held-out images": y, "posterior mean": model.restored(y, torch.ones_like(y), noise)[0]}

    return _stage(run, "trunk", parts.trunk, objective, show)


def _vae_stage(run: NoisyRun, parts: NoisyParts) -> Stage:
    trunk = parts.trunk.eval().requires_grad_(requires_grad=False)

    def objective(model: NoisyVAE, images: Tensor, generator: torch.Generator) -> Bound:
        y, noise = unpacked(images)
        with torch.no_grad():
            seen = trunk.seen(y, torch.ones_like(y), noise)
        eps = model.vae.noise(run.train.draws, len(y), generator)
        return model.bound(y, noise, seen, eps)

    def show(model: NoisyVAE, images: Tensor) -> dict[str, Tensor]:
        y, noise = unpacked(images)
        seen = trunk.seen(y, torch.ones_like(y), noise)
        restored, _ = model.restored(y, torch.ones_like(y), noise, seen)
        posterior = model.vae.posterior(model.encoded(noise.stabilised(y), seen.features))
        eps = model.vae.noise(2, len(y), keyed_generator(y.device, run.seed, SIMULATED_SEED))
        draws = noise.unbiased(model.likelihood.mean(model.vae.infer(posterior, eps).parameters))
        blocks = {"held-out images": y, "posterior mean": restored}
        return {**blocks, "draw 1": draws[0], "draw 2": draws[1]}

    return _stage(run, "vae", parts.vae, objective, show)


def _stage(
    run: NoisyRun,
    name: str,
    module: nn.Module,
    objective: Callable[[Any, Tensor, torch.Generator], Bound],
    show: Callable[[Any, Tensor], dict[str, Tensor]],
) -> Stage:
    return Stage(
        name,
        module,
        objective,
        noisy_optimisation(run, name),
        run.seed + STAGES.index(name),
        noisy_identity(run, name),
        show=show,
        latent=name == "vae",
        lengthening=f"epochs in {'[trunk.train]' if name == 'trunk' else '[train]'}",
    )


def noisy_optimisation(run: NoisyRun, stage: str) -> Optimisation:
    """How a stage is trained."""
    return run.trunk.train if stage == "trunk" else run.train


def noisy_identity(run: NoisyRun, stage: str) -> dict[str, Any]:
    """The settings that a checkpoint of a stage must have been made with, without its length."""
    tables = {"seed", "data", "trunk"} | ({"model", "train"} if stage == "vae" else set())
    told = run.model_dump(
        mode="json",
        include=tables,
        exclude={"train": {"epochs": True}, "trunk": {"train": {"epochs": True}}},
        exclude_defaults=True,
    )
    noise = run.model.likelihood.model_dump(mode="json", exclude_defaults=True)
    return {**told, "noise": noise}


def trained_noisy(run: NoisyRun, stage: str, folder: Path, device: torch.device) -> Any:
    """The network of a stage with the weights that its checkpoint in `folder` keeps, in evaluation mode.

    Raises:
        CheckpointError: It is missing, unfinished, or of other settings.
    """
    module = placed(getattr(build_noisy(run), stage), device)
    return read_trained(folder / f"{stage}.pt", noisy_identity(run, stage), module)


def as_noisily_trained(run: NoisyRun, folder: Path, *, longer: bool = False) -> NoisyRun:
    """The run with its checkpoints' numbers of epochs; `longer`: or its own where they are larger."""
    found = {stage: counted(noisy_optimisation(run, stage), folder / f"{stage}.pt", longer=longer) for stage in STAGES}
    trunk = run.trunk.model_copy(update={"train": found["trunk"]})
    return run.model_copy(update={"trunk": trunk, "train": found["vae"]})
