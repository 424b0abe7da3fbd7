"""Full variational Bayes: a posterior over the decoder's parameters as well as over the latents.

Source: Kingma and Welling (2013), appendix F.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from training.data import as_float, binarise
from training.distributions.gaussian import DiagonalGaussian
from training.models.vae import VAE, Bound
from training.objectives.elbo import Objective

INITIAL_STD = 0.05
"""Initial standard deviation of every parameter, below the spread of torch's initial weights: the means can learn."""


class FullVb(nn.Module):
    """A VAE under q(theta) = N(mean, diag(exp(log_var))) and p(theta) = N(0, I), theta the decoder's parameters.

    The means are the parameters of `vae.decoder` themselves, so `vae` is the model at the posterior's mean, for any
    architecture. The parameters of encoder, likelihood and prior of z are point estimates.
    """

    def __init__(self, vae: VAE, initial_std: float = INITIAL_STD) -> None:
        super().__init__()
        self.vae = vae
        self.shapes = {name: p.shape for name, p in vae.decoder.named_parameters()}
        self.sizes = [shape.numel() for shape in self.shapes.values()]
        first = next(vae.decoder.parameters())
        self.log_var = nn.Parameter(first.new_full((sum(self.sizes),), 2.0 * math.log(initial_std)))

    @property
    def posterior(self) -> DiagonalGaussian:
        """q(theta) over the decoder's parameters in one row, (P,)."""
        return DiagonalGaussian(torch.cat([p.flatten() for p in self.vae.decoder.parameters()]), self.log_var)

    def at(self, zeta: Tensor) -> VAE:
        """The VAE at theta = mean + std * zeta, differentiable in both: zeta (P,), a draw of N(0, I)."""
        parts = self.posterior.draw(zeta).split(self.sizes)
        theta = {name: part.view(shape) for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)}
        vae = self.vae
        return VAE(vae.encoder, _DecoderAt(vae.decoder, theta), vae.likelihood, vae.prior)

    def draw(self, generator: torch.Generator) -> VAE:
        """The VAE at a draw of q(theta)."""
        noise = torch.randn(self.log_var.shape, generator=generator, device=generator.device)
        return self.at(noise.to(self.log_var.dtype))


class _DecoderAt(nn.Module):
    """A decoder with given parameters in place of its own."""

    def __init__(self, decoder: nn.Module, theta: dict[str, Tensor]) -> None:
        super().__init__()
        self.decoder, self.theta = decoder, theta

    def forward(self, z: Tensor) -> Tensor:
        """Decode z (n, d) -> (n, c, h, w)."""
        found: Tensor = functional_call(self.decoder, self.theta, (z,))
        return found


def full_vb_bound(module: FullVb, x: Tensor, eps: Tensor, zeta: Tensor, size: int) -> Bound:
    """Estimate a minibatch's share of the bound on the log evidence of `size` images, differentiable in all parameters.

    The term `kl` contains an image's share of KL(q(theta) || p(theta)), in closed form. So `size` times the mean of the
    bound is the estimate of equation 24, and the trainer's loss is that divided by -size.

    Args:
        module: The VAE under q(theta).
        x: (n, c, h, w).
        eps: Draws of N(0, I), (L, n, d).
        zeta: A draw of N(0, I), (P,).
        size: Number of training images.

    Returns:
        The bound's terms, (n,) each.

    Source: Kingma and Welling (2013), equation 24 and algorithm 2, there with L = 1.
    """
    bound = module.at(zeta).bound(x, eps)
    return Bound(bound.log_likelihood, bound.kl + module.posterior.kl_from_standard_normal() / size)


def map_bound(vae: VAE, x: Tensor, eps: Tensor, size: int) -> Bound:
    """Estimate the same for a point theta (MAP); `kl` contains -log p(theta) / size without its constant."""
    bound = vae.bound(x, eps)
    square = sum((p.square().sum() for p in vae.decoder.parameters()), start=x.new_zeros(()))
    return Bound(bound.log_likelihood, bound.kl + 0.5 * square / size)


def full_vb_objective(size: int, *, draws: int = 1, dynamic: bool = True) -> Objective:
    """Make the trainer's objective, with one draw of theta a minibatch, or a microbatch.

    The trainer's own `weight_prior` and `free_nats` must be off: the first would count p(theta) twice, the second would
    count the share of KL(q(theta) || p(theta)) as the latents'.

    Args:
        size: Number of training images.
        draws: Draws of z an image, L.
        dynamic: Whether the images are binarised anew every time they are seen.
    """

    def objective(module: FullVb, images: Tensor, generator: torch.Generator) -> Bound:
        x = binarise(images, generator) if dynamic else as_float(images)
        eps = module.vae.noise(draws, len(x), generator)
        zeta = torch.randn(module.log_var.shape, generator=generator, device=x.device)
        return full_vb_bound(module, x, eps, zeta, size)

    return objective


class Evidence(NamedTuple):
    """A bound on the log evidence in nats, and the standard error of its estimate over draws of theta."""

    bound: float
    standard_error: float


@torch.no_grad()
def evidence_bound(module: FullVb, x: Tensor, draws: int, generator: torch.Generator) -> Evidence:
    """Estimate the bound on log p(x_1, ..., x_N), theta and z integrated out.

    Args:
        module: The VAE under q(theta).
        x: All training images, (N, c, h, w).
        draws: Draws of theta, two or more.
        generator: Of theta and z.

    Source: Kingma and Welling (2013), equation 18.
    """
    eps = (module.vae.noise(1, len(x), generator) for _ in range(draws))
    sums = torch.stack([module.draw(generator).bound(x, noise).elbo.double().sum() for noise in eps])
    kl = float(module.posterior.kl_from_standard_normal())
    return Evidence(float(sums.mean()) - kl, float(sums.std()) / math.sqrt(draws))
