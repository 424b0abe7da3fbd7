"""A U-Net from noisy image and noise level to clean image: the usual restorer without a generative model.

It restores one kind of corruption, additive Gaussian noise of a known level, and gives no uncertainty.
Source: Ronneberger, Fischer and Brox (2015); the noise level as a plane: Zhang, Zuo and Zhang (2018), FFDNet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.config import Optimisation
from training.data import ImageSet, as_float
from training.loop.checkpoint import read_trained
from training.loop.trainer import Stage, train
from training.models.restoration import SIGMA_RANGE
from training.models.vae import Bound
from training.networks.unet import UNet
from training.pipeline import locked

WIDTHS = (32, 64, 96)
NAME = "unet"
PIXEL_VARIANCE = 0.1
"""Prior variance of a pixel, about that of a digit's pixels, by which the noisy image is shrunk."""


class Denoiser(nn.Module):
    """E[x | y, sigma] for y = x + sigma N(0, I), by a U-Net of y and a plane of sigma.

    The network corrects a linear estimate: y times the Wiener gain v / (v + sigma^2), with v = `PIXEL_VARIANCE`.

    Args:
        shape: Shape (c, h, w) of an image.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = shape
        self.network = UNet(channels + 1, channels, (height, width), WIDTHS)

    def forward(self, y: Tensor, sigma: Tensor) -> Tensor:
        """Map y (n, c, h, w) and sigma (n,) to restored images (n, c, h, w)."""
        level = sigma[:, None, None, None]
        correction: Tensor = self.network(torch.cat([y, level.expand_as(y[:, :1])], 1)).float()
        return PIXEL_VARIANCE / (PIXEL_VARIANCE + level.square()) * y + correction


def stage(shape: tuple[int, int, int], epochs: int, identity: dict[str, Any]) -> Stage:
    """Make the stage that minimises the squared error under noise of log-uniform level.

    Each image's error is divided by its sigma, because the error of the best estimate grows about in proportion to
    sigma. Otherwise the strongest noise would dominate the loss.

    Args:
        shape: Shape (c, h, w) of an image.
        epochs: Number of epochs.
        identity: Values that a checkpoint must match to be resumed.
    """

    def objective(model: Denoiser, images: Tensor, generator: torch.Generator) -> Bound:
        x = as_float(images)
        low, high = SIGMA_RANGE
        sigma = low * (high / low) ** torch.rand(len(x), generator=generator, device=x.device)
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        restored = model(x + sigma[:, None, None, None] * noise, sigma)
        error = (restored - x).square().flatten(1).sum(1) / sigma
        return Bound(-error, torch.zeros_like(error))

    settings = Optimisation(
        epochs=epochs,
        batch_size=100,
        learning_rate=2e-3,
        warmup_steps=100,
        ema_decay=0.98,
        precision="bfloat16",
    )
    torch.manual_seed(0)
    module = Denoiser(shape).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    said = {**identity, "widths": list(WIDTHS), "train": settings.model_dump(mode="json", exclude_defaults=True)}
    return Stage(NAME, module, objective, settings, 0, said)


def trained(images: ImageSet, folder: Path, epochs: int, identity: dict[str, Any]) -> Denoiser:
    """Train the U-Net if it is not trained yet; an interrupted training is resumed.

    Args:
        images: The data set.
        folder: Folder for checkpoints and log.
        epochs: Number of epochs.
        identity: Values that a checkpoint must match to be resumed.

    Returns:
        The trained U-Net.

    Raises:
        TrainingError: Training fails.
    """
    one = stage(images.shape, epochs, identity)
    with locked(folder):
        train(one, images.train, folder)
    module: Denoiser = read_trained(folder / f"{NAME}.pt", one.identity, one.module)  # type: ignore[assignment]
    return module
