"""Figure 2: the lower bound against the training samples seen, AEVB beside wake-sleep on the same networks.

Raw grey levels, 500 hidden units for MNIST, 200 for Frey Face, whose Gaussian pixels are mixed with outliers as in the
author's code: without outliers the networks overfit long before the figure's values. Other settings are in `curves`.
Source: Kingma and Welling (2013), section 5 and figure 2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.paper import curves
from training.canvas import panels
from training.config import Run
from training.data import ImageSet, as_float
from training.loop.randomness import keyed_generator
from training.loop.stages import vae_stage
from training.loop.trainer import train
from training.models.vae import VAE
from training.pipeline import device

METHODS = {"aevb": "elbo", "wake-sleep": "wake_sleep"}
SCORED = 10_000
"""Maximum images behind a point of a curve; those of the training set are a fixed, seeded choice."""
DATA: dict[str, dict[str, Any]] = {
    "mnist": {"dataset": "mnist", "validation": 10_000},
    "frey": {"dataset": "frey", "split": "author"},
}
HIDDEN = {"mnist": 500, "frey": 200}
LIKELIHOODS: dict[str, dict[str, Any]] = {
    "mnist": {"likelihood": "bernoulli"},
    "frey": {"likelihood": "gaussian", "outliers": True},
}
FIELDS = ("data", "latent_dim", "method", "samples", "train_elbo", "test_elbo")


@dataclass(frozen=True)
class Curve:
    """One curve of one panel."""

    data: str
    latent_dim: int
    method: str

    @property
    def name(self) -> str:
        """Name of the curve, for `--only` and for its folder."""
        return f"{self.data}-{self.latent_dim}-{self.method}"

    @property
    def woken(self) -> bool:
        """Whether the curve needs other initial weights than the paper's.

        With small initial weights and Adagrad's large first steps, wake-sleep's latents on Frey Face carry no
        information (a KL of 0.05 nats). Those curves start as in the author's code (dpkingma/anglepy): weights scaled
        by fan-in, and a warm-up. Their step size is chosen later, because a collapsed model has the higher bound at
        first.
        """
        return (self.data, self.method) == ("frey", "wake-sleep")


CURVES = [
    Curve(data, latent_dim, method)
    for data, sizes in (("mnist", (3, 5, 10, 20, 200)), ("frey", (2, 5, 10, 20)))
    for latent_dim in sizes
    for method in METHODS
]


def draw(data: Path, runs: Path, out: Path, samples: int, pattern: str) -> None:
    """Train the curves that are not trained yet, then write figure2.csv and figure2.png of all trained curves.

    Curves of an earlier figure2.csv that are not in `runs` stay in the CSV.

    Args:
        data: Folder of the data sets.
        runs: Folder for checkpoints.
        out: Folder for CSV and PNG.
        samples: Training samples of a curve.
        pattern: Pattern of the names of the curves to train.

    Raises:
        ConfigError: No curve has such a name.
        TrainingError: Training fails.
    """
    for curve in curves.matching(CURVES, pattern):
        follow(curve, load(curve, data), runs / curve.name, samples)
    mine = [row for curve in CURVES for row in points(curve, runs / curve.name)]
    rows = curves.with_earlier(mine, out / "figure2.csv", ("data", "latent_dim", "method"))
    rows.sort(key=lambda row: CURVES.index(Curve(row["data"], row["latent_dim"], row["method"])))
    curves.write(rows, FIELDS, out / "figure2.csv")
    plot(rows, out / "figure2.png")


def load(curve: Curve, data: Path) -> ImageSet:
    """Load the curve's images onto the device that trains it: a GPU if there is one, else the CPU."""
    return run_of(curve, 1, curves.STEP_SIZES[0]).data.load(data).to(device("auto"))


def run_of(curve: Curve, epochs: int, step_size: float) -> Run:
    """The curve's training settings."""
    model: dict[str, Any] = {"latent_dim": curve.latent_dim, "likelihood": LIKELIHOODS[curve.data]}
    train: dict[str, Any] = {"epochs": epochs, "objective": METHODS[curve.method], "learning_rate": step_size}
    if curve.woken:
        model["initial_std"], train["warmup_steps"] = None, 100
    return curves.paper_run(
        curve.name,
        model,
        HIDDEN[curve.data],
        train,
        data=DATA[curve.data],
        binarise=False,
    )


def follow(curve: Curve, images: ImageSet, folder: Path, samples: int) -> Run:
    """Train a curve, or resume it, and score the bound during training.

    Args:
        curve: The curve.
        images: Its images.
        folder: Folder for checkpoints and log.
        samples: Training samples.

    Returns:
        The settings of the run.
    """
    step_size = choose(curve, images, folder, samples)
    run = run_of(curve, curves.epochs_of(images, samples), step_size)
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(0))[:SCORED]
    scored = {"train_elbo": images.train[order], "test_elbo": images.test[:SCORED]}
    stage = vae_stage(run, images.shape, images.train.device)
    last = run.train.epochs * (len(images.train) // curves.BATCH)
    steps = curves.watched_steps(curves.grid(samples), last)
    watched = replace(
        stage, watch=lambda vae: {name: bound(vae, split) for name, split in scored.items()}, watched_steps=steps
    )
    train(watched, images.train, folder)
    return run


def choose(curve: Curve, images: ImageSet, folder: Path, samples: int) -> float:
    """Choose the step size with the highest bound after the first samples, at most `samples`."""

    def trial(step_size: float, inside: Path) -> None:
        after = 5 * curves.CHOSEN_AFTER if curve.woken else curves.CHOSEN_AFTER
        short = run_of(curve, curves.epochs_of(images, min(after, samples)), step_size)
        train(vae_stage(short, images.shape, images.train.device), images.train, inside)

    return curves.best_step_size(trial, folder, "elbo")


@torch.inference_mode()
def bound(vae: VAE, images: Tensor) -> float:
    """Mean bound in nats of grey images (uint8), with one draw an image. Every call uses the same noise."""
    generator = keyed_generator(images.device, 0, 6)
    total = 0.0
    for part in images.split(1000):
        x = as_float(part)
        total += float(vae.bound(x, vae.noise(1, len(x), generator)).elbo.sum())
    return round(total / len(images), 3)


def points(curve: Curve, folder: Path) -> list[dict[str, Any]]:
    """The scored points of a curve."""
    own = {"data": curve.data, "latent_dim": curve.latent_dim, "method": curve.method}
    return [{**own, **point} for point in curves.scored(folder, "elbo")]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw a panel for each data set and latent dimension, as in the paper: AEVB red, wake-sleep green."""
    wanted = list(dict.fromkeys((row["data"], row["latent_dim"]) for row in rows))
    with panels(len(wanted), path) as axes:
        for axis, (data, latent_dim) in zip(axes, wanted, strict=False):
            mine = [row for row in rows if (row["data"], row["latent_dim"]) == (data, latent_dim)]
            curves.add_curves(axis, mine, "elbo")
            axis.set(title=f"{data}, {latent_dim} latents", ylabel="bound, nats")
            axis.set_ylim(*((-165, -95) if data == "mnist" else (0, 1500)))
        axes[0].legend(frameon=False, fontsize="small")
