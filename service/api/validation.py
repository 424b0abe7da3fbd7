"""Validation of a request: its options, and the shape, number and range of its rows, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from service.api.memory import answer_bytes
from service.codecs.payload import Intake, Meter, Payload, as_images, as_rows, channels_of, fits, viewed, within
from service.contract.graphs import fraction_of
from service.contract.images import FIT_ADVICE, Fit, fit
from service.errors import InvalidOption, InvalidShape, InvalidValue, TooLarge, WrongModel, quoted
from service.operations.inference.tiling import Tiling, tiling
from service.operations.operation import Inputs, LatentOptions, Operation, Rows
from service.runtime.model import Model

ROUNDING = 1e-6
"""Values outside the range by at most this much are clipped to it, because float32 rounds."""
OBSERVED_MARGIN = 10.0
"""How far a noisy value may lie outside [0, 1]."""


MOST_TERMS = 256
"""Bounds the terms that a model keeps, because options come from the client."""

Room = Callable[[int, tuple[int, int] | None], None]
"""Reserves memory for a number of rows, of the height and width of the graphs' images where they are free."""


class Terms:
    """What requests for an operation of a variant of a model with the same options have in common.

    Worked out once, because it takes longer than all that differs between two small requests.

    Attributes:
        shape: Shape of one row in the request.
        resizing: How images of another size are adapted; as in `Options`.
        multiplicity: Rows that one row of the request becomes.
        row_bytes: Estimated memory of answering one row; None where images are of free size.
        bounds: Range of the numbers of a request that is neither latents in place of images nor raw.
        offered: Whether the variant is known to have what operation and options need.
        checked: Whether the options are known to suit the variant, whose images have one size.
    """

    __slots__ = (
        "_kept", "bounds", "checked", "multiplicity", "offered", "resizing", "row_bytes", "shape",
    )  # fmt: skip

    def __init__(self, operation: Operation, model: Model, options: Any) -> None:
        """Work out the terms. They do not refer to the model, which refers to them."""
        self._kept = operation, options  # so that no others get their ids
        self.shape = operation.row_shape(model, options)
        self.resizing, self.multiplicity = options.resizing, options.multiplicity
        self.row_bytes = answer_bytes(model, options, 1) if model.free is None else None
        self.bounds = _bounds(operation, operation.takes, raw=False)
        self.offered = self.checked = False


def terms_of(operation: Operation, model: Model, options: Any) -> Terms:
    """Return the terms of an operation, a variant of a model and options; the same object for the same objects."""
    key = id(operation), id(options)
    known: Terms | None = model.terms.get(key)
    if known is None:
        if len(model.terms) >= MOST_TERMS:
            model.terms.clear()
        known = model.terms[key] = Terms(operation, model, options)
    return known


def options_of(operation: Operation, named: Mapping[str, Any], max_draws: int) -> Any:
    """Read the options of an operation.

    Args:
        operation: The operation.
        named: Options by name, as text or as JSON values.
        max_draws: Most rows that one row becomes (VAE_MAX_DRAWS).

    Raises:
        InvalidOption: One is unknown or invalid.
    """
    try:
        options = operation.options.model_validate(named)
    except ValidationError as error:
        known = ", ".join(operation.options.model_fields) or "none"
        wrong = error.errors()[:3]
        problem = "; ".join(f"{quoted('.'.join(map(str, one['loc'])))}: {one['msg']}" for one in wrong)
        raise InvalidOption(f"{problem} (options of {operation.name}: {known})") from error
    if options.multiplicity > max_draws:
        raise InvalidOption(f"draws is {options.multiplicity}, VAE_MAX_DRAWS is {max_draws}")
    return options


def intake_of(operation: Operation, model: Model, options: Any, meter: Meter, tile_pixels: int) -> Intake:
    """What a codec reads for an operation of a model.

    Args:
        operation: The operation.
        model: The first variant of the model.
        options: The options.
        meter: Limits on reading.
        tile_pixels: Pixels above which images of free size keep integer levels (VAE_TILE_PIXELS).
    """
    return Intake(
        operation.takes or "",
        terms_of(operation, model, options).shape,
        meter,
        operation.masked,
        operation.or_latents,
        tuple(model.variants) if model.others else (),
        None if model.free is None else tile_pixels,
        operation.observed and not operation.masked,
    )


def check_fingerprint(model: Model, header: bytes | None, options: Any) -> None:
    """Refuse a request for the fingerprint of another model.

    Raises:
        WrongModel: The header X-Fingerprint or the option `fingerprint` names another one.
    """
    option = options.fingerprint if isinstance(options, LatentOptions) else None
    if header is None and option is None:
        return
    manifest = model.manifest
    for fingerprint in (None if header is None else header.decode("latin-1"), option):
        if fingerprint is not None and fingerprint != manifest.fingerprint:
            raise WrongModel(
                f"the request is for the model with fingerprint {quoted(fingerprint)}, but {manifest.name} version "
                f"{manifest.version} has {manifest.fingerprint}; ask the model that gave the latents, or encode again"
            )


def variant_of(operation: Operation, model: Model, payload: Payload, options: Any) -> Model:
    """The variant of a model that a request is for.

    The channels of its images choose it, else its options. Latents without such an option are for the first variant
    whose latents have their shape.

    Raises:
        InvalidShape: The images have other channels than every variant.
        InvalidOption: No variant is as the options ask.
    """
    found: Model = options.variant(model)
    array = payload.array
    if array is None or not model.others:
        return found
    if not payload.latents and operation.takes == "images":
        return model.variants[channels_of(array, tuple(model.variants))]
    every, shapes = (found, *model.variants.values()), (array.shape[1:], array.shape)
    return next((one for one in every if any(fits(shape, one.latent_shape) for shape in shapes)), found)


def admit(
    operation: Operation,
    model: Model,
    payload: Payload,
    options: Any,
    max_rows: int,
    room: Room,
    float_pixels: int | None = None,
) -> Inputs:
    """Check the arrays of a request, and adapt them to rows of the model's shape.

    Args:
        operation: The operation.
        model: The model.
        payload: The arrays of the request.
        options: The options.
        max_rows: Maximum rows of a request, draws counted.
        room: Reserves memory.
        float_pixels: Pixels above which images of free size keep integer levels.

    Returns:
        Inputs whose rows have the model's shape, or are cut into tiles of it. Images of free size are padded to a size
        that the graphs take.

    Raises:
        InvalidShape: The arrays have another shape than the model's.
        InvalidValue: A value is outside the range.
        InvalidOption: The model or the operation cannot serve an option.
        TooLarge: There are too many rows, or `room` raises it.
        Overloaded: `room` raises it.
    """
    terms = terms_of(operation, model, options)
    if operation.takes is None:
        return _admit_count(model, options, max_rows, room)
    if payload.array is None:
        raise InvalidShape(f'the body lacks "{operation.takes}"')
    if model.free is not None:
        return _admit_free(operation, model, payload, options, max_rows, room, float_pixels)
    if not terms.checked:
        options.check(model)
        terms.checked = True
    shape, name, bounds = terms.shape, operation.takes, terms.bounds
    if payload.latents:
        shape, name = model.latent_shape, "latents"
    if payload.latents or payload.raw:
        bounds = _bounds(operation, name, raw=payload.raw)
    tiles = None
    if terms.resizing == "tile":
        images = as_images(payload.array, shape, name)
        tiles = tiling(len(images), (images.shape[2], images.shape[3]), (shape[1], shape[2]))
        check_tiles(tiles, terms.multiplicity, max_rows)
        shape = images.shape[1:]
    larger = "" if payload.array.shape[1:] == shape else _larger(payload.array, model, shape, name, options, max_rows)
    rows = _shaped(payload.array, shape, name, terms.resizing, max_rows, room, larger)
    count = tiles.rows if tiles else len(rows)
    check_count(count * terms.multiplicity, max_rows)
    room(count, None)
    rows = in_range(rows, *bounds, name)
    mask = None
    if operation.masked or payload.mask is not None:
        mask = _mask(operation, payload, shape, options, len(rows), room).astype(np.float32)
        mask = np.broadcast_to(mask, (len(rows), *shape))
    if tiles is not None:
        rows, mask = tiles.cut(rows), None if mask is None else tiles.cut(mask)
    return Inputs(rows, mask, latents=payload.latents, tiling=tiles, raw=payload.raw)


def _admit_count(model: Model, options: Any, max_rows: int, room: Room) -> Inputs:
    """`admit` for an operation without inputs."""
    options.check(model)
    check_count(options.count, max_rows)
    made = options.made_size(model)
    room(options.count, None if made is None else padded(model, made))
    return Inputs(np.empty((options.count, 0), np.float32), size=made)


def _admit_free(
    operation: Operation,
    model: Model,
    payload: Payload,
    options: Any,
    max_rows: int,
    room: Room,
    float_pixels: int | None,
) -> Inputs:
    """The same for a model whose images have any size: they are padded by reflection, as are their masks."""
    assert payload.array is not None
    if options.resizing is not None:
        raise InvalidOption(f"model {model.manifest.name} takes images of any size; leave fit out")
    options.check(model)
    if payload.latents or operation.takes == "latents":
        rows = as_rows(payload.array, model.latent_shape, "latents")
        check_count(len(rows) * options.multiplicity, max_rows)
        room(len(rows), _size_of_latents(model, rows.shape[1:]))
        rows = in_range(rows, -np.inf, np.inf, "latents")
        return Inputs(rows, latents=payload.latents, raw=payload.raw)
    images = as_images(payload.array, model.input_shape, "images", float_pixels)
    shape = images.shape[1:]
    size = shape[1] * options.enlargement, shape[2] * options.enlargement
    height, width = padded(model, size, options.enlargement)
    check_count(len(images) * options.multiplicity, max_rows)
    room(len(images), (height, width))
    if images.dtype.kind == "f":  # levels are in the range
        images = in_range(images, *_bounds(operation, "images", raw=payload.raw), "images")
    rows, mask = _reflected(images, height // options.enlargement, width // options.enlargement), None
    if operation.masked or payload.mask is not None:
        mask = _mask(operation, payload, shape, options, len(images), room)
        mask = mask if rows.dtype.kind == "u" else mask.astype(np.float32)
        mask = np.broadcast_to(_reflected(mask, *rows.shape[2:]), rows.shape)
    return Inputs(rows, mask, size=size, raw=payload.raw)


def padded(model: Model, size: tuple[int, int], scale: int = 1) -> tuple[int, int]:
    """Height and width of the graphs' images, for images of free size.

    Args:
        model: A model of free size.
        size: Height and width of the images.
        scale: A number of which they must be multiples too.

    Raises:
        InvalidShape: They are too large for the model.
    """
    known = model.manifest.size
    assert known is not None
    height, width = model.padded(size, scale)
    if max(height, width) > known.max:
        raise InvalidShape(
            f"images of {size[0]} x {size[1]} pixels are too large for model {model.manifest.name}, whose sides have "
            f"at most {known.max}; shrink them, or use another model"
        )
    return height, width


def _size_of_latents(model: Model, shape: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of the images that latents of a shape are decoded to.

    Raises:
        InvalidShape: The model has no such images.
    """
    size = {"height": 0, "width": 0}
    for axis, length in zip(model.manifest.latent_shape, shape, strict=True):
        if isinstance(axis, str) and (known := fraction_of(axis)):
            size[known[0]] = length * known[1]
    found = size["height"], size["width"]
    if not all(found) or padded(model, found) != found or model.latent_at(*found) != shape:
        assert model.manifest.size is not None
        least = model.latent_at(model.manifest.size.min, model.manifest.size.min)
        raise InvalidShape(
            f"no image of model {model.manifest.name} has latents of shape {shape}; the least is {least}"
        )
    return found


def _reflected(images: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Images (n, c, h, w) with reflections of their pixels below and to the right."""
    below, right = height - images.shape[2], width - images.shape[3]
    if not (below or right):
        return images
    return np.pad(images, ((0, 0), (0, 0), (0, below), (0, right)), "reflect")


def _larger(array: NDArray[Any], model: Model, shape: tuple[int, ...], name: str, options: Any, max_rows: int) -> str:
    """Advice for an error message: `fit=tile`, if operation, model and images allow it, else nothing."""
    if name != "images" or not (options.tiles and model.manifest.tileable):
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
    how: Fit | Literal["tile"] | None,
    max_rows: int,
    room: Room,
    larger: str = "",
) -> Rows:
    """Rows of a shape, resized if the options have a `fit`."""
    if how is None or how == "tile" or name == "latents":
        return as_rows(array, shape, name, larger)
    images = as_images(array, shape, name)
    check_count(len(images), max_rows)
    room(len(images), None)
    return images if images.shape[1:] == shape else fit(images, (shape[1], shape[2]), how)


def _mask(
    operation: Operation, payload: Payload, shape: tuple[int, ...], options: Any, rows: int, room: Room
) -> NDArray[np.bool_]:
    """Masks (1, 1, h, w) or (rows, 1, h, w), true where a pixel is seen.

    Raises:
        InvalidShape: The mask is missing, or has another shape than the images.
        InvalidValue: A value is outside the range.
        InvalidOption: The operation takes none.
    """
    if payload.mask is None:
        raise InvalidShape(
            f"{operation.name} needs a mask, 1 where a pixel is seen and 0 where it is missing: `mask` in JSON, a "
            "second file in the field `mask` of a form, or the transparency of the picture"
        )
    if not operation.observed:
        raise InvalidOption(f"{operation.name} takes no mask")
    mask = _shaped(payload.mask, (1, *shape[1:]), "mask", options.resizing, rows, room)
    mask = in_range(mask, 0.0, 1.0, "mask")
    if len(mask) not in (1, rows):
        raise InvalidShape(f"{len(mask)} masks for {rows} images; send one, or one an image")
    found: NDArray[np.bool_] = mask >= 0.5
    return found


def _bounds(operation: Operation, name: str | None, *, raw: bool) -> tuple[float, float]:
    """Range of the numbers of a request."""
    if name == "latents" or raw:
        return -np.inf, np.inf
    margin = OBSERVED_MARGIN if operation.observed else 0.0
    return 0.0 - margin, 1.0 + margin


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
