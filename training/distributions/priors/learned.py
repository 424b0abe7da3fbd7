"""What learned priors share: the KL estimated at the draws, and a way from noise to z."""

from __future__ import annotations

from torch import Tensor, nn

from training.distributions.gaussian import DiagonalGaussian


class LearnedPrior(nn.Module):
    """A density p(z) with parameters, trained with the networks."""

    noise_dim: int
    """Width of the standard normal noise that `draw` takes."""
    of_recognition = False

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats: (..., d) -> (...)."""
        raise NotImplementedError

    def draw(self, eps: Tensor) -> Tensor:
        """z ~ p(z) for eps ~ N(0, I): (n, noise_dim) -> (n, d)."""
        raise NotImplementedError

    def frozen(self) -> LearnedPrior:
        """The same density, with no more than it needs once training is over."""
        return self

    def kl(self, posterior: DiagonalGaussian, z: Tensor) -> Tensor:
        """KL(posterior || prior) in nats at the draws z (L, n, d) -> (n,): the entropy exact, the rest their mean.

        Source: Kingma and Welling (2013), equation 6, with the part of it that has a closed form in that form.
        """
        # As a matrix: in a graph, products of three axes would depend on how many rows there are.
        log_prob = self.log_prob(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        return -posterior.entropy() - log_prob.mean(0)
