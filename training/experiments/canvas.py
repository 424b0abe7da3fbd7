"""The one place that draws."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLUMNS = 5


@contextmanager
def panels(count: int, path: Path) -> Iterator[list[Any]]:
    """A grid of `count` axes, written to `path` as PNG when the block ends."""
    columns = max(1, min(COLUMNS, count))
    rows = max(1, math.ceil(count / columns))
    figure = Figure(figsize=(3.6 * columns, 3.0 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    flat = list(axes.flat)
    for axis in flat:
        axis.spines[["top", "right"]].set_visible(False)
    for spare in flat[count:]:
        spare.set_visible(False)
    yield flat
    figure.savefig(path, dpi=110)
