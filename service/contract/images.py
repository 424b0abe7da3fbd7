"""Conversion between Pillow images and arrays, and resizing. The trainer reads folders of images with it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

Fit = Literal["resize", "pad", "crop"]
FIT_ADVICE = "fit=resize, pad or crop"
Pixels = NDArray[np.float32]
Levels = NDArray[np.uint8] | NDArray[np.uint16]
"""Pixels as integers: 0 is black, the largest number of the type white."""

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
OPAQUE = 255
WHITE = 65535
"""White of 16-bit grey."""
NO_WHITE = "32-bit integer grey has no known white; convert it to 8 or 16 bits"
STRIP_PIXELS = 2**18
"""Pixels of a large picture that are converted at once."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transpositions that make an image upright, by its orientation in EXIF."""
DECODER_ERRORS = (
    Image.DecompressionBombError, EOFError, IndexError, KeyError, OSError, OverflowError, SyntaxError, TypeError,
    ValueError, Warning, struct.error, zlib.error,
)  # fmt: skip
"""Exceptions of Pillow for a broken file. `Warning` is there for processes that turn warnings into errors."""


def to_array(image: Image.Image, channels: int, white: int = WHITE) -> Pixels:
    """Convert a Pillow image to an array, turned upright, with transparent pixels on black.

    Args:
        image: Any image. A float image (mode F) keeps its values.
        channels: 1, 3 or 4.
        white: White of a 16-bit grey image.

    Returns:
        (channels, h, w) in [0, 1].

    Raises:
        ValueError: The channels are not 1, 3 or 4, or the image is 32-bit integer grey, whose white is unknown.
    """
    if channels not in MODES:
        raise ValueError(f"an image file cannot fill {channels} channels; send an array")
    if image.mode == "I" and image.format != "PPM":  # Pillow scales 16-bit PGM to 65,535 and calls it 32-bit
        raise ValueError(NO_WHITE)
    image = upright(image)
    if image.mode == "F" or image.mode.startswith("I"):
        divisor = np.float32(1.0 if image.mode == "F" else white)
        plane = np.divide(np.asarray(image), divisor, dtype=np.float32)
        return np.broadcast_to(plane, (channels, *plane.shape))
    levels = _interleaved(image, channels)
    values = np.empty((channels, *levels.shape[:2]), np.float32)
    for channel, plane in enumerate(values):
        np.divide(levels[..., channel], np.float32(255.0), out=plane)
    return values


def _interleaved(image: Image.Image, channels: int) -> NDArray[np.uint8]:
    """The 8-bit levels (h, w, channels) of an upright image, with transparent pixels on black."""
    if channels != 4 and is_transparent(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, OPAQUE)), image)
    return np.atleast_3d(np.asarray(image.convert(MODES[channels])))


def to_levels(image: Image.Image, channels: int) -> Levels:
    """Convert an upright Pillow image to levels (channels, h, w), strip by strip, so that it takes little more memory.

    The levels of 16-bit grey are uint16, all others uint8. Divided by white they are what `to_array` gives.

    Raises:
        ValueError: It is 32-bit integer grey, whose white is unknown.
    """
    if image.mode == "I":
        raise ValueError(NO_WHITE)
    image.load()
    deep = image.mode.startswith("I")
    levels = np.empty((channels, image.height, image.width), np.uint16 if deep else np.uint8)
    for top, bottom in _strips(image.height, image.width):
        strip = image.crop((0, top, image.width, bottom))
        levels[:, top:bottom] = np.asarray(strip) if deep else np.moveaxis(_interleaved(strip, channels), -1, 0)
    return levels


def _strips(height: int, width: int) -> Iterator[tuple[int, int]]:
    """First row and end of each strip of an image."""
    rows = max(1, STRIP_PIXELS // width)
    return ((top, min(top + rows, height)) for top in range(0, height, rows))


def opacity(image: Image.Image) -> Pixels | None:
    """Opacity of the pixels of a Pillow image, (1, h, w) in [0, 1], upright; None where it cannot be transparent."""
    if not is_transparent(image):
        return None
    image = upright(image)
    if image.mode.startswith("I"):  # 16-bit grey, one level of which is transparent
        return (np.asarray(image) != image.info["transparency"]).astype(np.float32)[None]
    alpha = image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
    return np.divide(np.asarray(alpha.getchannel("A")), np.float32(OPAQUE), dtype=np.float32)[None]


def seen(image: Image.Image) -> Pixels:
    """The mask in a Pillow image, (1, h, w) in [0, 1]: its opacity if it has transparent pixels, else its luminance."""
    found = opacity(image)
    return found if found is not None and found.min() < 1.0 else to_array(image, 1)


def is_transparent(image: Image.Image) -> bool:
    """Whether the image has an alpha channel or names a transparent colour."""
    return "A" in image.mode or "a" in image.mode or "transparency" in image.info


def upright(image: Image.Image) -> Image.Image:
    """The image turned upright by its EXIF; unchanged where the EXIF cannot be read."""
    image.load()
    try:
        return turned(image, image.getexif().get(ExifTags.Base.Orientation, 1))
    except DECODER_ERRORS:
        return image


def turned(image: Image.Image, orientation: Any) -> Image.Image:
    """The image turned upright from an orientation as EXIF numbers it."""
    turn = TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def fit(images: Pixels, size: tuple[int, int], how: Fit) -> Pixels:
    """Bring images to another size by bicubic interpolation with antialiasing.

    Args:
        images: (n, c, h, w).
        size: Height and width wanted.
        how: `resize` stretches; `pad` keeps the proportions and fills with 0; `crop` keeps them and cuts.

    Returns:
        (n, c, *size), clipped to the range of the images and 0, which the interpolation may overshoot.
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


def to_image(images: Pixels | NDArray[np.uint8]) -> Image.Image:
    """One Pillow image of (n, c, h, w) in [0, 1] or uint8; several rows become a sheet, nearly square, blanks black."""
    n, channels, height, width = images.shape
    columns = int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    if images.dtype == np.uint8 or height * width > STRIP_PIXELS:
        whole = Image.new(MODES[channels], (columns * width, rows * height))
        for k, image in enumerate(images):
            for top, bottom in _strips(height, width):
                strip = _quantised(np.ascontiguousarray(np.moveaxis(image[:, top:bottom], 0, -1)))
                whole.paste(_from_levels(strip), (k % columns * width, k // columns * height + top))
        return whole
    sheet = np.zeros((rows * columns, channels, height, width), np.float32)
    sheet[:n] = images
    tiled = sheet.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    return _from_levels(_quantised(tiled).reshape(rows * height, columns * width, channels))


def _quantised(values: NDArray[Any]) -> NDArray[np.uint8]:
    """The nearest levels of values in [0, 1]; levels as they are."""
    return values if values.dtype == np.uint8 else np.rint(np.clip(values, 0.0, 1.0) * 255.0).astype(np.uint8)


def _from_levels(levels: NDArray[np.uint8]) -> Image.Image:
    """The image of levels (h, w, channels)."""
    return Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels)
