"""Monte Carlo EM in the training loop: resumed bit for bit, refused with other settings."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from training.data import Digits
from training.distributions.likelihoods.bernoulli import Bernoulli
from training.distributions.priors.standard_normal import StandardNormal
from training.errors import CheckpointError
from training.loop.em import EmStage, train_by_em
from training.loop.randomness import keyed_generator
from training.models.vae import VAE
from training.networks.mlp import Mlp


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """200 digits of 8 x 8 pixels, uint8."""
    return Digits(dataset="digits").load(tmp_path_factory.mktemp("digits")).train[:200]


def em_stage(**changes: Any) -> EmStage:
    """Seven minibatches of Monte Carlo EM on digits."""
    torch.manual_seed(3)
    mlp = Mlp(architecture="mlp", hidden=(8,))
    vae = VAE(mlp.encoder((1, 8, 8), 3), mlp.decoder(3, (1, 8, 8)), Bernoulli((1, 8, 8)), StandardNormal(3))
    stage = EmStage(
        vae,
        binarised=True,
        steps=7,
        batch_size=50,
        learning_rate=0.1,
        weight_decay=1 / 200,
        seed=0,
        identity={"steps": 7},
    )
    return replace(stage, **changes)


def test_interrupted_em_goes_on_as_if_nothing_had_been(images: Tensor, tmp_path: Path) -> None:
    """Ctrl-C in the fifth step, in the second epoch: weights, chains and step size come out bit for bit the same."""
    train_by_em(em_stage(), images, tmp_path / "whole")

    def interrupt(_: VAE) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        return {}

    with pytest.raises(KeyboardInterrupt):
        train_by_em(em_stage(watch=interrupt, watched_steps=frozenset({5})), images, tmp_path / "parts")
    assert torch.load(tmp_path / "parts" / "mcem.pt", weights_only=True)["step"] == 5
    train_by_em(em_stage(), images, tmp_path / "parts")
    whole, parts = (torch.load(tmp_path / name / "mcem.pt", weights_only=True) for name in ("whole", "parts"))
    assert whole["finished"]
    assert parts["finished"]
    for name, weight in whole["module"].items():
        assert torch.equal(weight, parts["module"][name]), name
    assert torch.equal(whole["chains"], parts["chains"])
    assert torch.equal(whole["step_size"], parts["step_size"])


def test_other_settings_are_refused(images: Tensor, tmp_path: Path) -> None:
    """A checkpoint of seven steps is none of eight."""
    train_by_em(em_stage(), images, tmp_path)
    with pytest.raises(CheckpointError, match="steps"):
        train_by_em(em_stage(steps=8, identity={"steps": 8}), images, tmp_path)


def test_every_image_s_chain_moves_once_an_epoch(images: Tensor, tmp_path: Path) -> None:
    """Four minibatches of 50 of 200: nine chains in ten or so have left where they began, none more than once."""
    chains = [torch.randn(200, 3, generator=keyed_generator(torch.device("cpu"), 0, 2))]
    for steps in range(1, 5):
        train_by_em(em_stage(steps=steps), images, tmp_path)
        chains.append(torch.load(tmp_path / "mcem.pt", weights_only=True)["chains"])
    moves = (torch.stack(chains[1:]) != torch.stack(chains[:-1])).any(2).sum(0)
    assert int(moves.max()) == 1
    assert float(moves.float().mean()) > 0.8
