"""Poisson-Gaussian noise: its variance, its stabilising transform and the inverse, and its blind estimate."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch._higher_order_ops import scan
from torch.nn import functional

FAMILIES = ("poisson", "gaussian")
"""Columns of the level, (n, 2): the standard deviation that Poisson noise has at a pixel of 1, and that at 0."""
LEAST_VARIANCE = 1e-9
LEAST_GAIN = 1e-9
NO_GAUSSIAN = 1e-5
"""A Gaussian level up to this one means none."""
BLOCK = 8
LEAST_PIXELS = 0.4
"""Least share of usable pixels of a block that counts."""
MOST_CLIPPED = 0.05
"""Largest share of pixels of a block that are exactly black or white."""
TOLERANCE = 0.3
"""A block whose variance is above the line by this share has half the weight."""
CONSISTENT = 0.8966
"""Mean of a block's variance over the true one under the weights, for Gaussian noise: a weighted fit finds the line
times this number."""
ROUNDS = 40
"""Of iteratively reweighted least squares."""


class PoissonGaussian(NamedTuple):
    """Noise with Var[y|s] = gain s + offset around the clean signal s; images have values in units of white.

    A negative offset means that black is above 0, as in frames of a camera whose black level was not subtracted.
    """

    gain: Tensor
    """(n, 1, 1, 1), at least 0."""
    offset: Tensor
    """(n, 1, 1, 1)."""

    @classmethod
    def of_level(cls, level: Tensor) -> PoissonGaussian:
        """The noise of a level (n, 2)."""
        gain, offset = level.square()[:, :, None, None, None].unbind(1)
        return cls(gain, offset)

    @property
    def level(self) -> Tensor:
        """Its level (n, 2), which has no negative offset."""
        both = torch.cat([self.gain, self.offset], 1).flatten(1)
        return both.clamp(min=0.0).sqrt()

    @property
    def black(self) -> Tensor:
        """The signal without light, (n, 1, 1, 1): 0, or where the variance is 0."""
        return (-self.offset).clamp(min=0.0) / self.gain.clamp(min=LEAST_GAIN)

    def variance(self, s: Tensor) -> Tensor:
        """Var[y|s], shaped like s."""
        return (self.gain * s + self.offset).clamp(min=LEAST_VARIANCE)

    @property
    def _root(self) -> Tensor:
        """Square root of what the transform adds under its root."""
        return (0.375 * self.gain.square() + self.offset.clamp(min=0.0)).clamp(min=LEAST_VARIANCE).sqrt()

    def stabilised(self, y: Tensor) -> Tensor:
        """The generalised Anscombe transform, after which noise has about unit variance: shaped like y; black is 0.

        It is (2 / gain) (sqrt(gain y + root^2) - root), in a form that holds for pure Gaussian noise too.
        Source: Starck, Murtagh and Bijaoui (1998), "Image processing and data analysis", section 2.3; root^2 is
        3/8 gain^2 + offset.
        """
        y, root = y - self.black, self._root
        return 2.0 * y / ((self.gain * y + root.square()).clamp(min=0.0).sqrt() + root)

    def left(self, s: Tensor) -> Tensor:
        """Variance of the noise after the transform to first order, 1 but for few counts: shaped like the signal s."""
        variance = self.variance(s)
        return variance / (variance + 0.375 * self.gain.square())

    def one_count(self, s: Tensor) -> Tensor:
        """How far a pixel moves after the transform by one count more than the signal s; 0 for Gaussian noise."""
        return self.gain / (self.variance(s) + 0.375 * self.gain.square()).sqrt()

    def unbiased(self, t: Tensor) -> Tensor:
        """The exact unbiased inverse: the signal s whose transformed noisy pixel has the mean t; shaped like t.

        Source: Makitalo and Foi (2013), "Optimal inversion of the generalized Anscombe transformation for
        Poisson-Gaussian noise", equation 10, of which the terms that cancel are left out.
        """
        gain, root = self.gain, self._root
        inverse = gain / (gain * t + 2.0 * root).clamp(min=2.0 * math.sqrt(0.375) * gain + 1e-12)  # 1 / D
        tail = 0.25 * math.sqrt(1.5) * inverse - 1.375 * inverse**2 + 0.625 * math.sqrt(1.5) * inverse**3
        return self.black + 0.25 * gain * t.square() + root * t + gain * (0.25 + tail)


class Blocks(NamedTuple):
    """Figures of blocks of 8 x 8 pixels, (n, blocks) each, in double."""

    mean: Tensor
    variance: Tensor
    """Of the noise, from second differences; structure of the image makes it larger."""
    weight: Tensor
    """0 for blocks that do not count, else the share of their pixels that do."""


def blocks_of(y: Tensor, mask: Tensor) -> Blocks:
    """Means and noise variances of the blocks of images (n, c, h, w) of which the mask shows the known pixels.

    Source: Immerkaer (1996), "Fast noise variance estimation", equation 2, squared, for each block.
    """
    channels = y.shape[1]
    kernel = torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]], device=y.device)
    seen = (mask > 0.0).to(y.dtype)
    square = functional.conv2d(y, kernel.expand(channels, 1, 3, 3), padding=1, groups=channels).square() / 36.0
    known = (functional.avg_pool2d(functional.pad(seen, (1, 1, 1, 1)), 3, 1) > 1.0 - 1e-4).to(y.dtype)
    clipped = ((y == 0.0) | (y == 1.0)).to(y.dtype) * seen

    def mean(values: Tensor) -> Tensor:
        return functional.avg_pool2d(values, BLOCK).flatten(1).double()

    share = mean(known)
    usable = (share >= LEAST_PIXELS) & (mean(clipped) <= MOST_CLIPPED)
    return Blocks(
        mean(y * known) / share.clamp(min=1e-6),
        mean(square * known) / share.clamp(min=1e-6),
        share * usable,
    )


def estimated(y: Tensor, mask: Tensor) -> PoissonGaussian:
    """The noise of images (n, c, h, w), found from the images themselves, white in space.

    A line of the blocks' variances over their means, robust against blocks with structure.
    Source: Foi et al. (2008), "Practical Poissonian-Gaussian noise modeling and fitting for single-image raw-data",
    for the model; the fit is iteratively reweighted least squares.
    """
    blocks = blocks_of(y, mask)
    slope, at_zero = _line(blocks)
    return PoissonGaussian(*(part[:, :, None, None].to(y.dtype) for part in (slope, at_zero)))


def estimated_alone(y: Tensor, mask: Tensor) -> Tensor:
    """The level (n, 2) of each family as if it alone were at work."""
    blocks = blocks_of(y, mask)
    poisson, gaussian = _factor(blocks, blocks.mean.clamp(min=1e-6)), _factor(blocks, torch.ones_like(blocks.mean))
    return torch.cat([poisson, gaussian], 1).clamp(min=0.0).sqrt().to(y.dtype)


def _weights(blocks: Blocks, line: Tensor) -> Tensor:
    """Weights (n, blocks): by the precision of a block's variance, small where it is above the line."""
    line = line.clamp(min=LEAST_VARIANCE)
    above = (blocks.variance / line - 1.0).clamp(min=0.0) / TOLERANCE
    return blocks.weight / (1.0 + above.pow(4)) / line.square()


def _low(blocks: Blocks) -> Tensor:
    """Harmonic mean of the blocks' variances, (n, 1), which those with structure move little."""
    harmonic = (blocks.weight / blocks.variance.clamp(min=LEAST_VARIANCE)).sum(1, keepdim=True)
    return blocks.weight.sum(1, keepdim=True) / harmonic.clamp(min=1e-9)


def _line(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Slope, at least 0, and value at 0 of the line, (n, 1) each."""

    def fitted(slope: Tensor, at_zero: Tensor) -> tuple[Tensor, ...]:
        weights = _weights(blocks, slope * blocks.mean + at_zero)
        total = weights.sum(1, keepdim=True).clamp(min=1e-30)
        mean, variance = ((weights * part).sum(1, keepdim=True) / total for part in blocks[:2])
        off = blocks.mean - mean
        spread = (weights * off.square()).sum(1, keepdim=True) / total + 1e-9
        slope = ((weights * off * (blocks.variance - variance)).sum(1, keepdim=True) / total / spread).clamp(min=0.0)
        slope = slope / CONSISTENT
        return slope, variance / CONSISTENT - slope * mean

    low = _low(blocks)
    slope, at_zero = _repeated(fitted, torch.zeros_like(low), low)
    return slope, at_zero


def _factor(blocks: Blocks, shape: Tensor) -> Tensor:
    """The number (n, 1) by which a shape (n, blocks) is the blocks' variance."""
    scaled = Blocks(blocks.mean, blocks.variance / shape, blocks.weight)

    def fitted(factor: Tensor) -> tuple[Tensor, ...]:
        weights = _weights(scaled, factor)
        total = weights.sum(1, keepdim=True).clamp(min=1e-30)
        return ((weights * scaled.variance).sum(1, keepdim=True) / total / CONSISTENT,)

    (found,) = _repeated(fitted, _low(scaled))
    return found


def _repeated(step: Callable[..., tuple[Tensor, ...]], *start: Tensor) -> tuple[Tensor, ...]:
    """`ROUNDS` steps from the start. In an exported graph they are one Scan: unrolled, they take minutes to export."""
    if not torch.compiler.is_exporting():
        return reduce(lambda found, _: step(*found), range(ROUNDS), start)

    def scanned(found: tuple[Tensor, ...], number: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        return step(*found), number.clone()  # a scan may not answer with what it was given

    found, _ = scan(scanned, start, torch.arange(ROUNDS))
    return found
