"""A program: what the batcher runs over stacked rows, and how long that takes."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from service.contract.manifest import Size, Tiles

Arrays = tuple[NDArray[Any], ...]
Graph = Callable[..., tuple[NDArray[np.float32], ...]]
Graphs = Mapping[str, Graph]
"""The graphs of a model, by name."""
Compute = Callable[..., Arrays]
"""Computes a batch: arrays of rows in, arrays of as many rows out."""
Timing = dict[int, float]
"""Seconds by number of rows."""

TIMINGS, TIMING_S = 3, 0.02
"""A batch of one size is timed at most so often, and for about so long."""
HAND_OVER_S = 2e-4
"""Estimated overhead of a batch: the way to the thread and back."""
WORTH = 1.1
"""A larger batch is worth it where its cost a row is lower by this factor."""
MOST_SIZES = 256
"""Bounds the sized programs of one program, because the sizes of images come from the client."""


class FreeSize(NamedTuple):
    """What a program of a model of free size knows of sizes.

    Attributes:
        size: Multiple and bounds of height and width.
        tiles: How larger images are cut; None where the model does not say.
        pixels: Pixels of the golden images, with which the program is timed.
    """

    size: Size
    tiles: Tiles | None
    pixels: int


class Program(Protocol):
    """A whole operation over rows: every array in and out has one row for each row of the request.

    Programs are compared by identity.
    """

    @property
    def free(self) -> FreeSize | None:
        """What it knows of sizes, for images of free size."""

    @property
    def rounds(self) -> int:
        """How many trips a request's rows make: 1, or the number of slices that the work is cut into."""

    def run(self, *arrays: NDArray[Any]) -> Arrays:
        """Compute a batch. The answer for a row must not depend on the other rows."""

    def batch_rows(self, max_rows: int) -> int:
        """Rows of its batches: `max_rows`, or fewer where larger batches gain nothing."""

    def cost_s(self, rows: int) -> float:
        """Estimated time of a batch of `rows`, in seconds."""


class Trip(NamedTuple):
    """Output arrays, and the time in the queue and in the model, summed over the batches that a request needed.

    `tiled` is whether images were worked off in tiles.
    """

    arrays: Arrays
    queue_s: float
    inference_s: float
    tiled: bool = False

    def after(self, first: Trip) -> Trip:
        """These arrays, with the time of both trips."""
        tiled = self.tiled or first.tiled
        return Trip(self.arrays, first.queue_s + self.queue_s, first.inference_s + self.inference_s, tiled)


Submit = Callable[..., Awaitable[Trip]]
"""(program, arrays, begun=whether it continues an answer that has begun) -> Trip."""


@dataclass(eq=False)
class ModelProgram:
    """A program of one model.

    Args:
        model: Name of the model, for metrics.
        operation: Name of the operation, for metrics and traces.
        weight: What a row counts for in a batch: the number of draws that it is decoded at, at least 1.
        compute: Computes a batch.
        rounds: Number of slices that the work is cut into.
        timing: Measured seconds by number of rows; None while unmeasured.
        clock: Clock for the measurements, in seconds.
        free: Of a model whose images are of free size.
        block: Height and width in pixels of one place of its largest input of four axes: 1, or more where all inputs
            are latents or smaller images.
        local: Whether the answer for a pixel, or for a number an image, can be put together from tiles of the image.
        images: Places of the outputs that are images in [0, 1].
        most_rows: Rows of a batch at most; None is any number.
    """

    model: str
    operation: str
    weight: int
    compute: Compute
    rounds: int = 1
    timing: Timing | None = None
    clock: Callable[[], float] = time.perf_counter
    free: FreeSize | None = None
    block: int = 1
    local: bool = True
    images: tuple[int, ...] = ()
    most_rows: int | None = None
    _sized: dict[tuple[Any, ...], ModelProgram] = field(default_factory=dict)

    def image_size(self, arrays: Arrays) -> tuple[int, int]:
        """Height and width of the images that these inputs are of, for a model of free size."""
        shapes = [array.shape[-2:] for array in arrays if array.ndim == 4]  # (n, c, h, w); noise of draws has five
        height, width = max(shapes)
        return self.block * height, self.block * width

    def sized(self, arrays: Arrays, most_pixels: int) -> ModelProgram:
        """The program for inputs of this size; the same object for the same size, so that its rows share batches.

        Args:
            arrays: The inputs, of a model of free size.
            most_pixels: Pixels of a batch at most; a single row may have more.
        """
        key = tuple(array.shape[1:] for array in arrays)
        found = self._sized.get(key)
        if found is None:
            assert self.free is not None
            if len(self._sized) >= MOST_SIZES:
                del self._sized[next(iter(self._sized))]
            pixels = math.prod(self.image_size(arrays))
            share = pixels / self.free.pixels
            timing = None if self.timing is None else {rows: share * s for rows, s in self.timing.items()}
            most = max(1, most_pixels // (pixels * self.weight))
            found = self._sized[key] = replace(self, timing=timing, most_rows=most, _sized={})
        return found

    def run(self, *arrays: Any) -> Arrays:
        """Compute a batch."""
        return self.compute(*arrays)

    def batch_rows(self, max_rows: int) -> int:
        """Rows of its batches: the fewest whose cost a row is close to the lowest.

        Small batches let the HTTP work of the next batch run while this one is computed.
        """
        most = max_rows if self.most_rows is None else min(max_rows, self.most_rows)
        if self.timing is None:
            return max(1, most // self.weight)
        return min(most, self._enough)

    def cost_s(self, rows: int) -> float:
        """Estimated time of a batch, in seconds, from the measurements; infinite while unmeasured."""
        if self.timing is None:
            return math.inf
        one, further = self._line
        return one + (rows - 1) * further

    def measure(self, rows: int, *row: Any) -> None:
        """Time batches of 1, 4, 16 rows and so on, until `rows` or until larger batches gain nothing.

        Args:
            rows: Rows of the largest batch.
            *row: Each input, with at least one row. The first row is repeated.
        """
        self.timing = {}
        size = 1
        while size <= rows and self._still_pays:
            batch = tuple(np.repeat(array[:1], size, axis=0) for array in row)
            self.timing[size] = self._time(batch)
            size = min(4 * size, rows) if size < rows else rows + 1

    @property
    def _still_pays(self) -> bool:
        """Whether the last measured size was cheaper a row than the one before."""
        earlier, last = [math.inf, math.inf, *self._a_row.values()][-2:]
        return earlier == math.inf or last * WORTH < earlier

    @cached_property
    def _line(self) -> tuple[float, float]:
        """Seconds of the first row, and of each further row."""
        assert self.timing is not None
        rows, one = max(self.timing), self.timing[1]
        return one, max(0.0, self.timing[rows] - one) / max(1, rows - 1)

    @cached_property
    def _enough(self) -> int:
        return next(size for size, seconds in self._a_row.items() if seconds <= WORTH * min(self._a_row.values()))

    @property
    def _a_row(self) -> dict[int, float]:
        """Seconds a row, by number of rows."""
        assert self.timing is not None
        return {size: (seconds + HAND_OVER_S) / size for size, seconds in self.timing.items()}

    def _time(self, arrays: Arrays) -> float:
        """The shortest of `TIMINGS` runs, or of fewer where they take more than `TIMING_S`."""
        began, best = self.clock(), math.inf
        for _ in range(TIMINGS):
            started = self.clock()
            self.compute(*arrays)
            best = min(best, self.clock() - started)
            if self.clock() - began > TIMING_S:
                break
        return best
