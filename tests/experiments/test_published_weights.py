"""The paper's first author published a trained model: his weights in our networks must be worth what they are worth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.paper.oracle import published
from training.data.mnist import read_images
from training.evaluation.evaluate import likelihood
from training.models.vae import VAE

# ../shared/data/README.md: dynamically binarised MNIST, all 10,000 test images, 500 importance samples.
NEGATIVE_ELBO, NLL = 87.4, 84.2
FEWER_SAMPLES = 0.5  # what 100 samples instead of 500 may cost


@pytest.fixture(scope="module")
def model(real_data: Path) -> VAE:
    """The published one."""
    path = real_data / "kingma_m1" / "weights.npz"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    return published(real_data)


def test_published_weights_are_worth_what_they_are_worth(model: VAE, real_data: Path, tmp_path: Path) -> None:
    """On 500 random test images ELBO and NLL are within four standard errors of -87.4 and 84.2 nats."""
    images = read_images(real_data, "t10k-images-idx3-ubyte")
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))[:500]
    found = likelihood(model, images[chosen], 100, 1, tmp_path / "evaluation.pt", dynamic=True)
    values = {key: float(value) for key, value in found.items() if key != "binarisation"}
    assert abs(values["test_elbo_nats"] + NEGATIVE_ELBO) < 4.0 * values["test_elbo_standard_error_nats"]
    assert 0.5 < values["test_nll_standard_error_nats"] < 1.5
    assert abs(values["test_nll_nats"] - NLL) < 4.0 * values["test_nll_standard_error_nats"] + FEWER_SAMPLES
    # Images are the same in both figures, so their difference is far more certain than either.
    gap = -values["test_elbo_nats"] - values["test_nll_nats"]
    assert gap == pytest.approx(NEGATIVE_ELBO - NLL, abs=FEWER_SAMPLES + 0.5)
