"""Figure 2: the lower bound against the training samples seen, AEVB beside wake-sleep on the same networks.

Raw grey levels, one hidden layer (500 tanh units for MNIST, 200 for Frey Face), every parameter begun as N(0, 0.01^2),
minibatches of 100, one draw, Adagrad with a step size chosen on the first samples, N(0, I) on the weights.
Source: Kingma and Welling (2013), section 5 and figure 2.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.config import Run
from training.datasets import ImageSet, as_float
from training.elbo import elbo
from training.errors import ConfigError
from training.experiments.canvas import panels
from training.model import VAE
from training.stages import vae_stage
from training.trainer import keyed_generator, train

METHODS = {"aevb": "elbo", "wake-sleep": "wake_sleep"}
STEP_SIZES = (0.01, 0.02, 0.1)
CHOSEN_AFTER = 50_000
POINTS_A_DECADE = 8
FIRST_POINT = 10_000
BATCH = 100
SCORED = 10_000
"""Images that a point of the curve averages over, at most; of the training set a fixed, seeded choice."""
DATA: dict[str, dict[str, Any]] = {
    "mnist": {"dataset": "mnist", "validation": 10_000},
    "frey": {"dataset": "frey", "split": "author"},
}
HIDDEN = {"mnist": 500, "frey": 200}
LIKELIHOODS = {"mnist": "bernoulli", "frey": "gaussian"}
FIELDS = ("data", "latent_dim", "method", "samples", "train_elbo", "test_elbo")


@dataclass(frozen=True)
class Curve:
    """One line of one panel."""

    data: str
    latent_dim: int
    method: str

    @property
    def name(self) -> str:
        """As a pattern matches it."""
        return f"{self.data}-{self.latent_dim}-{self.method}"


CURVES = [
    Curve(data, latent_dim, method)
    for data, sizes in (("mnist", (3, 5, 10, 20, 200)), ("frey", (2, 5, 10, 20)))
    for latent_dim in sizes
    for method in METHODS
]


def draw(data: Path, runs: Path, out: Path, samples: int, pattern: str) -> None:
    """Train what is not trained yet, then write figure2.csv and figure2.png of all that is, into `out`.

    Raises: ConfigError where no curve has such a name, and what training raises.
    """
    chosen = [curve for curve in CURVES if fnmatch(curve.name, pattern)]
    if not chosen:
        raise ConfigError(f"no curve is called {pattern}; there are {', '.join(curve.name for curve in CURVES)}")
    for curve in chosen:
        follow(curve, load(curve, data), runs / curve.name, samples)
    rows = [row for curve in CURVES for row in points(curve, runs / curve.name)]
    out.mkdir(parents=True, exist_ok=True)
    with (out / "figure2.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, out / "figure2.png")


def load(curve: Curve, data: Path) -> ImageSet:
    """The curve's images."""
    return run_of(curve, 1, STEP_SIZES[0]).data.load(data)


def run_of(curve: Curve, epochs: int, step_size: float) -> Run:
    """The paper's settings."""
    return Run.model_validate(
        {
            "name": curve.name,
            "data": DATA[curve.data],
            "binarise": False,
            "model": {
                "latent_dim": curve.latent_dim,
                "initial_std": 0.01,
                "likelihood": {"likelihood": LIKELIHOODS[curve.data]},
                "network": {"architecture": "mlp", "hidden": [HIDDEN[curve.data]], "activation": "tanh"},
            },
            "train": {
                "epochs": epochs,
                "batch_size": BATCH,
                "objective": METHODS[curve.method],
                "optimiser": "adagrad",
                "learning_rate": step_size,
                "schedule": "constant",
                "warmup_steps": 0,
                "weight_prior": True,
                "ema_decay": 0.0,
            },
        }
    )


def follow(curve: Curve, images: ImageSet, folder: Path, samples: int) -> Run:
    """Train to `samples`, scoring the bound on the way; gives the settings. What was begun with as many is resumed."""
    step_size = choose(curve, images, folder)
    run = run_of(curve, epochs_of(images, samples), step_size)
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(0))[:SCORED]
    scored = {"train_elbo": images.train[order], "test_elbo": images.test[:SCORED]}
    stage = vae_stage(run, images.shape, torch.device("cpu"))
    steps = frozenset(seen // BATCH for seen in grid(samples))
    watched = replace(
        stage, watch=lambda vae: {name: bound(vae, split) for name, split in scored.items()}, watched_steps=steps
    )
    train(watched, images.train, folder)
    return run


def choose(curve: Curve, images: ImageSet, folder: Path) -> float:
    """The step size with the highest bound after the first samples."""
    reached = {}
    for step_size in STEP_SIZES:
        trial = folder / f"step-size-{step_size}"
        short = run_of(curve, epochs_of(images, CHOSEN_AFTER), step_size)
        train(vae_stage(short, images.shape, torch.device("cpu")), images.train, trial)
        reached[step_size] = [line["elbo"] for line in read_log(trial) if "elbo" in line][-1]
    return max(reached, key=lambda step_size: reached[step_size])


def epochs_of(images: ImageSet, samples: int) -> int:
    """Whole passes that see about so many samples, at least one."""
    return max(1, round(samples / len(images.train)))


def grid(samples: int) -> list[int]:
    """Numbers of samples, evenly spaced on a logarithmic scale, ending with `samples`."""
    found, k = [], 0
    while (seen := round(FIRST_POINT * 10 ** (k / POINTS_A_DECADE))) < samples:
        found.append(seen)
        k += 1
    return [*found, samples]


@torch.inference_mode()
def bound(vae: VAE, images: Tensor) -> float:
    """The mean bound of uint8 images, grey levels as they are, with one draw each that is always the same."""
    generator = keyed_generator(images.device, 0, 6)
    total = 0.0
    for part in images.split(1000):
        x = as_float(part)
        latent_dim = vae.posterior(x[:1]).mean.shape[1]
        total += float(elbo(vae, x, torch.randn(1, len(x), latent_dim, generator=generator)).elbo.sum())
    return round(total / len(images), 3)


def points(curve: Curve, folder: Path) -> list[dict[str, Any]]:
    """What has been scored of a curve; the last word counts where an interrupted run scored a point twice."""
    scored = {line["step"]: line for line in read_log(folder) if "test_elbo" in line}
    return [
        {
            "data": curve.data,
            "latent_dim": curve.latent_dim,
            "method": curve.method,
            "samples": step * BATCH,
            "train_elbo": line["train_elbo"],
            "test_elbo": line["test_elbo"],
        }
        for step, line in sorted(scored.items())
    ]


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; none where it has not begun."""
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel a data set and latent dimension, as in the paper: AEVB red, wake-sleep green, training dashed."""
    wanted = list(dict.fromkeys((row["data"], row["latent_dim"]) for row in rows))
    colours = {"aevb": "tab:red", "wake-sleep": "tab:green"}
    with panels(len(wanted), path) as axes:
        for axis, (data, latent_dim) in zip(axes, wanted, strict=False):
            for method, colour in colours.items():
                mine = [r for r in rows if (r["data"], r["latent_dim"], r["method"]) == (data, latent_dim, method)]
                samples = [r["samples"] for r in mine]
                axis.plot(samples, [r["test_elbo"] for r in mine], color=colour, label=f"{method}, test")
                axis.plot(samples, [r["train_elbo"] for r in mine], "--", color=colour, label=f"{method}, train")
            axis.set(
                title=f"{data}, {latent_dim} latents",
                xscale="log",
                xlabel="training samples seen",
                ylabel="bound, nats",
            )
            axis.set_ylim(*((-150, -95) if data == "mnist" else (0, 1500)))
        axes[0].legend(frameon=False, fontsize="small")
