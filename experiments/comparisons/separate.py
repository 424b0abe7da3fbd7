"""Measurement of how well the service's `score` separates test images from other pictures: AUROC by kind."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from experiments.paper import curves
from service.contract.images import Pixels, fit
from training.canvas import panels
from training.data.frey import read_frames
from training.errors import ConfigError, DataError
from training.evaluation.served import Client, ServiceOptions, offering, served
from training.evaluation.tasks import chosen, subject_of

OWN = "test images"
SCORES = ("elbo", "importance_weighted", "log_likelihood")
FIELDS = ("kind", "images", *(f"auroc_{score}" for score in SCORES), *(f"mean_{score}" for score in SCORES))
ROTATIONS = (15, 45, 90)
SHEAR = 0.5
"""Columns by which a row is shifted, for each row above the middle."""

Scores = dict[str, NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class SeparateOptions(ServiceOptions):
    """Options of `separate`, which asks the first served model of those names.

    Attributes:
        draws: Posterior draws for each score.
    """

    draws: int = 16


def separate(plan: SeparateOptions, out: Path) -> Path:
    """Score every kind of picture, then write separation.md, separation.csv and separation.png.

    Args:
        plan: The options.
        out: The folder.

    Returns:
        Path of the page.

    Raises:
        ConfigError: No model that scores is served.
        ServiceError: The service does not answer.
        DataError: The images cannot be loaded.
    """
    with served(plan.url, plan.models) as client:
        model = _scoring_model(client, plan)
        _, subject = subject_of(model)
        x = chosen(subject.dataset.load(plan.data).test, plan.images, plan.seed)
        options = {"draws": plan.draws, "seed": plan.seed}
        scores = {
            kind: client.figures(model["model"], "score", rows, **options) for kind, rows in kinds(x, plan).items()
        }
    rows = figures(scores)
    curves.write(rows, FIELDS, out / "separation.csv")
    _draw(scores, out / "separation.png")
    path = out / "separation.md"
    path.write_text(page(rows, plan, f"{model['model']} {model['version']}, {model['fingerprint']}"))
    return path


def _scoring_model(client: Client, plan: SeparateOptions) -> dict[str, Any]:
    told = client.models()
    found = offering("score", plan.names, told)
    if not found:
        offered = ", ".join(f"{one['model']} ({', '.join(one['operations'])})" for one in told)
        raise ConfigError(f"no model {plan.names} that offers score is served, but {offered}; see --models, --url")
    return found[0]


def kinds(x: Pixels, plan: SeparateOptions) -> dict[str, Pixels]:
    """Make as many pictures of every other kind as there are test images.

    Args:
        x: Test images, (n, c, h, w).
        plan: The options.

    Returns:
        Pictures by kind, the test images first, each of the shape of x.
    """
    generator = np.random.default_rng(plan.seed)
    found = {
        OWN: x,
        "inverted": 1.0 - x,
        "pixels shuffled": generator.permuted(x.reshape(*x.shape[:2], -1), axis=2).reshape(x.shape),
        "uniform noise": generator.random(x.shape, np.float32),
        **{f"rotated by {degrees} degrees": rotated(x, degrees) for degrees in ROTATIONS},
        "sheared": sheared(x),
    }
    try:
        faces = chosen(read_frames(plan.data), len(x), plan.seed)
    except DataError:
        return found  # absent: their licence does not allow a download by this program
    found["Frey faces"] = fit(faces, (x.shape[2], x.shape[3]), "resize").repeat(x.shape[1], axis=1)
    return found


def rotated(x: Pixels, degrees: float) -> Pixels:
    """Rotate images (n, c, h, w) anticlockwise about the middle, with bilinear interpolation and black outside."""
    turned = ndimage.rotate(x, degrees, axes=(3, 2), reshape=False, order=1)
    return np.asarray(turned.clip(0.0, 1.0), np.float32)


def sheared(x: Pixels) -> Pixels:
    """Shear images (n, c, h, w): shift rows by their height above the middle, bilinear, black outside."""
    matrix = np.eye(4)
    matrix[3, 2] = SHEAR
    offset = np.zeros(4)
    offset[3] = -SHEAR * (x.shape[2] - 1) / 2
    return np.asarray(ndimage.affine_transform(x, matrix, offset, order=1).clip(0.0, 1.0), np.float32)


def figures(scores: dict[str, Scores]) -> list[dict[str, Any]]:
    """Compute a row for each kind: number of pictures, mean of every score, and AUROC against test images."""
    rows = []
    for kind, values in scores.items():
        row: dict[str, Any] = {"kind": kind, "images": len(values[SCORES[0]])}
        for score in SCORES:
            if score not in values:  # grey levels under Bernoulli pixels have a bound but no importance-weighted score
                continue
            row[f"mean_{score}"] = round(float(values[score].mean()), 2)
            if kind != OWN:
                row[f"auroc_{score}"] = round(auroc(scores[OWN][score], values[score]), 4)
        rows.append(row)
    return rows


def auroc(inside: NDArray[Any], outside: NDArray[Any]) -> float:
    """Area under the ROC curve: P(an inlier's score is above an outlier's), where ties count half.

    Args:
        inside: Scores of inliers, (n,).
        outside: Scores of outliers, (m,).

    Returns:
        1 if the scores separate inliers from outliers, 0.5 at chance.
    """
    inlier = np.repeat([1, 0], [len(inside), len(outside)])
    return float(roc_auc_score(inlier, np.concatenate([inside, outside])))


def page(rows: list[dict[str, Any]], plan: SeparateOptions, model: str) -> str:
    """Format the page in Markdown."""
    lines = [
        f"| {row['kind']} | "
        + " | ".join(f"{row[f'auroc_{score}']:.3f}" if f"auroc_{score}" in row else "" for score in SCORES)
        + f" | {row['mean_elbo']:.1f} |"
        for row in rows
    ]
    asked = "" if plan.names == "*" else f" --model {shlex.quote(plan.names)}"
    named = ", ".join(kind for kind in (row["kind"] for row in rows) if kind != OWN)
    return f"""# Separating test images from other pictures

    python -m experiments separate{asked} --images {plan.images} --seed {plan.seed} --draws {plan.draws}

AUROC of the figures of `score`: the probability that a test image scores higher than a picture of another kind (1 is
perfect, 0.5 is chance, below it the other kind scores higher). {rows[0]["images"]} test images, seed
{plan.seed}, and as many of each: {named}. Model {model}, scored over HTTP with {plan.draws} draws.

| | {" | ".join(f"AUROC, `{score}`" for score in SCORES)} | mean `elbo`, nats |
|---|{"--:|" * (len(SCORES) + 1)}
{chr(10).join(lines)}

![the bound by kind of picture](separation.png)

Rotated and sheared images lie between, because few training images are like them. Frey faces are resized to the model's
size.
"""


def _draw(scores: dict[str, Scores], path: Path) -> None:
    """Draw a panel for each kind: the histogram of its bounds before that of the test images."""
    others = [kind for kind in scores if kind != OWN]
    with panels(len(others), path, columns=4) as axes:
        for axis, kind in zip(axes, others, strict=False):
            pair = [scores[OWN]["elbo"], scores[kind]["elbo"]]
            bins = np.histogram_bin_edges(np.concatenate(pair), 40)
            for values, label, colour in zip(pair, (OWN, kind), ("tab:gray", "tab:red"), strict=True):
                axis.hist(values, bins, alpha=0.6, label=label, color=colour)
            axis.set(xlabel="ELBO, nats", ylabel="pictures")
            axis.legend(frameon=False, fontsize="small")
