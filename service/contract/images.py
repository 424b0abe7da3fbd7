"""Pillow images to arrays and back, and to another size; the trainer reads its folders of images with the same code."""

from __future__ import annotations

import struct
import zlib
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

Fit = Literal["resize", "pad", "crop"]
FIT_ADVICE = "fit=resize, pad or crop"
Pixels = NDArray[np.float32]

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
OPAQUE = 255
WHITE = 65535
"""Of 16-bit grey."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its orientation in EXIF."""
DECODER_ERRORS = (
    Image.DecompressionBombError, EOFError, IndexError, KeyError, OSError, OverflowError, SyntaxError, TypeError,
    ValueError, Warning, struct.error, zlib.error,
)  # fmt: skip
"""What Pillow raises for a broken file. A warning is one where the process turns warnings into errors."""


def to_array(image: Image.Image, channels: int, white: int = WHITE) -> Pixels:
    """Any Pillow image as (channels, h, w) in [0, 1], upright; transparency is laid on black.

    16-bit grey is divided by `white`. A float image (mode F) is taken as it is.

    Raises:
        ValueError: The channels are not 1, 3 or 4, or the image is 32-bit integer grey, whose white is not known.
    """
    if channels not in MODES:
        raise ValueError(f"an image file cannot fill {channels} channels; send an array")
    if image.mode == "I" and image.format != "PPM":  # Pillow scales 16-bit PGM to 65,535 and calls it 32-bit
        raise ValueError("32-bit integer grey has no known white; convert it to 8 or 16 bits")
    image = upright(image)
    if image.mode == "F" or image.mode.startswith("I"):
        divisor = np.float32(1.0 if image.mode == "F" else white)
        plane = np.divide(np.asarray(image), divisor, dtype=np.float32)
        return np.broadcast_to(plane, (channels, *plane.shape))
    if channels != 4 and is_transparent(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, OPAQUE)), image)
    levels = np.atleast_3d(np.asarray(image.convert(MODES[channels])))
    values = np.empty((channels, *levels.shape[:2]), np.float32)
    for channel, plane in enumerate(values):
        np.divide(levels[..., channel], np.float32(255.0), out=plane)
    return values


def opacity(image: Image.Image) -> Pixels | None:
    """How opaque each pixel of a Pillow image is, (1, h, w) in [0, 1], upright; None where it cannot be transparent."""
    if not is_transparent(image):
        return None
    image = upright(image)
    if image.mode.startswith("I"):  # 16-bit grey, one level of which is transparent
        return (np.asarray(image) != image.info["transparency"]).astype(np.float32)[None]
    alpha = image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
    return np.divide(np.asarray(alpha.getchannel("A")), np.float32(OPAQUE), dtype=np.float32)[None]


def seen(image: Image.Image) -> Pixels:
    """A mask drawn as a picture, (1, h, w) in [0, 1]: its opacity where it is transparent, else its luminance."""
    found = opacity(image)
    return found if found is not None and found.min() < 1.0 else to_array(image, 1)


def is_transparent(image: Image.Image) -> bool:
    """Whether the image has an alpha channel or names a transparent colour."""
    return "A" in image.mode or "a" in image.mode or "transparency" in image.info


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF says; as it is where the EXIF cannot be read."""
    image.load()
    try:
        return turned(image, image.getexif().get(ExifTags.Base.Orientation, 1))
    except DECODER_ERRORS:
        return image


def turned(image: Image.Image, orientation: Any) -> Image.Image:
    """The image turned from that orientation, as EXIF counts, to upright."""
    turn = TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def fit(images: Pixels, size: tuple[int, int], how: Fit) -> Pixels:
    """(n, c, h, w) to (n, c, *size): `resize` stretches, `pad` keeps all and fills with 0, `crop` fills and cuts.

    Bicubic, smoothed before shrinking; what it overshoots is cut to the range of the input and 0.
    """
    height, width = size
    planes = [
        _fit_plane(Image.fromarray(plane), (width, height), how) for plane in images.reshape(-1, *images.shape[2:])
    ]
    fitted = np.stack(planes).reshape(*images.shape[:2], height, width)
    return np.clip(fitted, min(0.0, images.min()), images.max())


def _fit_plane(plane: Image.Image, size: tuple[int, int], how: Fit) -> NDArray[Any]:
    if how == "crop":
        return np.asarray(ImageOps.fit(plane, size))
    return np.asarray(ImageOps.pad(plane, size) if how == "pad" else plane.resize(size, Image.Resampling.BICUBIC))


def to_image(images: Pixels) -> Image.Image:
    """(n, c, h, w) in [0, 1] as one picture; several rows become a sheet, as square as it gets, empty places black."""
    n, channels, height, width = images.shape
    columns = int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    sheet = np.zeros((rows * columns, channels, height, width), np.float32)
    sheet[:n] = images
    tiled = sheet.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    levels = np.rint(np.clip(tiled, 0.0, 1.0) * 255.0).astype(np.uint8)
    return Image.fromarray(levels.reshape(rows * height, columns * width, channels).squeeze())
