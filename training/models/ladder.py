"""The ladder VAE: latents in several groups, each inferred and generated given those above it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from training.distributions.gaussian import DiagonalGaussian
from training.distributions.interface import Likelihood, Prior
from training.distributions.priors.standard_normal import StandardNormal
from training.models.vae import VAE, Inference
from training.networks.ladder import Down, Seen, Up


class GroupedPrior(Prior):
    """A prior of the first group, and N(0, I) of all others, whose latents are standardised.

    `free_nats` are a group's: the KL of a group has no gradient while its mean over the images is below them.
    Source: Kingma et al. (2016), appendix C.8.
    """

    def __init__(self, first: Prior, sizes: Sequence[int], free_nats: float = 0.0) -> None:
        super().__init__((sum(sizes),))
        self.first, self.sizes, self.free_nats = first, list(sizes), free_nats
        self.others = StandardNormal(sum(sizes[1:]))

    def log_prob(self, z: Tensor) -> Tensor:
        """Log p(z) in nats: (..., d) -> (...)."""
        first, others = self._split(z)
        return self.first.log_prob(first) + self.others.log_prob(others)

    def draw(self, eps: Tensor) -> Tensor:
        """z ~ p(z): (n, d) -> (n, d)."""
        first, others = self._split(eps)
        return torch.cat([self.first.draw(first), others], 1)

    def frozen(self) -> Prior:
        """N(0, I) where the first group's is that too."""
        first = self.first.frozen()
        if isinstance(first, StandardNormal):
            return StandardNormal(sum(self.sizes))
        return GroupedPrior(first, self.sizes)

    def kl(self, posterior: DiagonalGaussian, z: Tensor) -> Tensor:
        """The sum of `kl_groups`, with the gradient of those above their free nats: (n,)."""
        groups = self.kl_groups(posterior, z)
        if self.free_nats:
            groups = torch.where(groups.mean(1, keepdim=True) < self.free_nats, groups.detach(), groups)
        return groups.sum(0)

    def kl_groups(self, posterior: DiagonalGaussian, z: Tensor) -> Tensor:
        """KL of each group given those above, in nats, as the mean over the draws.

        Args:
            posterior: mean and log_var, (L, n, d) each.
            z: Draws, (L, n, d).

        Returns:
            (groups, n). Each of N(0, I) is in closed form, given the draws above.
        """
        means, log_vars = (part.split(self.sizes, -1) for part in posterior)
        first = self.first.kl(DiagonalGaussian(means[0][0], log_vars[0][0]), self._split(z)[0])
        pairs = zip(means[1:], log_vars[1:], strict=True)
        return torch.stack([first, *(DiagonalGaussian(*q).kl_from_standard_normal().mean(0) for q in pairs)])

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z[..., : self.sizes[0]], z[..., self.sizes[0] :]


class LadderVAE(VAE):
    """A VAE with groups of latents, packed into one vector: `posterior` is what the way up sees of the images.

    Source: Sonderby et al. (2016), section 2; Vahdat and Kautz (2020), section 3.
    """

    encoder: Up
    decoder: Down

    def __init__(self, encoder: Up, decoder: Down, likelihood: Likelihood, prior: Prior, free_nats: float) -> None:
        super().__init__(encoder, decoder, likelihood, GroupedPrior(prior, decoder.group_sizes, free_nats))

    @property
    def group_shapes(self) -> list[tuple[int, int, int]]:
        """Shapes of the groups, the vector above them first, as (latent_dim, 1, 1)."""
        return self.decoder.group_shapes

    def posterior(self, x: Tensor) -> Seen:  # type: ignore[override]
        """What q depends on: x (n, c, h, w) -> features."""
        seen: Seen = self.encoder(x)
        return seen

    def infer(self, posterior: Seen, eps: Tensor) -> Inference:
        """Draw every group from q given those above, on one way down."""
        walk = self.decoder.walk(posterior, eps)
        z, mean, log_var, parameters = (part.float().unflatten(0, eps.shape[:2]) for part in walk)
        return Inference(z, DiagonalGaussian(mean, log_var), parameters)

    def reconstruct(self, x: Tensor) -> Tensor:
        """E[x|z] with each group at its mean given those above: (n, c, h, w) -> the same shape."""
        eps = x.new_zeros(1, len(x), *self.noise_shapes.posterior)
        return self.likelihood.mean(self.infer(self.posterior(x), eps).parameters[0])
