"""The stages of a conditional model: the trunk, the latents on its features, and the estimator of the noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from training.config import CHANNELS, ConditionalRun, Optimisation
from training.data import as_float
from training.distributions.camera import luma
from training.distributions.spoiling import spoil
from training.errors import CheckpointError, ConfigError
from training.loop.checkpoint import read_trained, write_trained
from training.loop.pictures import SIMULATED_SEED
from training.loop.randomness import keyed_generator
from training.loop.stages import counted, placed
from training.loop.trainer import Stage
from training.models.conditional import (
    Complete,
    Restore,
    estimated,
    ladder_objective,
    latent_bound,
    level_bound,
    trunk_bound,
)
from training.models.vae import Bound
from training.networks.level import LevelNetwork
from training.networks.spatial_ladder import SpatialLadder
from training.networks.trunk import Trunk

STAGES = ("trunk", "latents", "level")
"""In the order in which they are trained; files of their checkpoints are named so."""
COMPLETIONS = 2
"""Completions of each image on the sheet."""
Weights = Mapping[str, Mapping[str, Tensor]]
"""Initial weights by stage, then by name; a stage may lack some or all."""


class Parts(NamedTuple):
    """The networks of one variant."""

    trunk: Trunk
    latents: SpatialLadder
    level: LevelNetwork

    @property
    def channels(self) -> int:
        """Of an image."""
        return self.latents.channels

    def each(self, function: Callable[[Any], Any]) -> Parts:
        """The function of every network."""
        return Parts(*map(function, self))


def build_parts(run: ConditionalRun, weights: Weights | None = None) -> Parts:
    """The networks of a run of one variant, with initial weights that are a function of its seed, or with given ones.

    Raises:
        ConfigError: The given weights are of other networks.
    """
    channels = CHANNELS[run.variants[0]]
    torch.manual_seed(run.seed)
    found = Parts(
        run.trunk.build(channels), run.latents.build(run.trunk.channels[0], channels), run.level.build(channels)
    )
    for stage, module in found._asdict().items():
        _begin_with(module, (weights or {}).get(stage, {}), stage)
    return found


def _begin_with(module: nn.Module, weights: Mapping[str, Tensor], stage: str) -> None:
    """Set the weights that are given.

    Raises:
        ConfigError: One is of another shape, or the network has none of its name.
    """
    own = module.state_dict()
    for name, weight in weights.items():
        shape = own[name].shape if name in own else None
        if shape != weight.shape:
            raise ConfigError(
                f"[{stage}] describes another network than the version to begin with ({name} is of "
                f"{list(weight.shape)} there, {'absent' if shape is None else f'of {list(shape)}'} here); copy the "
                f"table from training.settings in its manifest"
            )
        own[name].copy_(weight)


def conditional_stage(run: ConditionalRun, stage: str, parts: Parts, device: torch.device) -> Stage:
    """One of the `STAGES` of a run of one variant.

    Args:
        run: The run.
        stage: The stage.
        parts: The networks; those of earlier stages are trained.
        device: Where they are trained.
    """
    make = {"trunk": _trunk_stage, "latents": _latents_stage, "level": _level_stage}[stage]
    return make(run, parts.each(lambda module: placed(module, device)))


def _trunk_stage(run: ConditionalRun, parts: Parts) -> Stage:
    def objective(model: Trunk, images: Tensor, generator: torch.Generator) -> Bound:
        return trunk_bound(model, spoil(as_float(images), parts.channels, run.corruptions, generator))

    def show(model: Trunk, x: Tensor) -> dict[str, Tensor]:
        return _blocks(run, parts._replace(trunk=model), x)

    return _stage(run, "trunk", parts.trunk, objective, show, latent=False)


def _latents_stage(run: ConditionalRun, parts: Parts) -> Stage:
    trunk = parts.trunk.eval().requires_grad_(requires_grad=False)

    def objective(model: SpatialLadder, images: Tensor, generator: torch.Generator) -> Bound:
        spoilt = spoil(as_float(images), parts.channels, run.corruptions, generator)
        with torch.no_grad():
            seen = estimated(trunk, *spoilt[1:])
        bound = latent_bound(model, seen, spoilt.x, model.noise(spoilt.x, generator))
        height, width = images.shape[2:]
        places = [(height >> level) * (width >> level) for level in range(1, len(model.latents) + 1)]
        return ladder_objective(bound, places, run.latents.free_nats)

    def show(model: SpatialLadder, x: Tensor) -> dict[str, Tensor]:
        return _blocks(run, parts._replace(latents=model), x, COMPLETIONS)

    return _stage(run, "latents", parts.latents, objective, show)


def _level_stage(run: ConditionalRun, parts: Parts) -> Stage:
    def objective(model: LevelNetwork, images: Tensor, generator: torch.Generator) -> Bound:
        spoilt = spoil(as_float(images), parts.channels, run.level.corruptions, generator)
        clean = torch.rand(len(images), generator=generator, device=images.device) < run.level.clean
        return level_bound(model, spoilt, clean)

    return _stage(run, "level", parts.level, objective, None, latent=False)


def _stage(
    run: ConditionalRun,
    name: str,
    module: nn.Module,
    objective: Callable[[Any, Tensor, torch.Generator], Bound],
    show: Callable[[Any, Tensor], dict[str, Tensor]] | None,
    *,
    latent: bool = True,
) -> Stage:
    return Stage(
        name,
        module,
        objective,
        optimisation(run, name),
        run.seed + STAGES.index(name),
        stage_identity(run, name),
        show=show,
        replayable=False,  # JPEG is made on the CPU
        latent=latent,
        lengthening=f"epochs in [{name}.train]",
    )


def optimisation(run: ConditionalRun, stage: str) -> Optimisation:
    """How a stage is trained."""
    found: Optimisation = getattr(run, stage).train
    return found


@torch.no_grad()
def _blocks(run: ConditionalRun, parts: Parts, x: Tensor, completions: int = 0) -> dict[str, Tensor]:
    """Held-out images (n, c, h, w), what is seen of them, what is restored, and completions, by caption."""
    generator = keyed_generator(x.device, run.seed, SIMULATED_SEED)
    spoilt = spoil(luma(x) if x.shape[1] > parts.channels else x, parts.channels, run.corruptions, generator)
    restored, _, features = Restore(parts.trunk, parts.latents)(*spoilt[1:])
    blocks = {"held-out images": spoilt.x, "corrupted": spoilt.y, "restored": restored}
    for number in range(1, completions + 1):
        eps = parts.latents.noise(spoilt.x, generator)
        blocks[f"completion {number}"] = Complete(parts.latents)(*spoilt[1:], restored, features, eps)[0]
    return blocks


def stage_identity(run: ConditionalRun, stage: str) -> dict[str, Any]:
    """The settings that a checkpoint of a stage of one variant must have been made with, without its length."""
    tables = {"trunk": {"corruptions", "trunk"}, "latents": {"corruptions", "trunk", "latents"}, "level": {"level"}}
    return run.model_dump(
        mode="json",
        include={"seed", "data", "variants", "start", *tables[stage]},
        exclude={name: {"train": {"epochs": True}} for name in STAGES},
        exclude_defaults=True,
    )


def trained_parts(run: ConditionalRun, folder: Path, device: torch.device) -> Parts:
    """The networks of one variant with the weights that the checkpoints in `folder` keep.

    Raises:
        CheckpointError: One is missing, unfinished, or of other settings.
    """
    return Parts(*(trained_part(run, stage, folder, device) for stage in STAGES))


def trained_part(run: ConditionalRun, stage: str, folder: Path, device: torch.device) -> Any:
    """One of them, in evaluation mode."""
    module = placed(getattr(build_parts(run), stage), device)
    return read_trained(folder / f"{stage}.pt", stage_identity(run, stage), module)


def keep_weights(run: ConditionalRun, stage: str, weights: Mapping[str, Tensor], folder: Path, seconds: float) -> None:
    """Write weights that were trained elsewhere as the checkpoint of a finished stage of one variant.

    Args:
        run: The run of the variant, `run.of("grey")` or `run.of("colour")`.
        stage: One of `STAGES`.
        weights: By name.
        folder: Folder of the variant's checkpoints, such as `runs/photo/grey`.
        seconds: How long they were trained.

    Raises:
        CheckpointError: They are not those of the run's network.
    """
    module = getattr(build_parts(run), stage)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"these are no weights of [{stage}]: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    epochs = optimisation(run, stage).epochs
    write_trained(folder / f"{stage}.pt", stage_identity(run, stage), module, epochs=epochs, seconds=seconds)


def as_conditionally_trained(run: ConditionalRun, folder: Path, *, longer: bool = False) -> ConditionalRun:
    """The run of one variant with its checkpoints' numbers of epochs; `longer`: or its own where they are larger."""
    changed = {}
    for stage in STAGES:
        train = counted(optimisation(run, stage), folder / f"{stage}.pt", longer=longer)
        changed[stage] = getattr(run, stage).model_copy(update={"train": train})
    return run.model_copy(update=changed)
