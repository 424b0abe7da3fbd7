"""Figures 4 and 5: decoded grids of two latents, and samples of models with 2 to 20 latents.

The models are those of figure 2, trained in the same way.
Source: Kingma and Welling (2013), figures 4 and 5.
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import Tensor

from experiments.paper.figure2 import Curve, bound, follow, load
from service.contract.images import to_image
from training.errors import ConfigError
from training.loop.randomness import keyed_generator
from training.loop.stages import trained_vae
from training.models.vae import VAE

MAP = {"mnist": 20, "frey": 10}
DREAMS = 10
CPU = torch.device("cpu")


def draw_maps(data: Path, runs: Path, out: Path, samples: int, pattern: str) -> None:
    """Draw figure4.png: E[x|z] over a grid of equal probability of two latents, Frey Face left, MNIST right.

    Args:
        data: Folder of the data sets.
        runs: Folder for checkpoints.
        out: Folder for PNG and CSV.
        samples: Training samples of a model.
        pattern: Must be `*`, because the figure needs all models.

    Raises:
        ConfigError: `pattern` is another one.
    """
    _refuse(pattern)
    sheets, rows = [], []
    for curve in (Curve("frey", 2, "aevb"), Curve("mnist", 2, "aevb")):
        vae, row = trained(curve, data, runs, samples)
        sheets.append(sheet(vae, grid(MAP[curve.data]), MAP[curve.data]))
        rows.append(row)
    write(sheets, out, "figure4", rows)


def draw_dreams(data: Path, runs: Path, out: Path, samples: int, pattern: str) -> None:
    """Draw figure5.png: E[x|z] of 10 x 10 draws z ~ p(z), for 2, 5, 10 and 20 latents, left to right.

    Args:
        data: Folder of the data sets.
        runs: Folder for checkpoints.
        out: Folder for PNG and CSV.
        samples: Training samples of a model.
        pattern: Must be `*`, because the figure needs all models.

    Raises:
        ConfigError: `pattern` is another one.
    """
    _refuse(pattern)
    sheets, rows = [], []
    for latent_dim in (2, 5, 10, 20):
        vae, row = trained(Curve("mnist", latent_dim, "aevb"), data, runs, samples)
        eps = torch.randn(DREAMS**2, *vae.noise_shapes.prior, generator=keyed_generator(CPU, 0, 7))
        sheets.append(sheet(vae, vae.prior.draw(eps), DREAMS))
        rows.append(row)
    write(sheets, out, "figure5", rows)


def trained(curve: Curve, data: Path, runs: Path, samples: int) -> tuple[VAE, dict[str, object]]:
    """Train the model of a curve of figure 2, if it is not trained yet.

    Args:
        curve: The curve.
        data: Folder of the data sets.
        runs: Folder for checkpoints.
        samples: Training samples.

    Returns:
        The model, and a row of the CSV with its bound on the test images in nats.
    """
    folder, images = runs.parent / "figure2" / curve.name, load(curve, data)
    run = follow(curve, images, folder, samples)
    vae = trained_vae(run, images.shape, folder, CPU)
    row = {"data": curve.data, "latent_dim": curve.latent_dim, "samples": samples}
    return vae, {**row, "test_elbo": bound(vae, images.test.to(CPU))}


def grid(size: int) -> Tensor:
    """Two latents at the medians of size x size cells of equal probability, (size^2, 2), row by row from the top."""
    axis = torch.special.ndtri((torch.arange(size) + 0.5) / size)
    return torch.cartesian_prod(axis.flip(0), axis).flip(1)


@torch.inference_mode()
def sheet(vae: VAE, z: Tensor, columns: int) -> Tensor:
    """Decode z (n, d) to mean images in one sheet, (1, 1, rows * h, columns * w)."""
    x = vae.x_mean(z)[:, 0]
    tiles = x.unflatten(0, (-1, columns))
    return tiles.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[None, None]


def write(sheets: list[Tensor], out: Path, name: str, rows: list[dict[str, object]]) -> None:
    """Write sheets side by side as `name`.png, and rows as `name`.csv, into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    height = max(one.shape[2] for one in sheets)
    framed = [torch.nn.functional.pad(one, (0, 12, 0, height - one.shape[2]), value=1.0) for one in sheets]
    to_image(torch.cat(framed, 3)[..., :-12].numpy()).save(out / f"{name}.png")
    with (out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _refuse(pattern: str) -> None:
    if pattern != "*":
        raise ConfigError("this figure needs all of its models; leave --only out")
