"""Plots of the trainer and the experiments: grids of axes, written as PNG."""

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
    """Make a grid of axes, and write it as PNG when the block ends.

    Args:
        count: Number of axes.
        path: File of the PNG.
        columns: Maximum number of columns.
        size: Width and height of one pair of axes, in inches.

    Yields:
        At least `count` matplotlib axes, row by row; those after the first `count` are hidden.
    """
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
