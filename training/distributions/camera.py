"""What a camera does to a picture: noise on a Bayer mosaic, demosaicing, colours, and JPEG."""

from __future__ import annotations

import io

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from torch import Tensor
from torch.nn import functional

LUMA = (0.299, 0.587, 0.114)
GAMMA = 2.2
GAINS = ((1.4, 2.4), (1.3, 2.3))
"""Least and largest gain of red and of blue, by which white balance multiplies the sensor's values."""
SHOT = (-4.3, -1.5)
"""Powers of ten of the variance of a white pixel's shot noise, from ISO 100 to about ISO 6400."""
CAMERA_QUALITIES = 85, 95
"""Least and largest quality of JPEG in a camera."""
SUBSAMPLINGS = (0, 2)
"""Pillow's names of 4:4:4 and 4:2:0."""


def _interpolations() -> Tensor:
    """Green at red and blue; red at green in a row of red, and in a row of blue; red at blue. (4, 1, 5, 5)."""
    kernels = torch.zeros(4, 5, 5)
    kernels[0] = torch.tensor([[0, 0, -1, 0, 0], [0, 0, 2, 0, 0], [-1, 2, 4, 2, -1], [0, 0, 2, 0, 0], [0, 0, -1, 0, 0]])
    kernels[1] = torch.tensor(
        [[0, 0, 0.5, 0, 0], [0, -1, 0, -1, 0], [-1, 4, 5, 4, -1], [0, -1, 0, -1, 0], [0, 0, 0.5, 0, 0]]
    )
    kernels[2] = kernels[1].T
    kernels[3] = torch.tensor(
        [[0, 0, -1.5, 0, 0], [0, 2, 0, 2, 0], [-1.5, 0, 6, 0, -1.5], [0, 2, 0, 2, 0], [0, 0, -1.5, 0, 0]]
    )
    return kernels[:, None] / 8.0


INTERPOLATIONS = _interpolations()


def demosaiced(mosaic: Tensor) -> Tensor:
    """Colours (n, 3, h, w) of a mosaic (n, 1, h, w) whose even rows are red and green, whose odd ones green and blue.

    Source: Malvar, He and Cutler (2004), "High-quality linear interpolation for demosaicing of Bayer-patterned color
    images", figure 2.
    """
    found = functional.conv2d(functional.pad(mosaic, (2, 2, 2, 2), mode="reflect"), INTERPOLATIONS)
    green_there, along, across, opposite = found.unbind(1)
    height, width = mosaic.shape[2:]
    odd_row, odd_column = (torch.arange(height) % 2 == 1)[:, None], (torch.arange(width) % 2 == 1)[None]
    red, blue, raw = ~odd_row & ~odd_column, odd_row & odd_column, mosaic[:, 0]
    beside_red = ~odd_row & odd_column
    of_red = torch.where(red, raw, torch.where(blue, opposite, torch.where(beside_red, along, across)))
    of_blue = torch.where(blue, raw, torch.where(red, opposite, torch.where(beside_red, across, along)))
    return torch.stack([of_red, torch.where(red | blue, green_there, raw), of_blue], 1)


def mosaic_of(x: Tensor) -> Tensor:
    """What a sensor behind a Bayer filter sees of colours: (n, 3, h, w), both even -> (n, 1, h, w)."""
    found = x[:, 1:2].clone()
    found[:, 0, 0::2, 0::2] = x[:, 0, 0::2, 0::2]
    found[:, 0, 1::2, 1::2] = x[:, 2, 1::2, 1::2]
    return found


def photographed(x: Tensor, generator: torch.Generator, rng: Generator) -> Tensor:
    """Pictures as a camera of random noise and white balance would have taken and stored them.

    Args:
        x: (n, 3, h, w) in [0, 1], height and width even.
        generator: Source of noise and gains.
        rng: Source of the quality of JPEG.

    Returns:
        (n, 3, h, w) in [0, 1].

    Source: Foi et al. (2008), equation 3, for the noise of a sensor; Brooks et al. (2019), "Unprocessing images for
    learned raw denoising", for the steps and their order.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(x), 1, 1, 1, generator=generator)

    red, blue = (uniform(*ends) for ends in GAINS)
    gains = torch.cat([red, torch.ones_like(red), blue], 1)
    sensor = mosaic_of(x.clamp(0.0, 1.0) ** GAMMA / gains)
    shot = 10.0 ** uniform(*SHOT)
    read = 0.1 * shot**0.7 * uniform(0.0, 1.0)
    noise = torch.randn(sensor.shape, generator=generator)
    sensor = (sensor + (shot * sensor + read.square()).sqrt() * noise).clamp(0.0, 1.0)
    developed = (demosaiced(sensor) * gains).clamp(0.0, 1.0) ** (1.0 / GAMMA)
    return compressed(developed, rng, *CAMERA_QUALITIES)


def compressed(x: Tensor, rng: Generator, least: int, largest: int) -> Tensor:
    """Pictures after JPEG of random qualities, with blocks that begin at random places.

    Args:
        x: (n, c, h, w) in [0, 1], c 1 or 3.
        rng: Source of qualities and places.
        least: Least quality.
        largest: Largest quality.

    Returns:
        (n, c, h, w).
    """
    levels = (x.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    found = torch.empty_like(x, memory_format=torch.contiguous_format)
    for row, image in zip(found, levels, strict=True):
        top, left = rng.integers(0, 8, 2)
        padded = np.pad(image, ((top, 0), (left, 0), (0, 0)), mode="reflect")
        quality, subsampling = int(rng.integers(least, largest + 1)), int(rng.choice(SUBSAMPLINGS))
        content = io.BytesIO()
        Image.fromarray(padded[..., 0] if padded.shape[2] == 1 else padded).save(
            content, "JPEG", quality=quality, subsampling=subsampling
        )
        with Image.open(content) as file:
            decoded = np.atleast_3d(np.asarray(file, np.float32))[top:, left:] / np.float32(255.0)
        row.copy_(torch.from_numpy(decoded).permute(2, 0, 1))
    return found


def luma(x: Tensor) -> Tensor:
    """Grey of colours, as ITU-R BT.601 has it: (n, 3, h, w) -> (n, 1, h, w)."""
    return (x * torch.tensor(LUMA, device=x.device).view(1, 3, 1, 1)).sum(1, keepdim=True)
