"""Check of the evaluator against published values: scores the weights that the paper's first author published.

Source: Kingma et al. (2014), "Semi-supervised learning with deep generative models", model M1; github.com/dpkingma.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.data.mnist import read_images
from training.distributions.likelihoods.bernoulli import Bernoulli
from training.distributions.priors.standard_normal import StandardNormal
from training.errors import DataError
from training.evaluation.evaluate import likelihood
from training.models.vae import VAE
from training.networks.mlp import Mlp

BINARISATIONS = (1, 2, 3, 4)
OUR_NAMES = {
    "encoder.body.1": ("encoder.w0", "encoder.b0"),
    "encoder.body.3": ("encoder.w1", "encoder.b1"),
    "encoder.mean": ("encoder.mean_w", "encoder.mean_b"),
    "encoder.log_var": ("encoder.logvar_w", "encoder.logvar_b"),
    "decoder.0": ("decoder.w0", "decoder.b0"),
    "decoder.2": ("decoder.w1", "decoder.b1"),
    "decoder.4": ("decoder.out_w", "decoder.out_b"),
}


def published(data: Path) -> VAE:
    """Load the VAE 784-500-500-50, softplus, with the published weights.

    Args:
        data: Folder with `kingma_m1/weights.npz`.

    Raises:
        DataError: The file is missing.
    """
    path = data / "kingma_m1" / "weights.npz"
    if not path.is_file():
        raise DataError(f"{path} is absent; put the published weights of model M1 there")
    mlp = Mlp(architecture="mlp", hidden=(500, 500), activation="softplus")
    vae = VAE(mlp.encoder((1, 28, 28), 50), mlp.decoder(50, (1, 28, 28)), Bernoulli((1, 28, 28)), StandardNormal(50))
    with np.load(path, allow_pickle=False) as file:
        weights = {
            f"{ours}.{kind}": torch.from_numpy(file[theirs].reshape(-1) if kind == "bias" else file[theirs])
            for ours, both in OUR_NAMES.items()
            for kind, theirs in zip(("weight", "bias"), both, strict=True)
        }
    vae.load_state_dict(weights, strict=True)
    return vae.eval()


def score(data: Path, runs: Path, out: Path, draws: int) -> dict[str, Any]:
    """Score bound and likelihood on all test images, and write oracle.json.

    Images are binarised by several seeds, because the mean bound differs by 0.09 nats between binarisations.

    Args:
        data: Folder of the data sets.
        runs: Folder for partial results.
        out: Folder for oracle.json.
        draws: Importance samples an image.

    Returns:
        The content of oracle.json, in nats per image.
    """
    runs.mkdir(parents=True, exist_ok=True)
    images, model = read_images(data, "t10k-images-idx3-ubyte"), published(data)
    each = [
        likelihood(model, images, draws, seed, runs / f"evaluation-{seed}.pt", dynamic=True) for seed in BINARISATIONS
    ]
    means = {
        key: round(sum(float(one[key]) for one in each) / len(each), 3) for key in ("test_elbo_nats", "test_nll_nats")
    }
    found = {**means, "binarisations": each}
    out.mkdir(parents=True, exist_ok=True)
    (out / "oracle.json").write_text(json.dumps(found, indent=2) + "\n")
    return found
