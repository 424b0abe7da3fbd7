"""The usual PyTorch example of a VAE: a Dataset that transforms one image at a time, a DataLoader, Adam, BCE on means.

An image takes the way that torchvision's MNIST and `ToTensor` give it, by way of Pillow; grey levels stay grey. Kinder
than the example: workers outlive an epoch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Adam
from torch.utils.data import DataLoader, Dataset

from benchmarks.trainers.job import Job, answer
from benchmarks.trainers.layers import layers


class Pictures(Dataset[Tensor]):
    """Dataset that turns uint8 into a Pillow image and then a float tensor in [0, 1], one image at a time."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        picture = Image.fromarray(self.images[index, 0].numpy(), mode="L")
        return torch.from_numpy(np.array(picture, np.uint8)).view(1, *picture.size[::-1]).float().div(255)


def prepare(job: Job, images: Tensor) -> Callable[[], None]:
    """Prepare a fresh network, optimiser and loader."""
    encoder, decoder = layers(job)
    loader = DataLoader(
        Pictures(images),
        batch_size=job.batch_size,
        shuffle=True,
        num_workers=job.workers,
        persistent_workers=job.workers > 0,
    )
    optimiser = Adam([*encoder.parameters(), *decoder.parameters()], lr=job.learning_rate)
    return lambda: loop(encoder, decoder, loader, optimiser, job.epochs)


def loop(encoder: nn.Module, decoder: nn.Module, loader: DataLoader[Tensor], optimiser: Adam, epochs: int) -> None:
    """Train as the example does."""
    for _ in range(epochs):
        total = 0.0
        for x in loader:
            optimiser.zero_grad()
            mean, log_var = encoder(x)
            z = mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)
            missed = functional.binary_cross_entropy(torch.sigmoid(decoder(z)), x, reduction="sum")
            loss = missed - 0.5 * torch.sum(1 + log_var - mean.pow(2) - log_var.exp())
            loss.backward()
            total += loss.item()
            optimiser.step()


if __name__ == "__main__":
    answer(prepare)
