"""p(z) = N(0, I)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from training.distributions.gaussian import LOG_2_PI, DiagonalGaussian
from training.distributions.interface import Prior
from training.strict import Strict


class StandardNormalSettings(Strict):
    """The paper's prior: no parameters."""

    prior: Literal["standard_normal"] = "standard_normal"
    """N(0, I)."""

    def build(self, latent_shape: tuple[int, ...], _shape: tuple[int, int, int], _encoder: nn.Module) -> StandardNormal:
        """The density of z (..., *latent_shape)."""
        return StandardNormal(*latent_shape)


class StandardNormal(Prior):
    """N(0, I), with a KL in closed form.

    Args:
        *event_shape: Axes of one z. Of several axes those after the first may have any length.
    """

    def __init__(self, *event_shape: int) -> None:
        super().__init__(event_shape)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log N(z; 0, I) in nats: (..., *event_shape) -> (...)."""
        return -0.5 * (z.square() + LOG_2_PI).flatten(-len(self.event_shape)).sum(-1)

    def draw(self, eps: Tensor) -> Tensor:
        """The noise itself: (n, *event_shape) -> the same shape."""
        return eps

    def kl(self, posterior: DiagonalGaussian, z: Tensor) -> Tensor:  # noqa: ARG002  # only other priors need draws
        """KL(posterior || prior) in nats, in closed form: (n,)."""
        return posterior.kl_from_standard_normal()
