"""Masks of missing pixels: lettering, scratches, single pixels, a block."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

WORDS = "The quick brown fox jumps over the lazy dog, and nine true pixels in ten lie within the interval. "
LETTERS, LEADING = 14, 28
"""Size of the letters and distance of the lines, in pixels."""
SCRATCHES = 12
BLOCK = 24
"""Height and width of the block in pixels."""
Mask = NDArray[np.bool_]


def text(height: int, width: int, rng: np.random.Generator) -> Mask:
    """Lines of letters over the whole image."""
    page = Image.new("1", (width, height))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(LETTERS)
    for top in range(int(rng.integers(LEADING)), height, LEADING):
        pen.text((-int(rng.integers(200)), top), WORDS * (2 + width // 300), 1, font)
    return np.asarray(page)


def scratches(height: int, width: int, rng: np.random.Generator) -> Mask:
    """Straight lines, 1 to 3 pixels wide."""
    page = Image.new("1", (width, height))
    pen = ImageDraw.Draw(page)
    for _ in range(SCRATCHES):
        middle, angle = rng.uniform(0.0, (width, height)), rng.uniform(0.0, np.pi)
        half = rng.uniform(0.1, 0.4) * min(height, width) * np.array([np.cos(angle), np.sin(angle)])
        pen.line([*(middle - half), *(middle + half)], fill=1, width=int(rng.integers(1, 4)))
    return np.asarray(page)


def half(height: int, width: int, rng: np.random.Generator) -> Mask:
    """Every pixel with probability 1/2."""
    return rng.random((height, width)) < 0.5


def block(height: int, width: int, rng: np.random.Generator) -> Mask:
    """A square of 24 x 24 pixels, at least 8 pixels from the border where the image has room for that."""
    side = min(BLOCK, height // 2, width // 2)
    room = min(8, (height - side) // 2, (width - side) // 2)
    top, left = (int(rng.integers(room, length - side - room + 1)) for length in (height, width))
    missing = np.zeros((height, width), bool)
    missing[top : top + side, left : left + side] = True
    return missing


MASKS: dict[str, Callable[[int, int, np.random.Generator], Mask]] = {
    "text": text,
    "scratches": scratches,
    "50 % of pixels": half,
    "block": block,
}
"""Missing pixels (h, w) by name; functions of height, width and a generator."""
