"""Appendix F: full variational Bayes over the decoder's parameters, beside MAP and maximum likelihood, on few images.

The source has no experiment; this is ours. 1,000 training images of MNIST, binarised afresh whenever seen, networks of
100 tanh units, minibatches of 100, one draw of theta and of each z, Adam. The methods differ only in the posterior of
the decoder's parameters theta: N(mean, diag(std^2)) with the prior N(0, I), a point with that prior, a point.
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
"""Peak learning rates. Full VB's, with INITIAL_STD, had the highest bound on the evidence of six short runs."""
INITIAL_STD = 0.3
"""Large, because most of theta ends near its prior."""
LATENT_DIMS = (5, 10)
SIZE = 1000
HIDDEN = 100
SCORED = 1000
"""Test images, a fixed and seeded choice, binarised once."""
DRAWS = 200
"""(theta, z) an image; at a point theta, as many z."""
THETAS = 40
"""Draws of theta for the predictive average and for the bound on the evidence."""
DECODES = 2000
POINTS_A_DECADE = 4
STATISTICS = ("train_elbo", "test_elbo", "test_elbo_se", "test_log_likelihood", "test_log_likelihood_se")
OVER_MAP = ("over_map", "over_map_se")
"""Test log p(x) less that of MAP, at the end of training: paired by image, so its standard error is smaller."""
EVIDENCE = ("evidence_bound", "evidence_bound_se")
"""Nats of all training images together, their pixels binarised once; per draw of theta."""
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
        """Name for `--only`."""
        return f"mnist-{self.latent_dim}-{self.method}"


CURVES = [Curve(latent_dim, method) for latent_dim in LATENT_DIMS for method in LEARNING_RATES]


@dataclass(frozen=True)
class Images:
    """Training images, uint8, and scored images, binary: each (n, c, h, w)."""

    seen: Tensor
    train: Tensor
    test: Tensor

    @classmethod
    def of(cls, images: ImageSet) -> Images:
        """Choose and binarise the images, the same for every curve."""
        seen, test = _subset(images.train, SIZE, 0), _subset(images.test, SCORED, 1)
        return cls(seen, binarise(seen, keyed_generator(CPU, 0, 8)), binarise(test, keyed_generator(CPU, 0, 9)))


def _subset(images: Tensor, size: int, seed: int) -> Tensor:
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:size]]


def draw(data: Path, runs: Path, out: Path, samples: int, pattern: str) -> None:
    """Train curves that are not trained yet, then write appendix_f.csv and appendix_f.png of all into `out`.

    Raises:
        ConfigError: No curve has such a name.
        TrainingError: As training raises.
    """
    chosen = curves.matching(CURVES, pattern)
    repeat(chosen, Images.of(run_of(chosen[0], 1).data.load(data)), runs, out, samples)


def repeat(chosen: list[Curve], images: Images, runs: Path, out: Path, samples: int) -> None:
    """Train, score and write with the given images."""
    for curve in chosen:
        train(stage_of(curve, images, samples), images.seen, runs / curve.name)
    rows = [row for curve in CURVES for row in points(curve, runs / curve.name)]
    for latent_dim in LATENT_DIMS:
        compare(rows, latent_dim, images, runs, samples)
    curves.write(rows, FIELDS, out / "appendix_f.csv")
    plot(rows, len(images.seen), out / "appendix_f.png")


def run_of(curve: Curve, epochs: int) -> Run:
    """The settings; the last weights count, not an average."""
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
    """Training to about `samples`, scored on the way."""
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
    """The bound with theta a point, with or without its prior."""

    def objective(vae: VAE, batch: Tensor, generator: torch.Generator) -> Bound:
        x = binarise(batch, generator)
        eps = vae.noise(1, len(x), generator)
        return map_bound(vae, x, eps, size) if curve.method == "map" else vae.bound(x, eps)

    return objective


def estimates(module: nn.Module, method: str) -> dict[str, list[VAE]]:
    """The scored estimates of a trained module by name: the models whose p(x) is averaged, the same at every call."""
    if isinstance(module, FullVb):
        generator = keyed_generator(CPU, 0, 10)
        return {f"{method}-mean": [module.vae], f"{method}-draws": [module.draw(generator) for _ in range(THETAS)]}
    assert isinstance(module, VAE)
    return {method: [module]}


@torch.no_grad()
def score(models: list[VAE], x: Tensor) -> Tensor:
    """Estimate the mean bound over the models, and the log of their mean p(x) by importance sampling: (2, n) in nats.

    Each model has its share of DRAWS latents an image, so in expectation the second is too low, as it is for one model.
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
    """STATISTICS of each estimate, as `estimate/statistic`, and EVIDENCE where theta is integrated out."""
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
    """Means over images, and their standard errors: (k, n) -> k of each."""
    errors = columns.std(-1) / math.sqrt(columns.shape[-1])
    return columns.mean(-1).tolist(), errors.tolist()


def points(curve: Curve, folder: Path) -> list[dict[str, Any]]:
    """The scored points of a curve; of a point scored twice the later score counts."""
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
    """Add OVER_MAP to the last row of each estimate of that many latents, of curves trained to as many samples."""
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
    """Two panels a latent dimension: held-out log p(x), and the bounds, of the training images dashed."""
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
