"""application/x-npy: numpy's own format, never pickled."""

from __future__ import annotations

import io
import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from service.codecs.payload import Body, Intake, Payload
from service.errors import Unreadable

MAGIC = b"\x93NUMPY"
MAX_HEADER = 4096


def read(body: Body, _content_type: str, _intake: Intake) -> Payload:
    """A view of the body where it is little-endian, C-ordered; sizes are checked before anything is allocated."""
    return Payload(parse(body))


def parse(body: Body) -> NDArray[Any]:
    """The array in an .npy file.

    Raises: Unreadable for anything but a whole .npy of floats.
    """
    file = io.BytesIO(body)
    try:
        version = npy_format.read_magic(file)
        reader = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
        shape, fortran, dtype = reader(file, max_header_size=MAX_HEADER)
    except Exception as error:  # numpy's header reader raises ValueError, SyntaxError, TypeError and more
        raise Unreadable(f"the body is not an .npy file ({str(error)[:120]})") from error
    if dtype.kind != "f" or dtype.itemsize > 8:
        advice = "divide by 255 first" if dtype.kind in "iu" else "save it as float32"
        raise Unreadable(f"the .npy file holds {dtype}; the service takes float16, float32 or float64: {advice}")
    expected, present = math.prod(shape) * dtype.itemsize, len(body) - file.tell()
    if expected != present:
        raise Unreadable(f"the .npy file announces {shape} {dtype}, {expected} bytes, but {present} follow")
    array = np.frombuffer(body, dtype, offset=file.tell())
    return array.reshape(shape, order="F" if fortran else "C")


@lru_cache(1024)
def header(shape: tuple[int, ...]) -> bytes:
    """What comes before the numbers of a float32 array of that shape."""
    file = io.BytesIO()
    npy_format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()
