"""Noise2Void, a network trained on noisy images alone that never sees the pixel whose value it predicts.

Source: Krull, Buchholz and Jug (2019), "Noise2Void: learning denoising from single noisy images", sections 3.3 and 4:
crops of 64 x 64, 64 pixels of each replaced by one of the 5 x 5 pixels around it, squared error at these pixels alone,
Adam with a rate of 4e-4, images standardised. The network is our U-Net, and the schedule our cosine.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from training.config import Optimisation
from training.data import ImageSet
from training.data.noisy import unpacked
from training.loop.checkpoint import read_trained
from training.loop.trainer import Stage, train
from training.models.vae import Bound
from training.networks.unet import UNet
from training.pipeline import locked

WIDTHS = (32, 64, 96)
NAME = "noise2void"
MASKED = 64
"""Pixels of a crop of 64 x 64 that are replaced."""
REACH = 2
"""How far away the pixel that replaces another may be, in each direction."""


class Noise2Void(nn.Module):
    """E[x | all other pixels], by a U-Net on standardised images.

    Args:
        centre: Mean of the training images.
        scale: Their standard deviation.
    """

    def __init__(self, centre: float, scale: float) -> None:
        super().__init__()
        self.register_buffer("centre", torch.tensor(centre))
        self.register_buffer("scale", torch.tensor(scale))
        self.centre: Tensor
        self.scale: Tensor
        self.network = UNet(1, 1, None, WIDTHS)

    def forward(self, y: Tensor) -> Tensor:
        """Map noisy images to restored ones, (n, 1, h, w), height and width multiples of 4."""
        standard = (y - self.centre) / self.scale
        found: Tensor = self.network(standard).float()
        return self.centre + self.scale * found


def blinded(y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (n, 1, h, w) some of whose pixels are others near them, and a mask of these, 1 where it is so."""
    n, _, height, width = y.shape
    mask = torch.zeros_like(y)
    share = MASKED / (64 * 64)
    count = max(1, round(share * height * width))
    place = torch.rand(n, height * width, generator=generator).argsort(1)[:, :count]
    mask.view(n, -1).scatter_(1, place, 1.0)
    side = 2 * REACH + 1
    step = torch.randint(0, side**2 - 1, (n, count), generator=generator)
    step = step + (step >= side**2 // 2).long()  # not the pixel itself
    row = (place // width + step // side - REACH).clamp(0, height - 1)
    column = (place % width + step % side - REACH).clamp(0, width - 1)
    seen = y.clone()
    seen.view(n, -1).scatter_(1, place, y.view(n, -1).gather(1, row * width + column))
    return seen, mask


def stage(images: ImageSet, epochs: int) -> Stage:
    """The stage that minimises the squared error at the replaced pixels, for crops as `training.data.noisy` makes."""

    def objective(model: Noise2Void, crops: Tensor, generator: torch.Generator) -> Bound:
        y, _ = unpacked(crops)
        seen, mask = blinded(y.contiguous(), generator)
        square = ((model(seen) - y) / model.scale).square() * mask
        error = square.flatten(1).sum(1) / mask.flatten(1).sum(1)
        return Bound(-error, torch.zeros_like(error))

    settings = Optimisation(epochs=epochs, batch_size=16, learning_rate=4e-4, precision="bfloat16", gradient_norm=1e6)
    y, _ = unpacked(images.train)
    torch.manual_seed(0)
    module = Noise2Void(float(y.mean()), float(y.std())).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    said = {"widths": list(WIDTHS), "masked": MASKED, "train": settings.model_dump(mode="json", exclude={"epochs"})}
    return Stage(NAME, module, objective, settings, 0, said, latent=False, lengthening="--epochs")


def trained(images: ImageSet, folder: Path, epochs: int) -> Noise2Void:
    """Train it if it is not trained yet; an interrupted training is resumed.

    Args:
        images: Noisy crops, as `training.data.noisy` makes them.
        folder: Folder for checkpoints and log.
        epochs: Number of epochs.

    Raises:
        TrainingError: Training fails.
    """
    one = stage(images, epochs)
    with locked(folder):
        train(one, images.train, folder, held_out=images.validation, crops=images.crops)
    module: Noise2Void = read_trained(folder / f"{NAME}.pt", one.identity, one.module)  # type: ignore[assignment]
    return module
