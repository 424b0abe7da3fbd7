"""The report of `restore`: a page, a CSV and two pictures."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.comparisons.methods import RIDGES
from experiments.comparisons.restore import Findings
from experiments.paper import curves
from training.canvas import panels
from training.evaluation.measures import DEVIATIONS, LEAST_STD, MOST_DB
from training.evaluation.tasks import SCATTERED
from training.extras import installed

FIELDS = (
    "dataset", "task", "method", "images", "seed", "psnr_db", "psnr_standard_error", "ssim", "worse", "coverage",
    "level_error", "setting", "ms_batch_1", "ms_batch_16",
)  # fmt: skip
PACKAGES = ("scikit-image", "bm3d", "scipy", "pillow", "torch", "onnxruntime")
Row = dict[str, Any]

HOW = f"""
PSNR in dB for data in [0, 1], the mean over images (at most {MOST_DB:.0f} each); for inpainting of the missing pixels
alone. SSIM: scikit-image's default, a uniform window of 7 x 7, of whole images. Noise is not cut to [0, 1] before it
is sent; every method gets the same float32 arrays, and every answer is cut to [0, 1]. Where missing pixels are
scattered, they are {SCATTERED:.0%} of all.

The other methods have an advantage: they get the kind and level of the noise, and a setting (total variation's weight,
the strength of non-local means, the window of Wiener's filter and of the median) is the one of a small grid with the
highest mean PSNR on these very images; the CSV names it. The Gaussian conditional uses the mean and covariance of the
training images, its ridge chosen from {RIDGES[0]:g} to {RIDGES[-1]:g} on validation images. The U-Net gets the level
and is trained for additive Gaussian noise alone, so it has no row elsewhere. `encode and decode` is a plain
reconstruction of the observation. Ours are this service's, by its `quality`; with `auto` it estimates the level.

Coverage is the share of true pixels within mean +- {DEVIATIONS} `std`, 0.90 if the posterior is right, over the pixels
(for inpainting the missing ones) whose `std` is above {LEAST_STD:g}; `std` is calibrated on validation images where the
model's manifest holds a calibration. Worse is the share of images with a lower PSNR
than what was seen, cut to [0, 1]. The level's error is that of the estimate, relative.
"""


def write(findings: Findings, out: Path) -> Path:
    """Write restoration.md, its CSV, bars (restoration.png) and pictures (restoration-pictures.png).

    Args:
        findings: The results.
        out: The folder.

    Returns:
        Path of the page.
    """
    curves.write(findings.rows, FIELDS, out / "restoration.csv")
    draw_bars(findings.rows, out / "restoration.png")
    draw_pictures(findings, out / "restoration-pictures.png")
    path = out / "restoration.md"
    path.write_text(page(findings))
    return path


def page(findings: Findings) -> str:
    """Format the page in Markdown."""
    parts = [
        "# Restoration beside classical methods and a U-Net",
        "",
        _command(findings),
        "",
        *(f"- {note}" for note in findings.notes),
        "",
        "![PSNR by task](restoration.png)",
        "",
        "![what the methods make of one image](restoration-pictures.png)",
    ]
    for name, model in findings.models.items():
        rows = [row for row in findings.rows if row["dataset"] == name]
        if rows:
            parts += ["", f"## {name}", "", f"Answers of model {model}.", "", *_tables(rows, findings.timed[name])]
    return "\n".join([*parts, "", "## How", HOW])


def _command(findings: Findings) -> str:
    plan = findings.plan
    images = max(row["images"] for row in findings.rows)
    versions = ", ".join(f"{name} {installed(name)}" for name in PACKAGES)
    processor = platform.processor() or platform.machine()
    said = {"--tasks": plan.tasks, "--methods": plan.methods}
    chosen = "".join(f" {flag} {shlex.join(names)}" for flag, names in said.items() if names != ("*",))
    epochs = "" if plan.unet_epochs is None else f" --unet-epochs {plan.unet_epochs}"
    return (
        f"    python -m experiments restore --images {plan.images} --seed {plan.seed}{epochs}{chosen}\n\n"
        f"{images} test images, chosen and corrupted by seed {plan.seed}; {findings.seconds:.0f} s, answers kept "
        f"from an earlier run apart. Python {platform.python_version()}, {processor}; {versions}."
    )


def _tables(rows: list[Row], timed: str) -> list[str]:
    """Tables of PSNR, SSIM and other figures, one row for each method and one column for each task; then of time."""
    own = [row for row in rows if row["method"].startswith("ours")]
    times = [{**row, "task": f"batch of {size}"} | {"ms": row.get(key)} for row in rows if row["task"] == timed
             for size, key in ((1, "ms_batch_1"), (16, "ms_batch_16"))]  # fmt: skip
    return [
        *_table("PSNR, dB", rows, lambda row: f"{row['psnr_db']:.2f}", best="psnr_db"),
        *_table("SSIM", rows, lambda row: f"{row['ssim']:.3f}", best="ssim"),
        *_table("Coverage of the 90 % interval", own, lambda row: _or_dash(row.get("coverage"), ".3f")),
        *_table("Worse than what was seen", [row for row in rows if "worse" in row], lambda row: f"{row['worse']:.0%}"),
        *_table(
            "The estimated level's error",
            [row for row in own if "level_error" in row],
            lambda row: f"{row['level_error']:.1%}",
        ),
        *_table(f"Milliseconds an image, {timed}, one thread", times, lambda row: _or_dash(row["ms"], ".2f")),
    ]


def _or_dash(value: float | None, form: str) -> str:
    return "" if value is None or value != value else format(value, form)  # noqa: PLR0124  # not a number


def _table(title: str, rows: list[Row], show: Callable[[Row], str], best: str | None = None) -> list[str]:
    """Format a table in Markdown, with the highest `best` of each column in bold."""
    tasks, methods = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "method"))
    if not tasks:
        return []
    found = {(row["method"], row["task"]): row for row in rows}
    methods.sort(key=lambda method: method.startswith("ours"))
    highest = {task: max(row[best] for row in rows if row["task"] == task) for task in tasks} if best else {}

    def cell(method: str, task: str) -> str:
        row = found.get((method, task))
        if row is None:
            return ""
        return f"**{show(row)}**" if best and row[best] == highest[task] else show(row)

    lines = [f"| {method} | " + " | ".join(cell(method, task) for task in tasks) + " |" for method in methods]
    return [f"### {title}", "", f"| | {' | '.join(tasks)} |", "|---|" + "--:|" * len(tasks), *lines, ""]


def draw_bars(rows: list[Row], path: Path) -> None:
    """Draw a panel for each task: PSNR of every method, this service's in red."""
    tasks = list(dict.fromkeys((row["dataset"], row["task"]) for row in rows))
    with panels(len(tasks), path, columns=3, size=(5.0, 3.2)) as axes:
        for axis, task in zip(axes, tasks, strict=False):
            mine = sorted(
                (row for row in rows if (row["dataset"], row["task"]) == task), key=lambda row: row["psnr_db"]
            )
            colours = ["tab:red" if row["method"].startswith("ours") else "tab:blue" for row in mine]
            bars = axis.barh([row["method"] for row in mine], [row["psnr_db"] for row in mine], color=colours)
            axis.bar_label(bars, fmt="%.1f", fontsize="small", padding=2)
            axis.set(title=": ".join(task), xlabel="PSNR, dB")
            axis.tick_params(axis="y", labelsize="small")


def draw_pictures(findings: Findings, path: Path) -> None:
    """Draw a row for each task: an image, its observation, and the result of every method."""
    found = {(row["dataset"], row["task"], row["method"]): row for row in findings.rows}
    columns = max(len(shown) for shown in findings.pictures.values())
    with panels(columns * len(findings.pictures), path, columns=columns, size=(1.35, 1.6)) as axes:
        for axis in axes:
            axis.set_axis_off()
        for k, ((name, task), shown) in enumerate(findings.pictures.items()):
            for axis, (method, image) in zip(axes[k * columns :], shown.items(), strict=False):
                axis.imshow(image.transpose(1, 2, 0).clip(0.0, 1.0).squeeze(), cmap="gray", vmin=0.0, vmax=1.0)
                row = found.get((name, task, method))
                said = f"{task}\n{method}" if row is None else f"{method}\n{row['psnr_db']:.1f} dB"
                axis.set_title(said.replace("ours ", "ours\n"), fontsize=7)
