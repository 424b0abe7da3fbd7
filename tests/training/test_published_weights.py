"""The paper's first author published a trained model: his weights in our networks must be worth what they are worth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from training.architectures.mlp import Mlp
from training.datasets.mnist import read_images
from training.evaluate import likelihood
from training.likelihoods.bernoulli import Bernoulli
from training.model import VAE
from training.priors.standard_normal import StandardNormal

# ../shared/data/README.md: dynamically binarised MNIST, all 10,000 test images, 500 importance samples.
NEGATIVE_ELBO, NLL = 87.4, 84.2
FEWER_SAMPLES = 0.5  # what 100 samples instead of 500 may cost
OUR_NAMES = {
    "encoder.body.1": ("encoder.w0", "encoder.b0"),
    "encoder.body.3": ("encoder.w1", "encoder.b1"),
    "encoder.mean": ("encoder.mean_w", "encoder.mean_b"),
    "encoder.log_var": ("encoder.logvar_w", "encoder.logvar_b"),
    "decoder.0": ("decoder.w0", "decoder.b0"),
    "decoder.2": ("decoder.w1", "decoder.b1"),
    "decoder.4": ("decoder.out_w", "decoder.out_b"),
}


@pytest.fixture(scope="module")
def published(real_data: Path) -> VAE:
    """784-500-500-50 and back, softplus, with the published weights."""
    path = real_data / "kingma_m1" / "weights.npz"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    mlp = Mlp(architecture="mlp", hidden=(500, 500), activation="softplus")
    vae = VAE(mlp.encoder((1, 28, 28), 50), mlp.decoder(50, (1, 28, 28)), Bernoulli(), StandardNormal())
    with np.load(path, allow_pickle=False) as file:
        weights = {
            f"{ours}.{kind}": torch.from_numpy(file[theirs].reshape(-1) if kind == "bias" else file[theirs])
            for ours, both in OUR_NAMES.items()
            for kind, theirs in zip(("weight", "bias"), both, strict=True)
        }
    vae.load_state_dict(weights, strict=True)
    return vae.eval()


def test_published_weights_are_worth_what_they_are_worth(published: VAE, real_data: Path, tmp_path: Path) -> None:
    """On 500 random test images ELBO and NLL are within four standard errors of -87.4 and 84.2 nats."""
    images = read_images(real_data, "t10k-images-idx3-ubyte")
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))[:500]
    found = likelihood(published, images[chosen], 100, 1, tmp_path / "evaluation.pt", dynamic=True)
    values = {key: float(value) for key, value in found.items() if key != "binarisation"}
    assert abs(values["test_elbo_nats"] + NEGATIVE_ELBO) < 4.0 * values["test_elbo_standard_error_nats"]
    assert 0.5 < values["test_nll_standard_error_nats"] < 1.5
    assert abs(values["test_nll_nats"] - NLL) < 4.0 * values["test_nll_standard_error_nats"] + FEWER_SAMPLES
    # Images are the same in both figures, so their difference is far more certain than either.
    gap = -values["test_elbo_nats"] - values["test_nll_nats"]
    assert gap == pytest.approx(NEGATIVE_ELBO - NLL, abs=FEWER_SAMPLES + 0.5)
