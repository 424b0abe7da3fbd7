"""Validation of inputs: shape, number and range of rows, compared with the manifest before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.codecs.payload import Payload, as_images, as_rows, viewed, within
from service.contract.images import FIT_ADVICE, fit
from service.errors import InvalidOption, InvalidShape, InvalidValue, TooLarge
from service.operations.inference.tiling import Tiling, tiling
from service.operations.operation import Inputs, Operation, Rows
from service.runtime.model import Model

ROUNDING = 1e-6
"""Values outside the range by at most this much are clipped to it, because float32 rounds."""
OBSERVED_MARGIN = 10.0
"""How far a noisy value may lie outside [0, 1]."""


def admit(
    operation: Operation,
    model: Model,
    payload: Payload,
    options: Any,
    max_rows: int,
    room: Callable[..., None],
) -> Inputs:
    """Check the arrays of a request, and adapt them to rows of the model's shape.

    Args:
        operation: The operation.
        model: The model.
        payload: The arrays of the request.
        options: The options.
        max_rows: Maximum rows of a request, draws counted.
        room: Reserves memory for a number of rows of images of a size.

    Returns:
        Inputs whose rows have the model's shape, or are cut into tiles of it.

    Raises:
        InvalidShape: The arrays have another shape than the model's.
        InvalidValue: A value is outside the range.
        InvalidOption: The model or the operation cannot serve an option.
        TooLarge: There are too many rows, or `room` raises it.
        Overloaded: `room` raises it.
    """
    if operation.takes is None:
        options.check(model)
        check_count(options.count, max_rows)
        size = options.made_size(model)
        room(options.count, size)
        return Inputs(np.empty((options.count, 0), np.float32), size=size)
    if payload.array is None:
        raise InvalidShape(f'the body lacks "{operation.takes}"')
    options.check(model)
    shape, name = operation.row_shape(model, options), operation.takes
    if payload.latents:
        shape, name = model.latent_shape, "latents"
    tiles = None
    if options.resizing == "tile":
        images = as_images(payload.array, shape, name)
        tiles = tiling(len(images), (images.shape[2], images.shape[3]), (shape[1], shape[2]))
        check_tiles(tiles, options.multiplicity, max_rows)
        shape = images.shape[1:]
    larger = _larger(payload.array, model, shape, options, max_rows) if name == "images" else ""
    rows = _shaped(payload.array, shape, name, options, max_rows, room, larger)
    count = tiles.rows if tiles else len(rows)
    check_count(count * options.multiplicity, max_rows)
    room(count)
    rows = in_range(rows, *_bounds(operation, name), name)
    if payload.mask is None and operation.masked:
        raise InvalidShape(
            f"{operation.name} needs a mask, 1 where a pixel is seen and 0 where it is missing: `mask` in JSON, a "
            "second file in the field `mask` of a form, or the transparency of the picture"
        )
    if payload.mask is not None and not operation.observed:
        raise InvalidOption(f"{operation.name} takes no mask")
    mask = None if payload.mask is None else _mask(payload.mask, shape, options, len(rows), room)
    if tiles is not None:
        rows, mask = tiles.cut(rows), None if mask is None else tiles.cut(mask)
    return Inputs(rows, mask, latents=payload.latents, tiling=tiles)


def _larger(array: NDArray[Any], model: Model, shape: tuple[int, ...], options: Any, max_rows: int) -> str:
    """Advice for an error message: `fit=tile`, if operation, model and images allow it, else nothing."""
    if array.shape[1:] == shape or not (options.tiles and model.manifest.tileable):
        return ""
    images = viewed(array, shape, "images")
    if images is None or images.shape[2] < shape[1] or images.shape[3] < shape[2]:
        return ""
    tiles = tiling(len(images), (images.shape[2], images.shape[3]), (shape[1], shape[2]))
    fits = tiles.rows * options.multiplicity <= max_rows
    return "; fit=tile restores larger ones part by part" if fits else ""


def _shaped(
    array: NDArray[Any],
    shape: tuple[int, ...],
    name: str,
    options: Any,
    max_rows: int,
    room: Callable[[int], None],
    larger: str = "",
) -> Rows:
    """Rows of a shape, resized if the options have a `fit`."""
    how = options.resizing
    if how in (None, "tile") or name == "latents":
        return as_rows(array, shape, name, larger)
    images = as_images(array, shape, name)
    check_count(len(images), max_rows)
    room(len(images))
    return images if images.shape[1:] == shape else fit(images, (shape[1], shape[2]), how)


def _mask(array: NDArray[Any], shape: tuple[int, ...], options: Any, rows: int, room: Callable[[int], None]) -> Rows:
    """Masks (n, c, h, w), 1 where a pixel is seen, from one mask for all rows or one for each row."""
    mask = _shaped(array, (1, *shape[1:]), "mask", options, rows, room)
    mask = in_range(mask, 0.0, 1.0, "mask")
    if len(mask) not in (1, rows):
        raise InvalidShape(f"{len(mask)} masks for {rows} images; send one, or one an image")
    return np.broadcast_to((mask >= 0.5).astype(np.float32), (rows, *shape))


def _bounds(operation: Operation, name: str) -> tuple[float, float]:
    if name == "latents":
        return -np.inf, np.inf
    margin = OBSERVED_MARGIN if operation.observed else 0.0
    return -margin, 1.0 + margin


def check_tiles(tiles: Tiling, multiplicity: int, limit: int) -> None:
    """Refuse more tiles than one request may have rows.

    Args:
        tiles: The tiles.
        multiplicity: Rows that one tile becomes.
        limit: Maximum rows.

    Raises:
        TooLarge: There are more; the message names what works.
    """
    count = tiles.rows
    if count * multiplicity > limit:
        (height, width), (tall, wide) = tiles.size, tiles.tile
        drawn = f" of {multiplicity} draws each" if multiplicity > 1 else ""
        ways = [
            *(["fewer draws"] if count <= limit < count * multiplicity else []),
            *(["fewer images"] if tiles.tiles * multiplicity <= limit < count * multiplicity else []),
            FIT_ADVICE,
        ]
        raise TooLarge(
            f"{tiles.images} x {height} x {width} pixels are {count} tiles of {tall} x {wide}{drawn}; "
            f"VAE_MAX_REQUEST_ROWS is {limit}; use {' or '.join(ways)}"
        )


def check_count(rows: int, limit: int) -> None:
    """Refuse more rows than one request may have.

    Raises:
        TooLarge: There are more than `limit`.
    """
    if rows > limit:
        raise TooLarge(f"{rows} rows in one request, draws counted; VAE_MAX_REQUEST_ROWS is {limit}")


def in_range(array: Rows, low: float, high: float, name: str) -> Rows:
    """Check that all values lie in [low, high].

    Args:
        array: The values.
        low: Lower bound.
        high: Upper bound.
        name: Name of the array, for the message.

    Returns:
        The values. Those that rounding put outside by at most `ROUNDING` are clipped.

    Raises:
        InvalidValue: A value is not finite, or lies further outside.
    """
    if low == 0.0 and within(array, high):
        return array  # the usual case
    least, most = array.min(), array.max()  # both are NaN if any value is
    if not (np.isfinite(least) and np.isfinite(most)):
        raise InvalidValue(f"{name} has NaN, infinity or a number that float32 cannot hold; every value must be finite")
    if least >= low and most <= high:
        return array
    if float(least) >= low - ROUNDING and float(most) <= high + ROUNDING:
        return np.clip(array, np.float32(low), np.float32(high))
    advice = "; divide 8-bit values by 255" if most > 1.0 and name == "images" else ""
    raise InvalidValue(
        f"{name} has values from {least!s} to {most!s}; they must lie in [{low:.9g}, {high:.9g}]{advice}"
    )
