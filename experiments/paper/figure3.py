"""Figure 3: marginal likelihood against the training samples seen: AEVB, wake-sleep and Monte Carlo EM, MNIST.

100 hidden units, 3 latents, 1,000 training images (a seeded random choice) and 50,000; other settings are those of
`curves`. Grey levels have no probability under Bernoulli pixels. So every training image is binarised again in every
epoch. The scored images, 1,000 training and 1,000 test images chosen at random by a fixed seed, are binarised once (the
paper took the first 1,000).

All methods are scored by the same estimator, which uses no encoder: half of an image's draws by Hybrid Monte Carlo fit
a density, the other half estimate p(x). On 400 test images of a model trained by AEVB, its result was within 0.03 nats
(its standard error) of importance sampling with 300,000 draws of the prior. With the paper's 50 draws and 4 leapfrog
steps it was 0.12 nats too high. With chains that started at N(0, I) it was 9.1 nats too low, because many stay in a
small mode of the posterior.

Monte Carlo EM keeps a chain for each training image. A step on a minibatch is one transition of 10 leapfrog steps,
tuned to 90 % acceptance, then 5 updates of the weights; it counts its images once as samples seen. On one CPU thread it
takes about four times as long as AEVB's one update, so its curve ends at a quarter of the samples.
Source: Kingma and Welling (2013), section 5, figure 3 and appendices D and E.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from experiments.paper import curves
from training.canvas import panels
from training.config import Run
from training.data import ImageSet, Mnist, binarise
from training.inference.marginal import reciprocal_log_likelihood
from training.loop.em import EmStage, train_by_em
from training.loop.randomness import keyed_generator
from training.loop.stages import build_vae, vae_stage
from training.loop.trainer import train
from training.models.vae import VAE

OBJECTIVES = {"aevb": "elbo", "wake-sleep": "wake_sleep"}
METHODS = (*OBJECTIVES, "mcem")
SIZES = (1_000, 50_000)
EM_COST = 4
"""Training samples of the other methods, divided by those of Monte Carlo EM."""
LATENT_DIM = 3
POINTS_A_DECADE = 5
DATA = {"dataset": "mnist", "validation": 10_000}
FIELDS = (
    "train_images",
    "method",
    "samples",
    "train_log_likelihood",
    "test_log_likelihood",
    "images",
    "draws",
    "pixels",
)
PIXELS = "trained on fresh binarisations, scored on one"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Curve:
    """One curve of one panel."""

    size: int
    method: str

    @property
    def name(self) -> str:
        """Name of the curve, for `--only` and for its folder."""
        return f"{self.size}-{self.method}"


@dataclass(frozen=True)
class Scale:
    """Size of the experiment; the defaults are the figure's.

    Attributes:
        hidden: Hidden units.
        chosen_after: Samples after which the step size is chosen.
        images: Scored images of each split.
        candidates: Draws of the prior from which a chain's start is chosen.
        burn_in: Transitions of a chain before its draws count.
        draws: Draws of the estimator for each image. The paper has 50, with a larger bias above log p(x).
        leapfrog_steps: Leapfrog steps of a transition of the estimator.
    """

    hidden: int = 100
    chosen_after: int = curves.CHOSEN_AFTER
    images: int = 1_000
    candidates: int = 5_000
    burn_in: int = 20
    draws: int = 200
    leapfrog_steps: int = 2


PAPER = Scale()
CURVES = [Curve(size, method) for size in SIZES for method in METHODS]


def draw(data: Path, runs: Path, out: Path, samples: int, pattern: str) -> None:
    """Train the curves that are not trained yet, then write figure3.csv and figure3.png of all trained curves.

    Curves of an earlier figure3.csv that are not in `runs` stay in the CSV.

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
    wanted = curves.matching(CURVES, pattern)
    images = Mnist.model_validate(DATA).load(data)
    for curve in wanted:
        follow(curve, some(images, curve.size), runs / curve.name, samples)
    report(runs, out)


def some(images: ImageSet, size: int) -> ImageSet:
    """Keep `size` training images, chosen at random by a fixed seed."""
    return replace(images, train=choice(images.train, size))


def choice(images: Tensor, size: int) -> Tensor:
    """Choose at most `size` images at random by a fixed seed."""
    return images[torch.randperm(len(images), generator=keyed_generator(CPU, 0, 8))[:size]]


def follow(curve: Curve, images: ImageSet, folder: Path, samples: int, scale: Scale = PAPER) -> None:
    """Train a curve, or resume it, and score log p(x) during training.

    Args:
        curve: The curve.
        images: All images.
        folder: Folder for checkpoints and log.
        samples: Training samples.
        scale: Size of the experiment.
    """
    seen = max(curves.BATCH, samples // EM_COST) if curve.method == "mcem" else samples

    def trial(step_size: float, inside: Path) -> None:
        fit(curve, images, inside, step_size, [scale.chosen_after], scale)

    step_size = curves.best_step_size(trial, folder, "train_log_likelihood")
    fit(curve, images, folder, step_size, curves.grid(seen, POINTS_A_DECADE), scale)


def fit(curve: Curve, images: ImageSet, folder: Path, step_size: float, points: list[int], scale: Scale) -> None:
    """Train with one step size.

    Args:
        curve: The curve.
        images: Its training images, and all test images.
        folder: Folder for checkpoints and log.
        step_size: Adagrad's step size.
        points: Numbers of samples after which the model is scored; training ends with the last.
        scale: Size of the experiment.
    """
    run = run_of(curve, curves.epochs_of(images, points[-1]), step_size, scale)
    splits = {"train": images.train, "test": images.test}
    x = {name: binarised(choice(split, scale.images)) for name, split in splits.items()}

    def watch(vae: VAE) -> dict[str, float]:
        return {f"{name}_log_likelihood": log_likelihood(vae, x[name], scale) for name in x}

    by_em = curve.method == "mcem"
    last = points[-1] // curves.BATCH if by_em else run.train.epochs * (len(images.train) // curves.BATCH)
    steps = curves.watched_steps(points, last)
    if by_em:
        train_by_em(replace(em_stage(run, images, last), watch=watch, watched_steps=steps), images.train, folder)
    else:
        train(replace(vae_stage(run, images.shape, CPU), watch=watch, watched_steps=steps), images.train, folder)


def run_of(curve: Curve, epochs: int, step_size: float, scale: Scale) -> Run:
    """The curve's training settings. Monte Carlo EM uses only those of the networks and the step size."""
    return curves.paper_run(
        curve.name,
        {"latent_dim": LATENT_DIM},
        scale.hidden,
        {"epochs": epochs, "objective": OBJECTIVES.get(curve.method, "elbo"), "learning_rate": step_size},
        data=DATA,
    )


def em_stage(run: Run, images: ImageSet, steps: int) -> EmStage:
    """Make the stage that trains the same model, with the same initial weights, by Monte Carlo EM."""
    return EmStage(
        build_vae(run, images.shape),
        binarised=run.binary,
        steps=steps,
        batch_size=curves.BATCH,
        learning_rate=run.train.learning_rate,
        weight_decay=1.0 / len(images.train),
        seed=run.seed,
        identity={
            **run.model_dump(mode="json", include={"seed", "data", "model", "train"}),
            "binarise": run.binary,
            "steps": steps,
        },
    )


def binarised(images: Tensor) -> Tensor:
    """Binarise images with one Bernoulli draw of every pixel, from a fixed seed."""
    return binarise(images, keyed_generator(images.device, 0, 9))


def log_likelihood(vae: VAE, x: Tensor, scale: Scale) -> float:
    """Estimate the mean log p(x) in nats of binary images. Every call uses the same random numbers.

    Args:
        vae: The VAE.
        x: Binary images, (n, c, h, w).
        scale: Size of the experiment.
    """
    generator = keyed_generator(x.device, 0, 10)
    each = reciprocal_log_likelihood(
        vae,
        x,
        start(vae, x, scale.candidates, generator),
        generator,
        draws=scale.draws,
        leapfrog_steps=scale.leapfrog_steps,
        burn_in=scale.burn_in,
    )
    return round(float(each.mean()), 3)


@torch.no_grad()
def start(vae: VAE, x: Tensor, candidates: int, generator: torch.Generator) -> Tensor:
    """Draw approximately from p(z|x) for each image, without an encoder.

    Each image chooses one of the candidates, common draws of p(z), with a probability proportional to p(x|z). A chain
    that starts at an arbitrary draw of p(z) may stay in a small mode of the posterior.

    Args:
        vae: The VAE.
        x: Binary images, (n, c, h, w).
        candidates: Number of candidates.
        generator: Source of randomness.

    Returns:
        One latent for each image, (n, d).

    Source: Rubin (1988), sampling importance resampling.
    """
    z = vae.prior.draw(torch.randn(candidates, *vae.noise_shapes.prior, generator=generator))
    logits = vae.decode(z).flatten(1)
    # log p(x|z) of every pair by one matrix product.
    log_prob = x.flatten(1) @ logits.T - functional.softplus(logits).sum(1)
    chosen = torch.multinomial(torch.softmax(log_prob, 1), 1, generator=generator)
    return z[chosen[:, 0]]


def report(runs: Path, out: Path, scale: Scale = PAPER) -> None:
    """Write figure3.csv and figure3.png of all scored points.

    Args:
        runs: Folder with the checkpoints and logs of the curves.
        out: Folder for CSV and PNG.
        scale: Size of the experiment.
    """
    said = {"images": scale.images, "draws": scale.draws, "pixels": PIXELS}
    mine = [
        {"train_images": curve.size, "method": curve.method, **point, **said}
        for curve in CURVES
        for point in curves.scored(runs / curve.name, "log_likelihood")
    ]
    rows = curves.with_earlier(mine, out / "figure3.csv", ("train_images", "method"))
    rows.sort(key=lambda row: CURVES.index(Curve(row["train_images"], row["method"])))
    curves.write(rows, FIELDS, out / "figure3.csv")
    plot(rows, out / "figure3.png")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw a panel for each number of training images: AEVB red, wake-sleep green, Monte Carlo EM blue."""
    with panels(len(SIZES), path) as axes:
        for axis, size in zip(axes, SIZES, strict=True):
            curves.add_curves(axis, [row for row in rows if row["train_images"] == size], "log_likelihood")
            axis.set(title=f"{size:,} training images", ylabel="log p(x), nats", ylim=(-200, -100))
        drawn = [axis for axis in axes if axis.lines]
        if drawn:
            drawn[-1].legend(frameon=False, fontsize="small", loc="lower right")
