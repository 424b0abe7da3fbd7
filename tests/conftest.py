"""What tests of the trainer and of the service share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from training.config import load
from training.pipeline import Workshop

CONFIGS = Path(__file__).parent.parent / "training" / "configs"
# Threads of small operations wait for each other by spinning: on cores that have other work, fifteen times slower.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Where the real data lie."""
    folder = os.environ.get("VAE_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real data: set VAE_DATA to the folder that holds mnist/")
    return Path(folder)


@pytest.fixture(scope="session")
def digits_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with one version of `digits`, trained, evaluated and exported for real."""
    run = load(CONFIGS / "digits.toml")
    short = run.train.model_copy(update={"epochs": 10})
    assert run.restoration is not None
    restoration = run.restoration.model_copy(update={"train": run.restoration.train.model_copy(update={"epochs": 5})})
    run = run.model_copy(update={"train": short, "restoration": restoration})
    folder = tmp_path_factory.mktemp("digits")
    workshop = Workshop.open(run, folder, folder / "run", torch.device("cpu"))
    workshop.fit(folder / "models")
    return folder / "models"
