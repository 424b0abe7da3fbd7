"""Pillow images to arrays and back, and to another size; the trainer reads its folders of images with the same code."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Fit = Literal["resize", "pad", "crop"]
Pixels = NDArray[np.float32]

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
DEEPEST = 65535.0


def to_array(image: Image.Image, channels: int) -> Pixels:
    """Any Pillow image as (channels, h, w) in [0, 1], upright; transparency is laid on black.

    16-bit grey is scaled by 65,535. A float image (mode F) is taken as it is.
    Raises: ValueError where the model's channels are not 1, 3 or 4.
    """
    if channels not in MODES:
        raise ValueError(f"an image file cannot fill {channels} channels; send an array")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        plane = np.asarray(image, np.float32) / np.float32(1.0 if image.mode == "F" else DEEPEST)
        return np.broadcast_to(plane, (channels, *plane.shape))
    if channels != 4 and _is_transparent(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    values = np.asarray(image.convert(MODES[channels]), np.float32) / np.float32(255.0)
    return np.atleast_3d(values).transpose(2, 0, 1)


def opacity(image: Image.Image) -> Pixels | None:
    """How opaque each pixel of a Pillow image is, (1, h, w) in [0, 1], upright; None where it cannot be transparent."""
    if not _is_transparent(image):
        return None
    return np.asarray(ImageOps.exif_transpose(image).convert("RGBA"), np.float32)[None, ..., 3] / np.float32(255.0)


def _is_transparent(image: Image.Image) -> bool:
    return "A" in image.mode or "a" in image.mode or "transparency" in image.info


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
