"""An imported VAE, of which the encoder and the decoder are known and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.distributions.gaussian import DiagonalGaussian
from training.models.vae import VAE, Bound, NoiseShapes


class Frozen(VAE):
    """A VAE of fixed weights, without likelihood and prior.

    Its bound is for posteriors r(z|y) of corrupted images y alone: minus the KL divergence from q(z|x) to r(z|y). On
    average over clean and corrupted images it is largest where r(z|y) is closest to E[q(z|x) | y], the posterior that
    the encoder implies. It needs neither likelihood nor prior.

    Args:
        encoder: x (n, c, h, w) -> mean and log_var, (n, *latent_shape) each.
        decoder: z (n, *latent_shape) -> images (n, c, h, w).
        latent_shape: Of one z: (d,), or (c, h, w) for the training images.
        value_range: Values of black and white of both; x and x_mean of this class are in [0, 1].
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_shape: tuple[int, ...],
        value_range: tuple[float, float],
    ) -> None:
        nn.Module.__init__(self)
        self.encoder, self.decoder = encoder, decoder
        self.of_one = latent_shape
        self.low, self.high = value_range
        self.eval().requires_grad_(requires_grad=False)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one z."""
        return self.of_one

    @property
    def noise_shapes(self) -> NoiseShapes:
        """Shapes of the noise that `bound` takes for one example."""
        return NoiseShapes(self.latent_shape, self.latent_shape)

    def posterior(self, x: Tensor) -> DiagonalGaussian:
        """q(z|x): x (n, c, h, w) in [0, 1] -> mean and log_var (n, *latent_shape), in float32."""
        return super().posterior(self.low + (self.high - self.low) * x)

    def x_mean(self, z: Tensor) -> Tensor:
        """E[x|z]: z (n, *latent_shape) -> (n, c, h, w), in [0, 1]."""
        return ((self.decode(z) - self.low) / (self.high - self.low)).clamp(0.0, 1.0)

    def bound(self, x: Tensor, _eps: Tensor, posterior: DiagonalGaussian | None = None) -> Bound:
        """Minus KL(q(z|x) || posterior) in nats, in closed form, (n,).

        Source: Bishop (2006), "Pattern recognition and machine learning", section 10.1.2, on KL(p || q).
        """
        assert posterior is not None, "an imported VAE has no bound of its own"
        with torch.no_grad():
            q = self.posterior(x)
        square = (q.log_var.exp() + (q.mean - posterior.mean).square()) * torch.exp(-posterior.log_var)
        kl = 0.5 * (posterior.log_var - q.log_var + square - 1.0).flatten(1).sum(1)
        return Bound(torch.zeros_like(kl), kl)
