"""p(z) = N(0, I)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from training.distributions.gaussian import LOG_2_PI, DiagonalGaussian
from training.strict import Strict


class StandardNormalSettings(Strict):
    """The paper's prior: no parameters."""

    prior: Literal["standard_normal"] = "standard_normal"
    """N(0, I)."""

    def build(self, _latent_dim: int, _shape: tuple[int, int, int], _encoder: nn.Module) -> StandardNormal:
        """The density; it needs no dimension."""
        return StandardNormal()


class StandardNormal(nn.Module):
    """N(0, I), with a KL in closed form."""

    noise_dim = None
    of_recognition = False

    def log_prob(self, z: Tensor) -> Tensor:
        """log N(z; 0, I) in nats: (..., d) -> (...)."""
        return -0.5 * (z.square() + LOG_2_PI).sum(-1)

    def draw(self, eps: Tensor) -> Tensor:
        """The noise itself: (n, d) -> (n, d)."""
        return eps

    def kl(self, posterior: DiagonalGaussian, z: Tensor) -> Tensor:  # noqa: ARG002  # the draws of other priors
        """KL(posterior || prior) in nats, closed form: (n, d) -> (n,)."""
        return posterior.kl_from_standard_normal()
