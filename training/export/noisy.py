"""The graphs of a model of noisy images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from service.contract.graphs import GRAPHS, Axis
from training.config import NoisyRun
from training.distributions.poisson_gaussian import FAMILIES, PoissonGaussian
from training.export.export import Exportable, Rows, packed_grids
from training.export.pair import MODULE_PARITY, shapes_told
from training.export.tiling import FELT_STD, felt_margin, noise_in
from training.loop.noisy_stages import NoisyParts
from training.models.noisy import CompleteNoisy, EstimateNoisy, RestoreNoisy

UNFELT = 1.0 / 65535.0
"""Difference that tiles may make: a level of 16 bits, because micrographs may fill a small part of the range."""
FIT_PARITY = 1e-3
"""As `MODULE_PARITY`, of the fitted noise: weights of blocks near the limit pass a rounding on, enlarged."""


@torch.no_grad()
def noisy_graphs(parts: NoisyParts, exact: NoisyParts, y: Tensor) -> dict[str, Exportable]:
    """The graphs by name, with golden rows.

    Args:
        parts: The networks, on the CPU.
        exact: Those before their weights were rounded, or the same.
        y: Golden noisy images (n, 1, h, w).
    """
    mask = torch.ones_like(y)
    mask[-1, :, : y.shape[2] // 4] = 0.0
    level = torch.tensor([[0.2, 0.05], [0.0, 0.1], [0.1, 0.02], [0.15, 0.1]])[: len(y)]
    made, before = _modules(parts), _modules(exact)
    restored, _, features = made["restoration"](y, mask, level)
    depth = parts.vae.vae.latent_shape[0]
    step = _coarsest(parts)
    eps = torch.randn(
        len(y), depth, *(side // step for side in y.shape[2:]), generator=torch.Generator().manual_seed(0)
    )
    rows: dict[str, Rows] = {
        "restoration": (y, mask, level),
        "completion": (y, mask, level, restored, features, eps),
        "noise_level": (y, mask),
        "noise": (y, mask),
    }
    shape: dict[str, list[Axis]] = {"features": [parts.trunk.trunk.width, "height/2", "width/2"]}
    return {
        name: Exportable(
            module,
            rows[name],
            GRAPHS[name],
            parity=MODULE_PARITY if name in ("restoration", "completion") else FIT_PARITY,
            exact=None if parts == exact or not list(module.parameters()) else before[name],
            chosen=shape,
        )
        for name, module in made.items()
    }


def _modules(parts: NoisyParts) -> dict[str, nn.Module]:
    return {
        "restoration": RestoreNoisy(parts.trunk, parts.vae),
        "completion": CompleteNoisy(parts.vae),
        "noise_level": EstimateNoisy(alone=True),
        "noise": EstimateNoisy(alone=False),
    }


def _coarsest(parts: NoisyParts) -> int:
    """Side in pixels of a place of the latents' grid."""
    return int(2 ** len(parts.vae.vae.decoder.levels))


def noisy_about(run: NoisyRun, parts: NoisyParts, y: Tensor) -> dict[str, Any]:
    """Keys of the manifest that tell shapes, groups and tiles, for golden images (n, 1, h, w)."""
    step = _coarsest(parts)
    latents = (len(y), parts.vae.vae.latent_shape[0], *(side // step for side in y.shape[2:]))
    told = shapes_told(y.shape, latents, run.multiple_of)
    down = parts.vae.vae.decoder
    groups = ((channels, block) for (channels, *_), block in zip(down.group_shapes, down.blocks, strict=True))
    return {
        **told,
        "groups": packed_grids(groups, step),
        "tiles": {"margin": _margin(run, parts), "exact": True},
        "noise_families": list(FAMILIES),
    }


def _margin(run: NoisyRun, parts: NoisyParts) -> int:
    """From how far away pixels and noise change the mean and a draw, at a known noise level: the margin of tiles."""
    model = parts.vae
    # Var[y|s] is FELT_STD^2 at 0.5; the mean has a network of its own where the noise has a Poisson part.
    noise = PoissonGaussian(*(torch.full((1, 1, 1, 1), value) for value in (FELT_STD**2, 0.5 * FELT_STD**2)))

    def drawn(y: Tensor) -> Tensor:
        seen = parts.trunk.seen(y, torch.ones_like(y), noise)
        eps = noise_in(y, model.vae.latent_shape[0], _coarsest(parts))[None]
        encoded = model.encoded(noise.stabilised(y), seen.features)
        found = model.vae.infer(model.vae.posterior(encoded), eps).parameters[0]
        mean, _ = model.restored(y, torch.ones_like(y), noise, seen)
        return mean + noise.unbiased(model.likelihood.mean(found))

    return felt_margin(drawn, 1, run.multiple_of, UNFELT)
