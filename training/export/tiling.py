"""How far from an inner edge a tile's answer differs from the whole image's."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from service.contract.corruption import FAMILIES
from training.export.weights import Module
from training.models.restoration import Recognition

LENGTHS = (128, 256, 512, 1024)
"""Lengths of the strips that are tried, in pixels."""
BREADTH = 32
"""Their least breadth."""
FELT = 320
"""Height and width of the image that `felt_margin` cuts, in pixels."""
FELT_STD = 0.2
"""Standard deviation of its pixels around 0.5."""


@torch.no_grad()
def margin(
    networks: Callable[[Tensor], Tensor], channels: int, multiple_of: int, lengths: tuple[int, ...] = LENGTHS
) -> int | None:
    """Measure how far the pixels of an image reach.

    The pixels beyond an edge are NaN, which every operation that sees them passes on, whatever its weights. The
    networks must be in double, because fast convolutions in float also mix pixels that they do not need.

    Args:
        networks: Maps images (n, c, h, w) in double to images or latents.
        channels: c.
        multiple_of: What divides height and width of the images; the edge lies at a multiple of it.
        lengths: Those of the images to try, until one is longer than twice the margin.

    Returns:
        The number of pixels beside an edge within which outputs depend on what lies beyond it; None if all of them do
        at every length, as with attention or group normalisation.
    """
    for length in lengths:
        edge = multiple_of * math.ceil(length / 2 / multiple_of)
        breadth = multiple_of * math.ceil(BREADTH / multiple_of)
        strips = [
            torch.zeros(1, channels, *size, dtype=torch.float64) for size in ((2 * edge, breadth), (breadth, 2 * edge))
        ]
        found = max(
            _reach(networks, strip.clone(), axis, after)
            for axis, strip in enumerate(strips, 2)
            for after in (True, False)
        )
        if found < edge:
            return found
    return None


def tiles(
    encoder: nn.Module, decoder: nn.Module, recognition: Recognition | None, channels: int, multiple_of: int
) -> dict[str, Any]:
    """Measure the manifest's `tiles` of a model of images of any size.

    Args:
        encoder: x (n, c, h, w) -> mean and log_var.
        decoder: z -> images.
        recognition: The recognition model of corrupted images; None if there is none.
        channels: c.
        multiple_of: What divides height and width.

    Returns:
        The larger of the margins of a reconstruction and of a restoration at a known level.
    """
    encode, decode = in_double(encoder), in_double(decoder)
    margins = [margin(lambda x: decode(encode(x)[0]), channels, multiple_of)]
    if recognition is not None:
        observed = 2 * channels + len(FAMILIES)
        recognise, correct = in_double(recognition.network), in_double(recognition.correction.network)
        parts = (
            margin(lambda y: decode(recognise(y)[0]), observed, multiple_of),
            margin(correct, observed + 2 * channels, multiple_of),
        )
        margins.append(None if None in parts else sum(part or 0 for part in parts))
    return {"margin": max(found or 0 for found in margins), "exact": None not in margins}


@torch.no_grad()
def felt_margin(networks: Callable[[Tensor], Tensor], channels: int, multiple_of: int, unfelt: float) -> int:
    """Measure from how far away the answer of trained networks changes.

    The receptive field of a deep network is far wider than that, and what lies in margins is computed several times.

    Args:
        networks: Maps an image of noise (1, c, h, w) to an image of that size.
        channels: c.
        multiple_of: What divides height and width of the images.
        unfelt: Largest root mean square difference, over all pixels of one distance from an edge, that is none.

    Returns:
        The number of pixels beside an edge beyond which the answer for a part of the image is that for the whole.
    """
    edge = FELT // 2 // multiple_of * multiple_of
    x = 0.5 + FELT_STD * torch.randn(1, channels, 2 * edge, 2 * edge, generator=torch.Generator().manual_seed(0))
    whole, found = networks(x), 0
    for axis, start in product((2, 3), (0, edge)):
        difference = networks(x.narrow(axis, start, edge)) - whole.narrow(axis, start, edge)
        by_place = difference.movedim(axis, 0).flatten(1).square().mean(1).sqrt()
        felt = (by_place if start else by_place.flip(0)) > unfelt
        found = max(found, int(felt.nonzero().max()) + 1 if bool(felt.any()) else 0)
    return found


def noise_in(y: Tensor, depth: int, block: int) -> Tensor:
    """The noise of an image of `felt_margin`, (n, c, h, w), as that of latents (n, depth, h/block, w/block)."""
    packed = functional.pixel_unshuffle((y - 0.5) / FELT_STD, block)
    return packed.repeat(1, -(-depth // packed.shape[1]), 1, 1)[:, :depth]


def in_double(network: Module) -> Module:
    """A copy in double on the CPU, in evaluation mode, as `margin` needs it."""
    return deepcopy(network).cpu().double().eval()


def _reach(networks: Callable[[Tensor], Tensor], x: Tensor, axis: int, after: bool) -> int:
    """How many pixels before the middle of an axis see those after it, or vice versa."""
    edge = x.shape[axis] // 2
    x.narrow(axis, edge if after else 0, edge).fill_(math.nan)
    seen = networks(x).isnan().movedim(axis, 0).flatten(1).any(1)
    near = seen[: len(seen) // 2].flip(0) if after else seen[len(seen) // 2 :]
    reach = int(near.nonzero().max()) + 1 if bool(near.any()) else 0
    return reach * x.shape[axis] // len(seen)
