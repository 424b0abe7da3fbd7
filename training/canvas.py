"""Grids of axes written as PNG: every plot of the trainer and the experiments."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COLUMNS = 5


@contextmanager
def panels(
    count: int, path: Path, columns: int = COLUMNS, size: tuple[float, float] = (3.6, 3.0)
) -> Iterator[list[Any]]:
    """A grid of `count` axes, each of `size` in inches, written to `path` as PNG when the block ends."""
    from matplotlib.figure import Figure  # noqa: PLC0415  # slow to import, and most commands draw nothing

    columns = max(1, min(columns, count))
    rows = max(1, math.ceil(count / columns))
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    flat = list(axes.flat)
    for axis in flat:
        axis.spines[["top", "right"]].set_visible(False)
    for spare in flat[count:]:
        spare.set_visible(False)
    yield flat
    figure.savefig(path, dpi=110)
