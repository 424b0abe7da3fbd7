"""Appendix F: full variational Bayes over the decoder's parameters, compared with MAP and maximum likelihood.

The paper has no experiment for this appendix. Settings: 1,000 training images of MNIST, binarised again in every epoch;
networks of 100 tanh units; minibatches of 100; one draw of theta and of each z; Adam. The methods differ only in the
posterior of the decoder's parameters theta. Full VB: N(mean, diag(std^2)) with the prior N(0, I). MAP: a point with
that prior. Maximum likelihood: a point without a prior.
Source: Kingma and Welling (2013), appendix F.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.paper import curves
from training.canvas import panels
from training.config import Run
from training.data import ImageSet, binarise
from training.errors import CheckpointError
from training.loop.checkpoint import read_trained
from training.loop.randomness import keyed_generator
from training.loop.stages import build_vae
from training.loop.trainer import Stage, train
from training.models.vae import VAE, Bound
from training.objectives.elbo import Objective, importance_log_likelihood
from training.objectives.full_vb import FullVb, evidence_bound, full_vb_objective, map_bound

LEARNING_RATES = {"ml": 3e-3, "map": 3e-3, "full-vb": 2e-2}
"""Peak learning rates. That of full VB, with INITIAL_STD, had the highest bound on the evidence of six short runs."""
INITIAL_STD = 0.3
"""Initial std of theta; large, because the posterior of most of theta ends near its prior."""
LATENT_DIMS = (5, 10)
SIZE = 1000
HIDDEN = 100
SCORED = 1000
"""Number of test images, a fixed and seeded choice, binarised once."""
DRAWS = 200
"""Draws of (theta, z) for each image; of z alone where theta is a point."""
THETAS = 40
"""Draws of theta for the predictive average and for the bound on the evidence."""
DECODES = 2000
POINTS_A_DECADE = 4
STATISTICS = ("train_elbo", "test_elbo", "test_elbo_se", "test_log_likelihood", "test_log_likelihood_se")
OVER_MAP = ("over_map", "over_map_se")
"""Test log p(x) minus that of MAP, at the end of training. Pairing by image lowers its standard error."""
EVIDENCE = ("evidence_bound", "evidence_bound_se")
"""Bound on the evidence of all training images, binarised once, in nats, and its standard error over draws of theta."""
FIELDS = ("latent_dim", "estimate", "samples", *STATISTICS, *OVER_MAP, *EVIDENCE)
ESTIMATES = {"ml": "tab:gray", "map": "tab:blue", "full-vb-mean": "tab:orange", "full-vb-draws": "tab:red"}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Curve:
    """One training run."""

    latent_dim: int
    method: str

    @property
    def name(self) -> str:
        """Name of the curve, for `--only` and for its folder."""
        return f"mnist-{self.latent_dim}-{self.method}"


CURVES = [Curve(latent_dim, method) for latent_dim in LATENT_DIMS for method in LEARNING_RATES]


@dataclass(frozen=True)
class Images:
    """The images of the experiment, (n, c, h, w) each.

    Attributes:
        seen: Training images, uint8.
        train: The training images, binarised once for scoring.
        test: Test images, binarised once.
    """

    seen: Tensor
    train: Tensor
    test: Tensor

    @classmethod
    def of(cls, images: ImageSet) -> Images:
        """Choose and binarise images by fixed seeds, the same for every curve."""
        seen, test = _subset(images.train, SIZE, 0), _subset(images.test, SCORED, 1)
        return cls(seen, binarise(seen, keyed_generator(CPU, 0, 8)), binarise(test, keyed_generator(CPU, 0, 9)))


def _subset(images: Tensor, size: int, seed: int) -> Tensor:
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:size]]


def draw(data: Path, runs: Path, out: Path, samples: int, pattern: str) -> None:
    """Train the curves that are not trained yet, then write appendix_f.csv and appendix_f.png of all trained curves.

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
    chosen = curves.matching(CURVES, pattern)
    repeat(chosen, Images.of(run_of(chosen[0], 1).data.load(data)), runs, out, samples)


def repeat(chosen: list[Curve], images: Images, runs: Path, out: Path, samples: int) -> None:
    """Train and score the chosen curves, and write CSV and PNG.

    Args:
        chosen: The curves to train.
        images: The images.
        runs: Folder for checkpoints.
        out: Folder for CSV and PNG.
        samples: Training samples of a curve.
    """
    for curve in chosen:
        train(stage_of(curve, images, samples), images.seen, runs / curve.name)
    rows = [row for curve in CURVES for row in points(curve, runs / curve.name)]
    for latent_dim in LATENT_DIMS:
        compare(rows, latent_dim, images, runs, samples)
    curves.write(rows, FIELDS, out / "appendix_f.csv")
    plot(rows, len(images.seen), out / "appendix_f.png")


def run_of(curve: Curve, epochs: int) -> Run:
    """The curve's training settings. The last weights are scored, not an average."""
    return Run.model_validate(
        {
            "name": curve.name,
            "data": {"dataset": "mnist", "validation": 10_000},
            "model": {
                "latent_dim": curve.latent_dim,
                "network": {"architecture": "mlp", "hidden": [HIDDEN], "activation": "tanh"},
            },
            "train": {
                "epochs": epochs,
                "batch_size": curves.BATCH,
                "learning_rate": LEARNING_RATES[curve.method],
                "ema_decay": 0.0,
            },
        }
    )


def stage_of(curve: Curve, images: Images, samples: int) -> Stage:
    """Make the stage that trains a curve for about `samples` samples and scores it during training."""
    size = len(images.seen)
    run = run_of(curve, max(1, round(samples / size)))
    identity = {**run.model_dump(mode="json"), "initial_std": INITIAL_STD, "size": size}
    vae = build_vae(run, (1, *images.seen.shape[-2:]))
    if curve.method == "full-vb":
        objective = full_vb_objective(size)
        stage = Stage("full-vb", FullVb(vae, INITIAL_STD), objective, run.train, run.seed, identity)
    else:
        stage = Stage(curve.method, vae, point_objective(curve, size), run.train, run.seed, identity)
    last = run.train.epochs * max(1, size // curves.BATCH)
    steps = curves.watched_steps(curves.grid(samples, POINTS_A_DECADE), last) | {last}
    return replace(stage, watch=lambda module: statistics(module, curve.method, images), watched_steps=steps)


def point_objective(curve: Curve, size: int) -> Objective:
    """Make the objective with theta a point: the bound, for MAP with the prior of theta."""

    def objective(vae: VAE, batch: Tensor, generator: torch.Generator) -> Bound:
        x = binarise(batch, generator)
        eps = vae.noise(1, len(x), generator)
        return map_bound(vae, x, eps, size) if curve.method == "map" else vae.bound(x, eps)

    return objective


def estimates(module: nn.Module, method: str) -> dict[str, list[VAE]]:
    """Make the scored estimates of a trained module, the same at every call.

    Args:
        module: The trained module.
        method: `ml`, `map` or `full-vb`.

    Returns:
        By name of the estimate, the models whose p(x) is averaged.
    """
    if isinstance(module, FullVb):
        generator = keyed_generator(CPU, 0, 10)
        return {f"{method}-mean": [module.vae], f"{method}-draws": [module.draw(generator) for _ in range(THETAS)]}
    assert isinstance(module, VAE)
    return {method: [module]}


@torch.no_grad()
def score(models: list[VAE], x: Tensor) -> Tensor:
    """Estimate the mean bound over models, and the log of their mean p(x) by importance sampling.

    The DRAWS latents of an image are divided among the models. In expectation the second estimate is too low, as it is
    for one model.

    Args:
        models: The models.
        x: Binary images, (n, c, h, w).

    Returns:
        Both estimates in nats, (2, n).
    """
    generator, each = keyed_generator(CPU, 0, 11), DRAWS // len(models)
    columns = []
    for part in x.split(DECODES // each):
        pairs = [(model, model.noise(each, len(part), generator)) for model in models]
        bounds = torch.stack([model.bound(part, eps[:1]).elbo for model, eps in pairs])
        weights = torch.stack([importance_log_likelihood(model, part, eps) for model, eps in pairs])
        columns.append(torch.stack([bounds.mean(0), torch.logsumexp(weights, 0) - math.log(len(models))]))
    return torch.cat(columns, 1).double()


@torch.no_grad()
def statistics(module: nn.Module, method: str, images: Images) -> dict[str, float]:
    """Compute STATISTICS of each estimate, as `estimate/statistic`, and EVIDENCE for full VB."""
    found: dict[str, float] = {}
    for name, models in estimates(module, method).items():
        test, test_se = _mean(score(models, images.test))
        generator = keyed_generator(CPU, 0, 12)
        train_elbo = torch.stack([_bound(model, images.train, generator) for model in models]).mean()
        values = (float(train_elbo), test[0], test_se[0], test[1], test_se[1])
        found |= {f"{name}/{key}": round(value, 3) for key, value in zip(STATISTICS, values, strict=True)}
    if isinstance(module, FullVb):
        evidence = evidence_bound(module, images.train, THETAS, keyed_generator(CPU, 0, 13))
        found |= {f"{method}-draws/{key}": round(value, 1) for key, value in zip(EVIDENCE, evidence, strict=True)}
    return found


def _bound(vae: VAE, x: Tensor, generator: torch.Generator) -> Tensor:
    return vae.bound(x, vae.noise(1, len(x), generator)).elbo.mean()


def _mean(columns: Tensor) -> tuple[list[float], list[float]]:
    """Means over images and their standard errors, k of each, from (k, n)."""
    errors = columns.std(-1) / math.sqrt(columns.shape[-1])
    return columns.mean(-1).tolist(), errors.tolist()


def points(curve: Curve, folder: Path) -> list[dict[str, Any]]:
    """Read the scored points of a curve. If a point was scored twice, the later score counts."""
    scored = {line["step"]: line for line in curves.read_log(folder) if any("/" in key for key in line)}
    names = [name for name in ESTIMATES if name.startswith(curve.method)]
    return [
        {
            "latent_dim": curve.latent_dim,
            "estimate": name,
            "samples": step * curves.BATCH,
            **{key.partition("/")[2]: value for key, value in line.items() if key.startswith(f"{name}/")},
        }
        for name in names
        for step, line in sorted(scored.items())
    ]


def compare(rows: list[dict[str, Any]], latent_dim: int, images: Images, runs: Path, samples: int) -> None:
    """Add OVER_MAP to the last row of each estimate, for curves trained for `samples` samples.

    Args:
        rows: All rows; changed in place.
        latent_dim: Only rows with this number of latents are changed.
        images: The images.
        runs: Folder of the checkpoints.
        samples: Training samples.
    """
    scores: dict[str, Tensor] = {}
    for curve in (curve for curve in CURVES if curve.latent_dim == latent_dim):
        stage, folder = stage_of(curve, images, samples), runs / curve.name
        try:
            module = read_trained(folder / f"{stage.name}.pt", stage.identity, stage.module)
        except CheckpointError:
            continue
        scores |= {name: score(models, images.test)[1] for name, models in estimates(module, curve.method).items()}
    for name in scores.keys() - {"map"} if "map" in scores else ():
        last = [row for row in rows if (row["latent_dim"], row["estimate"]) == (latent_dim, name)][-1]
        (difference,), (error,) = _mean((scores[name] - scores["map"])[None])
        last |= dict(zip(OVER_MAP, (round(difference, 3), round(error, 3)), strict=True))


def plot(rows: list[dict[str, Any]], size: int, path: Path) -> None:
    """Draw two panels for each latent dimension: test log p(x), and the bounds, training images dashed."""
    wanted = list(dict.fromkeys(row["latent_dim"] for row in rows))
    with panels(2 * len(wanted), path) as axes:
        for left, right, latent_dim in zip(axes[::2], axes[1::2], wanted, strict=False):
            for name, colour in ESTIMATES.items():
                mine = [row for row in rows if (row["latent_dim"], row["estimate"]) == (latent_dim, name)]
                _lines(left, right, mine, name, colour, size)
            left.set(title=f"{latent_dim} latents", ylabel="test log p(x), nats")
            right.set(title=f"{latent_dim} latents", ylabel="bound an image, nats")
            for axis in (left, right):
                axis.set(xscale="log", xlabel="training samples seen", ylim=(-220, -95))
            left.set_ylim(-180, -125)
        axes[0].legend(frameon=False, fontsize="small")
        axes[1].legend(frameon=False, fontsize="small")


def _lines(left: Any, right: Any, rows: list[dict[str, Any]], name: str, colour: str, size: int) -> None:
    samples = [row["samples"] for row in rows]
    values = [row["test_log_likelihood"] for row in rows]
    width = 4 if name == "ml" else 1.5  # it lies under MAP
    errors = [row["test_log_likelihood_se"] for row in rows]
    left.errorbar(samples, values, errors, color=colour, label=name, linewidth=width)
    for split, style in (("test", "-"), ("train", "--")):
        label = split if name == "map" else None
        bounds = [row[f"{split}_elbo"] for row in rows]
        right.plot(samples, bounds, style, color=colour, label=label, linewidth=width)
    evidence = [row for row in rows if "evidence_bound" in row]
    if evidence:
        each = [row["evidence_bound"] / size for row in evidence]
        right.plot([row["samples"] for row in evidence], each, ":", color=colour, label="evidence / images")
