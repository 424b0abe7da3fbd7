"""application/x-npy: numpy's own format, never pickled. Source: numpy.lib.format, versions 1 to 3."""

from __future__ import annotations

import ast
import io
import math
import re
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from service.codecs.codec import binary
from service.codecs.payload import FLOAT, Body, Intake, Payload, check_scale
from service.errors import InvalidShape, Unreadable

MAGIC = b"\x93NUMPY"
MAX_HEADER = 4096
MAX_AXES = 8
TYPES = re.compile(r"[<>=|]?(?:b1|u1|f[248])|\?|bool|uint8|float(?:16|32|64)")
INTEGERS = re.compile(r"[<>=|]?[iu][248]|[<>=|]?i1|u?int\d*")
KEYS = {"descr", "fortran_order", "shape"}


def read(body: Body, _content_type: str, intake: Intake) -> Payload:
    """The array of the file: a view of the body where it is little-endian. Raises as `parse` does."""
    return Payload(parse(body, intake))


def parse(body: Body, intake: Intake) -> NDArray[Any]:
    """The array in an .npy file: bool, uint8, float16, float32 or float64 of either byte order.

    Sizes are checked before anything is allocated.

    Raises:
        Unreadable: The body is no .npy file, is of another type, or its length differs from its header.
        InvalidShape: The array is empty.
        InvalidValue: The scale of levels that stay integers is unknown.
        TooLarge: The request needs more memory than VAE_MEMORY_BYTES to convert it.
        Overloaded: Other requests leave too little memory.
    """
    start = _start(body)
    shape, fortran, dtype = _header(bytes(body[:start]))
    expected, present = math.prod(shape) * dtype.itemsize, len(body) - start
    if expected != present:
        raise Unreadable(
            f"the .npy file announces {dtype} of shape {shape}, which is {expected} bytes, but {present} follow; "
            "send the whole file"
        )
    if not expected:
        raise InvalidShape(f"the array in the .npy file has shape {shape}, which holds nothing; send at least one row")
    array = np.frombuffer(body, dtype, offset=start).reshape(shape, order="F" if fortran else "C")
    if intake.keeps_levels(array):
        check_scale(array, intake.name)
        intake.meter.reserve(array.nbytes)
    elif dtype != FLOAT or fortran or shape[-len(intake.shape) :] != intake.shape:  # it will be copied
        intake.meter.reserve(array.size * FLOAT.itemsize)
    return array


def _start(body: Body) -> int:
    """Offset of the numbers."""
    if len(body) < 12 or bytes(body[:6]) != MAGIC:
        raise Unreadable("the body is not an .npy file; make one with numpy.save")
    version, size = body[6], 2 if body[6] == 1 else 4
    if version not in (1, 2, 3) or body[7] != 0:
        raise Unreadable(f"version {version}.{body[7]} of .npy files is not known; versions 1.0 to 3.0 are read")
    length = int.from_bytes(body[8 : 8 + size], "little")
    if length > MAX_HEADER or 8 + size + length > len(body):
        raise Unreadable(f"the header of the .npy file is {length} bytes long; at most {MAX_HEADER} of a whole file do")
    return 8 + size + length


@lru_cache(256)
def _header(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, whether the order is Fortran's, type) from the bytes before the numbers.

    Raises:
        Unreadable: The header is malformed, or of a type that is not read.
    """
    text = head[10 if head[6] == 1 else 12 :].decode("utf-8" if head[6] == 3 else "latin-1", "replace")
    try:
        said = ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:  # as documented there
        raise Unreadable("the header of the .npy file cannot be read; save the array again with numpy.save") from error
    if not isinstance(said, dict) or said.keys() != KEYS:
        raise Unreadable("the header of the .npy file must name descr, fortran_order and shape; save it again")
    shape, fortran, name = said["shape"], said["fortran_order"], said["descr"]
    if not (isinstance(shape, tuple) and all(type(side) is int and side >= 0 for side in shape)):
        raise Unreadable("the shape in the header of the .npy file must be whole numbers, none below 0; save it again")
    if len(shape) > MAX_AXES:
        raise Unreadable(f"the .npy file has {len(shape)} axes; at most {MAX_AXES} are read")
    if not isinstance(fortran, bool):
        raise Unreadable("fortran_order in the header of the .npy file must be True or False; save it again")
    if not (isinstance(name, str) and TYPES.fullmatch(name)):
        raise Unreadable(_other_type(name))
    return shape, fortran, np.dtype(name)


def _other_type(name: Any) -> str:
    advice = "save the array as float32"
    if isinstance(name, str) and INTEGERS.fullmatch(name):
        advice = "save levels of 0 to 255 as uint8, or divide by 255 and save as float32"
    what = (
        f"numbers of type {name[:20]}" if isinstance(name, str) and name.isascii() and name.isprintable() else "records"
    )
    return f"the .npy file holds {what}; bool, uint8, float16, float32 and float64 are read: {advice}"


@lru_cache(1024)
def header(shape: tuple[int, ...]) -> bytes:
    """The bytes before the numbers of a float32 array of that shape."""
    file = io.BytesIO()
    npy_format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()


NPY = binary("application/x-npy", read, header, ("application/npy", "application/x-numpy"))
