"""The two models that every server serves: an MLP, where HTTP is the cost, and a convolution, where the model is."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import TypeAdapter

from training.architectures import Architecture
from training.export import GOLDEN_ROWS, Exportable, export, exportables
from training.likelihoods import LIKELIHOODS
from training.model import VAE
from training.priors import PRIORS

SHAPE = (1, 28, 28)
LATENT = 20
NETWORKS: dict[str, dict[str, object]] = {
    "mlp": {"architecture": "mlp", "hidden": [500]},
    "conv": {"architecture": "conv"},
}


def write(repository: Path) -> None:
    """Make `repository`/<network>/1 anew: random, seeded weights, which cost what trained ones do."""
    for name in NETWORKS:
        export(graphs(name), repository, name, "1", ABOUT, replace=True)


def graphs(name: str) -> dict[str, Exportable]:
    """Encoder and decoder of one network."""
    torch.manual_seed(0)
    network: Architecture = TypeAdapter(Architecture).validate_python(NETWORKS[name])
    parts = network.encoder(SHAPE, LATENT), network.decoder(LATENT, SHAPE)
    vae = VAE(*parts, LIKELIHOODS["bernoulli"], PRIORS["standard_normal"]).eval()
    found: dict[str, Exportable] = exportables(vae, torch.rand(GOLDEN_ROWS, *SHAPE), None, None)  # type: ignore[arg-type]
    return found


ABOUT = {
    "input_shape": list(SHAPE),
    "value_range": [0.0, 1.0],
    "latent_shape": [LATENT],
    "likelihood": "bernoulli",
    "noise_families": [],
    "prior": "standard_normal",
    "dataset": "none",
    "training": {},
    "quality": {},
}
