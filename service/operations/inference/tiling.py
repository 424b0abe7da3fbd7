"""Tiling: images larger than the model's, cut into overlapping tiles and blended again."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.contract.images import Pixels
from service.errors import InvalidShape


class Tiling(NamedTuple):
    """Places of the tiles of images of one size.

    Args:
        images: Number of images.
        tile: Height and width of a tile.
        size: Height and width of an image.
        tops: Rows of the upper edges.
        lefts: Columns of the left edges.
    """

    images: int
    tile: tuple[int, int]
    size: tuple[int, int]
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    @property
    def tiles(self) -> int:
        """Number of tiles of one image."""
        return len(self.tops) * len(self.lefts)

    @property
    def rows(self) -> int:
        """Number of tiles of all images."""
        return self.images * self.tiles

    def cut(self, images: Pixels) -> Pixels:
        """(n, c, *size) -> (n * tiles, c, *tile), image by image, row by row."""
        height, width = self.tile
        places = [images[..., top : top + height, left : left + width] for top in self.tops for left in self.lefts]
        return np.ascontiguousarray(np.stack(places, 1)).reshape(-1, images.shape[1], height, width)

    def joined(self, tiles: Pixels) -> Pixels:
        """(n * tiles, ..., *tile) -> (n, ..., *size): means of overlapping tiles, weighted to their centres."""
        height, width = self.tile
        parts = tiles.reshape(self.images, self.tiles, *tiles.shape[1:])
        weight = _slope(height)[:, None] * _slope(width)
        total, weights = (
            np.zeros((self.images, *tiles.shape[1:-2], *self.size), np.float32),
            np.zeros(self.size, np.float32),
        )
        places = [(top, left) for top in self.tops for left in self.lefts]
        for k, (top, left) in enumerate(places):
            total[..., top : top + height, left : left + width] += weight * parts[:, k]
            weights[top : top + height, left : left + width] += weight
        return np.asarray(total / weights, np.float32)


def tiling(images: int, size: tuple[int, int], tile: tuple[int, int]) -> Tiling:
    """Tiles that overlap by at least half.

    Args:
        images: Number of images.
        size: Height and width of an image.
        tile: Height and width of a tile.

    Raises:
        InvalidShape: The images are smaller than a tile.
    """
    if size[0] < tile[0] or size[1] < tile[1]:
        raise InvalidShape(
            f"images of {size[0]} x {size[1]} are smaller than the model's tiles of {tile[0]} x {tile[1]}; use fit=pad"
        )
    tops, lefts = (_starts(length, side) for length, side in zip(size, tile, strict=True))
    return Tiling(images, tile, size, tops, lefts)


def _starts(length: int, tile: int) -> tuple[int, ...]:
    """Evenly spaced starts; the last tile ends at the edge of the image."""
    count = -(-(length - tile) // max(1, tile // 2)) + 1
    return tuple(round(k * (length - tile) / max(1, count - 1)) for k in range(count))


def _slope(length: int) -> NDArray[np.float32]:
    """Weights that rise from the edges to the middle."""
    place = np.arange(length, dtype=np.float32)
    return np.minimum(place + 1, length - place)
