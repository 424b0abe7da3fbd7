"""Images that were never clean: the blind spots of Noise2Void, and how models of them are measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.comparisons.noise2void import MASKED, REACH, Noise2Void, blinded
from experiments.comparisons.unclean import measured, noisy_copies, photograph_pairs, psnr
from training.data.noisy import Noisy
from training.distributions.likelihoods.noise import Camera


def test_a_blinded_pixel_is_one_of_those_around_it() -> None:
    """64 pixels of each crop, none of which stays as it was; all others stay."""
    y = torch.arange(64.0 * 64.0).view(1, 1, 64, 64).repeat(5, 1, 1, 1)
    seen, mask = blinded(y, torch.Generator().manual_seed(0))
    assert mask.flatten(1).sum(1).tolist() == [MASKED] * 5
    assert torch.equal(seen[mask == 0], y[mask == 0])
    old, new = y[mask == 1].long(), seen[mask == 1].long()
    down, right = new // 64 - old // 64, new % 64 - old % 64
    assert int(down.abs().max()) == int(right.abs().max()) == REACH
    inner = (old // 64 >= REACH) & (old // 64 < 62) & (old % 64 >= REACH) & (old % 64 < 62)
    assert bool((new != old)[inner].all())


def test_affine_decibels_ignore_scale_and_shift() -> None:
    """And plain ones do not; both agree where the fit changes nothing."""
    clean = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    noisy = clean + 0.05 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    assert psnr(0.3 * noisy + 0.2, clean, affine=True) == pytest.approx(psnr(noisy, clean, affine=True), abs=1e-6)
    assert psnr(0.3 * noisy + 0.2, clean, affine=False) < 20.0
    assert psnr(clean + 0.1, clean + 0.0, affine=True) > 100.0


def test_copies_have_one_fixed_draw_of_noise(tmp_path: Path) -> None:
    """In floating point, not cut off, the same each time; the data set reads them."""
    for number in range(3):
        Image.new("RGB", (40, 24), (10, 10, 10)).save(tmp_path / f"{number}.png")
    for name in ("a", "b"):
        assert noisy_copies(tmp_path, tmp_path / name, 25.0) >= 3
    one, again = (np.asarray(Image.open(tmp_path / name / "0001.tif")) for name in ("a", "b"))
    assert np.array_equal(one, again)
    assert one.std() == pytest.approx(25.0 / 255.0, rel=0.1)
    assert one.min() < 0.0
    images = Noisy(dataset="noisy", size=8, per_epoch=8).load(tmp_path / "a", Camera(gain=0.0, offset=0.01))
    assert images.shape == (3, 8, 8)


def test_methods_are_measured_at_the_image_s_own_size(tmp_path: Path) -> None:
    """Padded for the network, cut back for the score: the identity scores as the noisy image does."""
    Image.new("L", (21, 13), 128).save(tmp_path / "grey.png")
    pairs = list(photograph_pairs(tmp_path, 25.0))
    every = {"identity": lambda y, _noise: y, "Noise2Void": lambda y, _noise: Noise2Void(0.5, 0.2)(y)}
    found = measured(pairs, every, 8, Camera(gain=0.0, offset=0.01), affine=False)
    assert found["identity"] == found["noisy"] == pytest.approx(20.17, abs=1.2)
    assert np.isfinite(found["Noise2Void"])
