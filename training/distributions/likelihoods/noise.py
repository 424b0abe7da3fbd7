"""p(y|z) as a noise model around the clean signal s(z): for images that were never clean."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from training.distributions.gaussian import LOG_2_PI
from training.distributions.interface import Likelihood, Support
from training.errors import ConfigError
from training.strict import Strict

NotNegative = Annotated[float, Field(ge=0)]


class Camera(Strict):
    """Noise of a camera, as `python -m training noise-model` writes it: Var[y|s] = gain s + offset."""

    gain: NotNegative
    """Variance a unit of signal, of images in which white is 1."""
    offset: float
    """Variance at a signal of 0; negative where black lies above 0."""


class NoiseSettings(Strict):
    """p(y|z) has the mean s(z) and the variance gain s(z) + offset: the decoder gives the clean signal.

    Give `sigma`, or `gain` and `offset`, or `calibration`; without them both are found blindly in each image.
    """

    support: ClassVar[Support] = Support.REAL
    likelihood: Literal["noise"]
    """Noise around a clean signal that no training image shows."""
    sigma: Annotated[float, Field(gt=0)] | None = None
    """Standard deviation of Gaussian noise, the same everywhere; white is 1."""
    gain: NotNegative | None = None
    """Variance of Poisson-Gaussian noise a unit of signal; white is 1."""
    offset: float | None = None
    """Its variance at a signal of 0; negative where black lies above 0."""
    calibration: Path | None = None
    """File that `python -m training noise-model` wrote."""

    @model_validator(mode="after")
    def _one_source(self) -> NoiseSettings:
        if (self.gain is None) != (self.offset is None):
            raise ValueError("gain and offset belong together; give both")
        if sum(part is not None for part in (self.sigma, self.gain, self.calibration)) > 1:
            raise ValueError("give one of sigma, gain and offset, or calibration; none of them finds the noise blindly")
        if self.gain == 0.0 and (self.offset or 0.0) <= 0.0:
            raise ValueError("without gain the offset must be above 0; otherwise there is no noise")
        return self

    def known(self) -> Camera | None:
        """The noise of every image; None where it is to be found in each of them.

        Raises:
            ConfigError: The file cannot be read.
        """
        if self.sigma is not None:
            return Camera(gain=0.0, offset=self.sigma**2)
        if self.gain is not None and self.offset is not None:
            return Camera(gain=self.gain, offset=self.offset)
        return None if self.calibration is None else read_camera(self.calibration)


def read_camera(path: Path) -> Camera:
    """Read what `python -m training noise-model` wrote.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        return Camera.model_validate(told.get("noise", {}))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise ConfigError(
            f"{path} is no noise model ({error}); write it with python -m training noise-model"
        ) from error


class UnitNoise(Likelihood):
    """N(s, 1) of each pixel after the stabilising transform; the decoder gives (s - centre) / scale.

    Args:
        shape: (c, h, w) of the images.
        centre: Mean of the transformed training images.
        scale: Their standard deviation.
    """

    def __init__(self, shape: tuple[int, int, int], centre: float = 0.0, scale: float = 1.0) -> None:
        super().__init__(shape)
        self.register_buffer("centre", torch.tensor(centre))
        self.register_buffer("scale", torch.tensor(scale))
        self.centre: Tensor
        self.scale: Tensor

    def mean(self, parameters: Tensor) -> Tensor:
        """The clean signal s, shaped like `parameters`."""
        return self.centre + self.scale * parameters

    def standardised(self, t: Tensor) -> Tensor:
        """The inverse of `mean`."""
        return (t - self.centre) / self.scale

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        """Log N(x; s, 1) in nats, summed over channels and pixels: (..., c, h, w) -> (...)."""
        square = (x - self.mean(parameters)).square() + LOG_2_PI
        return -0.5 * square.flatten(-3).sum(-1)

    def draw(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """A noisy image, shaped like `parameters`."""
        noise = torch.randn(parameters.shape, generator=generator, device=parameters.device)
        return self.mean(parameters) + noise
