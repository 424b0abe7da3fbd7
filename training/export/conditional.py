"""The graphs of a conditional model, one variant after the other, and the way back from them to weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from service.contract import manifest as manifests
from service.contract.graphs import GRAPHS, Axis
from service.contract.manifest import ManifestError
from training.config import CHANNELS, ConditionalRun, VariantName
from training.distributions.spoiling import NAMES, Corruptions, Spoilt, spoil
from training.errors import ExportError
from training.export.export import GOLDEN_TOLERANCE, Exportable, Rows, golden_images, packed_grids
from training.export.pair import MODULE_PARITY, shapes_told
from training.export.tiling import FELT_STD, felt_margin, noise_in
from training.export.weights import weights_in
from training.loop.conditional_stages import Parts
from training.loop.randomness import keyed_generator
from training.models.conditional import Complete, EstimateLevels, EstimateNoise, Restore, Temperature, estimated
from training.networks.eight_bits import StoredConv2d, stored, trainable

GOLDEN = Corruptions(white=0.25, camera=0.0, jpeg=0.25, missing=0.25, shrunk=0.25)
"""Corruptions of golden rows."""
A_LEVEL = 0.1
"""How far answers may differ where activations have eight bits: the last digit of a float may move one by a level."""
UNFELT = 0.25 / 255.0
"""Difference that tiles of photographs may make: a hundredth of noise of 25/255. A smaller one costs wide margins."""
WHERE = {"trunk.": "trunk", "head.": "latents", "ladder.": "latents", "network.": "level"}
"""Stage of a weight by the beginning of its name in the graphs; the names of the stage's own follow it."""


@torch.no_grad()
def conditional_graphs(
    parts: Parts, exact: Parts, spoilt: Spoilt, temperature: Temperature | None = None
) -> dict[str, Exportable]:
    """The graphs of a variant by name, with golden rows.

    Args:
        parts: The networks, on the CPU.
        exact: Those before their weights were rounded, or the same.
        spoilt: Golden images.
        temperature: Of the draws; None is 1.
    """
    features: dict[str, list[Axis]] = {"features": [parts.trunk.width, "height/2", "width/2"]}
    found = {}
    made, unrounded = _modules(parts, temperature), _modules(exact, temperature)
    _, *seen = spoilt
    restored, _, of_trunk = made["restoration"](*seen)
    eps = parts.latents.noise(spoilt.x, keyed_generator(spoilt.x.device, 0))
    rows: dict[str, Rows] = {
        "restoration": tuple(seen),
        "completion": (*seen, restored, of_trunk, eps),
        "noise_level": tuple(seen[:2]),
        "noise": tuple(seen[:2]),
    }
    for name, module in made.items():
        before = None if parts == exact else unrounded[name]
        eight_bits = any(isinstance(part, StoredConv2d) for part in module.modules())
        parity, tolerance = (A_LEVEL, A_LEVEL) if eight_bits else (MODULE_PARITY, GOLDEN_TOLERANCE)
        found[name] = Exportable(
            module, rows[name], GRAPHS[name], parity=parity, exact=before, chosen=features, tolerance=tolerance
        )
    return found


def _modules(parts: Parts, temperature: Temperature | None) -> dict[str, nn.Module]:
    return {
        "restoration": Restore(stored(parts.trunk), parts.latents),
        "completion": Complete(parts.latents, temperature),
        "noise_level": EstimateLevels(parts.level),
        "noise": EstimateNoise(parts.level),
    }


def golden_rows(run: ConditionalRun, x: Tensor) -> Spoilt:
    """Golden images of a variant, made of float test images (n, c, h, w) of its channels."""
    step = run.multiple_of
    small = golden_images(x, step)[..., : 4 * step, : 3 * step].contiguous()  # rows of features are large
    return spoil(small, x.shape[1], GOLDEN, keyed_generator(x.device, run.seed, 5))


def conditional_about(run: ConditionalRun, parts: Parts, spoilt: Spoilt) -> dict[str, Any]:
    """Keys of the manifest that a variant has, and `size` and `tiles`, which belong to all of them."""
    ladder, (height, width) = parts.latents, spoilt.x.shape[2:]
    latents = (len(spoilt.x), ladder.depth, height // ladder.multiple_of, width // ladder.multiple_of)
    told = shapes_told(spoilt.x.shape, latents, run.multiple_of)
    groups = packed_grids(zip(ladder.latents[::-1], ladder.blocks[::-1], strict=True), ladder.multiple_of)
    return {**told, "groups": groups, "tiles": {"margin": _margin(run, parts), "exact": True}}


def _margin(run: ConditionalRun, parts: Parts) -> int:
    """From how far away pixels and noise change a draw: the margin of tiles. The mean feels no more."""
    ladder = parts.latents

    def drawn(y: Tensor) -> Tensor:
        level = torch.tensor([[FELT_STD, *[0.0] * (len(NAMES) - 1)]])
        seen = estimated(parts.trunk, y, torch.ones_like(y), level)
        return seen.restored + seen.sigma * ladder(seen.features, noise_in(y, ladder.depth, ladder.multiple_of)).mean

    return felt_margin(drawn, parts.channels, run.multiple_of, UNFELT)


def weights_of(folder: Path, variant: VariantName) -> dict[str, dict[str, Tensor]]:
    """Read the weights of a version's variant back from its graphs: all that inference needs.

    Args:
        folder: Folder of the version.
        variant: The variant.

    Returns:
        Weights by stage, then by name. The posterior of the latents, which training alone needs, is not among them.

    Raises:
        ExportError: The folder holds no conditional model with this variant.
    """
    try:
        manifest = manifests.read(folder)
    except ManifestError as error:
        raise ExportError(str(error)) from error
    views = {view.channels: view for view in manifest.views()}
    graphs = views[CHANNELS[variant]].graphs if CHANNELS[variant] in views else {}
    if not {"restoration", "completion", "noise"} <= graphs.keys():
        raise ExportError(f"{folder} has no {variant} variant of a conditional model to begin with")
    found: dict[str, dict[str, Tensor]] = {}
    for name in ("restoration", "completion", "noise"):
        for key, weight in weights_in(folder / graphs[name].file).items():
            for beginning, stage in WHERE.items():
                if key.startswith(beginning):
                    own = key.removeprefix("ladder." if beginning == "ladder." else beginning)
                    found.setdefault(stage, {})[f"head.{own}" if beginning == "head." else own] = weight
    return {stage: trainable(weights) for stage, weights in found.items()}
