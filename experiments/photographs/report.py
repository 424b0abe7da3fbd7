"""The pages photographs.md and micrographs.md, with a CSV each, made of the kept figures alone."""

from __future__ import annotations

import csv
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.paper import curves
from experiments.photographs import sets, speed
from experiments.photographs.camera import FULL_WELL, QUALITIES, READ_NOISE
from experiments.photographs.cases import CAMERA, FRAME, INTERVAL_SIGMAS, JPEG, MISSING, SHRUNK, TOLD_SIGMAS
from experiments.photographs.measure import PhotographOptions
from experiments.photographs.methods import CHOOSERS, DRAWS, OURS, SENT
from experiments.photographs.tables import SETS, Tables, table
from training.extras import installed

PACKAGES = ("scikit-image", "bm3d", "scipy", "pillow", "onnxruntime")
FIELDS = (
    "set", "case", "method", "images", "psnr_db", "ssim", "sent_db", "affine_db", "detail", "coverage",
    "uncertain_coverage", "level", "block_error", "block_drawn", "block_within", "draw_db", "mean_of_draws_db",
    "setting", "seconds_512",
)  # fmt: skip
BASELINES = sets.W2S / "baselines.csv"
QUOTED_BASELINES = {"noise2noise_fmd": "Noise2Noise, trained on FMD", "vst_bm3d": "BM3D in a stabilising transform"}
"""Columns of the data set's own figures, and their names here."""

HOW = f"""
- **Noise** is drawn by a seed of its own for each image, in float32, and not cut to [0, 1] before it is sent. Every
  method gets the same values. Answers are cut to [0, 1] and compared as floats: PSNR in dB for data in [0, 1], the mean
  over images; SSIM with scikit-image's default, a uniform window of 7 x 7.
- **Ours** are answers over HTTP. `auto` is a request without any option about the noise.
- **Total variation and non-local means** get the level. Weight and strength are chosen for each level, in units of it,
  on {CHOOSERS} photographs of `photos/dev`. Both and BM3D restore the channels of colour images jointly.
- **Quoted** figures are those of the publications, for 8-bit answers, which changes less than 0.01 dB.
- **Coverage** is the share of true pixels within mean +- 1.645 `std`: 0.90 if the intervals are right.
- **Blocks**: variance of the means of 8 x 8 blocks over {DRAWS} draws, divided by the squared error of the restored
  image's means: 1 if the draws show all uncertainty. The pixels' own part is the variance that `std` has and the draws
  have not, as if independent between pixels.
- **Camera**: a white pixel holds {FULL_WELL:,.0f} electrons at ISO 100 and fewer in proportion at others; it is read
  with a deviation of {READ_NOISE:g}. Bayer mosaic, linear demosaicing (Malvar, He and Cutler, 2004), white
  balance, sRGB curve, JPEG of quality {QUALITIES[0]} to {QUALITIES[1]}. It shares no code with the trainer's camera.
- **Detail** is the root mean square of the answer's Laplacian over that of the truth.
- **Seconds and memory** are of one core and the median of three calls; the service's include HTTP, in .npy. Its memory
  is the sum of its processes' peaks; of other methods it is what they take beside the images and the interpreter.
- A number in brackets counts the images, where it is not the whole set.
"""


def write(plan: PhotographOptions, out: Path) -> list[Path]:
    """Write photographs.md and micrographs.md with their CSV; a page without any figures is left out.

    Args:
        plan: The options; the figures of earlier runs in the same folder are part of the pages.
        out: The folder.

    Returns:
        Paths of the pages.
    """
    sizes = {name: sets.size(plan.data, name) for name in sets.SETS}
    tables, written = Tables(plan.results, sizes), []
    for name, chosen in (("photographs", set(SETS)), ("micrographs", {sets.MICROGRAPHS})):
        rows = [_summary(tables, place) for place in tables.found if place.set in chosen]
        if rows:
            curves.write(rows, FIELDS, out / f"{name}.csv")
            lines = photographs(tables, plan, out) if name == "photographs" else micrographs(tables, plan)
            written.append(out / f"{name}.md")
            written[-1].write_text("\n".join(lines).rstrip() + "\n")
    return written


def photographs(tables: Tables, plan: PhotographOptions, out: Path) -> list[str]:
    """Lines of the page of photographs."""
    sigmas = sorted({*TOLD_SIGMAS, *plan.sigmas})
    unsure = sorted({*INTERVAL_SIGMAS, *plan.sigmas})
    lines = ["# Photographs: restored beside other methods", "", *_head(tables, SETS, plan.seed)]
    lines += ["## Gaussian noise, level known", ""]
    for name in SETS:
        lines += [f"### {name}", "", *tables.noise(name, sigmas)]
        lines += [f"Ahead of {model}, in dB: {said}.\n" for model in tables.models
                  if (said := tables.ahead(name, sigmas, model))]  # fmt: skip
    for title, about, found in (
        ("Coverage of the 90 % intervals", "", tables.intervals(unsure)),
        ("Variance of 8 x 8 block means", "Of the draws, over the true one.", tables.blocks(unsure)),
        ("Draws", "PSNR in dB: draws are plausible, their mean has the least error.", tables.draws(unsure)),
        ("Level estimated", "PSNR minus that with the known level, and the estimate's error.", tables.auto()),
        ("Worse than what was sent", "Over sigma from 2 to 75.", tables.worse()),
        ("Nothing to remove", "PSNR of the answer against what was sent, `auto`.", tables.kept()),
        ("A camera's noise", "CBSD68, `auto`, dB.", tables.real(CAMERA)),
        ("JPEG", "CBSD68, `auto`, dB, by quality.", tables.real(JPEG)),
        ("Missing pixels", "PSNR in dB, of the missing pixels alone.", tables.filled(MISSING, "biharmonic")),
        ("Smaller images", "PSNR in dB of super-resolution from block means.", tables.filled(SHRUNK, "bicubic")),
    ):
        lines += [f"## {title}", "", *([about, ""] if about else []), *found]
    return [*lines, *speed.sections(out), speed.NEXT, HOW]


def micrographs(tables: Tables, plan: PhotographOptions) -> list[str]:
    """Lines of the page of micrographs: affine PSNR by channel."""
    rows = [
        _channels(method if not method.startswith(OURS) else f"**{method}**", {
            image: one["affine_db"] for image, one in tables.of(sets.MICROGRAPHS, FRAME.name, method).items()
        })
        for method in (SENT, *(f"{OURS} {model} auto" for model in tables.models))
    ]  # fmt: skip
    theirs = _baselines(plan.data / BASELINES)
    rows[1:1] = [_channels(f"*baseline:* {said}", theirs.get(key, {})) for key, said in QUOTED_BASELINES.items()]
    about = (
        "PSNR in dB after affine alignment of each field, because the 8-bit copies are stretched image by image: "
        "fields 81 to 120 of W2S, one noisy frame against the mean of 400. Baselines are the data set's own figures "
        "(`baselines.csv`). Frames are sent as PNG without any option about the noise."
    )
    head = ["", "channel 0", "channel 1", "channel 2", "all", "fields"]
    return [
        "# Micrographs: restored beside other methods",
        "",
        *_head(tables, (sets.MICROGRAPHS,), plan.seed),
        about,
        "",
        *table(head, rows),
    ]


def _head(tables: Tables, names: Sequence[str], seed: int) -> list[str]:
    versions = ", ".join(f"{name} {installed(name)}" for name in PACKAGES)
    measured = [name for name in names if any(place.set == name for place in tables.found)]
    return [
        f"    python -m experiments restore --set {' '.join(measured)}" + (f" --seed {seed}" if seed else ""),
        "",
        f"makes this page. Python {platform.python_version()}; {versions}.",
        "",
    ]


def _channels(name: str, figures: dict[str, float]) -> list[str]:
    """A row: mean by the channel that an image's name ends with, over all, and number of images."""
    means = []
    for suffix in ("_0", "_1", "_2", ""):
        values = [value for image, value in figures.items() if image.endswith(suffix)]
        means.append(f"{fmean(values):.2f}" if values else "")
    return [name, *means, f"{len(figures)}" if figures else ""]


def _baselines(path: Path) -> dict[str, dict[str, float]]:
    """Figures by column and image."""
    if not path.exists():
        return {}
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {key: {row["image"]: float(row[key]) for row in rows} for key in QUOTED_BASELINES}


def _summary(tables: Tables, place: Any) -> dict[str, Any]:
    """A row of the CSV: means over the images."""
    images = tables.found[place]
    row: dict[str, Any] = {"set": place.set, "case": place.case, "method": place.method, "images": len(images)}
    for figure in FIELDS[4:]:
        values = [one[figure] for one in images.values() if figure in one]
        if values:
            row[figure] = f"{fmean(values):.5g}"
    for kind in ("", "uncertain_"):
        if counted := sum(one.get(f"{kind}counted", 0.0) for one in images.values()):
            row[f"{kind}coverage"] = round(sum(one[f"{kind}covered"] for one in images.values()) / counted, 4)
    return row
