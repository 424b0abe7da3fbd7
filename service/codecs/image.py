"""image/png, image/jpeg, image/webp in; image/png out. The file's own magic bytes decide, not the header."""

from __future__ import annotations

import io

from PIL import Image

from service.codecs.payload import Answer, Body, Intake, Payload, images_only
from service.errors import ServiceError, Unreadable
from service.pixels import Pixels, opacity, to_array, to_image

FORMATS = ("PNG", "JPEG", "WEBP")
PIXEL_BYTES = 48
"""Most memory that decoding a pixel takes: WebP's canvases, RGBA twice, float32 by channel, and the mask."""
Image.MAX_IMAGE_PIXELS = (
    None  # VAE_MAX_PIXELS is looked at below; Pillow would warn, and remember each size it warned of
)


def read(body: Body, _content_type: str, intake: Intake) -> Payload:
    """One picture as (1, c, h, w); where a mask is wanted, its opacity as that."""
    pixels, mask = parse(body, intake)
    return Payload(pixels[None], None if mask is None else mask[None])


def parse(body: Body, intake: Intake) -> tuple[Pixels, Pixels | None]:
    """A picture file as (c, h, w) in [0, 1], of its own size; its opacity (1, h, w) where wanted and there is one.

    Raises: Unreadable for no picture, a broken one, or an operation that takes none; TooLarge before decoding.
    """
    if not intake.is_images:
        raise Unreadable(f"this operation takes {intake.name}, not pictures; send JSON, npy or raw float32")
    try:
        with Image.open(io.BytesIO(body), formats=FORMATS) as picture:
            intake.meter.picture(*picture.size, PIXEL_BYTES)
            return to_array(picture, intake.shape[0]), opacity(picture) if intake.masked else None
    except ServiceError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise Unreadable(f"the picture cannot be read ({str(error)[:120]}); send a whole PNG, JPEG or WebP") from error


def write(answer: Answer) -> bytes | None:
    """A PNG; several rows become one sheet."""
    images = images_only(answer)
    if images is None or images.shape[1] not in (1, 3, 4):
        return None
    file = io.BytesIO()
    to_image(images).save(file, "PNG", compress_level=1)
    return file.getvalue()
