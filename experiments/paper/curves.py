"""Common parts of figures 2 and 3: the paper's training settings, and curves against the training samples seen.

One hidden layer of tanh units, initial parameters of N(0, 0.01^2), minibatches of 100, one draw, Adagrad with a step
size chosen on the first samples, the prior N(0, I) on the weights.
Source: Kingma and Welling (2013), section 5.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol, TypeVar

from training.config import Run
from training.data import ImageSet
from training.errors import ConfigError, DivergedError

STEP_SIZES = (0.01, 0.02, 0.1)
CHOSEN_AFTER = 200_000
FIRST_POINT = 10_000
BATCH = 100
COLOURS = {"aevb": "tab:red", "wake-sleep": "tab:green", "mcem": "tab:blue"}


class Named(Protocol):
    """A curve of a panel."""

    @property
    def name(self) -> str:
        """Name of the curve, for `--only` and for its folder."""


SomeCurve = TypeVar("SomeCurve", bound=Named)


def matching(curves: Sequence[SomeCurve], pattern: str) -> list[SomeCurve]:
    """Select the curves whose name matches a pattern.

    Args:
        curves: The curves.
        pattern: A pattern such as `mnist-20-*`.

    Returns:
        At least one curve.

    Raises:
        ConfigError: None does; the message lists all names.
    """
    chosen = [curve for curve in curves if fnmatch(curve.name, pattern)]
    if not chosen:
        raise ConfigError(f"no curve is called {pattern}; there are {', '.join(curve.name for curve in curves)}")
    return chosen


def paper_run(name: str, model: dict[str, Any], hidden: int, train: dict[str, Any], **said: Any) -> Run:
    """The paper's settings for one curve.

    Args:
        name: Name of the run.
        model: The curve's own settings of `model`.
        hidden: Hidden units.
        train: The curve's own settings of `train`.
        **said: Other keys of the run.
    """
    return Run.model_validate(
        {
            "name": name,
            **said,
            "model": {
                "initial_std": 0.01,
                "network": {"architecture": "mlp", "hidden": [hidden], "activation": "tanh"},
                **model,
            },
            "train": {
                "batch_size": BATCH,
                "optimiser": "adagrad",
                "schedule": "constant",
                "warmup_steps": 0,
                "weight_prior": True,
                "ema_decay": 0.0,
                **train,
            },
        }
    )


def best_step_size(trial: Callable[[float, Path], None], folder: Path, quantity: str) -> float:
    """Choose the step size whose trial ends with the highest quantity.

    Args:
        trial: Trains briefly: (step size, folder) -> None.
        folder: Folder for the trials.
        quantity: Name of the quantity in the trial's log.

    Returns:
        One of `STEP_SIZES`.

    Raises:
        DivergedError: Training diverges with every step size.
    """
    reached: dict[float, float] = {}
    for step_size in STEP_SIZES:
        inside = folder / f"step-size-{step_size}"
        try:
            trial(step_size, inside)
        except DivergedError:
            continue
        reached[step_size] = [line[quantity] for line in read_log(inside) if quantity in line][-1]
    if not reached:
        raise DivergedError(f"training diverged with each step size of {', '.join(map(str, STEP_SIZES))} in {folder}")
    return max(reached, key=lambda step_size: reached[step_size])


def epochs_of(images: ImageSet, samples: int) -> int:
    """Number of epochs for about `samples` training samples, at least one."""
    return max(1, round(samples / len(images.train)))


def grid(samples: int, a_decade: int = 8) -> list[int]:
    """Numbers of samples on a logarithmic scale, `a_decade` for each factor of 10, up to `samples`."""
    found, k = [], 0
    while (seen := round(FIRST_POINT * 10 ** (k / a_decade))) < samples:
        found.append(seen)
        k += 1
    return [*found, samples]


def watched_steps(samples: list[int], last: int) -> frozenset[int]:
    """Training steps after which these numbers of samples have been seen, at most `last`, the run's end."""
    return frozenset(min(seen // BATCH, last) for seen in samples)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's log; an empty list before the run begins."""
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def scored(folder: Path, quantity: str) -> list[dict[str, Any]]:
    """Read the scored points of a curve from its log.

    Args:
        folder: Folder of the run.
        quantity: Name of the quantity, without the split.

    Returns:
        `samples` and the quantity of both splits for each point. If a point was scored twice, the later score counts.
    """
    names = [f"{split}_{quantity}" for split in ("train", "test")]
    lines = {line["step"]: line for line in read_log(folder) if names[-1] in line}
    return [{"samples": step * BATCH, **{name: line[name] for name in names}} for step, line in sorted(lines.items())]


def with_earlier(rows: list[dict[str, Any]], path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Put the rows of other curves in an earlier CSV before `rows`.

    Args:
        rows: New rows.
        path: The CSV; it may be absent.
        keys: Columns that identify a curve.

    Returns:
        Earlier rows of curves that are not in `rows`, then `rows`.
    """
    mine = {tuple(str(row[key]) for key in keys) for row in rows}
    if not path.exists():
        return rows
    with path.open(newline="") as file:
        earlier = [row for row in csv.DictReader(file) if tuple(row[key] for key in keys) not in mine]
    return [*({name: _number(text) for name, text in row.items()} for row in earlier), *rows]


def _number(text: str) -> Any:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def write(rows: list[dict[str, Any]], fields: Sequence[str], path: Path) -> None:
    """Write rows as CSV; the folder is created if absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


def add_curves(axis: Any, rows: list[dict[str, Any]], quantity: str) -> None:
    """Draw curves: one colour for each method, test solid, training dashed, samples on a logarithmic scale."""
    for method in (method for method in COLOURS if any(row["method"] == method for row in rows)):
        mine = [row for row in rows if row["method"] == method]
        for split, style in (("test", "-"), ("train", "--")):
            values = [row[f"{split}_{quantity}"] for row in mine]
            label = f"{method}, {split}"
            axis.plot([row["samples"] for row in mine], values, style, color=COLOURS[method], label=label)
    axis.set(xscale="log", xlabel="training samples seen")
