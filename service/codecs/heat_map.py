"""Heat maps: one number a pixel as a colour, from black for 0 over red to light yellow for the top of the scale."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from service.contract.images import Pixels

COLOURS = np.frombuffer(
    bytes.fromhex(
        "000004 0b0724 210c4a 3c0965 57106d 70196e 89226a a32b61 bb3755 d14644 e35932 f1711e f98d0a fcab0f f9ca32 "
        "f2e865 fcffa4"
    ),
    np.uint8,
).reshape(-1, 3)
"""Levels of red, green and blue at even steps of the scale.

Source: the map `inferno` of matplotlib, by Smith and van der Walt (CC0), whose steps look equally large.
"""
TABLE = np.stack(
    [np.interp(np.linspace(0, len(COLOURS) - 1, 256), range(len(COLOURS)), channel) for channel in COLOURS.T], -1
).round().astype(np.uint8)  # fmt: skip
"""The colours of 256 steps."""

LEAST_TOP = 1e-9


def heat_map(values: Pixels, top: float) -> NDArray[np.uint8]:
    """Colours of the root mean square of values over the channels.

    Args:
        values: Numbers (n, c, h, w), none negative.
        top: What has the last colour, and all above it.

    Returns:
        Levels (n, 3, h, w).
    """
    square = np.square(values, dtype=np.float32).mean(1)
    share = np.sqrt(square) / np.float32(max(top, LEAST_TOP))
    steps = np.rint(np.minimum(share, 1.0) * 255.0).astype(np.uint8)
    return np.ascontiguousarray(np.moveaxis(TABLE[steps], -1, 1))
