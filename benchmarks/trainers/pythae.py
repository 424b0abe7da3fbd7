"""pythae: its VAE and BaseTrainer around the same layers, on grey levels, because it does not binarise."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from typing import Any

import torch
from pythae.data.datasets import BaseDataset  # type: ignore[import-not-found]  # it is in an environment of its own
from pythae.models import VAE, VAEConfig  # type: ignore[import-not-found]
from pythae.models.base.base_utils import ModelOutput  # type: ignore[import-not-found]
from pythae.models.nn import BaseDecoder, BaseEncoder  # type: ignore[import-not-found]
from pythae.trainers import BaseTrainer, BaseTrainerConfig  # type: ignore[import-not-found]
from torch import Tensor, nn

from benchmarks.trainers.job import SHAPE, Job, answer
from benchmarks.trainers.layers import layers


class Encoder(BaseEncoder):  # type: ignore[misc]  # its classes are Any here
    """Encoder with pythae's output type."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        """(n, c, h, w) -> mean and log_var."""
        mean, log_var = self.network(x)
        return ModelOutput(embedding=mean, log_covariance=log_var)


class Decoder(BaseDecoder):  # type: ignore[misc]
    """Decoder with pythae's output type; pythae's loss expects means, not logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor) -> Any:
        """(n, d) -> E[x|z]."""
        return ModelOutput(reconstruction=torch.sigmoid(self.network(z)))


def prepare(job: Job, images: Tensor) -> Callable[[], None]:
    """Prepare a fresh model, its dataset in float32, and a trainer after its sanity check."""
    logging.disable(logging.INFO)
    shutil.rmtree(job.folder, ignore_errors=True)
    encoder, decoder = layers(job)
    config = VAEConfig(input_dim=SHAPE, latent_dim=job.latent_dim, reconstruction_loss="bce")
    model = VAE(config, Encoder(encoder), Decoder(decoder))
    settings = BaseTrainerConfig(
        output_dir=job.folder,
        per_device_train_batch_size=job.batch_size,
        num_epochs=job.epochs,
        learning_rate=job.learning_rate,
        train_dataloader_num_workers=job.workers,
        no_cuda=True,
    )
    trainer = BaseTrainer(model, BaseDataset(images.float() / 255.0, torch.ones(len(images))), None, settings)
    return lambda: trainer.train()  # noqa: PLW0108  # its answer is not wanted


if __name__ == "__main__":
    answer(prepare)
