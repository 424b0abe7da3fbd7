"""On a GPU a step is recorded once and replayed with the same result."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from service.contract import manifest
from training.config import Run
from training.loop.stages import restoration_stage, trained_vae, vae_stage
from training.loop.trainer import train
from training.models.vae import VAE
from training.pipeline import Workshop

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SHAPE = (1, 8, 8)
CONV = {"architecture": "conv", "channels": [8, 12], "blocks": 1, "head": 4}
RUNS: dict[str, dict[str, Any]] = {
    "adam": {},
    "muon": {"train": {"optimiser": "muon", "kl_warmup_steps": 20, "gradient_norm": 5.0}},
    "adagrad": {"train": {"optimiser": "adagrad", "schedule": "constant", "weight_prior": True, "warmup_steps": 0}},
    "importance-weighted": {"train": {"objective": "importance_weighted", "draws": 3}},
    "wake-sleep": {"train": {"objective": "wake_sleep"}},
    "denoising": {"train": {"objective": "denoising"}},
    "flow": {"model": {"prior": {"prior": "realnvp", "couplings": 2, "width": 8}}, "train": {"free_nats": 1.0}},
    "vamp": {"model": {"prior": {"prior": "vamp"}}},
    "microbatches": {"train": {"microbatches": 2}},
    "bfloat16": {"train": {"precision": "bfloat16"}},
}


def run(epochs: int = 10, **said: dict[str, Any]) -> Run:
    """4 steps an epoch."""
    restoration = {"network": CONV, "level_network": CONV, "train": {"epochs": 2, "batch_size": 25}}
    return Run.model_validate(
        {
            "name": "tiny",
            "data": {"dataset": "digits"},
            "model": {"latent_dim": 4, "network": CONV, **said.get("model", {})},
            "train": {"epochs": epochs, "batch_size": 25, "warmup_steps": 10, **said.get("train", {})},
            "restoration": restoration,
        }
    )


def images(device: str = "cuda") -> Tensor:
    """100 grey images."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (100, *SHAPE), generator=generator).to(device, torch.uint8)


def trained(run: Run, folder: Path, device: str = "cuda", **changed: Any) -> dict[str, Tensor]:
    """Weights at the end of the first stage."""
    stage = vae_stage(run, SHAPE, torch.device(device))
    train(dataclasses.replace(stage, **changed), images(device), folder)
    return {name: value.cpu() for name, value in stage.module.state_dict().items()}


def stop(_module: VAE) -> dict[str, float]:
    """Ctrl-C at the watched step."""
    raise KeyboardInterrupt


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-3) -> None:
    """Compare every weight, up to the order of sums."""
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=rtol, atol=rtol / 10, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("name", RUNS)
def test_a_replayed_step_is_the_step(name: str, tmp_path: Path) -> None:
    """For every objective, a replayed step has the noise, rates and weights of an eager one."""
    wanted = trained(run(**RUNS[name]), tmp_path / "plain", replayable=False)
    found = trained(run(**RUNS[name]), tmp_path / "replayed")
    assert_close(found, wanted)


def test_a_replayed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """A run resumed from a checkpoint has the same weights and moments; nothing of the recording is saved."""
    whole = trained(run(**RUNS["muon"]), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(run(**RUNS["muon"]), tmp_path / "broken", watch=stop, watched_steps=frozenset({17}))
    assert_close(trained(run(**RUNS["muon"]), tmp_path / "broken"), whole)


@pytest.mark.parametrize("name", ["adam", "muon", "adagrad"])
@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_a_checkpoint_moves_between_devices(name: str, first: str, tmp_path: Path) -> None:
    """A run may begin on one device and end on the other, and a CPU reads the export."""
    with pytest.raises(KeyboardInterrupt):
        trained(run(**RUNS[name]), tmp_path, first, watch=stop, watched_steps=frozenset({17}))
    trained(run(**RUNS[name]), tmp_path, "cuda" if first == "cpu" else "cpu")
    vae = trained_vae(run(**RUNS[name]), SHAPE, tmp_path, torch.device("cpu"))
    assert all(bool(p.isfinite().all()) for p in vae.parameters())


def test_restoration_trains_on_a_gpu(tmp_path: Path) -> None:
    """Its operators are numpy's, so its steps are not replayed."""
    device = torch.device("cuda")
    trained(run(), tmp_path)
    stage = restoration_stage(run(), trained_vae(run(), SHAPE, tmp_path, device), SHAPE, device)
    train(stage, images(), tmp_path)
    assert all(bool(p.isfinite().all()) for p in stage.module.parameters())


def test_a_run_is_exported_from_a_gpu(tmp_path: Path) -> None:
    """Trained and evaluated there; the graphs and their golden vectors are made on the CPU that serves them."""
    workshop = Workshop.open(run(1), tmp_path, tmp_path / "run", torch.device("cuda"))
    version = workshop.fit(tmp_path / "models")
    assert manifest.read(version).training["device"] == "cuda"
