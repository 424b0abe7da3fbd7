"""application/octet-stream: little-endian float32 rows of the model's shape, without a header."""

from __future__ import annotations

import math

import numpy as np

from service.codecs.codec import binary
from service.codecs.payload import FLOAT, Body, Intake, Payload
from service.errors import InvalidShape


def read(body: Body, _content_type: str, intake: Intake) -> Payload:
    """The rows as a view of the body.

    Raises:
        InvalidShape: The body is not a whole number of rows, or rows have no fixed shape.
    """
    if 0 in intake.shape:
        raise InvalidShape(
            f"the model takes {intake.name} of any size, which application/octet-stream does not tell; send "
            "application/x-npy" + (" or a picture" if intake.is_images else "")
        )
    row_bytes = math.prod(intake.shape) * FLOAT.itemsize
    if len(body) == 0 or len(body) % row_bytes:
        raise InvalidShape(
            f"{len(body)} bytes are not a whole number of float32 rows {intake.shape} of {row_bytes} bytes"
        )
    return Payload(np.frombuffer(body, FLOAT).reshape(-1, *intake.shape))


def header(_shape: tuple[int, ...]) -> bytes:
    """Empty."""
    return b""


RAW = binary("application/octet-stream", read, header)
