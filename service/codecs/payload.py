"""What passes between a codec and an operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.errors import Deferred, InvalidShape, TooLarge
from service.pixels import Pixels

FLOAT = np.dtype("<f4")
"""What travels in binary."""


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
Writer = Callable[[Answer], bytes | None]
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


def as_rows(array: NDArray[Any], shape: tuple[int, ...], name: str) -> NDArray[np.float32]:
    """Float32 rows (n, *shape) from (n, *shape), one bare row, or, for one channel, the same without the channel axis.

    A view where the array already is what is wanted.
    Raises: InvalidShape naming both shapes.
    """
    if array.dtype.kind != "f":
        array = _floats(array, name)
    wanted = [shape, shape[1:]] if len(shape) == 3 and shape[0] == 1 else [shape]
    for row in wanted:
        if array.shape == row or (array.ndim == len(row) + 1 and array.shape[1:] == row):
            rows = array.reshape(-1, *shape)
            if len(rows) == 0:
                raise InvalidShape(f"{name} has no rows; send at least one")
            return np.ascontiguousarray(rows, np.float32)
    raise InvalidShape(
        f"{name} has shape {tuple(array.shape)}; the model takes (n, {', '.join(map(str, shape))})"
        + ("; fit=resize, pad or crop brings images to its size" if name == "images" else "")
    )


def as_images(array: NDArray[Any], channels: int, name: str) -> Pixels:
    """Float32 (n, channels, h, w) of any size from the same forms as `as_rows`.

    Raises: InvalidShape.
    """
    shape, axes = array.shape, array.ndim
    if channels == 1 and axes in (2, 3) and 0 not in shape:
        array = array.reshape(-1, 1, *shape[-2:])
    elif axes == 3 and shape[0] == channels:
        array = array[None]
    if array.ndim != 4 or array.shape[1] != channels or 0 in shape:
        raise InvalidShape(f"{name} has shape {tuple(shape)}; the model takes (n, {channels}, height, width)")
    return np.ascontiguousarray(array, np.float32)


def _floats(array: NDArray[Any], name: str) -> NDArray[Any]:
    if array.dtype.kind not in "iub":
        raise InvalidShape(f"{name} must be a rectangular array of numbers, not of {array.dtype}")
    return array.astype(np.float32)
