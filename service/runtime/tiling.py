"""Tiles: images of free size that are too large for one run, cut into overlapping tiles whose answers are blended.

Only the tiles that run, and the seams that the next ones need, are in memory as float32. Pixels may come as levels of
8 or 16 bits, masks as booleans, and images may be answered as levels.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from itertools import product
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.contract.manifest import Size, Tiles
from service.errors import InferenceFailed, TooLarge
from service.runtime.program import Arrays, ModelProgram, Submit, Trip

BLEND = 16
"""Pixels over which tiles are blended where their answers are equal."""
EXACT_SIDE = 816
"""Height and width at most of tiles whose answers are equal to those for the whole image. Larger ones save little of
what margins cost, and a run needs memory in proportion to its pixels."""
OVERLAP = 4
"""Tiles whose answers differ overlap by this part of their side, as diffusers' tiled AutoencoderKL does."""
WHITE = {np.dtype(np.bool_): 1.0, np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0}
"""White of pixels as levels, and of masks."""
Levels = Literal["uint8", "uint16"]
"""Types of levels that images are answered as."""


class Span(NamedTuple):
    """A tile along one axis, in pixels of the image.

    Attributes:
        start: First pixel that is computed.
        stop: The pixel after the last one that is computed.
        first: First pixel whose answer is used.
        last: The pixel after the last one whose answer is used.
        seam: Pixels from `first` on that are blended with the tile before.
        end: The pixel from which on the next tile's answer is used.
    """

    start: int
    stop: int
    first: int
    last: int
    seam: int
    end: int

    def over(self, block: int) -> Span:
        """The span on a grid with one place for each `block` pixels."""
        return Span(*(value // block for value in self))


def spans(length: int, side: int, tiles: Tiles, multiple: int) -> list[Span]:
    """Tiles along one axis.

    Args:
        length: Pixels of the axis, a multiple.
        side: Pixels of a tile, a multiple.
        tiles: How tiles differ from the whole image.
        multiple: All places are multiples of it.

    Raises:
        TooLarge: The tiles are too small for the model's margin.
    """
    if length <= side:
        return [Span(0, length, 0, length, 0, length)]
    margin, overlap = (-(-part // multiple) * multiple for part in (tiles.margin, side // OVERLAP))
    blend = -(-BLEND // multiple) * multiple if tiles.exact else overlap
    step = side - 2 * margin - blend
    if step < multiple:
        least = 2 * margin + blend + multiple
        raise TooLarge(f"the model's tiles need at least {least} x {least} pixels; raise VAE_TILE_PIXELS to {least**2}")
    # The last tile that diffusers makes may lie in the one before; it is blended all the same.
    starts = range(0, length, step) if not tiles.exact else range(0, length - 2 * margin - blend, step)
    stops = [min(start + side, length) for start in starts]
    firsts = [start + margin if start else 0 for start in starts]
    lasts = [stop if stop == length else stop - margin for stop in stops]
    seams = [0, *(max(0, before - first) for before, first in zip(lasts, firsts[1:], strict=False))]
    ends = [*firsts[1:], length]
    return [Span(*parts) for parts in zip(starts, stops, firsts, lasts, seams, ends, strict=True)]


def tile_side(size: Size, tiles: Tiles | None, tile_pixels: int, multiple: int = 1) -> int:
    """Height and width of the largest tile, a multiple of the model's number and of `multiple`."""
    step = math.lcm(size.multiple_of, multiple)
    most = tiles.side if tiles and tiles.side else size.max
    side = min(math.isqrt(tile_pixels), most, EXACT_SIDE if tiles and tiles.exact else most)
    return max(size.padded(size.min, multiple), side // step * step)


async def run_tiled(submit: Submit, program: ModelProgram, arrays: Arrays, tile_pixels: int, **known: Any) -> Trip:
    """Run a program over images of more than `tile_pixels` pixels, tile by tile.

    Args:
        submit: Runs a program over arrays of one tile.
        program: A program of a model of free size.
        arrays: Its inputs (n, ...). Those of four axes and more are images, or grids of one place a block of pixels.
        tile_pixels: Pixels of a tile at most.
        **known: Further arguments of `submit`; and `levels`, the type of images that are answered as levels; and
            `watch`, called with the number of tiles done and of all tiles after each.

    Returns:
        The outputs for whole images, and the time. Outputs without height and width are medians over the tiles.

    Raises:
        TooLarge: The program looks at whole images, or the model does not say how to cut them.
        InferenceFailed: An image to be answered as levels has values that are not finite.
        ServiceError: As `submit`.
    """
    free = program.free
    assert free is not None
    height, width = program.image_size(arrays)
    if free.tiles is None or not program.local:
        raise TooLarge(
            f"{program.operation} of model {program.model} takes images of at most {tile_pixels} pixels, not "
            f"{height} x {width}; send a smaller one, or raise VAE_TILE_PIXELS"
        )
    side, multiple = (
        tile_side(free.size, free.tiles, tile_pixels, program.block),
        math.lcm(free.size.multiple_of, program.block),
    )
    tall, wide = (spans(length, side, free.tiles, multiple) for length in (height, width))
    levels, watch = known.pop("levels", None), known.pop("watch", None)
    canvas = Canvas((height, width), len(arrays[0]), program.images if levels else (), levels or "uint8")
    spent, done, every = Trip((), 0.0, 0.0), 0, len(arrays[0]) * len(tall) * len(wide)
    for row in range(len(arrays[0])):
        cuts = _cuts(arrays, row, (height, width), list(product(tall, wide)))
        async with aclosing(_ahead(submit, program, cuts, known, begun=row > 0)) as trips:
            for down, across in product(tall, wide):
                trip = await anext(trips)
                canvas.add(row, down, across, trip.arrays)
                spent, done = trip.after(spent), done + 1
                if watch is not None:
                    watch(done, every)
    return spent._replace(arrays=canvas.arrays(), tiled=True)


async def _ahead(
    submit: Submit, program: ModelProgram, cuts: Iterator[Arrays], known: dict[str, Any], *, begun: bool
) -> AsyncGenerator[Trip, None]:
    """Run tile after tile; each one while the answer of the one before is blended."""
    begun = begun or known.pop("begun", False)
    ahead = asyncio.ensure_future(submit(program, next(cuts), begun=begun, **known))
    try:
        for cut in cuts:
            trip = await ahead
            ahead = asyncio.ensure_future(submit(program, cut, begun=True, **known))
            yield trip
        yield await ahead
    finally:
        ahead.cancel()


def _cuts(arrays: Arrays, row: int, size: tuple[int, int], tiles: list[tuple[Span, Span]]) -> Iterator[Arrays]:
    """The inputs of one tile after the other, as one row of float32."""
    for down, across in tiles:
        yield tuple(_cut(array[row : row + 1], size, down, across) for array in arrays)


def _cut(array: NDArray[Any], size: tuple[int, int], down: Span, across: Span) -> NDArray[Any]:
    if array.ndim < 4:  # (n, c, h, w)
        return array
    block = size[0] // array.shape[-2]
    tall, wide = down.over(block), across.over(block)
    tile = array[..., tall.start : tall.stop, wide.start : wide.stop]
    white = WHITE.get(array.dtype)
    if white is None:
        return np.ascontiguousarray(tile)
    if white == 1.0:
        return tile.astype(np.float32, order="C")
    return np.divide(tile, np.float32(white), dtype=np.float32)


class Canvas:
    """Whole outputs, into which the answers of tiles are blended from the top left to the bottom right.

    Args:
        size: Height and width of the images.
        rows: Number of images.
        levels: Places of the outputs that are kept as levels.
        kind: Type of the levels.
    """

    def __init__(self, size: tuple[int, int], rows: int, levels: tuple[int, ...], kind: Levels = "uint8") -> None:
        self._size, self._rows, self._levels, self._kind = size, rows, levels, np.dtype(kind)
        self._whole: list[NDArray[Any]] = []
        self._figures: dict[tuple[int, int], list[NDArray[Any]]] = {}
        self._above: list[dict[int, NDArray[Any]]] = []
        self._left: list[NDArray[Any]] = []

    def add(self, row: int, down: Span, across: Span, tiles: Arrays) -> None:
        """Blend the outputs of one tile of an image; the tiles come row by row.

        Raises:
            InferenceFailed: An image to be kept as levels has values that are not finite.
        """
        if not self._whole:
            self._whole = [self._empty(place, tile, down, across) for place, tile in enumerate(tiles)]
            self._above, self._left = [{} for _ in tiles], list(tiles)
        for place, tile in enumerate(tiles):
            if tile.ndim < 4:  # (n, c, h, w)
                self._figures.setdefault((place, row), []).append(tile)
            else:
                self._blend(place, row, (down, across), tile)

    def arrays(self) -> Arrays:
        """The outputs."""
        for (place, row), found in self._figures.items():
            self._whole[place][row] = np.median(np.concatenate(found), axis=0)
        return tuple(self._whole)

    def _empty(self, place: int, tile: NDArray[Any], down: Span, across: Span) -> NDArray[Any]:
        if tile.ndim < 4:  # (n, c, h, w)
            return np.empty((self._rows, *tile.shape[1:]), tile.dtype)
        lengths = (
            whole * length // (span.stop - span.start)
            for whole, length, span in zip(self._size, tile.shape[-2:], (down, across), strict=True)
        )
        kind = self._kind if place in self._levels else np.dtype(np.float32)
        return np.empty((self._rows, *tile.shape[1:-2], *lengths), kind)

    def _blend(self, place: int, row: int, spans: tuple[Span, Span], tile: NDArray[Any]) -> None:
        """Blend with the tile above, then with the one to the left, as diffusers' `blend_v` and `blend_h` do."""
        block = (spans[0].stop - spans[0].start) // tile.shape[-2]
        down, across = (span.over(block) for span in spans)
        tile = tile[
            ...,
            down.first - down.start : down.last - down.start,
            across.first - across.start : across.last - across.start,
        ].copy()
        if down.seam:
            _ramp(self._above[place][across.start], tile, -2, down.seam)
        if across.seam:
            _ramp(self._left[place], tile, -1, across.seam)
        self._above[place][across.start] = tile[..., down.end - down.first :, :]
        self._left[place] = tile[..., :, across.end - across.first :]
        kept = tile[0, ..., : down.end - down.first, : across.end - across.first]
        if place in self._levels:
            if not np.isfinite(kept).all():
                raise InferenceFailed("the model's answer for a tile of the image is not finite; try another version")
            kept = np.rint(np.clip(kept, 0.0, 1.0) * np.float32(WHITE[self._kind]))
        self._whole[place][row][..., down.first : down.end, across.first : across.end] = kept


def _ramp(before: NDArray[Any], tile: NDArray[Any], axis: int, seam: int) -> None:
    """Blend the first `seam` places of a tile with what the tile before holds there, linearly, in place."""
    weight = (np.arange(seam, dtype=np.float32) / np.float32(seam)).reshape((-1,) + (1,) * (-1 - axis))
    place = (..., slice(0, seam)) if axis == -1 else (..., slice(0, seam), slice(None))
    tile[place] = before[place] * (1 - weight) + tile[place] * weight
