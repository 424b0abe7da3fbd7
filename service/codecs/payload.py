"""Data between codecs and operations: what is wanted, what was read, what is written; arrays brought to rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.codecs.source import LEVELS, Source
from service.contract.images import FIT_ADVICE, MODES, WHITE, Pixels, white_of
from service.errors import Deferred, InvalidOption, InvalidShape, InvalidValue, TooLarge

FLOAT = np.dtype("<f4")
"""Numbers in binary formats."""
LARGEST = float(np.finfo(FLOAT).max)
UNSIGNED = {4: np.uint32, 8: np.uint64}


LOOP_PIXELS, LOOP_PICTURES = 2**14, 4
"""Most pixels and pictures of one body that the event loop decodes; more go to a thread."""


class Meter:
    """Limits on reading one body: pixels of all its pictures, rows, memory, time.

    A codec asks before it allocates or decodes, because work in a thread cannot be cancelled.
    """

    def __init__(
        self,
        max_pixels: int = 2**25,
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
                Overloaded where they are not free.
            check_time: Raises DeadlinePassed after the request's deadline. Long work calls it between its parts.
            in_loop: Whether the codec runs in the event loop, where only few small pictures may be decoded.
        """
        self.max_pixels, self.max_rows = max_pixels, max_rows
        self.reserve, self.check_time = reserve, check_time
        self._pixels = self._pictures = 0
        self._in_loop = in_loop

    def slow(self) -> None:
        """Raise Deferred in the event loop: what follows takes too long for it."""
        if self._in_loop:
            raise Deferred

    def picture(self, width: int, height: int, pixel_bytes: int, pages: int = 1) -> None:
        """Count a picture by the size in its header, before it is decoded.

        Args:
            width: Pixels a row.
            height: Rows of pixels.
            pixel_bytes: Most memory that decoding and converting takes, in bytes a pixel.
            pages: Pictures of that size.

        Raises:
            TooLarge: The request's pictures exceed VAE_MAX_PIXELS, or their memory VAE_MEMORY_BYTES.
            Overloaded: Other requests leave too little memory.
            DeadlinePassed: The request's time is up.
            Deferred: Decoding takes too long for the event loop.
        """
        pixels = width * height * pages
        if self._pixels + pixels > self.max_pixels:
            several = f"{pages} pages of " if pages > 1 else ""
            further = f", with {self._pixels} of the request's other pictures," if self._pixels else ""
            raise TooLarge(f"{several}{width} x {height} pixels{further} are above VAE_MAX_PIXELS ({self.max_pixels})")
        self._pixels += pixels
        self._pictures += 1
        if self._pixels > LOOP_PIXELS or self._pictures > LOOP_PICTURES:
            self.slow()
        self.check_time()
        self.reserve(pixels * pixel_bytes)


class Intake(NamedTuple):
    """What an operation takes, for the codec that reads it.

    Attributes:
        name: `images` or `latents`; empty where the operation takes no array.
        shape: Of one row, without the axis of rows; 0 where an axis may have any length.
        meter: Limits on reading.
        masked: Whether the transparency of a picture is a mask.
        or_latents: Whether `latents` may be sent in place of images.
        variants: Channels of the images of each variant of the model; empty where the shape's are the only ones.
        float_pixels: Pixels above which 8-bit and 16-bit images keep their integer levels; None converts all.
        keeps_alpha: Whether the answer keeps the opacity of a picture, whose colours are then as they are stored.
    """

    name: str
    shape: tuple[int, ...]
    meter: Meter
    masked: bool = False
    or_latents: bool = False
    variants: tuple[int, ...] = ()
    float_pixels: int | None = None
    keeps_alpha: bool = False

    @property
    def is_images(self) -> bool:
        """Whether picture files make sense."""
        return self.name == "images"

    @property
    def channels(self) -> tuple[int, ...]:
        """Numbers of channels that images may have."""
        return self.variants or self.shape[:1]

    def keeps_levels(self, array: NDArray[Any]) -> bool:
        """Whether an array holds images whose levels stay integers."""
        if self.float_pixels is None or not self.is_images or array.dtype.kind != "u":
            return False
        count = _channels_in(array, self.channels)
        images = None if count is None else viewed(array, (count, *self.shape[1:]), self.name)
        return images is not None and images[0, 0].size > self.float_pixels


class Payload(NamedTuple):
    """The content of a body: the array as it was sent, a mask beside it, and the options that it names."""

    array: NDArray[Any] | None
    mask: NDArray[Any] | None = None
    options: Mapping[str, Any] = MappingProxyType({})
    latents: bool = False
    """Whether the array holds latents, sent in place of images."""
    source: Source | None = None
    """What an answer keeps of pictures. Images of a type without a known white are not scaled yet."""
    raw: bool = False
    """Whether images may lie beyond black and white, which are 0 and 1, in the request and in the answer."""


class Answer(NamedTuple):
    """The outcome of an operation, for the codec that writes it.

    Attributes:
        outputs: Arrays by name; the first axis is rows. `images` may be levels where a picture was asked for.
        about: Fields that describe them, by name: model, version, seed, notes.
        queue_s: Seconds in the queue.
        inference_s: Seconds in the model.
        source: What pictures of it keep of those that were sent.
    """

    outputs: dict[str, NDArray[np.float32]]
    about: Mapping[str, Any] = MappingProxyType({})
    queue_s: float = 0.0
    inference_s: float = 0.0
    source: Source = Source()


Body = bytes | bytearray
Written = Body | memoryview
"""The body of an answer; a view of an array is not copied."""


def single_array(outputs: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32] | None:
    """The outputs as one little-endian array; several of one shape are stacked along axis 1. None for other shapes."""
    arrays = list(outputs.values())
    if len(arrays) == 1:
        return np.ascontiguousarray(arrays[0], FLOAT)
    shapes = {array.shape for array in arrays}
    return np.stack(arrays, 1, dtype=FLOAT) if len(shapes) == 1 else None


def images_only(answer: Answer) -> Pixels | None:
    """The images of an answer that holds nothing else, if a picture can hold them; None for any other."""
    images = answer.outputs["images"] if set(answer.outputs) == {"images"} else None
    return None if images is None or images.shape[1] not in MODES else images


def scaled(payload: Payload, scale: str | None, meter: Meter) -> Payload:
    """Bring the numbers of pictures to [0, 1] by the option `scale`.

    Args:
        payload: What was sent.
        scale: The numbers of black and white with a comma between, `auto` for the least and the largest of the
            request, None for 0 and white of 8 or 16 bits.
        meter: Limits on reading.

    Raises:
        InvalidOption: There are no pictures, or black is not below white.
        InvalidValue: White is unknown, or a number is not finite.
        TooLarge: The request needs too much memory to convert them.
        Overloaded: Other requests leave too little memory.
    """
    images, source = payload.array, payload.source
    if scale is None:
        if source is not None and source.kind not in LEVELS:
            raise InvalidValue(
                f"the pictures hold numbers of type {source.kind.name}, whose black and white are unknown; name both "
                "with scale=MIN,MAX, or use scale=auto, which takes the least and the largest"
            )
        return payload
    if images is None or source is None:
        raise InvalidOption("scale says what black and white of picture files are; arrays are sent in [0, 1]")
    if images.shape[1] not in (1, 3):
        raise InvalidOption(f"scale is for grey and for RGB, and images of the model have {images.shape[1]} channels")
    meter.reserve(FLOAT.itemsize * images.size + 2 * 8 * images[0].size)
    white = white_of(source.kind) if images.dtype != source.kind else 1.0  # of levels that are floats already
    low, high = (float(images.min()), float(images.max())) if scale == "auto" else map(float, scale.split(","))
    if scale == "auto":
        high = high if high > low else low + 1.0 / white  # an image of one value is black
    else:
        low, high = low / white, high / white
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InvalidValue("the images hold NaN or infinity, so scale has no bounds; every value must be finite")
    if not low < high:
        raise InvalidOption(f"scale is {scale}; name black first, and then a larger number for white")
    found = np.empty(images.shape, np.float32)
    for image, row in zip(images, found, strict=True):
        values = image.astype(np.float64)
        values -= low
        values /= high - low
        row[...] = values
    return payload._replace(array=found, source=source._replace(scale=(low * white, high * white)))


def check_pictures(count: int, meter: Meter) -> None:
    """Refuse more pictures than VAE_MAX_REQUEST_ROWS before any is decoded.

    Raises:
        TooLarge: There are more.
    """
    if count > meter.max_rows:
        raise TooLarge(f"{count} pictures in one request; VAE_MAX_REQUEST_ROWS is {meter.max_rows}")


def as_rows(array: NDArray[Any], shape: tuple[int, ...], name: str, larger: str = "") -> NDArray[np.float32]:
    """An array as float32 rows of the model's shape.

    A single row without the axis of rows is accepted; so are images with the channels last, and grey images without an
    axis of channels.

    Args:
        array: As it was sent.
        shape: Of one row; latents may have any length where it is 0.
        name: `images`, `latents` or `mask`, for messages; latents have no channels to move.
        larger: Advice for images of another size, beside `fit`.

    Returns:
        Rows (n, *shape); a view where the array already is that.

    Raises:
        InvalidShape: The array cannot be read as such rows; the message names both shapes and the fix.
        InvalidValue: It holds integers of unknown scale.
    """
    found = array.shape
    if found[1:] == shape and array.dtype == FLOAT and array.flags.c_contiguous and found[0]:
        return array  # the usual case
    if 0 in shape and (like := next((end for end in (found[1:], found) if fits(end, shape)), None)):
        shape = like
    if found[1:] == shape or found == shape:
        rows = array
    elif name != "latents" and (moved := _exact(array, shape)) is not None:
        rows = moved
    else:
        wanted = ", ".join(str(axis or "any") for axis in shape)
        raise InvalidShape(
            f"{name} has shape {found}; the model takes (n, {wanted}){_advice(found, shape, name, larger)}"
        )
    rows = rows.reshape(-1, *shape)
    if len(rows) == 0:
        raise InvalidShape(f"{name} has no rows; send at least one")
    return as_floats(rows, name)


def fits(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether an array has a shape whose axes of length 0 may have any length but 0."""
    return len(found) == len(shape) and all(
        length == axis or (not axis and length) for length, axis in zip(found, shape, strict=True)
    )


def channels_of(array: NDArray[Any], channels: tuple[int, ...]) -> int:
    """Channels of images in an array of any layout and size.

    The first of these readings whose number of channels is among `channels` holds: (n, c, h, w), (n, h, w, c);
    (c, h, w), (h, w, c), grey (n, h, w); grey (h, w).

    Args:
        array: As it was sent.
        channels: Numbers of channels that images may have.

    Raises:
        InvalidShape: No reading has one of these.
    """
    count = _channels_in(array, channels)
    if count is None:
        counts = " or ".join(map(str, sorted(channels)))
        raise InvalidShape(f"images has shape {array.shape}; the model takes (n, {counts}, height, width)")
    return count


def _channels_in(array: NDArray[Any], channels: tuple[int, ...]) -> int | None:
    found = array.shape
    first = found[-3:-2] if len(found) in (3, 4) else ()
    last = found[-1:] if first and min(found[-3:-1]) > 1 else ()
    grey = (1,) if len(found) in (2, 3) else ()
    return next((count for count in (*first, *last, *grey) if count in channels), None)


def as_images(array: NDArray[Any], shape: tuple[int, ...], name: str, float_pixels: int | None = None) -> Pixels:
    """An array as float32 images (n, channels, h, w) of any size, from the same layouts as `as_rows`.

    The model's own shape is tried first. Levels of images of more than `float_pixels` pixels stay integers.

    Raises:
        InvalidShape: The array cannot be read as images, or in more than one way.
        InvalidValue: It holds integers of unknown scale.
    """
    found, moved = array.shape, viewed(array, shape, name)
    if moved is None:
        raise InvalidShape(
            f"{name} has shape {found}; the model takes (n, {shape[0]}, height, width){_advice(found, shape, name)}"
        )
    if float_pixels is not None and name == "images" and moved.dtype.kind == "u" and moved[0, 0].size > float_pixels:
        return np.ascontiguousarray(moved)
    return as_floats(moved, name)


def of_one_type(arrays: Sequence[NDArray[Any]], meter: Meter) -> Sequence[NDArray[Any]]:
    """Images as they are where all are floats or levels of one type, else all as float32.

    Raises:
        TooLarge: The request needs too much memory to convert them.
        Overloaded: Other requests leave too little memory.
    """
    if len({array.dtype for array in arrays}) == 1:
        return arrays
    meter.reserve(FLOAT.itemsize * sum(array.size for array in arrays))
    return [as_floats(array, "images") for array in arrays]


def viewed(array: NDArray[Any], shape: tuple[int, ...], name: str) -> NDArray[Any] | None:
    """The array as (n, channels, h, w) of any size and type; None where it cannot be read as images."""
    found, channels = array.shape, shape[0]
    if 0 in found:
        return None
    moved = array if found[1:] == shape else array[None] if found == shape else _exact(array, shape)
    moved = _of_any_size(array, shape, name) if moved is None else moved
    return None if moved is None else moved.reshape(-1, channels, *moved.shape[-2:])


COLOURS = (3, 4)
"""Numbers of channels of colour pictures."""


def _exact(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any] | None:
    """Images of exactly that shape, sent without an axis of channels (grey) or with that axis last; else None."""
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
    """How to mend an array of the wrong shape, to be appended to a message."""
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
        return f"; {FIT_ADVICE} brings images to its size{larger}" if name == "images" and all(shape) else ""
    if channels > 1 and (len(found) == 2 or 1 in places):
        return f"; repeat the grey images in {channels} channels, or send picture files, which the service converts"
    return ""


def within(array: NDArray[np.floating[Any]], high: float) -> bool:
    """Whether every value lies in [0, high] and none is -0.0, in one pass.

    Read as unsigned integers, the bits of negative numbers, NaN and infinity exceed those of all other values. numpy's
    `argmax` takes a quarter of the time of `max`.
    """
    bits = array.view(UNSIGNED[array.itemsize])
    return bool(bits.item(bits.argmax()) <= _bits(high, array.dtype))


@lru_cache
def _bits(value: float, kind: np.dtype[Any]) -> int:
    return int(np.array(value, kind).view(UNSIGNED[kind.itemsize]))


def as_floats(array: NDArray[Any], name: str) -> NDArray[np.float32]:
    """An array as float32 in C order: bool as 0 and 1, integer images as parts of white, uint8 masks as 0 and 1.

    Float64 beyond the range of float32 becomes infinite; the check of the value range refuses it later.

    Raises:
        InvalidShape: The array does not hold numbers, or latents are integers.
        InvalidValue: The scale of 8-bit levels is unknown.
    """
    kind = array.dtype.kind
    if kind == "f" and array.dtype.itemsize <= FLOAT.itemsize:
        return np.ascontiguousarray(array, np.float32)
    if kind == "f" and array.dtype == np.float64 and within(array, LARGEST):
        return array.astype(np.float32, "C")
    if kind == "f":
        with np.errstate(over="ignore"):
            return array.astype(np.float32, "C")
    deep = name == "images" and array.dtype == np.uint16  # of pictures alone
    if name == "latents" or not (deep or array.dtype in (np.bool_, np.uint8)):
        raise InvalidShape(f"{name} must be floats, not {array.dtype}")
    if kind == "b":
        return np.ascontiguousarray(array, np.float32)
    if name == "mask":
        most = array.max()
        if not ((array == 0) | (array == most)).all() or most not in (0, 1, 255):
            raise InvalidValue("a mask in uint8 must hold 0 and 1, or 0 and 255; 0 is missing")
        return np.ascontiguousarray(array != 0, np.float32)
    if not deep:
        check_scale(array, name)
    return np.divide(array, np.float32(WHITE if deep else 255.0), dtype=np.float32, order="C")


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The numbers whose upper halves these are."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(array: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of the nearest numbers that have no lower ones; of two, the even one."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)


def check_scale(array: NDArray[Any], name: str) -> None:
    """Refuse uint8 arrays whose largest number is 1.

    Raises:
        InvalidValue: The scale is unknown.
    """
    if array.max() == 1:
        raise InvalidValue(
            f"{name} in uint8 are levels of 0 to 255, but the highest is 1; send black and white as bool, as float32, "
            "or as 0 and 255"
        )
