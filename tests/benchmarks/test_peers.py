"""What all servers of a benchmark compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.peers.model import Denoiser

MODELS = Path(__file__).parents[2] / "models"


def test_peers_denoise_with_as_many_families_of_noise_as_the_graphs_know() -> None:
    """The number has grown before, and no server could be measured."""
    denoiser = Denoiser(str(max((MODELS / "mnist").iterdir())))
    y = np.random.default_rng(0).random((2, 1, 28, 28), np.float32)
    weak, strong = denoiser(y, 0.1), denoiser(y, 0.5)
    assert weak.shape == y.shape
    assert np.abs(weak - strong).max() > 0.01
