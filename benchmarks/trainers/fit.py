"""This project's trainer: `python -m training fit` from a fresh network to the written checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.trainers.job import SHAPE, Job, answer
from training.config import Run
from training.loop.stages import vae_stage
from training.loop.trainer import train


def prepare(job: Job, images: Tensor) -> Callable[[], None]:
    """Prepare a fresh network and an empty folder."""
    folder = Path(job.folder)
    shutil.rmtree(folder, ignore_errors=True)
    stage = vae_stage(Run.model_validate(job.run), SHAPE, torch.device("cpu"))
    return lambda: train(stage, images, folder)


if __name__ == "__main__":
    answer(prepare)
