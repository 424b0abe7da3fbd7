"""A digital camera simulated from a finished photograph: sensor, demosaicing, white balance, gamma, JPEG.

It shares no code with the trainer's, so that a model is measured on a camera other than the one that it was trained on.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from service.contract.images import Pixels

FULL_WELL = 20_000.0
"""Electrons of a white pixel at ISO 100."""
READ_NOISE = 3.0
"""Standard deviation of the read-out in electrons."""
RED_GAINS, BLUE_GAINS = (1.6, 2.2), (1.4, 1.9)
"""White balance: factors of red and blue, from and to; that of green is 1."""
QUALITIES = (85, 95)
"""JPEG qualities of the finished picture, from and to."""
Plane = NDArray[np.float64]

CROSS = np.array([[0, 0, -1, 0, 0], [0, 0, 2, 0, 0], [-1, 2, 4, 2, -1], [0, 0, 2, 0, 0], [0, 0, -1, 0, 0]]) / 8.0
"""Green at red and blue (Malvar, He and Cutler, 2004, figure 2, as are the next two)."""
ALONG = np.array([[0, 0, 1, 0, 0], [0, -2, 0, -2, 0], [-2, 8, 10, 8, -2], [0, -2, 0, -2, 0], [0, 0, 1, 0, 0]]) / 16.0
"""Red or blue at green, where their own pixels are the neighbours to the left and right."""
ACROSS = np.array([[0, 0, -3, 0, 0], [0, 4, 0, 4, 0], [-3, 0, 12, 0, -3], [0, 4, 0, 4, 0], [0, 0, -3, 0, 0]]) / 16.0
"""Red at blue, and blue at red."""


def photographed(x: Pixels, iso: float, rng: np.random.Generator) -> Pixels:
    """Photograph a scene.

    Args:
        x: The scene as a finished picture, RGB (3, h, w) in [0, 1].
        iso: Sensitivity; a white pixel holds 20,000 electrons at 100 and inversely proportionally fewer at others.
        rng: Draws white balance, noise and JPEG quality.

    Returns:
        The picture that the camera stores, (3, h, w), multiples of 1/255.
    """
    gains = np.array([rng.uniform(*RED_GAINS), 1.0, rng.uniform(*BLUE_GAINS)]).reshape(3, 1, 1)
    raw = exposed(mosaic(linear(x) / gains), iso, rng)
    balanced = demosaiced(np.clip(raw, 0.0, 1.0)) * gains
    return jpeg(finished(np.clip(balanced, 0.0, 1.0)), int(rng.integers(QUALITIES[0], QUALITIES[1] + 1)))


def exposed(light: Plane, iso: float, rng: np.random.Generator) -> Plane:
    """Count electrons and read them out.

    Args:
        light: Light of each pixel; 1 fills a pixel.
        iso: Sensitivity.
        rng: Draws the noise.

    Returns:
        What is read, of mean `light` and variance (light + 9 / full) / full, where `full` electrons fill a pixel.
    """
    full = FULL_WELL * 100.0 / iso
    return (rng.poisson(light * full) + READ_NOISE * rng.standard_normal(light.shape)) / full


def linear(x: Pixels) -> Plane:
    """Light of sRGB values (IEC 61966-2-1)."""
    values = np.asarray(x, np.float64)
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def finished(light: Plane) -> Pixels:
    """Return sRGB values of light, the inverse of `linear`."""
    curve = 1.055 * np.maximum(light, 0.0031308) ** (1.0 / 2.4) - 0.055
    return np.where(light <= 0.0031308, 12.92 * light, curve).astype(np.float32)


def mosaic(colours: Plane) -> Plane:
    """Keep one colour a pixel: rows R G R G ..., then G B G B ..."""
    raw = colours[1].copy()
    raw[0::2, 0::2] = colours[0, 0::2, 0::2]
    raw[1::2, 1::2] = colours[2, 1::2, 1::2]
    return raw


def demosaiced(raw: Plane) -> Plane:
    """Interpolate the colours that `mosaic` left out.

    Args:
        raw: The mosaic, (h, w).

    Returns:
        RGB, (3, h, w); it may leave [0, 1].

    Source: Malvar, He and Cutler (2004), "High-quality linear interpolation for demosaicing of Bayer-patterned color
    images".
    """
    cross, along, down, across = (
        ndimage.convolve(raw, kernel, mode="mirror") for kernel in (CROSS, ALONG, ALONG.T, ACROSS)
    )
    red, green, blue = raw.copy(), cross.copy(), raw.copy()
    green[0::2, 1::2], green[1::2, 0::2] = raw[0::2, 1::2], raw[1::2, 0::2]
    red[0::2, 1::2], red[1::2, 0::2], red[1::2, 1::2] = along[0::2, 1::2], down[1::2, 0::2], across[1::2, 1::2]
    blue[1::2, 0::2], blue[0::2, 1::2], blue[0::2, 0::2] = along[1::2, 0::2], down[0::2, 1::2], across[0::2, 0::2]
    return np.stack([red, green, blue])


def jpeg(x: Pixels, quality: int) -> Pixels:
    """Store as JPEG, colours at half the resolution, and read it again.

    Args:
        x: A picture, (1 or 3, h, w), in [0, 1].
        quality: Quality of libjpeg, 1 to 100.

    Returns:
        What is read, (c, h, w), multiples of 1/255.
    """
    levels = as_levels(x)
    content = io.BytesIO()
    Image.fromarray(levels).save(content, "JPEG", quality=quality, subsampling="4:2:0")
    found = np.asarray(Image.open(content), np.float32) / np.float32(255.0)
    return found[None] if found.ndim == 2 else np.ascontiguousarray(found.transpose(2, 0, 1))


def as_levels(x: Pixels) -> NDArray[np.uint8]:
    """8-bit levels of a picture (c, h, w) in [0, 1]: (h, w) or (h, w, 3), as Pillow takes them."""
    levels = np.rint(np.clip(x, 0.0, 1.0) * 255.0).astype(np.uint8)
    return levels[0] if len(levels) == 1 else np.ascontiguousarray(levels.transpose(1, 2, 0))


def png(x: Pixels) -> bytes:
    """The picture (c, h, w) in [0, 1] as a PNG file of 8 bits."""
    content = io.BytesIO()
    Image.fromarray(as_levels(x)).save(content, "PNG")
    return content.getvalue()
