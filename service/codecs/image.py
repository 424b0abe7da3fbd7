"""image/png, image/jpeg, image/webp, image/bmp: all are read, PNG is written.

The first bytes of the file decide its format, not Content-Type.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TypeVar

from PIL import Image

from service.codecs.codec import Codec
from service.codecs.container import picture
from service.codecs.payload import Answer, Body, Intake, Meter, Payload, images_only
from service.contract.images import DECODER_ERRORS, MODES, Pixels, opacity, seen, to_array, to_image, turned
from service.errors import Unreadable

Image.MAX_IMAGE_PIXELS = None  # VAE_MAX_PIXELS is checked by the Meter; Pillow would warn, and remember each warning

Decoded = TypeVar("Decoded")


def read(body: Body, _content_type: str, intake: Intake) -> Payload:
    """One picture as (1, c, h, w), with its opacity as the mask where one is wanted. Raises as `parse` does."""
    pixels, mask = parse(body, intake)
    return Payload(pixels[None], None if mask is None else mask[None])


def parse(body: Body, intake: Intake) -> tuple[Pixels, Pixels | None]:
    """Decode a picture file.

    Returns:
        Pixels (c, h, w) in [0, 1], of the picture's own size; its opacity (1, h, w) where the operation wants a mask
        and the picture has transparency, else None.

    Raises:
        Unreadable: The file is no picture or a broken one, or the operation takes none.
        TooLarge: It has too many pixels or needs too much memory; raised before it is decoded.
        Overloaded: Other requests leave too little memory.
        DeadlinePassed: The request's time is up.
        Deferred: Decoding takes too long for the event loop.
    """
    if not intake.is_images:
        raise Unreadable(f"this operation takes {intake.name or 'options'}, not pictures")
    channels = intake.shape[0]
    if channels not in MODES:
        raise Unreadable(f"the model's images have {channels} channels, which no picture has; send an array")

    def convert(image: Image.Image) -> tuple[Pixels, Pixels | None]:
        return to_array(image, channels), opacity(image) if intake.masked else None

    return _decoded(body, channels, intake.meter, convert)


def parse_mask(body: Body, intake: Intake) -> Pixels:
    """Decode a mask drawn as a picture: transparent or black where a pixel is missing. Raises as `parse` does.

    Returns:
        (1, h, w) in [0, 1].
    """
    return _decoded(body, 1, intake.meter, seen)


def _decoded(body: Body, channels: int, meter: Meter, convert: Callable[[Image.Image], Decoded]) -> Decoded:
    found = picture(body)
    meter.picture(found.width, found.height, found.pixel_bytes(channels))
    meter.reserve(len(found.content))
    try:
        with Image.open(io.BytesIO(found.content), formats=(found.form,)) as image:
            return convert(turned(image, found.orientation))
    except DECODER_ERRORS as error:
        raise Unreadable(f"the {found.form} is broken, cut short or of a rare kind; send it as plain PNG") from error


def write(answer: Answer) -> bytes | None:
    """The images as a PNG, several as one sheet; None for an answer that holds anything else."""
    images = images_only(answer)
    if images is None or images.shape[1] not in (1, 3, 4):
        return None
    file = io.BytesIO()
    to_image(images).save(file, "PNG", compress_level=1)
    return file.getvalue()


PNG = Codec("image/png", ("image/x-png", "image/apng"), read, write)
JPEG = Codec("image/jpeg", ("image/jpg", "image/pjpeg"), read, answered_in=PNG.media_type)
WEBP = Codec("image/webp", ("image/x-webp",), read, answered_in=PNG.media_type)
BMP = Codec("image/bmp", ("image/x-ms-bmp", "image/x-bmp", "image/x-windows-bmp"), read, answered_in=PNG.media_type)
