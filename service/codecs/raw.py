"""application/octet-stream: little-endian float32 rows of the model's shape, nothing else."""

from __future__ import annotations

import math

import numpy as np

from service.codecs.payload import Answer, Intake, Payload, single_array
from service.errors import InvalidShape

FLOAT = np.dtype("<f4")


def read(body: bytes, _content_type: str, intake: Intake) -> Payload:
    """A view of the body."""
    row_bytes = math.prod(intake.shape) * FLOAT.itemsize
    if len(body) == 0 or len(body) % row_bytes:
        raise InvalidShape(
            f"{len(body)} bytes are not a whole number of float32 rows {intake.shape} of {row_bytes} bytes"
        )
    return Payload(np.frombuffer(body, FLOAT).reshape(-1, *intake.shape))


def write(answer: Answer) -> bytes | None:
    """The answer's array, row after row."""
    array = single_array(answer)
    return None if array is None else array.astype(FLOAT, copy=False).tobytes()
