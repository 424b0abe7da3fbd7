"""The two models that every server serves: an MLP, where HTTP is the cost, and a convolution, where the model is."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import nn

from service.contract.corruption import FAMILIES
from training.distributions.likelihoods.bernoulli import Bernoulli
from training.distributions.priors.standard_normal import StandardNormal
from training.export.export import GOLDEN_ROWS, Exportable, export, exportables
from training.models.restoration import Recognition, simulate
from training.models.vae import VAE
from training.networks import Architecture
from training.networks.unet import UNetSettings

SHAPE = (1, 28, 28)
LATENT = 20
SCATTER = 0.07
NETWORKS: dict[str, dict[str, object]] = {
    "mlp": {"architecture": "mlp", "hidden": [500]},
    "conv": {"architecture": "conv"},
}


def write(repository: Path) -> None:
    """Write `repository`/<network>/1 with random, seeded weights, which cost as much as trained ones."""
    for name in NETWORKS:
        export(graphs(name), repository, name, "1", ABOUT, replace=True)


def graphs(name: str) -> dict[str, Exportable]:
    """Graphs of one network for every operation, denoising included."""
    torch.manual_seed(0)
    network: Architecture = TypeAdapter(Architecture).validate_python(NETWORKS[name])
    parts = network.encoder(SHAPE, LATENT), network.decoder(LATENT, SHAPE)
    vae = VAE(*parts, Bernoulli(SHAPE), StandardNormal(LATENT))
    channels, height, width = SHAPE
    recognition = Recognition(
        network.encoder((2 * channels + len(FAMILIES), height, width), LATENT),
        network.encoder((2 * channels, height, width), len(FAMILIES)),
        UNetSettings().network(4 * channels + len(FAMILIES), 2 * channels, (height, width)),
    )
    for part in (vae, recognition.network):
        scramble(part)
    x = torch.rand(GOLDEN_ROWS, *SHAPE)
    seen = simulate(x, torch.Generator().manual_seed(0))
    return exportables(vae.eval(), recognition.eval(), x, seen)


def scramble(module: nn.Module) -> None:
    """Perturb every weight, so that different images have different answers and a wrong answer is detected."""
    for parameter in module.parameters():
        parameter.data += SCATTER * torch.randn(parameter.shape)


ABOUT = {
    "input_shape": list(SHAPE),
    "value_range": [0.0, 1.0],
    "latent_shape": [LATENT],
    "likelihood": "bernoulli",
    "noise_families": list(FAMILIES),
    "prior": "standard_normal",
    "dataset": "none",
    "training": {},
    "quality": {},
    # Nobody asks these models to score, but their graphs can, which the service wants to know of.
    "scoring": {
        "binary": True,
        "binarisation": "none",
        "elbo_percentiles_nats": [float(percent) for percent in range(101)],
        "images": 1,
        "draws": 1,
        "seed": 0,
    },
}
