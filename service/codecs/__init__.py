"""Wire formats: one `Codec` each, listed in `CODECS`. A new format is one file and one line here.

A codec reads a body as a `Payload` and writes an `Answer` as a body. Codecs know no HTTP and no operations.
"""

from __future__ import annotations

from service.codecs import events, image, multipart, npy, raw, structured
from service.codecs.codec import Codec

JSON = structured.JSON
CODECS: tuple[Codec, ...] = (
    JSON,
    npy.NPY,
    raw.RAW,
    image.PNG,
    image.JPEG,
    image.WEBP,
    image.BMP,
    image.TIFF,
    image.GIF,
    image.AVIF,
    image.HEIC,
    multipart.FORM,
    multipart.URLENCODED,
    events.EVENT_STREAM,
    events.LINES,
)
"""In the order of the documentation. The first that is written answers callers that accept anything."""
