"""image/png, image/jpeg, image/webp, image/bmp: all are read, PNG is written.

The first bytes of the file decide its format, not Content-Type.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.codecs.codec import Codec
from service.codecs.container import Picture, picture
from service.codecs.heat_map import heat_map
from service.codecs.payload import Answer, Body, Intake, Meter, Payload, images_only
from service.contract.images import (
    DECODER_ERRORS,
    MODES,
    Levels,
    Pixels,
    opacity,
    seen,
    to_array,
    to_image,
    to_levels,
    turned,
)
from service.errors import Unreadable

Image.MAX_IMAGE_PIXELS = None  # VAE_MAX_PIXELS is checked by the Meter; Pillow would warn, and remember each warning

Decoded = TypeVar("Decoded")


def read(body: Body, _content_type: str, intake: Intake) -> Payload:
    """One picture as (1, c, h, w), with its opacity as the mask where one is wanted. Raises as `parse` does."""
    pixels, mask = parse(body, intake)
    return Payload(pixels[None], None if mask is None else mask[None])


def parse(body: Body, intake: Intake) -> tuple[Pixels | Levels, Pixels | None]:
    """Decode a picture file.

    Returns:
        Pixels (c, h, w) in [0, 1], or as levels above `intake.float_pixels`, of the picture's own size; its opacity
        (1, h, w) where the operation wants a mask and the picture has transparency, else None.

    Raises:
        Unreadable: The file is no picture or a broken one, or the operation takes none.
        TooLarge: It has too many pixels or needs too much memory; raised before it is decoded.
        Overloaded: Other requests leave too little memory.
        DeadlinePassed: The request's time is up.
        Deferred: Decoding takes too long for the event loop.
    """
    if not intake.is_images:
        raise Unreadable(f"this operation takes {intake.name or 'options'}, not pictures")
    found = picture(body)
    channels = _channels(found, intake.channels)
    floats = intake.float_pixels is None or found.width * found.height <= intake.float_pixels

    def convert(image: Image.Image) -> tuple[Pixels | Levels, Pixels | None]:
        pixels = to_array(image, channels) if floats else to_levels(image, channels)
        return pixels, opacity(image) if intake.masked else None

    pixel_bytes = found.pixel_bytes(channels) if floats else found.level_bytes(channels, masked=intake.masked)
    return _decoded(found, pixel_bytes, intake.meter, convert)


def _channels(found: Picture, known: tuple[int, ...]) -> int:
    """The number of channels, among those of the model, in which a picture is read: 1 if it is grey, else 3.

    Raises:
        Unreadable: No picture has one of these numbers.
    """
    best = (1, 3, 4) if found.grey else (4, 3, 1) if found.transparent else (3, 4, 1)
    channels = next((count for count in best if count in known), None)
    if channels is None:
        counts = " or ".join(map(str, known))
        raise Unreadable(f"the model's images have {counts} channels, which no picture has; send an array")
    return channels


def parse_mask(body: Body, intake: Intake) -> Pixels:
    """Decode a mask drawn as a picture: transparent or black where a pixel is missing. Raises as `parse` does.

    Returns:
        (1, h, w) in [0, 1].
    """
    found = picture(body)
    return _decoded(found, found.pixel_bytes(1), intake.meter, seen)


def _decoded(found: Picture, pixel_bytes: int, meter: Meter, convert: Callable[[Image.Image], Decoded]) -> Decoded:
    meter.picture(found.width, found.height, pixel_bytes)
    meter.reserve(len(found.content))
    try:
        with Image.open(io.BytesIO(found.content), formats=(found.form,)) as image:
            return convert(turned(image, found.orientation))
    except DECODER_ERRORS as error:
        raise Unreadable(f"the {found.form} is broken, cut short or of a rare kind; send it as plain PNG") from error


def shown(answer: Answer) -> Pixels | NDArray[np.uint8] | None:
    """What a picture shows of an answer: its images, or the heat map of `std`; None for an answer with more."""
    if "std_scale" in answer.about:
        return heat_map(answer.outputs["std"], answer.about["std_scale"])
    return images_only(answer)


def write(answer: Answer) -> bytes | None:
    """The images or their heat map as a PNG, several as one sheet; None for an answer that no picture shows."""
    images = shown(answer)
    if images is None or images.shape[1] not in MODES:
        return None
    file = io.BytesIO()
    to_image(images).save(file, "PNG", compress_level=1)
    return file.getvalue()


PNG = Codec("image/png", ("image/x-png", "image/apng"), read, write)
JPEG = Codec("image/jpeg", ("image/jpg", "image/pjpeg"), read, answered_in=PNG.media_type)
WEBP = Codec("image/webp", ("image/x-webp",), read, answered_in=PNG.media_type)
BMP = Codec("image/bmp", ("image/x-ms-bmp", "image/x-bmp", "image/x-windows-bmp"), read, answered_in=PNG.media_type)
