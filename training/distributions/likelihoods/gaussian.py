"""Gaussian p(x|z) for real-valued pixels."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from training.distributions.gaussian import LOG_2_PI
from training.distributions.interface import Likelihood, Support
from training.strict import Strict


class GaussianSettings(Strict):
    """Mean through a sigmoid; one learned standard deviation a pixel, at least `least_std`.

    Without the lower limit the bound has no maximum: where the model predicts a pixel exactly, its density grows
    without end.
    Source: Kingma and Welling (2013), appendix C.2; the lower limit: Mattei and Frellsen (2018), section 2.
    """

    support: ClassVar[Support] = Support.REAL
    likelihood: Literal["gaussian"]
    """Grey levels as real numbers."""
    least_std: Annotated[float, Field(gt=0, lt=1)] = 1 / 256
    """The width of a grey level: finer differences than that are not in the data."""
    outliers: bool = False
    """Whether each pixel is mixed with the uniform density on [0, 1], by a learned weight that starts at a half. An
    unlikely pixel then costs little. The paper does not have it, its author's code (anglepy) does."""

    def build(self, shape: tuple[int, int, int]) -> Gaussian:
        """The likelihood of images of that shape."""
        return (GaussianWithOutliers if self.outliers else Gaussian)(shape, self.least_std)


class Gaussian(Likelihood):
    """Independent Gaussian pixels; `parameters` are logits of the mean, shaped like the image."""

    support = GaussianSettings.support

    def __init__(self, shape: tuple[int, int, int], least_std: float) -> None:
        super().__init__(shape)
        self.least_std = least_std
        self.raw_std = nn.Parameter(torch.full(shape, -2.0))

    def std(self) -> Tensor:
        """The learned standard deviation of every pixel, (c, h, w)."""
        return self.least_std + functional.softplus(self.raw_std)

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        """Log p(x|z), a density in nats, summed over channels and pixels: (..., c, h, w) -> (...)."""
        return self._pixels(parameters, x).flatten(-3).sum(-1)

    def draw(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """x ~ p(x|z), shaped like `parameters`; clipped to [0, 1], as the author's code does."""
        noise = torch.randn(parameters.shape, generator=generator, device=parameters.device)
        return (torch.sigmoid(parameters) + self.std() * noise).clamp(0.0, 1.0)

    def _pixels(self, parameters: Tensor, x: Tensor) -> Tensor:
        std = self.std()
        square = ((x - torch.sigmoid(parameters)) / std).square()
        return -0.5 * (square + 2.0 * std.log() + LOG_2_PI)


class GaussianWithOutliers(Gaussian):
    """Each pixel Gaussian or, with a learned probability, uniform on [0, 1].

    `dream` has no outliers, nor has it in dpkingma/anglepy (`gen_xz`): at first half of the pixels would be uniform
    noise, from which the encoder learns nothing about later images.
    """

    def __init__(self, shape: tuple[int, int, int], least_std: float) -> None:
        super().__init__(shape, least_std)
        self.outlier_logit = nn.Parameter(torch.zeros(shape))

    def mean(self, parameters: Tensor) -> Tensor:
        """E[x|z] in [0, 1], shaped like `parameters`."""
        return torch.lerp(torch.sigmoid(parameters), torch.full_like(parameters, 0.5), self._outlier_share())

    def draw(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """x ~ p(x|z), shaped like `parameters`, clipped to [0, 1]."""
        anything, chance = torch.rand((2, *parameters.shape), generator=generator, device=parameters.device)
        return torch.where(chance < self._outlier_share(), anything, super().draw(parameters, generator))

    def dream(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """x of the Gaussian part alone, shaped like `parameters`, clipped to [0, 1]."""
        return super().draw(parameters, generator)

    def _outlier_share(self) -> Tensor:
        return torch.sigmoid(self.outlier_logit)

    def _pixels(self, parameters: Tensor, x: Tensor) -> Tensor:
        gaussian = functional.logsigmoid(-self.outlier_logit) + super()._pixels(parameters, x)
        return torch.logaddexp(gaussian, functional.logsigmoid(self.outlier_logit))
