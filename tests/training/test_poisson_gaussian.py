"""Poisson-Gaussian noise: the transform, its inverse against sums and integrals, and the blind estimate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm, poisson
from torch import Tensor

from training.distributions.poisson_gaussian import CONSISTENT, TOLERANCE, PoissonGaussian, blocks_of, estimated


def noise_of(gain: float, offset: float) -> PoissonGaussian:
    """One row, in double."""
    return PoissonGaussian(*(torch.full((1, 1, 1, 1), part, dtype=torch.float64) for part in (gain, offset)))


def mean_after(noise: PoissonGaussian, s: float) -> Tensor:
    """E[stabilised(y)|s] by a sum over counts and an integral over Gaussian noise."""
    gain, std = float(noise.gain), math.sqrt(float(noise.offset))
    counts, at = np.arange(200), np.linspace(-8.0, 8.0, 2001)
    weights = poisson.pmf(counts, s / gain)[:, None] * norm.pdf(at) / norm.pdf(at).sum()
    y = torch.from_numpy(counts[:, None] * gain + std * at)[None, None]
    return (noise.stabilised(y) * torch.from_numpy(weights)).sum().view(1, 1, 1, 1)


@pytest.mark.parametrize("counts", [0.05, 0.3, 1.0, 3.0, 20.0])
@pytest.mark.parametrize(("offset", "within"), [(0.0, 0.02), (0.5, 0.11), (4.0, 0.06)])
def test_the_inverse_is_unbiased(counts: float, offset: float, within: float) -> None:
    """It takes the mean of the transformed pixel back to the signal, to a tenth of a count; gain and offset scale."""
    for gain in (1.0, 0.04):
        noise = noise_of(gain, offset * gain**2)
        found = float(noise.unbiased(mean_after(noise, counts * gain)))
        assert found == pytest.approx(counts * gain, abs=within * gain)


def test_without_poisson_noise_the_transform_divides_by_the_deviation() -> None:
    """And its inverse multiplies: the limit of no gain is exact."""
    y = torch.linspace(-0.2, 1.2, 5, dtype=torch.float64).view(1, 1, 1, 5)
    noise = noise_of(0.0, 0.01)
    torch.testing.assert_close(noise.stabilised(y), y / 0.1)
    torch.testing.assert_close(noise.unbiased(y / 0.1), y)


def test_transformed_noise_has_unit_variance() -> None:
    """At 5 to 50 counts, whatever the Gaussian part."""
    generator = torch.Generator().manual_seed(0)
    for gain, offset in ((0.02, 0.0), (0.02, 0.001), (0.002, 0.004)):
        for s in (0.1, 0.5, 1.0):
            counts = torch.poisson(torch.full((1, 1, 200, 200), s / gain), generator)
            y = counts * gain + math.sqrt(offset) * torch.randn(counts.shape, generator=generator)
            spread = noise_of(gain, offset).stabilised(y.double()).std()
            assert float(spread) == pytest.approx(1.0, abs=0.03)


def test_a_black_level_moves_the_transform() -> None:
    """A negative offset is a black level: the transform of y - black with no offset."""
    y = torch.linspace(0.02, 1.0, 5, dtype=torch.float64).view(1, 1, 1, 5)
    torch.testing.assert_close(noise_of(0.05, -0.001).stabilised(y), noise_of(0.05, 0.0).stabilised(y - 0.02))
    torch.testing.assert_close(noise_of(0.05, -0.001).unbiased(y + 2.0), noise_of(0.05, 0.0).unbiased(y + 2.0) + 0.02)


def test_the_level_is_that_of_the_service() -> None:
    """The standard deviation of Poisson noise at 1, and that at 0."""
    level = torch.tensor([[0.2, 0.1], [0.0, 0.3]])
    noise = PoissonGaussian.of_level(level)
    torch.testing.assert_close(noise.level, level)
    torch.testing.assert_close(noise.variance(torch.ones(2, 1, 1, 1)).flatten(), torch.tensor([0.05, 0.09]))


def test_the_fit_is_consistent_for_gaussian_noise() -> None:
    """`CONSISTENT` is the weighted mean of a block's variance over the true one."""
    y = 0.5 + 0.1 * torch.randn(20, 1, 200, 200, generator=torch.Generator().manual_seed(0))
    found = blocks_of(y, torch.ones_like(y))
    ratio = found.variance[found.weight == 1.0] / 0.01
    weights = 1.0 / (1.0 + ((ratio - 1.0).clamp(min=0.0) / TOLERANCE) ** 4)
    assert float((weights * ratio).sum() / weights.sum()) == pytest.approx(CONSISTENT, abs=0.005)


def scene(size: int = 256) -> Tensor:
    """A clean picture of a ramp, with texture on a third of it."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    ramp = 0.1 + 0.7 * columns / size
    return torch.where(rows < size // 3, ramp + 0.1 * torch.sin(2.3 * rows) * torch.cos(1.9 * columns), ramp)[
        None, None
    ]


@pytest.mark.parametrize(("gain", "std"), [(0.0, 0.05), (0.01, 0.02), (0.05, 0.0)])
def test_noise_is_found_blindly(gain: float, std: float) -> None:
    """The deviation at dark and bright pixels within 5 %, in the presence of texture, missing and clipped pixels."""
    generator, x = torch.Generator().manual_seed(1), scene()
    y = torch.poisson(x / gain, generator) * gain if gain else x.clone()
    y = y + std * torch.randn(x.shape, generator=generator)
    mask = (torch.rand(x.shape, generator=generator) < 0.999).float()
    y[..., :20] = 1.0
    found = estimated(y * mask, mask)
    for s in (0.2, 0.8):
        known = math.sqrt(gain * s + std**2)
        assert float(found.variance(torch.tensor(s)).sqrt()) == pytest.approx(known, rel=0.05)


def test_the_smallest_image_has_an_estimate() -> None:
    """Of one block of 8 x 8 pixels: the variance, no slope."""
    y = 0.5 + 0.1 * torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    found = estimated(y, torch.ones_like(y))
    assert found.variance(torch.full((50, 1, 1, 1), 0.5)).mean().sqrt() == pytest.approx(0.1, rel=0.2)
