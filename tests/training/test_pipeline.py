"""A run's folder belongs to its images and to one trainer at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from training.config import Run
from training.data import ImageSet
from training.errors import CheckpointError
from training.pipeline import Workshop, locked

RUN = Run.model_validate(
    {
        "name": "tiny",
        "data": {"dataset": "digits"},
        "model": {"latent_dim": 2, "network": {"architecture": "mlp", "hidden": [8]}},
        "train": {"epochs": 1},
        "evaluation": {"draws": 2, "images": 20},
    }
)


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    """A run that takes a moment."""
    return Workshop.open(RUN, tmp_path, tmp_path / "run", torch.device("cpu"))


def test_a_run_is_not_resumed_on_other_images(workshop: Workshop, tmp_path: Path) -> None:
    """The same settings with other images are refused, because resuming would export the old model; --fresh trains."""
    workshop.fit(tmp_path / "models")
    images = workshop.images
    train, validation, test = (split.flip(-1) for split in (images.train, images.validation, images.test))
    other = dataclasses.replace(workshop, images=ImageSet(train, validation, test))
    with pytest.raises(CheckpointError, match="other images; use --fresh"):
        other.fit(tmp_path / "models", replace=True)
    other.clear()
    other.fit(tmp_path / "models", replace=True)


def test_a_second_trainer_is_kept_out(workshop: Workshop, tmp_path: Path) -> None:
    """Two processes in one folder would overwrite each other's checkpoints; the lock ends with its holder."""
    with locked(workshop.folder), pytest.raises(CheckpointError, match="another process trains"):
        workshop.fit(tmp_path / "models")
    assert workshop.fit(tmp_path / "models").is_dir()
