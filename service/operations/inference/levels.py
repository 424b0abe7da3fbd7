"""Noise levels of images, one an image: estimates from y, whole or, of a large image, from parts of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.contract.corruption import Observation
from service.contract.images import to_floats
from service.operations.inference.tiling import Tiling
from service.operations.inference.vae import Rows
from service.runtime.model import Model
from service.runtime.program import Arrays, Compute, Graphs, Submit, Trip

LEAST_LEVEL, MOST_LEVEL = np.float32(1e-6), np.float32(1.0)
"""Bounds of an estimated level: those of the option `level`, which must be above 0."""
SIDE, PARTS = 256, 4
"""Height and width of the parts of a large image from which its level is estimated, and parts along each axis."""
WHOLE_PIXELS = (PARTS * SIDE) ** 2
"""Pixels of the largest image of free size whose level is estimated from all of it."""


def estimate_rows(graphs: Graphs, column: int | None) -> Compute:
    """y, mask -> level (n, F): of the family in that column, the others 0; with None, of all families together.

    An estimate is clipped to the bounds of the option `level`; families that are not at work have 0.
    """

    def compute(y: Rows, mask: Rows) -> Arrays:
        if column is None:
            return (np.clip(graphs["noise"](y, mask)[0], np.float32(0.0), MOST_LEVEL),)
        (guess,) = graphs["noise_level"](y, mask)
        level = np.zeros_like(guess)
        level[:, column] = np.clip(guess[:, column], LEAST_LEVEL, MOST_LEVEL)
        return (level,)

    return compute


def level_rows(graphs: Graphs, estimated: int | None) -> Compute:
    """y, mask, level -> level. The column `estimated`, unless None, is estimated from y, and the others are 0."""
    estimate = estimate_rows(graphs, estimated)

    def compute(y: Rows, mask: Rows, level: Rows) -> Arrays:
        return (level,) if estimated is None else estimate(y, mask)

    return compute


async def of_one_level(
    model: Model, submit: Submit, seen: Observation, tiling: Tiling | None
) -> tuple[Observation, Trip]:
    """Set the noise level of each image to its estimate: that of the whole image, or the median over parts or tiles.

    Args:
        model: A model with the graph `noise_level`, or `noise` for all families together.
        submit: Submits a program.
        seen: An observation of unknown level.
        tiling: Places of its rows in larger images, if they are tiles.

    Returns:
        The observation with its level, which counts as known, and the time.
    """
    y, mask = (seen.y, seen.mask) if "restoration" in model.graphs else seen.lifted()[:2]
    n, parts = len(y), 1 if tiling is None else tiling.tiles
    if model.manifest.size is not None and math.prod(y.shape[-2:]) > WHOLE_PIXELS:
        y, mask, parts = *(_parts(array, model.manifest.size.multiple_of) for array in (y, mask)), PARTS**2
    trip = await submit(model.plan("level", estimate_rows, 0, seen.family), (y, mask))
    level = trip.arrays[0]
    if parts > 1:
        level = _medians(level.reshape(-1, parts, level.shape[1]), mask.any((1, 2, 3)).reshape(-1, parts))
        level = np.repeat(level, n // len(level), axis=0)
    return seen._replace(level=level, known=True), trip


def _parts(images: NDArray[Any], multiple: int) -> Rows:
    """Parts (n * PARTS^2, c, h, w) of images (n, c, height, width), evenly spread from edge to edge, as float32."""
    sizes = images.shape[-2:]
    sides = [min(length, max(multiple, SIDE // multiple * multiple)) for length in sizes]
    tops, lefts = (
        [(length - side) * k // (PARTS - 1) // multiple * multiple for k in range(PARTS)]
        for length, side in zip(sizes, sides, strict=True)
    )
    cuts = [images[..., top : top + sides[0], left : left + sides[1]] for top in tops for left in lefts]
    found = np.stack(cuts, 1).reshape(-1, images.shape[1], *sides)
    return to_floats(found)


def _medians(levels: Rows, sighted: NDArray[np.bool_]) -> Rows:
    """Medians (n, F) over the parts of (n, parts, F) of which something is seen; over all where nothing is."""
    sighted = sighted | ~sighted.any(1, keepdims=True)
    found: Rows = np.nanmedian(np.where(sighted[..., None], levels, np.float32(np.nan)), 1)
    return found
