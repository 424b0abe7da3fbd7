"""PSNR, SSIM and coverage against values known otherwise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from training.evaluation.measures import coverage, psnr, ssim


def test_psnr_of_known_errors() -> None:
    """An error of 0.1 everywhere is 20 dB; where half is looked at, that half's; what is exact stops at 60 dB."""
    x = np.zeros((3, 1, 2, 4))
    restored = x.copy()
    restored[0] = 0.1
    restored[1, :, 0] = 0.01
    restored[1, :, 1] = 1.0
    upper = np.zeros_like(x)
    upper[:, :, 0] = 1.0
    np.testing.assert_allclose(psnr(restored, x), [20.0, -10.0 * math.log10((1e-4 + 1.0) / 2.0), 60.0])
    np.testing.assert_allclose(psnr(restored, x, upper), [20.0, 40.0, 60.0])


def test_coverage_of_a_true_posterior_is_nine_tenths() -> None:
    """Of normal errors; pixels with hardly any deviation, and those outside `where`, do not count."""
    generator = np.random.default_rng(0)
    std = generator.uniform(0.02, 0.3, (40, 1, 30, 30))
    mean = generator.random(std.shape)
    x = mean + std * generator.standard_normal(std.shape)
    assert coverage(mean, std, x) == pytest.approx(0.9, abs=0.005)
    assert coverage(mean, 0.5 * std, x) == pytest.approx(math.erf(1.645 / 2.0 / math.sqrt(2.0)), abs=0.01)
    left = np.zeros_like(x)
    left[..., :15] = 1.0
    x[..., 15:] = 9.0
    assert coverage(mean, std, x, left) == pytest.approx(0.9, abs=0.01)
    std[..., 15:] = 0.005
    assert coverage(mean, std, x) == pytest.approx(0.9, abs=0.01)
    assert math.isnan(coverage(mean, np.zeros_like(std), x))


def test_ssim_of_an_image_with_itself_is_one() -> None:
    """And lower with noise, channels or none."""
    pytest.importorskip("skimage", reason="needs the extra evaluation")
    x = np.random.default_rng(2).random((2, 3, 8, 8))
    np.testing.assert_allclose(ssim(x, x), 1.0)
    assert (ssim(x[:, :1] ** 2, x[:, :1]) < 0.99).all()
