"""Pictures of a run while it trains: the curves of its log, and what its model makes of held-out images."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from training.canvas import panels, png, sheet
from training.data import as_float
from training.files import write_whole
from training.loop.randomness import keyed_generator
from training.models.restoration import Recognition, simulate
from training.models.vae import VAE

CURVES, SHEET = PICTURES = ("curves.png", "sheet.png")
"""Files in the run's folder."""
FIRST_S, PICTURES_S = 10.0, 120.0
"""Until the first pictures of a stage, and between two renewals."""
PAUSE = 100.0
"""Least time between two renewals, in multiples of the time that one takes: drawing takes at most 1 % of a run."""
SHOWN = 8
"""Held-out images on the sheet."""
SAMPLES = 16
SAMPLE_SEED = 15
"""Part of the key of the samples' noise."""
SIMULATED_SEED = 16
"""Part of the key of the corruptions."""
NO_CURVES = frozenset({"stage", "step", "epoch", "seconds", "skipped"})
"""Keys of the log's lines that are not drawn."""
IN_NATS = frozenset({"elbo", "log_likelihood", "kl"})
HELD_OUT = "held_out_"
"""Prefix of the figures of held-out images, which share the axes of those of training images."""
BEGINNING = 0.1
"""Share of a curve, its steepest part, that may lie outside the axes."""
Figures = dict[str, dict[str, dict[int, float]]]
"""Values by step, of training and of held-out images, by figure."""


class Pictures:
    """`curves.png` and `sheet.png` in a run's folder.

    Args:
        folder: The folder, with `log.jsonl`.
        show: What a module makes of float images: blocks of images by caption.
        held_out: uint8 (n, c, h, w); the first `SHOWN` are on the sheet.
    """

    def __init__(self, folder: Path, show: Callable[[Any, Tensor], dict[str, Tensor]], held_out: Tensor) -> None:
        self.folder, self.show, self.images = folder, show, held_out[:SHOWN]
        self.next = time.monotonic() + FIRST_S

    def due(self) -> bool:
        """Whether it is time to renew them."""
        return time.monotonic() >= self.next

    @torch.no_grad()
    def draw(self, module: nn.Module) -> Image.Image:
        """Renew both pictures.

        Args:
            module: The stage's module.

        Returns:
            The sheet.

        Raises:
            DiskError: A picture cannot be written.
        """
        started = time.monotonic()
        blocks = self.show(module, as_float(self.images))
        found = sheet({name: images.float().cpu().numpy() for name, images in blocks.items()}, SHOWN)
        write_whole(self.folder / SHEET, png(found))
        draw_curves(self.folder / "log.jsonl", self.folder / CURVES)
        now = time.monotonic()
        self.next = now + max(PICTURES_S, PAUSE * (now - started))
        return found


def vae_blocks(vae: VAE, x: Tensor, seed: int) -> dict[str, Tensor]:
    """Held-out images, their reconstructions, and samples of the prior where the model has one.

    Args:
        vae: The model.
        x: (n, c, h, w).
        seed: Seed of the samples.

    Returns:
        Images (k, c, h, w) by caption.
    """
    blocks = {"held-out images": x, "reconstructions": vae.reconstruct(x)}
    if getattr(vae, "prior", None) is None:
        return blocks
    shape = vae.noise_shapes.prior
    eps = torch.randn(SAMPLES, *shape, generator=keyed_generator(x.device, seed, SAMPLE_SEED), device=x.device)
    return {**blocks, "samples": vae.sample(eps)}


def restoration_blocks(recognition: Recognition, vae: VAE, x: Tensor, seed: int) -> dict[str, Tensor]:
    """The blocks of the VAE, and the images after a random corruption each, with what is restored from them.

    Args:
        recognition: The recognition model of corrupted images.
        vae: The model.
        x: (n, c, h, w).
        seed: Seed of samples and corruptions.

    Returns:
        Images (k, c, h, w) by caption.
    """
    seen = simulate(x, keyed_generator(x.device, seed, SIMULATED_SEED))
    restored, _ = recognition.restored(vae, seen)
    return {**vae_blocks(vae, x, seed), "corrupted": seen.y, "restored": restored}


def draw_curves(log: Path, path: Path) -> None:
    """Draw the figures of a log over the steps, each stage in its row of axes.

    Args:
        log: The log; a step that it has twice, of a run that was resumed, counts as the last time.
        path: File of the PNG.

    Raises:
        DiskError: It cannot be written.
    """
    stages: dict[str, Figures] = {}
    for line in map(json.loads, log.read_text().splitlines()):
        for name, value in line.items():
            if name not in NO_CURVES:
                curves = stages.setdefault(line["stage"], {}).setdefault(name.removeprefix(HELD_OUT), {})
                curves.setdefault(name, {})[line["step"]] = value
    wide = max(map(len, stages.values()), default=1)
    with panels(wide * len(stages), path, wide) as axes:
        for row, (stage, figures) in enumerate(stages.items()):
            for column, axis in enumerate(axes[row * wide : (row + 1) * wide]):
                axis.set_visible(column < len(figures))
            for axis, (name, curves) in zip(axes[row * wide :], figures.items(), strict=False):
                axis.set_title(f"{stage}: {name.replace('_', ' ')}", fontsize="medium")
                axis.set_ylabel("nats" if name in IN_NATS else "")
                _plot(axis, curves)


def _plot(axis: Any, curves: dict[str, dict[int, float]]) -> None:
    """Draw one figure of training and held-out images; the axes fit what follows the curves' beginning."""
    settled: list[float] = []
    for name, points in curves.items():
        steps, values = zip(*sorted(points.items()), strict=True)
        held_out = name.startswith(HELD_OUT)
        marker = "o" if len(steps) == 1 else None  # a line of one point is invisible
        label, colour = ("held out", "C0") if held_out else ("training", "C1")
        axis.plot(steps, values, colour, linewidth=1.0, marker=marker, markersize=4.0, label=label, zorder=2 + held_out)
        settled += filter(math.isfinite, values[int(BEGINNING * len(values)) :])
    low, high = min(settled, default=0.0), max(settled, default=0.0)
    if high > low:
        axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axis.set_xlabel("step")
    if len(curves) > 1:
        axis.legend(frameon=False, fontsize="small")
