"""Plots and sheets of images of the trainer and the experiments, as PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from service.contract.images import Pixels
from training.files import write_whole

COLUMNS = 5
CELL = 128
"""Longer side of an image on a sheet, at most, in pixels."""
LEAST_CELL = 16
GAP = 4
"""Pixels between images."""
CAPTION = 12
"""Size of the captions' letters in pixels."""


@contextmanager
def panels(
    count: int, path: Path, columns: int = COLUMNS, size: tuple[float, float] = (3.6, 3.0)
) -> Iterator[list[Any]]:
    """Make a grid of axes, and write it as PNG when the block ends.

    Args:
        count: Number of axes.
        path: File of the PNG.
        columns: Maximum number of columns.
        size: Width and height of one pair of axes, in inches.

    Yields:
        At least `count` matplotlib axes, row by row; those after the first `count` are hidden.

    Raises:
        DiskError: The file cannot be written.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  # slow to import, and most commands draw nothing

    columns = max(1, min(columns, count))
    rows = max(1, math.ceil(count / columns))
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    flat = list(axes.flat)
    for axis in flat:
        axis.spines[["top", "right"]].set_visible(False)
    for spare in flat[count:]:
        spare.set_visible(False)
    yield flat
    content = io.BytesIO()
    figure.savefig(content, dpi=110)
    write_whole(path, content.getvalue())


def sheet(blocks: Mapping[str, Pixels], columns: int, cell: int = CELL) -> Image.Image:
    """Lay out images in blocks, each under its caption.

    Args:
        blocks: Images (n, c, h, w) in [0, 1] by caption; blocks may differ in size. Of three or four
            channels the first three are shown, as RGB, of other numbers the first, as grey.
        columns: Images a row.
        cell: Longer side of a shown image in pixels, at most. Smaller images are enlarged by a whole factor, without
            smoothing; larger ones are shrunk.

    Returns:
        A grey picture if every image is grey, else an RGB one.
    """
    drawn = {caption: [_shown(image, cell) for image in images] for caption, images in blocks.items()}
    sizes = [image.size for images in drawn.values() for image in images]
    wide = max(size[0] for size in sizes) + GAP
    mode = "L" if all(image.mode == "L" for images in drawn.values() for image in images) else "RGB"
    head = CAPTION + 2 * GAP
    tall = {caption: max(image.height for image in images) + GAP for caption, images in drawn.items()}
    rows = {caption: -(-len(images) // columns) for caption, images in drawn.items()}
    font = ImageFont.load_default(CAPTION)
    width = max(columns * wide, max(math.ceil(font.getlength(caption)) for caption in drawn) + GAP) + GAP
    page = Image.new(mode, (width, sum(head + rows[key] * tall[key] for key in drawn) + GAP), "white")
    pen, top = ImageDraw.Draw(page), 0
    for caption, images in drawn.items():
        pen.text((GAP, top + GAP), caption, "black", font)
        for k, image in enumerate(images):
            row, column = divmod(k, columns)
            page.paste(image, (GAP + column * wide, top + head + row * tall[caption]))
        top += head + rows[caption] * tall[caption]
    return page


def png(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    return content.getvalue()


def small_png(blocks: Mapping[str, Pixels], columns: int, most_bytes: int) -> bytes:
    """A sheet as a PNG file of at most `most_bytes`, with cells as large as fit; larger only at `LEAST_CELL`."""
    cell = CELL
    while len(content := png(sheet(blocks, columns, cell))) > most_bytes and cell > LEAST_CELL:
        cell = max(LEAST_CELL, cell * 3 // 4)
    return content


def _shown(image: Pixels, cell: int) -> Image.Image:
    """One image (c, h, w) in grey or RGB, its longer side about `cell` pixels long."""
    channels, height, width = image.shape
    levels = np.rint(np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8)
    picture = Image.fromarray(levels[:3].transpose(1, 2, 0) if channels in (3, 4) else levels[0])
    longer = max(height, width)
    if longer > cell:
        size = (max(1, round(width * cell / longer)), max(1, round(height * cell / longer)))
        return picture.resize(size, Image.Resampling.BOX)
    factor = cell // longer
    return picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)
