"""Train, export and serve on the real MNIST, in one short run."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import numpy as np
import torch

from service.app import create_app
from service.settings import Settings
from training.config import Run
from training.data.mnist import read_images
from training.pipeline import Workshop

RUN = Run.model_validate(
    {
        "name": "short",
        "data": {"dataset": "mnist"},
        "model": {"latent_dim": 10, "network": {"architecture": "mlp", "hidden": [128], "activation": "relu"}},
        "train": {"epochs": 2, "batch_size": 200, "learning_rate": 2e-3, "ema_decay": 0.98},
        "evaluation": {"draws": 10, "images": 500},
    }
)
RAW = {"content-type": "application/octet-stream", "accept": "application/octet-stream"}


def test_two_epochs_are_worth_serving(real_data: Path, tmp_path: Path) -> None:
    """After two epochs the bound is far above that of independent pixels (-206 nats), and the service reconstructs."""
    folder = Workshop.open(RUN, real_data, tmp_path / "run", torch.device("cpu")).fit(tmp_path / "models")
    quality = json.loads((folder / "manifest.json").read_text())["quality"]
    assert quality["test_elbo_nats"] > -160
    assert quality["test_elbo_nats"] < -quality["test_nll_nats"] < -84
    x = (read_images(real_data, "t10k-images-idx3-ubyte")[:100].numpy() / 255).astype("<f4")

    async def served() -> bytes:
        transport = httpx.ASGITransport(create_app(Settings(models=tmp_path / "models")))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            assert (await client.post("/v1/denoise", content=x.tobytes(), headers=RAW)).status_code == 422
            return (await client.post("/v1/reconstruct", content=x.tobytes(), headers=RAW)).content

    again = np.frombuffer(asyncio.run(served()), "<f4").reshape(x.shape)
    assert np.square(again - x).mean() < 0.6 * np.square(x.mean(0) - x).mean()
