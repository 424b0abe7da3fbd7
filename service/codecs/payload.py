"""What passes between a codec and an operation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.contract.images import FIT_ADVICE, Pixels
from service.errors import Deferred, InvalidShape, InvalidValue, TooLarge

FLOAT = np.dtype("<f4")
"""What travels in binary."""
LARGEST = float(np.finfo(FLOAT).max)
UNSIGNED = {4: np.uint32, 8: np.uint64}


LOOP_PIXELS, LOOP_PICTURES = 2**14, 4
"""What the event loop decodes of one body; more goes to a thread."""


class Meter:
    """What reading one body may cost: pixels of all its pictures, rows, memory, time.

    A reader asks it before it allocates or decodes, since work in a thread cannot be cancelled.
    """

    def __init__(
        self,
        max_pixels: int = 2**24,
        max_rows: int = 2**14,
        reserve: Callable[[int], None] = lambda _: None,
        check_time: Callable[[], None] = lambda: None,
        *,
        in_loop: bool = False,
    ) -> None:
        """Limits of one request.

        Args:
            max_pixels: Pixels of all pictures together, masks included (VAE_MAX_PIXELS).
            max_rows: Rows of one request (VAE_MAX_REQUEST_ROWS).
            reserve: Takes a number of bytes from the memory budget until the request is answered; raises TooLarge or
                Overloaded where they are not there.
            check_time: Raises DeadlinePassed after the request's deadline. To be called between parts of long work.
            in_loop: Whether the event loop waits for the reader, so that only few small pictures may be decoded.
        """
        self.max_pixels, self.max_rows = max_pixels, max_rows
        self.reserve, self.check_time = reserve, check_time
        self._pixels = self._pictures = 0
        self._in_loop = in_loop

    def picture(self, width: int, height: int, pixel_bytes: int) -> None:
        """Count a picture, known from its header, before it is decoded.

        Args:
            width: Pixels a row.
            height: Rows of pixels.
            pixel_bytes: Most memory that decoding and converting takes, in bytes a pixel.

        Raises:
            TooLarge: The request's pictures exceed VAE_MAX_PIXELS, or their memory VAE_MEMORY_BYTES.
            Overloaded: Other requests leave too little memory.
            DeadlinePassed: The request's time is up.
            Deferred: Decoding takes too long for the event loop.
        """
        if self._pixels + width * height > self.max_pixels:
            further = f", with {self._pixels} of the request's other pictures," if self._pixels else ""
            raise TooLarge(f"{width} x {height} pixels{further} are above VAE_MAX_PIXELS ({self.max_pixels})")
        self._pixels += width * height
        self._pictures += 1
        if self._in_loop and (self._pixels > LOOP_PIXELS or self._pictures > LOOP_PICTURES):
            raise Deferred
        self.check_time()
        self.reserve(width * height * pixel_bytes)


class Intake(NamedTuple):
    """What the operation takes: the array's name, the shape of one row, and what reading may cost.

    masked: whether a picture's transparency is a mask. or_latents: whether latents may come in place of images.
    """

    name: str
    shape: tuple[int, ...]
    meter: Meter
    masked: bool = False
    or_latents: bool = False

    @property
    def is_images(self) -> bool:
        """Whether picture files make sense."""
        return self.name == "images"


class Payload(NamedTuple):
    """A body read: the array as it was sent, an optional mask beside it, and the options it named."""

    array: NDArray[Any] | None
    mask: NDArray[Any] | None = None
    options: Mapping[str, Any] = MappingProxyType({})
    latents: bool = False
    """Whether the array is of latents, sent in place of images."""


class Answer(NamedTuple):
    """What an operation gives: arrays by name, each with one row a row, and what it took to make them."""

    outputs: dict[str, NDArray[np.float32]]
    about: Mapping[str, Any] = MappingProxyType({})


Body = bytes | bytearray
Reader = Callable[[Body, str, Intake], Payload]
"""(body, whole content type, what is wanted) -> Payload; raises Unreadable, InvalidShape, TooLarge."""
Writer = Callable[[Answer], Body | None]
"""None where the format cannot hold this answer."""
Header = Callable[[tuple[int, ...]], bytes]
"""Of a binary form: what comes before the numbers of an array of that shape."""


def binary(header: Header) -> Writer:
    """The writer of a form that is a header and then the numbers of one array."""

    def write(answer: Answer) -> bytes | None:
        array = single_array(answer.outputs)
        return None if array is None else header(array.shape) + array.tobytes()

    return write


def single_array(outputs: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32] | None:
    """The one array of a binary answer, little-endian: several outputs of one shape are stacked along axis 1."""
    arrays = list(outputs.values())
    if len(arrays) == 1:
        return np.ascontiguousarray(arrays[0], FLOAT)
    shapes = {array.shape for array in arrays}
    return np.stack(arrays, 1, dtype=FLOAT) if len(shapes) == 1 else None


def images_only(answer: Answer) -> Pixels | None:
    """The images of an answer that has nothing else."""
    return answer.outputs["images"] if set(answer.outputs) == {"images"} else None


def check_pictures(count: int, meter: Meter) -> None:
    """Refuse more pictures than one request may have rows, before any is decoded.

    Raises: TooLarge.
    """
    if count > meter.max_rows:
        raise TooLarge(f"{count} pictures in one request; VAE_MAX_REQUEST_ROWS is {meter.max_rows}")


def as_rows(array: NDArray[Any], shape: tuple[int, ...], name: str, larger: str = "") -> NDArray[np.float32]:
    """Float32 rows (n, *shape) of the model's shape.

    Also taken are one bare row, for one channel the same without the channel axis, and, unless they are latents, images
    whose last axis is the channels'. A view where the array already is what is wanted.

    larger: what else than `fit` may be advised for images of another size.

    Raises:
        InvalidShape: No reading fits; the message names both shapes and the fix.
        InvalidValue: Integers whose scale is not known.
    """
    found = array.shape
    if found[1:] == shape or found == shape:
        rows = array
    elif name != "latents" and (moved := _exact(array, shape)) is not None:
        rows = moved
    else:
        wanted = ", ".join(map(str, shape))
        raise InvalidShape(
            f"{name} has shape {found}; the model takes (n, {wanted}){_advice(found, shape, name, larger)}"
        )
    rows = rows.reshape(-1, *shape)
    if len(rows) == 0:
        raise InvalidShape(f"{name} has no rows; send at least one")
    return as_floats(rows, name)


def as_images(array: NDArray[Any], shape: tuple[int, ...], name: str) -> Pixels:
    """Float32 (n, channels, h, w) of any size from the same forms as `as_rows`; the model's own shape is tried first.

    Raises:
        InvalidShape: No reading fits, or more than one does.
        InvalidValue: As `as_rows` does.
    """
    found, moved = array.shape, viewed(array, shape, name)
    if moved is None:
        raise InvalidShape(
            f"{name} has shape {found}; the model takes (n, {shape[0]}, height, width){_advice(found, shape, name)}"
        )
    return as_floats(moved, name)


def viewed(array: NDArray[Any], shape: tuple[int, ...], name: str) -> NDArray[Any] | None:
    """The array as (n, channels, h, w), of any size and type; None where it cannot be read so."""
    found, channels = array.shape, shape[0]
    if 0 in found:
        return None
    moved = array if found[1:] == shape else array[None] if found == shape else _exact(array, shape)
    moved = _of_any_size(array, shape, name) if moved is None else moved
    return None if moved is None else moved.reshape(-1, channels, *moved.shape[-2:])


COLOURS = (3, 4)
"""Channels of colour pictures."""


def _exact(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any] | None:
    """Images of exactly that size: grey ones without an axis of channels, or any with that axis last."""
    channels, height, width = shape
    found = array.shape
    if channels == 1 and found[-2:] == (height, width) and len(found) <= 3:
        return array
    if found[-3:] == (height, width, channels) and len(found) in (3, 4):
        return np.moveaxis(array, -1, -3)
    return None


def _of_any_size(array: NDArray[Any], shape: tuple[int, ...], name: str) -> NDArray[Any] | None:
    """Images of any size, as (n, c, h, w), (c, h, w), the same with the channels last, or grey (n, h, w), (h, w)."""
    found, channels = array.shape, shape[0]
    axes = len(found)
    if axes not in (2, 3, 4) or (axes == 2 and (channels != 1 or found[1] == math.prod(shape))):
        return None
    if axes == 2 or (axes > 2 and found[-3] == channels):
        return array
    if found[-1] == channels and min(found[-3:-1]) > 1:
        return np.moveaxis(array, -1, -3)
    if axes == 3 and channels == 1 and (name == "mask" or not {found[0], found[-1]} & set(COLOURS)):
        return array
    return None


def _advice(found: tuple[int, ...], shape: tuple[int, ...], name: str, larger: str = "") -> str:
    """What to do about an array that is none of these."""
    flat = math.prod(shape)
    if found and flat == found[-1] and len(found) <= 2 and len(shape) > 1:
        one = f", or a single image to (1, 1, {found[0]}, {flat})" if len(found) == 2 and shape[0] == 1 else ""
        return f"; reshape it to ({', '.join(map(str, (*found[:-1], *shape)))}){one}"
    if name == "latents" or len(shape) != 3:
        return ""
    channels = shape[0]
    places = {found[-3], found[-1]} if len(found) in (3, 4) else set()
    if channels == 1 and places & set(COLOURS):
        return (
            "; convert colour to grey first, or send picture files, which the service converts. Grey images of that "
            "many rows or columns are sent as (n, 1, height, width)"
        )
    if channels in places or (channels == 1 and len(found) in (2, 3)):
        return f"; {FIT_ADVICE} brings images to its size{larger}" if name == "images" else ""
    if channels > 1 and (len(found) == 2 or 1 in places):
        return f"; repeat the grey images in {channels} channels, or send picture files, which the service converts"
    return ""


def within(array: NDArray[np.floating[Any]], high: float) -> bool:
    """Whether every value lies in [0, high] and is not -0.0, in one pass.

    As unsigned integers, the bits of negative numbers, NaN and infinity are above those of all other values. numpy's
    `argmax` takes a quarter of the time of `max`.
    """
    bits = array.view(UNSIGNED[array.itemsize])
    return bool(bits.item(bits.argmax()) <= _bits(high, array.dtype))


@lru_cache
def _bits(value: float, kind: np.dtype[Any]) -> int:
    return int(np.array(value, kind).view(UNSIGNED[kind.itemsize]))


def _narrowed(array: NDArray[Any]) -> NDArray[np.float32]:
    """Float32; what that cannot hold becomes infinite, and is refused with the range."""
    if array.dtype == np.float64 and within(array, LARGEST):
        return array.astype(np.float32, "C")
    with np.errstate(over="ignore"):
        return array.astype(np.float32, "C")


def as_floats(array: NDArray[Any], name: str) -> NDArray[np.float32]:
    """Float32 in C order: bool as 0 and 1, uint8 images as 255ths, uint8 masks of 0 and 1 or of 0 and 255.

    Raises:
        InvalidShape: The array is not of numbers, or latents are integers.
        InvalidValue: It is not known what 8-bit levels mean.
    """
    kind = array.dtype.kind
    if kind == "f" and array.dtype.itemsize <= FLOAT.itemsize:
        return np.ascontiguousarray(array, np.float32)
    if kind == "f":
        return _narrowed(array)
    if name == "latents" or array.dtype not in (np.bool_, np.uint8):
        raise InvalidShape(f"{name} must be floats, not {array.dtype}")
    if kind == "b":
        return np.ascontiguousarray(array, np.float32)
    most = array.max()
    if name == "mask":
        if not ((array == 0) | (array == most)).all() or most not in (0, 1, 255):
            raise InvalidValue("a mask in uint8 must hold 0 and 1, or 0 and 255; 0 is missing")
        return np.ascontiguousarray(array != 0, np.float32)
    if most == 1:
        raise InvalidValue(
            f"{name} in uint8 are levels of 0 to 255, but the highest is 1; send black and white as bool, as float32, "
            "or as 0 and 255"
        )
    return np.divide(array, np.float32(255.0), dtype=np.float32, order="C")
