"""p(z) as the image of N(0, I) under affine couplings."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from training.distributions.gaussian import LOG_2_PI
from training.distributions.interface import Prior
from training.strict import Positive, Strict

LARGEST_LOG_SCALE = 2.0


class RealNvpSettings(Strict):
    """`couplings` affine couplings, each a network with two hidden layers of `width`.

    Source: Dinh, Sohl-Dickstein and Bengio (2017), section 3; as a VAE's prior: Xu et al. (2019), section 3.
    """

    prior: Literal["realnvp"]
    """A flow of affine couplings."""
    couplings: Annotated[int, Field(ge=2)] = 6
    """How many."""
    width: Positive = 128
    """Of the two hidden layers of each."""

    def build(self, latent_shape: tuple[int, ...], _shape: tuple[int, int, int], _encoder: nn.Module) -> RealNvp:
        """The density of z (..., d), for latent_shape (d,).

        Raises:
            ValueError: Fewer than two dimensions leave nothing to condition on.
        """
        (latent_dim,) = latent_shape
        return RealNvp(latent_dim, self.couplings, self.width)


class RealNvp(Prior):
    """z -> u by couplings that keep alternate halves unchanged; u ~ N(0, I). It starts as the identity."""

    def __init__(self, latent_dim: int, couplings: int, width: int) -> None:
        super().__init__((latent_dim,))
        if latent_dim < 2:
            raise ValueError("a coupling flow needs at least 2 latent dimensions; use the standard normal prior")
        self.couplings = nn.ModuleList(Coupling(latent_dim, width, odd=k % 2 == 1) for k in range(couplings))

    def log_prob(self, z: Tensor) -> Tensor:
        """Log p(z) = log N(u; 0, I) + log |du/dz|, in nats: (..., d) -> (...)."""
        u, log_scales = z, torch.zeros_like(z[..., 0])
        for coupling in self.couplings:
            u, log_scale = coupling(u)
            log_scales = log_scales + log_scale
        return -0.5 * (u.square() + LOG_2_PI).sum(-1) + log_scales

    def draw(self, eps: Tensor) -> Tensor:
        """z for u = eps: (n, d) -> (n, d)."""
        z = eps
        for coupling in reversed(self.couplings):
            z = coupling.inverse(z)  # type: ignore[operator]
        return z


class Coupling(nn.Module):
    """Scales and shifts one half of z; a network of the other half gives scale and shift.

    The halves are the even and the odd places; couplings alternate between them, so every dimension is changed.
    """

    def __init__(self, latent_dim: int, width: int, *, odd: bool) -> None:
        super().__init__()
        self.odd = odd
        kept, changed = (latent_dim + 1) // 2, latent_dim // 2
        if odd:
            kept, changed = changed, kept
        self.network = nn.Sequential(
            nn.Linear(kept, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2 * changed)
        )
        nn.init.zeros_(self.network[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.network[-1].bias)  # type: ignore[arg-type]

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z (..., d) -> u (..., d) and log |du/dz| (...)."""
        kept, changed = self._halves(z)
        shift, log_scale = self._affine(kept)
        return self._joined(kept, changed * log_scale.exp() + shift), log_scale.sum(-1)

    def inverse(self, u: Tensor) -> Tensor:
        """u (..., d) -> z (..., d)."""
        kept, changed = self._halves(u)
        shift, log_scale = self._affine(kept)
        return self._joined(kept, (changed - shift) * (-log_scale).exp())

    def _affine(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = self.network(kept).to(kept.dtype).chunk(2, -1)
        return shift, LARGEST_LOG_SCALE * torch.tanh(raw / LARGEST_LOG_SCALE)

    def _halves(self, z: Tensor) -> tuple[Tensor, Tensor]:
        even, odd = z[..., ::2], z[..., 1::2]
        return (odd, even) if self.odd else (even, odd)

    def _joined(self, kept: Tensor, changed: Tensor) -> Tensor:
        even, odd = (changed, kept) if self.odd else (kept, changed)
        paired = torch.stack([even[..., : odd.shape[-1]], odd], -1).flatten(-2)
        return torch.cat([paired, even[..., odd.shape[-1] :]], -1)
