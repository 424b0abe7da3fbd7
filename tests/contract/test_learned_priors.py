"""A learned prior, from the trainer to an answer of the service."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from service.app import create_app
from service.contract.manifest import read
from service.operations.inference.latent import standard_normal
from service.runtime.session import Session
from service.settings import Settings
from training.config import load
from training.distributions.priors import PriorSettings
from training.objectives.elbo import importance_log_likelihood
from training.pipeline import Workshop

CONFIGS = Path(__file__).parent.parent.parent / "training" / "configs"
PRIORS: dict[str, dict[str, Any]] = {
    "realnvp": {"prior": "realnvp", "couplings": 4, "width": 16},
    "vamp": {"prior": "vamp", "components": 20},
}


@pytest.mark.parametrize("name", PRIORS)
def test_a_learned_prior_is_sampled_through_the_service(name: str, tmp_path: Path) -> None:
    """Latents are the prior graph's at the seed's noise, scaled by the temperature; scores are the trainer's."""
    run = load(CONFIGS / "digits.toml")
    model = run.model.model_copy(update={"prior": TypeAdapter(PriorSettings).validate_python(PRIORS[name])})
    few = run.train.model_copy(update={"epochs": 3})
    run = run.model_copy(update={"model": model, "train": few, "restoration": None})
    workshop = Workshop.open(run, tmp_path, tmp_path / "run", torch.device("cpu"))
    version = workshop.fit(tmp_path / "models")
    sessions = {
        name: Session((version / graph.file).read_bytes(), "CPUExecutionProvider", 1, graph)
        for name, graph in read(version).graphs.items()
    }
    x = np.random.default_rng(0).integers(0, 2, (6, 1, 8, 8)).astype(np.float32)

    async def ask() -> tuple[Any, Any]:
        transport = httpx.ASGITransport(create_app(Settings(models=tmp_path / "models")))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            options = {"count": 5, "seed": 3, "temperature": 0.5, "latents": True}
            score = {"images": x.tolist(), "seed": 3, "draws": 40}
            return (await client.post("/v1/sample", json=options)).json(), (
                await client.post("/v1/score", json=score)
            ).json()

    answer, scores = asyncio.run(ask())
    eps = np.float32(0.5) * standard_normal(3, 5, (8 + (name == "vamp"),))
    (z,) = sessions["prior"](eps)
    assert np.allclose(answer["latents"], z, atol=1e-6)
    assert np.allclose(answer["images"], sessions["decoder"](z)[0], atol=1e-6)
    vae, eps = workshop.vae(), torch.from_numpy(standard_normal(3, 6, (40, 8))).transpose(0, 1)
    with torch.no_grad():
        bound = vae.bound(torch.from_numpy(x), eps).elbo.numpy()
        weighted = importance_log_likelihood(vae, torch.from_numpy(x), eps).numpy()
        density = vae.prior.log_prob(torch.from_numpy(z)).numpy()
    assert np.allclose(scores["elbo"], bound, rtol=1e-4, atol=1e-3)
    assert np.allclose(scores["importance_weighted"], weighted, rtol=1e-4, atol=1e-3)
    assert np.allclose(sessions["log_joint"](x[:5], z)[1], density, rtol=1e-4, atol=1e-3)
