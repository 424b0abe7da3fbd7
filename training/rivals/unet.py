"""The rival that one would train without a generative model: a U-Net from noisy image and noise level to clean image.

It knows one kind of corruption, additive Gaussian noise of a known level, and says nothing of its uncertainty.
Source: Ronneberger, Fischer and Brox (2015); the noise level as a plane: Zhang, Zuo and Zhang (2018), FFDNet.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.architectures.conv import Residual, Upsample
from training.config import Optimisation
from training.datasets import ImageSet, as_float
from training.elbo import Bound
from training.pipeline import locked
from training.restoration import SIGMA_RANGE
from training.trainer import Stage, read_averaged, train

WIDTHS = (32, 64, 96)
NAME = "unet"
PIXEL_VARIANCE = 0.1
"""About that of a digit's pixels: it says from which level on the noisy image is not a good first guess."""


class UNet(nn.Module):
    """E[x | y, sigma] for y = x + sigma N(0, I): a residual block a level on the way down and one on the way up.

    Its answer is a correction of y shrunk by how far y can be believed, so that it starts as a linear filter.
    """

    def __init__(self, shape: tuple[int, int, int], widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        channels, height, width = shape
        sizes = [(height, width)]
        for _ in widths[1:]:
            sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
        pairs = list(pairwise(widths))
        self.first = nn.Conv2d(channels + 1, widths[0], 3, padding=1)
        self.down = nn.ModuleList(Residual(one) for one in widths[:-1])
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.middle = nn.Sequential(Residual(widths[-1]), Residual(widths[-1]))
        self.grow = nn.ModuleList(Upsample(b, a, size) for (a, b), size in zip(pairs, sizes[:-1], strict=True))
        self.up = nn.ModuleList(Residual(one) for one in widths[:-1])
        self.last = nn.Conv2d(widths[0], channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)

    def forward(self, y: Tensor, sigma: Tensor) -> Tensor:
        """y (n, c, h, w), sigma (n,) -> (n, c, h, w)."""
        level = sigma[:, None, None, None]
        hidden, passed = self.first(torch.cat([y, level.expand_as(y[:, :1])], 1)), []
        for block, shrink in zip(self.down, self.shrink, strict=True):
            passed.append(block(hidden))
            hidden = shrink(passed[-1])
        hidden = self.middle(hidden)
        for grow, block, skip in zip(reversed(self.grow), reversed(self.up), reversed(passed), strict=True):
            hidden = block(grow(functional.silu(hidden)) + skip)
        believed = PIXEL_VARIANCE / (PIXEL_VARIANCE + level.square())
        correction: Tensor = self.last(functional.silu(hidden)).float()
        return believed * y + correction


def stage(
    shape: tuple[int, int, int], epochs: int, identity: dict[str, Any], widths: tuple[int, ...] = WIDTHS
) -> Stage:
    """Lower the squared error under noise of log-uniform level, over the range that the recognition model sees.

    The error of the best answer grows about as sigma does, so each image's is divided by its sigma: else only the
    strongest noise would be learned.
    """

    def objective(model: UNet, images: Tensor, generator: torch.Generator) -> Bound:
        x = as_float(images)
        low, high = SIGMA_RANGE
        sigma = low * (high / low) ** torch.rand(len(x), generator=generator, device=x.device)
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        restored = model(x + sigma[:, None, None, None] * noise, sigma)
        error = (restored - x).square().flatten(1).sum(1) / sigma
        return Bound(-error, torch.zeros_like(error))

    settings = Optimisation(epochs=epochs, batch_size=100, learning_rate=2e-3, precision="bfloat16")
    torch.manual_seed(0)
    module = UNet(shape, widths).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    said = {**identity, "widths": list(widths), "train": settings.model_dump(mode="json", exclude_defaults=True)}
    return Stage(NAME, module, objective, settings, 0, said)


def trained(images: ImageSet, folder: Path, epochs: int, identity: dict[str, Any]) -> UNet:
    """The U-Net, trained in `folder` unless it is already; an interrupted training is resumed.

    Raises: what `train` raises.
    """
    one = stage(images.shape, epochs, identity)
    with locked(folder):
        train(one, images.train, folder)
    module: UNet = read_averaged(folder / f"{NAME}.pt", one.identity, one.module)  # type: ignore[assignment]
    return module
