"""How alike two pictures are, by PSNR and SSIM. No service is asked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from vae_client.errors import InvalidRequest, UnreadableFile, missing
from vae_client.files import load, read

Pixels = NDArray[np.float64]
RADIUS, SIGMA = 5, 1.5
"""Half the width of SSIM's window less a half, and the standard deviation of its weights, in pixels."""
C1, C2 = 0.01**2, 0.03**2
"""Constants of SSIM for pixels in [0, 1]."""
PNG, PNG_COLOURS, DEEP = b"\x89PNG\r\n\x1a\n", {2, 6}, 16


class Comparison(NamedTuple):
    """How alike two images are.

    Attributes:
        psnr_db: Peak signal-to-noise ratio, in dB; infinite where they are equal.
        ssim: Structural similarity, 1 where they are equal; None for images below 11 x 11 pixels.
    """

    psnr_db: float
    ssim: float | None


def compare(one: str | Path | NDArray[np.number], other: str | Path | NDArray[np.number]) -> Comparison:
    """Compare two images.

    Args:
        one: A picture file, an .npy file, or an array in [0, 1], (h, w), (c, h, w) or (n, c, h, w).
        other: The same of one size with it.

    Raises:
        InvalidRequest: They are of different shapes.
        UnreadableFile: A file is broken, or neither a picture nor .npy.
        MissingExtra: Pillow is not installed.
    """
    first, second = (_planes(image) for image in (one, other))
    if first.shape != second.shape:
        shapes = " and ".join(" x ".join(map(str, image.shape)) for image in (first, second))
        raise InvalidRequest(f"the images differ in size or colours: {shapes} (planes, height, width)")
    error = float(np.mean(np.square(first - second)))
    psnr = math.inf if error == 0 else -10 * math.log10(error)
    if min(first.shape[1:]) < 2 * RADIUS + 1:
        return Comparison(psnr, None)
    return Comparison(psnr, float(np.mean([ssim(a, b) for a, b in zip(first, second, strict=True)])))


def ssim(x: Pixels, y: Pixels) -> float:
    """Structural similarity of two grey images in [0, 1], (h, w) each.

    Source:
        Wang et al. (2004), "Image quality assessment: from error visibility to structural similarity", with a Gaussian
        window of 11 x 11 pixels that lies wholly in the image.
    """
    weights = np.exp(-np.square(np.arange(-RADIUS, RADIUS + 1)) / (2 * SIGMA**2))
    weights /= weights.sum()

    def mean(image: Pixels) -> Pixels:
        for axis in (0, 1):
            image = sliding_window_view(image, 2 * RADIUS + 1, axis) @ weights
        return image

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (var_x + var_y + C2)
    return float(np.mean(luminance * structure))


def _planes(image: str | Path | NDArray[np.number]) -> Pixels:
    """An image as (planes, h, w) in [0, 1]."""
    if isinstance(image, str | Path):
        path = Path(image)
        array = load(path) if path.suffix.lower() in (".npy", ".npz") else _decoded(path)
        if isinstance(array, dict):
            raise InvalidRequest(f"{path} holds {', '.join(array)}; compare .npy files, or picture files")
    else:
        array = image
    if array.ndim < 2 or array.dtype.kind not in "biuf":
        raise InvalidRequest(f"an array of {array.dtype} of shape {array.shape} is no image; send (h, w) or (c, h, w)")
    white = np.iinfo(array.dtype).max if array.dtype.kind == "u" else 1
    return array.reshape(-1, *array.shape[-2:]).astype(np.float64) / white


def _decoded(path: Path) -> NDArray[np.number]:
    """The levels of a picture file, (planes, h, w).

    Raises:
        InvalidRequest: Pillow would drop some of its bits.
        UnreadableFile: It is broken, or no picture.
    """
    try:
        from PIL import Image, ImageSequence, UnidentifiedImageError  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise missing("pictures", "Pillow", "comparing picture files") from error
    head = read(path)[:26]
    if head.startswith(PNG) and head[24] == DEEP and head[25] in PNG_COLOURS:
        raise InvalidRequest(f"{path} has 16 bits a colour, of which Pillow reads 8; compare .npy files instead")
    try:
        with Image.open(path) as file:
            pages = [_levels(frame) for frame in ImageSequence.Iterator(file)]
    except UnidentifiedImageError as error:
        raise UnreadableFile(f"{path} is no picture that Pillow reads") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow raises for broken files
        raise UnreadableFile(f"{path} is broken or cut short: {error}") from error
    return np.concatenate(pages)


def _levels(frame: object) -> NDArray[np.number]:
    """One page; opacity does not count."""
    mode = frame.mode  # type: ignore[attr-defined]
    plain = {"1": "L", "LA": "L", "P": "RGB", "PA": "RGB", "RGBA": "RGB", "CMYK": "RGB"}.get(mode, mode)
    array = np.asarray(frame if plain == mode else frame.convert(plain))  # type: ignore[attr-defined]
    if array.dtype.kind == "i":
        raise InvalidRequest("pictures of 32 bits have no known white; compare .npy files instead")
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
