"""p(z) as a mixture of the posteriors of learned images."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from training.distributions.gaussian import DiagonalGaussian
from training.distributions.interface import Prior
from training.strict import Positive, Strict


class VampSettings(Strict):
    """`components` pseudo-inputs. Source: Tomczak and Welling (2018), section 3."""

    prior: Literal["vamp"]
    """A mixture of posteriors of learned pseudo-inputs."""
    components: Positive = 500
    """Pseudo-inputs."""

    def build(self, latent_shape: tuple[int, ...], shape: tuple[int, int, int], encoder: nn.Module) -> Vamp:
        """The mixture of q(z|u_k) over pseudo-inputs u_k of that shape."""
        (latent_dim,) = latent_shape
        return Vamp(latent_dim, shape, encoder, self.components)


class Mixture(Prior):
    """(1/K) sum_k N(z; mean_k, diag(exp(log_var_k)))."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__((latent_dim,))
        self.noise_shape = (latent_dim + 1,)

    def components(self) -> DiagonalGaussian:
        """The mixed Gaussians: mean and log_var, each (K, d)."""
        raise NotImplementedError

    def log_prob(self, z: Tensor) -> Tensor:
        """Log p(z) in nats: (..., d) -> (...)."""
        components = self.components()
        return torch.logsumexp(components.log_prob(z.unsqueeze(-2)), -1) - math.log(len(components.mean))

    def draw(self, eps: Tensor) -> Tensor:
        """Draw z; the normal CDF of the first column of the noise chooses the component: (n, d + 1) -> (n, d)."""
        mean, log_var = self.components()
        share = 0.5 * (1.0 + torch.erf(eps[:, 0] / math.sqrt(2.0)))
        chosen = (share * len(mean)).long().clamp(0, len(mean) - 1)
        return DiagonalGaussian(mean[chosen], log_var[chosen]).draw(eps[:, 1:])


class Vamp(Mixture):
    """p(z) = (1/K) sum_k q(z | u_k), u_k in [0, 1]; the encoder is the VAE's own, and both train it."""

    uses_encoder = True

    def __init__(self, latent_dim: int, shape: tuple[int, int, int], encoder: nn.Module, count: int) -> None:
        super().__init__(latent_dim)
        # Near-black noise, as in the source; the encoder in a tuple, so that its weights are not counted twice.
        self.pseudo_inputs = nn.Parameter(0.05 + 0.01 * torch.randn(count, *shape))
        self._encoder = (encoder,)

    def components(self) -> DiagonalGaussian:
        """The posteriors of the pseudo-inputs: mean and log_var, each (K, d)."""
        mean, log_var = self._encoder[0](self.pseudo_inputs.clamp(0.0, 1.0))
        return DiagonalGaussian(mean.float(), log_var.float())

    def frozen(self) -> Prior:
        """The components alone, without pseudo-inputs and encoder."""
        return FrozenMixture(self.components())


class FrozenMixture(Mixture):
    """A mixture with constant components."""

    def __init__(self, components: DiagonalGaussian) -> None:
        super().__init__(components.mean.shape[1])
        self.register_buffer("mean", components.mean.detach())
        self.register_buffer("log_var", components.log_var.detach())

    def components(self) -> DiagonalGaussian:
        """The given Gaussians: mean and log_var, each (K, d)."""
        return DiagonalGaussian(self.mean, self.log_var)  # type: ignore[arg-type]  # buffers
