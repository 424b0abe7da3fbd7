"""Tensors and pictures as diffusers' remote VAE exchanges them: bytes whose shape and type stand beside them.

Source:
    diffusers, src/diffusers/utils/remote_utils.py.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.codecs.payload import FLOAT, Body, Meter, from_bfloat16, to_bfloat16
from service.contract.images import MODES, Pixels, to_image
from service.errors import InvalidOption, InvalidShape

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": FLOAT,
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "uint8": np.dtype(np.uint8),
}
"""Types of tensors; numpy has no bfloat16, whose bits are the upper halves of float32."""
MEDIA_TYPE = "tensor/binary"
PICTURES = {"png": "image/png", "jpg": "image/jpeg"}
"""Media types of pictures, by what clients call the formats."""
JPEG_QUALITY = 95


def read(body: Body, shape: tuple[int, ...], dtype: str, meter: Meter) -> NDArray[Any]:
    """A tensor; bfloat16 as float32.

    Args:
        body: Its bytes, row-major.
        shape: Its shape.
        dtype: One of `DTYPES`.
        meter: Limits on reading.

    Raises:
        InvalidShape: The body has another length.
        TooLarge: It needs too much memory.
        Overloaded: Other requests leave too little memory.
    """
    kind = DTYPES[dtype]
    expected = math.prod(shape) * kind.itemsize
    if len(body) != expected:
        raise InvalidShape(f"{dtype} of shape {[*shape]} has {expected} bytes, and the body has {len(body)}")
    array = np.frombuffer(body, kind).reshape(shape)
    meter.reserve(array.size * FLOAT.itemsize)
    return from_bfloat16(array) if dtype == "bfloat16" else array


def write(array: Pixels, dtype: str) -> bytes:
    """The numbers of a tensor, rounded to a type."""
    return (to_bfloat16(array) if dtype == "bfloat16" else array.astype(DTYPES[dtype])).tobytes()


def write_picture(images: Pixels, form: str) -> bytes:
    """One image (1, c, h, w) in [0, 1] as a picture.

    Raises:
        InvalidOption: There are several images, or no picture has their channels.
    """
    count, channels = images.shape[:2]
    if count > 1 or channels not in MODES:
        raise InvalidOption(
            f"a picture holds one image of 1 or 3 channels, and the answer has {count} of {channels}; ask for "
            "output_type=pt"
        )
    options: dict[str, Any] = {"compress_level": 1} if form == "png" else {"quality": JPEG_QUALITY, "subsampling": 0}
    file = io.BytesIO()
    to_image(images, None).save(file, "PNG" if form == "png" else "JPEG", **options)
    return file.getvalue()


def unpacked(latents: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Latents (n, c, h, w) of those that Flux packs, (n, h/2 * w/2, 4 c), of blocks of two by two.

    Args:
        latents: The packed ones.
        height: Height h of the latents.
        width: Their width w.

    Raises:
        InvalidShape: They are not of that size.

    Source:
        diffusers, FluxPipeline._unpack_latents.
    """
    rows, places, numbers = latents.shape
    if height % 2 or width % 2 or places != height * width // 4 or numbers % 4:
        raise InvalidShape(
            f"packed latents of shape {[*latents.shape]} do not fit height and width, which are {height} x {width} "
            f"latents: send {height * width // 4} blocks of a multiple of 4 numbers"
        )
    blocks = latents.reshape(rows, height // 2, width // 2, numbers // 4, 2, 2)
    return blocks.transpose(0, 3, 1, 4, 2, 5).reshape(rows, numbers // 4, height, width)
