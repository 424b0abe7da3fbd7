"""The ladder VAE: latents in several groups, each inferred and generated given those above it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from training.distributions.gaussian import DiagonalGaussian, SpatialGaussian
from training.distributions.interface import Likelihood, Prior
from training.distributions.priors.standard_normal import StandardNormal
from training.models.vae import VAE, Inference
from training.networks.ladder import Down, Seen, Up


class GroupedPrior(Prior):
    """A prior of the first group, and N(0, I) of all others, whose latents are standardised.

    `free_nats` are a group's: the KL of a group has no gradient while its mean over the images is below them.
    Source: Kingma et al. (2016), appendix C.8.

    Args:
        event_shape: Of z, whose groups lie beside each other along its first axis.
        sizes: Length of each group along that axis.
        first: Prior of the first group; None is N(0, I) too.
        free_nats: As above.
    """

    def __init__(
        self, event_shape: tuple[int, ...], sizes: Sequence[int], first: Prior | None = None, free_nats: float = 0.0
    ) -> None:
        super().__init__(event_shape)
        self.first, self.sizes, self.free_nats = first, list(sizes), free_nats
        rest = sum(sizes) if first is None else sum(sizes[1:])
        self.others = StandardNormal(rest, *event_shape[1:])

    def log_prob(self, z: Tensor) -> Tensor:
        """Log p(z) in nats: (..., *event_shape) -> (...)."""
        if self.first is None:
            return self.others.log_prob(z)
        first, others = self._split(z)
        return self.first.log_prob(first) + self.others.log_prob(others)

    def draw(self, eps: Tensor) -> Tensor:
        """z ~ p(z): (n, *event_shape) -> the same shape."""
        if self.first is None:
            return eps
        first, others = self._split(eps)
        return torch.cat([self.first.draw(first), others], 1)

    def frozen(self) -> Prior:
        """N(0, I) where the first group's is that too."""
        first = None if self.first is None else self.first.frozen()
        if first is None or isinstance(first, StandardNormal):
            return StandardNormal(*self.event_shape)
        return GroupedPrior(self.event_shape, self.sizes, first)

    def kl(self, posterior: DiagonalGaussian, z: Tensor) -> Tensor:
        """The sum of `kl_groups`, with the gradient of those above their free nats: (n,)."""
        groups = self.kl_groups(posterior, z)
        if self.free_nats:
            groups = torch.where(groups.mean(1, keepdim=True) < self.free_nats, groups.detach(), groups)
        return groups.sum(0)

    def kl_groups(self, posterior: DiagonalGaussian, z: Tensor) -> Tensor:
        """KL of each group given those above, in nats, as the mean over the draws.

        Args:
            posterior: mean and log_var, (L, n, *event_shape) each.
            z: Draws, likewise.

        Returns:
            (groups, n). Each of N(0, I) is in closed form, given the draws above.
        """
        means, log_vars = (part.split(self.sizes, 2) for part in posterior)
        closed = [type(posterior)(*q).kl_from_standard_normal().mean(0) for q in zip(means, log_vars, strict=True)]
        if self.first is not None:
            closed[0] = self.first.kl(DiagonalGaussian(means[0][0], log_vars[0][0]), self._split(z)[0])
        return torch.stack(closed)

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z[..., : self.sizes[0]], z[..., self.sizes[0] :]


class LadderVAE(VAE):
    """A VAE with groups of latents, packed into one tensor: `posterior` is what the way up sees of the images.

    Source: Sonderby et al. (2016), section 2; Vahdat and Kautz (2020), section 3.
    """

    encoder: Up
    decoder: Down

    def __init__(self, encoder: Up, decoder: Down, likelihood: Likelihood, prior: Prior, free_nats: float) -> None:
        """Take the prior of the vector above all groups, or, where there is none, N(0, I) of all latents."""
        sizes = decoder.group_sizes
        grouped = (
            GroupedPrior(prior.event_shape, sizes, None, free_nats)
            if decoder.spatial
            else GroupedPrior((sum(sizes),), sizes, prior, free_nats)
        )
        super().__init__(encoder, decoder, likelihood, grouped)

    @property
    def group_shapes(self) -> list[tuple[int, int, int]]:
        """Shapes of the groups, the vector above them first, if there is one, as (latent_dim, 1, 1)."""
        return self.decoder.group_shapes

    def posterior(self, x: Tensor) -> Seen:  # type: ignore[override]
        """What q depends on: x (n, c, h, w) -> features."""
        seen: Seen = self.encoder(x)
        return seen

    def infer(self, posterior: Seen, eps: Tensor) -> Inference:
        """Draw every group from q given those above, on one way down."""
        walk = self.decoder.walk(posterior, eps)
        z, mean, log_var, parameters = (part.float().unflatten(0, eps.shape[:2]) for part in walk)
        return Inference(z, (SpatialGaussian if z.ndim > 3 else DiagonalGaussian)(mean, log_var), parameters)

    def reconstruct(self, x: Tensor) -> Tensor:
        """E[x|z] with each group at its mean given those above: (n, c, h, w) -> the same shape."""
        eps = x.new_zeros(1, len(x), *self.noise_shapes.posterior)
        return self.likelihood.mean(self.infer(self.posterior(x), eps).parameters[0])
