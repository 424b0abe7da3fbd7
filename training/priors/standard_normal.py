"""p(z) = N(0, I)."""

from __future__ import annotations

from torch import Tensor

from training.gaussian import LOG_2_PI, DiagonalGaussian


class StandardNormal:
    """The paper's prior: no parameters, and a KL in closed form."""

    name = "standard_normal"

    def log_prob(self, z: Tensor) -> Tensor:
        """log N(z; 0, I) in nats: (..., d) -> (...)."""
        return -0.5 * (z.square() + LOG_2_PI).sum(-1)

    def kl(self, posterior: DiagonalGaussian) -> Tensor:
        """KL(posterior || prior) in nats, closed form: (..., d) -> (...)."""
        return posterior.kl_from_standard_normal()
