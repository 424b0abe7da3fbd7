"""Conversion between Pillow images and arrays, and resizing. The trainer reads folders of images with it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

Fit = Literal["resize", "pad", "crop"]
FIT_ADVICE = "fit=resize, pad or crop"
Pixels = NDArray[np.float32]

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
OPAQUE_MODES = {1: "LA", 3: "RGBA"}
"""Modes with an opacity beside these channels."""
OPAQUE = 255
WHITE = 65535
"""White of 16 bits."""
LUMA = (19595, 38470, 7471)
"""Shares of red, green and blue in grey, in 65,536ths, as Pillow has them. Source: ITU-R BT.601."""
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


class Samples(NamedTuple):
    """A decoded picture as numbers of any type, for what Pillow cannot hold.

    Attributes:
        colour: Grey or RGB, (h, w, 1) or (h, w, 3).
        alpha: Opacity (h, w) of the same type; None where all is opaque.
        associated: Whether the colours are multiplied by the opacity.
    """

    colour: NDArray[Any]
    alpha: NDArray[Any] | None = None
    associated: bool = False


def white_of(kind: np.dtype[Any]) -> float:
    """The number that stands for white and for opaque: the largest of integers, 1 of floats and booleans."""
    return 1.0 if kind.kind in "fb" else float(np.iinfo(kind).max)


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
    levels = _interleaved(image, channels, on_black=True)
    values = np.empty((channels, *levels.shape[:2]), np.float32)
    for channel, plane in enumerate(values):
        np.divide(levels[..., channel], np.float32(255.0), out=plane)
    return values


def _interleaved(image: Image.Image, channels: int, *, on_black: bool) -> NDArray[np.uint8]:
    """The 8-bit levels (h, w, channels) of an upright image."""
    if channels != 4 and is_transparent(image):
        image = image.convert("RGBA")
        if on_black:
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, OPAQUE)), image)
    return np.atleast_3d(np.asarray(image.convert(MODES[channels])))


def draw(image: Image.Image | Samples, out: NDArray[Any], *, on_black: bool = True) -> None:
    """Write an upright picture into an array, strip by strip, so that it takes little more memory.

    Args:
        image: A Pillow image of 8 bits, or numbers.
        out: (channels, h, w), of 1, 3 or 4 channels. Its type is that of the picture's numbers, uint8 for Pillow's, or
            float32, to which levels are converted as parts of white.
        on_black: Whether transparent pixels are laid on black; else their colours are as they are stored.

    Raises:
        ValueError: The picture is 32-bit integer grey, whose white is unknown, or of another size.
    """
    if not isinstance(image, Samples):
        if image.mode == "I":
            raise ValueError(NO_WHITE)
        image.load()
    height, width = image.colour.shape[:2] if isinstance(image, Samples) else (image.height, image.width)
    if out.shape[1:] != (height, width):
        raise ValueError(f"the picture is of {width} x {height} pixels, not {out.shape[2]} x {out.shape[1]}")
    for top, bottom in _strips(height, width):
        strip = out[:, top:bottom]
        if isinstance(image, Samples):
            alpha = None if image.alpha is None else image.alpha[top:bottom]
            part = image._replace(colour=image.colour[top:bottom], alpha=alpha)
            levels = _converted(part, len(out), on_black=on_black)
        else:
            whole = bottom - top == height
            cut = image if whole else image.crop((0, top, width, bottom))
            levels = np.moveaxis(_interleaved(cut, len(out), on_black=on_black), -1, 0)
        if levels.dtype.kind == "u" and out.dtype.kind == "f":
            np.divide(levels, np.float32(white_of(levels.dtype)), out=strip)
        else:
            strip[...] = levels


def _converted(found: Samples, channels: int, *, on_black: bool) -> NDArray[Any]:
    """Numbers as (channels, h, w)."""
    colour, alpha = found.colour, found.alpha
    kind, white = colour.dtype, white_of(colour.dtype)
    if on_black and alpha is not None and not found.associated and channels != 4:
        colour = rounded(colour * (alpha / white)[..., None], kind)
    if channels == 1 and colour.shape[2] == 3:
        if kind in (np.uint8, np.uint16):  # the sum of the largest levels fits
            red, green, blue = (colour[..., k].astype(np.uint32) * np.uint32(LUMA[k]) for k in range(3))
            colour = ((red + green + blue + np.uint32(2**15)) >> np.uint32(16)).astype(kind)[..., None]
        else:
            colour = rounded(colour @ (np.array(LUMA) / 2**16), kind)[..., None]
    planes = np.moveaxis(colour, -1, 0)
    if channels == 4:
        planes = np.broadcast_to(planes, (3, *planes.shape[1:]))
        opaque = np.full(planes.shape[1:], white, kind) if alpha is None else alpha
        return np.concatenate([planes, opaque[None]])
    return np.broadcast_to(planes, (channels, *planes.shape[1:]))


def rounded(values: NDArray[Any], kind: np.dtype[Any]) -> NDArray[Any]:
    """Values as numbers of a type, integers by rounding to the nearest within its range."""
    if kind.kind == "f":
        return values.astype(kind)
    known = np.iinfo(kind)
    if kind.itemsize == 8:  # its largest number is no float64
        return np.clip(np.rint(values), known.min, np.nextafter(float(known.max), 0.0)).astype(kind)
    return np.clip(np.rint(values), known.min, known.max).astype(kind)


def _strips(height: int, width: int) -> Iterator[tuple[int, int]]:
    """First row and end of each strip of an image."""
    rows = max(1, STRIP_PIXELS // width)
    return ((top, min(top + rows, height)) for top in range(0, height, rows))


def opacity(image: Image.Image | Samples) -> NDArray[Any] | None:
    """Opacity of an upright picture as levels (1, h, w); None where it cannot be transparent."""
    if isinstance(image, Samples):
        return None if image.alpha is None else image.alpha[None]
    if not is_transparent(image):
        return None
    alpha = image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
    return np.asarray(alpha.getchannel("A"))[None]


def draw_seen(image: Image.Image | Samples, out: Pixels) -> None:
    """Write the mask in an upright picture of levels into an array (1, h, w), as numbers in [0, 1].

    It is the opacity if any pixel is transparent, else the luminance.
    """
    found = opacity(image)
    if found is None or found.min() == white_of(found.dtype):
        draw(image, out)
    else:
        out[...] = to_floats(found)


def to_floats(values: NDArray[Any]) -> Pixels:
    """Levels and booleans as parts of white; floats as they are."""
    if values.dtype.kind == "f":
        return values
    return np.divide(values, np.float32(white_of(values.dtype)), dtype=np.float32)


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


def turned_array(image: NDArray[Any], orientation: int) -> NDArray[Any]:
    """The same for an array (h, w, ...), as a view."""
    if orientation not in TURNS:
        return image
    if orientation > 4:
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return image[:, ::-1] if orientation in (2, 3, 6, 7) else image


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


def to_image(images: NDArray[Any], alpha: NDArray[Any] | None = None) -> Image.Image:
    """One Pillow image of 8 bits; several rows become a sheet, nearly square, blanks black.

    Args:
        images: (n, c, h, w), values in [0, 1] or levels.
        alpha: Opacity of every row (n, 1, h, w) likewise; blanks are transparent then.
    """
    n, channels, height, width = images.shape
    columns = int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    if alpha is not None or images.dtype.kind == "u" or height * width > STRIP_PIXELS:
        mode = MODES[channels] if alpha is None else OPAQUE_MODES[channels]
        whole = Image.new(mode, (columns * width, rows * height))
        for k, top, strip in _interleaved_strips(images, alpha, np.dtype(np.uint8)):
            whole.paste(_from_levels(strip), (k % columns * width, k // columns * height + top))
        return whole
    sheet = np.zeros((rows * columns, channels, height, width), np.float32)
    sheet[:n] = images
    tiled = sheet.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    levels = as_levels(tiled, np.dtype(np.uint8))
    return _from_levels(levels.reshape(rows * height, columns * width, channels))


def to_sheet(images: NDArray[Any], alpha: NDArray[Any] | None = None) -> NDArray[np.uint16]:
    """The same as 16-bit levels (height, width, channels), the opacity behind the colours."""
    n, channels, height, width = images.shape
    columns = int(np.ceil(np.sqrt(n)))
    sheet = np.zeros((-(-n // columns) * height, columns * width, channels + (alpha is not None)), np.uint16)
    for k, top, strip in _interleaved_strips(images, alpha, sheet.dtype):
        down, across = k // columns * height + top, k % columns * width
        sheet[down : down + len(strip), across : across + width] = strip
    return sheet


def to_pages(images: NDArray[Any], alpha: NDArray[Any] | None, kind: np.dtype[Any]) -> NDArray[Any]:
    """Rows as pages (n, h, w, channels) of numbers of a type, the opacity behind the colours; see `to_image`."""
    n, channels, height, width = images.shape
    pages = np.empty((n, height, width, channels + (alpha is not None)), kind)
    for k, top, strip in _interleaved_strips(images, alpha, kind):
        pages[k, top : top + len(strip)] = strip
    return pages


def _interleaved_strips(
    images: NDArray[Any], alpha: NDArray[Any] | None, kind: np.dtype[Any]
) -> Iterator[tuple[int, int, NDArray[Any]]]:
    """(row, top, strip (h, w, channels)) of numbers of a type, the opacity behind the colours."""
    for k, image in enumerate(images):
        for top, bottom in _strips(*image.shape[1:]):
            planes = as_levels(image[:, top:bottom], kind)
            if alpha is not None:
                planes = np.concatenate([planes, as_levels(alpha[k, :, top:bottom], kind)])
            yield k, top, np.ascontiguousarray(np.moveaxis(planes, 0, -1))


def as_levels(values: NDArray[Any], kind: np.dtype[Any]) -> NDArray[Any]:
    """Values in [0, 1], or levels of 8 or 16 bits, as the nearest numbers of a type, 1 being its white.

    What is of the type stays as it is. Levels of 16 bits that were divided by white in float32 come back exactly.
    """
    if values.dtype == kind or kind.kind == "f":
        return values.astype(kind, copy=False)
    if values.dtype.kind == "f":
        return np.rint(np.clip(values, 0.0, 1.0) * white_of(kind)).astype(kind)
    if kind.itemsize == 1:
        return ((values.astype(np.uint32) + 128) // 257).astype(kind)
    return values.astype(kind) * kind.type(257)


def _from_levels(levels: NDArray[np.uint8]) -> Image.Image:
    """The image of levels (h, w, channels)."""
    return Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels)
