"""What an answer in pictures keeps of the pictures that were sent: their bits, scale, opacity, profile and axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.contract.images import Fit, fit, rounded, to_floats, white_of
from service.errors import InvalidShape

LEVELS = (np.dtype(np.uint8), np.dtype(np.uint16))
"""Types whose white is known to be their largest number."""
DEFAULT = "image/png"


class Tags(NamedTuple):
    """What a TIFF says of its pages, beside their pixels.

    Attributes:
        order: Byte order, `<` or `>`.
        compression: Code of the compression.
        predictor: Code of the predictor.
        resolution: Pixels a unit across and down, as fractions; None where it has none.
        unit: Code of the unit.
        description: What names the axes: OME-XML, ImageJ's or tifffile's lines; empty where there are none.
        further: ImageJ's metadata, as (tag, type, count, value).
        rows: Rows of the whole file.
        planes: Rows of a page, which are its samples, as channels of a microscope may be.
        page: Height, width and channels of a row, for which the description is right.
        associated: Whether the colours are multiplied by the opacity.
    """

    order: str
    compression: int
    predictor: int
    resolution: tuple[tuple[int, int], tuple[int, int]] | None
    unit: int
    description: bytes
    further: tuple[tuple[int, int, int, Any], ...]
    rows: int
    planes: int
    page: tuple[int, int, int]
    associated: bool


class Source(NamedTuple):
    """What an answer in pictures keeps of the pictures that were sent.

    Attributes:
        media_type: In which it is written where Accept leaves the choice.
        kind: Type of the numbers.
        scale: The numbers that are 0 and 1 in the images, where they are not 0 and white.
        alpha: Opacity (n, 1, h, w) of that type; None where the answer has none.
        profile: Colour profile (ICC); empty where there is none.
        durations: Milliseconds of each frame of a GIF.
        loop: How often a GIF is repeated, 0 for ever; None for once.
        tags: What a TIFF says of its pages.
        how: How the opacity is brought to the size of the answer's images.
    """

    media_type: str = DEFAULT
    kind: np.dtype[Any] = LEVELS[0]
    scale: tuple[float, float] | None = None
    alpha: NDArray[Any] | None = None
    profile: bytes = b""
    durations: tuple[int, ...] = ()
    loop: int | None = 0
    tags: Tags | None = None
    how: Fit = "resize"

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        described = 0 if self.tags is None else len(self.tags.description)
        return len(self.profile) + described + (0 if self.alpha is None else self.alpha.nbytes)

    def numbers(self, images: NDArray[Any]) -> NDArray[Any]:
        """Values in units of the scale as numbers of the type; without a scale, as they are."""
        if self.scale is None:
            return images
        low, high = self.scale
        found = np.empty(images.shape, self.kind)
        for image, row in zip(images, found, strict=True):
            values = image.astype(np.float64)
            values *= high - low
            values += low
            row[...] = rounded(values, self.kind)
        return found

    def opacity(self, images: NDArray[Any]) -> NDArray[Any] | None:
        """Opacity of the rows of an answer, of their size; None where it has none."""
        alpha, size = self.alpha, images.shape[2:]
        if alpha is None or len(alpha) != len(images) or images.shape[1] > 3:
            return None
        return alpha if alpha.shape[2:] == size else fit(to_floats(alpha), size, self.how)

    def profile_of(self, channels: int) -> bytes:
        """The colour profile, if it is for pictures of so many channels."""
        return self.profile if self.profile[16:20] == (b"GRAY" if channels == 1 else b"RGB ") else b""


def joined(arrays: Sequence[NDArray[Any]], sources: Sequence[Source]) -> Source:
    """What an answer keeps of several files.

    Args:
        arrays: The rows (n, c, h, w) of each.
        sources: What is kept of each.

    Raises:
        InvalidShape: Their types differ, and one of them has no known white.
    """
    first, kinds = sources[0], {source.kind for source in sources}
    if len(sources) == 1:
        return first
    kind = max(kinds, key=lambda one: one.itemsize)
    if len(kinds) > 1 and not kinds <= {*LEVELS}:
        raise InvalidShape("the pictures of one request must be of one type of numbers; send them one by one")
    alpha = None
    if any(source.alpha is not None for source in sources):
        alpha = np.concatenate([_alpha(array, source, kind) for array, source in zip(arrays, sources, strict=True)])
    return Source(
        first.media_type if len({source.media_type for source in sources}) == 1 else DEFAULT,
        kind,
        alpha=alpha,
        profile=first.profile if len({source.profile for source in sources}) == 1 else b"",
        durations=tuple(duration for source in sources for duration in source.durations),
        loop=first.loop,
    )


def _alpha(array: NDArray[Any], source: Source, kind: np.dtype[Any]) -> NDArray[Any]:
    """The opacity of the rows of a file, 1 where it has none."""
    if source.alpha is None:
        return np.full((len(array), 1, *array.shape[2:]), white_of(kind), kind)
    return source.alpha if source.kind == kind else source.alpha * kind.type(257)
