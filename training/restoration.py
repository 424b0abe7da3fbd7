"""Restoration: q(z | y, mask, level) for corrupted images y, and fusion of the decoder's answer with the observation.

An encoder trained on clean images does not know noise: encoding a noisy digit and decoding it gives a worse picture
than the noisy one. So a second recognition model is trained on simulated corruptions, conditioned on their level.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.elbo import Bound, bound_under
from training.gaussian import DiagonalGaussian
from training.model import VAE

FAMILIES = ("gaussian", "salt-and-pepper", "masking")
"""Noise families in the order of the level's columns: standard deviation, share of flipped, share of zeroed pixels."""
SIGMA_RANGE = (0.015, 0.8)
SHARE_RANGES = ((0.02, 0.6), (0.05, 0.9))
SMALLEST_ERROR = 1e-6  # 60 dB: an image restored that well need not get better
SHRINKAGE = 1e-5
FAMILY_ODDS = (0.64, 0.14, 0.12, 0.10)
"""How often each family is simulated; the last is none at all."""


class Observation(NamedTuple):
    """What is seen of an image: y and mask (n, c, h, w), level (n, 3). Missing pixels (mask 0) are 0 in y."""

    y: Tensor
    mask: Tensor
    level: Tensor


def corrupt(x: Tensor, level: Tensor, generator: torch.Generator, clip: Tensor | bool = False) -> Tensor:
    """y ~ p(y | x, level): additive Gaussian noise, then salt and pepper, then masking noise (pixels set to 0).

    Shapes: x (n, c, h, w); level (n, 3), zero where a family is absent; clip (n, 1, 1, 1): cut y to [0, 1], as an
    8-bit image does.
    Source: the three corruptions of Vincent et al. (2010), section 3.3.
    """
    sigma, flip, masking = (column[:, None, None, None] for column in level.unbind(1))
    y = x + sigma * torch.randn(x.shape, generator=generator, device=x.device)
    y = torch.where(torch.as_tensor(clip, device=x.device), y.clamp(0.0, 1.0), y)
    u = torch.rand(x.shape, generator=generator, device=x.device)
    y = torch.where(u < flip, (u < 0.5 * flip).to(y.dtype), y)
    return y * (torch.rand(x.shape, generator=generator, device=x.device) >= masking)


def simulate(x: Tensor, generator: torch.Generator) -> Observation:
    """Corrupt each image by a random family at a random level; a third also loses known pixels, scattered or a half."""
    n, device = len(x), x.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    family = torch.multinomial(torch.tensor(FAMILY_ODDS, device=device), n, True, generator=generator)
    low, high = SIGMA_RANGE
    sigma = low * (high / low) ** uniform(n)
    shares = [low + (high - low) * uniform(n) for low, high in SHARE_RANGES]
    level = torch.stack([sigma, *shares], 1) * functional.one_hot(family, 4)[:, :3]
    y = corrupt(x, level, generator, uniform(n, 1, 1, 1) < 0.5)
    mask = _random_mask(x, uniform)
    return Observation(y * mask, mask, level)


def _random_mask(x: Tensor, draw: Callable[..., Tensor]) -> Tensor:
    """1 where seen: two thirds see all, a sixth loses scattered pixels, a sixth up to 70 % from one side."""
    n, channels, height, width = x.shape
    scattered = draw(n, 1, height, width) >= draw(n, 1, 1, 1)
    rows = torch.arange(height, device=x.device).view(1, 1, -1, 1) / height
    columns = torch.arange(width, device=x.device).view(1, 1, 1, -1) / width
    side, cut = draw(n, 1, 1, 1), 0.3 + 0.5 * draw(n, 1, 1, 1)
    halves = torch.where(
        side < 0.5,
        torch.where(side < 0.25, rows < cut, rows >= 1 - cut),
        torch.where(side < 0.75, columns < cut, columns >= 1 - cut),
    )
    kind = draw(n, 1, 1, 1)
    seen = (kind >= 1 / 3) | torch.where(kind < 1 / 6, scattered, halves)
    return seen.float().expand(n, channels, height, width).contiguous()


class Recognition(nn.Module):
    """q(z | y, mask, level) and q(level | y, mask), both diagonal Gaussians; the second over log level.

    `network` is an encoder of 2 c + 3 planes (y, mask, one constant plane a level), `level_network` of 2 c planes.
    """

    def __init__(self, network: nn.Module, level_network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.level_network = level_network

    def posterior(self, seen: Observation) -> DiagonalGaussian:
        """q(z | y, mask, level): mean and log_var (n, d)."""
        planes = seen.level[:, :, None, None].expand(-1, -1, *seen.y.shape[2:])
        mean, log_var = self.network(torch.cat([seen.y, seen.mask, planes], 1))
        return DiagonalGaussian(mean.float(), log_var.float())

    def log_level(self, y: Tensor, mask: Tensor) -> DiagonalGaussian:
        """q(log level | y, mask): mean and log_var (n, 3), each column as if its family were the one at work."""
        mean, log_var = self.level_network(torch.cat([y, mask], 1))
        return DiagonalGaussian(mean.float(), log_var.float())


def restoration_bound(recognition: Recognition, vae: VAE, x: Tensor, seen: Observation, eps: Tensor) -> Bound:
    """A bound on log p(x) from a corrupted view of x, plus log q(level | y), which trains the level's estimate.

    The decoder is fixed; its likelihood is of the clean image.
    Source: Im et al. (2015), "Denoising criterion for variational auto-encoding framework", equation 5.
    """
    bound = bound_under(vae, recognition.posterior(seen), x, eps)
    present = seen.level > 0
    log_level = torch.where(present, seen.level, 1.0).log()
    estimate = recognition.log_level(seen.y, seen.mask)
    per_column = DiagonalGaussian(estimate.mean[..., None], estimate.log_var[..., None])
    level_log_prob = (per_column.log_prob(log_level[..., None]) * present).sum(1)
    return Bound(bound.log_likelihood + level_log_prob, bound.kl)


class BernoulliFusion(nn.Module):
    """E[x | y, z] and Var[x | y, z] of every pixel, given the decoder's mean.

    Under Gaussian noise the pixel's density given z is a mixture: N(mean, c mean (1 - mean) + d), and with a small
    weight anything in [0, 1], so that a stroke that the decoder missed is believed, not erased. c, d and the weight are
    quadratics in log sigma, fitted on held-out images (`calibrate`). Under salt and pepper, or masking noise, a pixel
    is kept with the odds that the decoder gives to what is seen, times those of a clean pixel to be exactly 0 or 1.
    Where mask is 0 nothing is seen.
    """

    lowest: Tensor
    highest: Tensor
    extremes: Tensor

    def __init__(self) -> None:
        super().__init__()
        start = torch.zeros(3, 3)
        start[0] = torch.tensor([-1.0, -6.0, -5.0])
        self.coefficients = nn.Parameter(start)
        # log c, log d, logit: variances between a thousandth of a grey level and that of any image in [0, 1].
        self.register_buffer("lowest", torch.tensor([-14.0, -14.0, -1e4]), persistent=False)
        self.register_buffer("highest", torch.tensor([1.4, -1.4, 1e4]), persistent=False)
        # How often a clean pixel is exactly 0, and exactly 1, where the decoder's mean says dark, and bright.
        self.register_buffer("extremes", torch.ones(2), persistent=False)

    def pixel_prior(self, x_mean: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Variance of the pixel around the decoder's mean, and the logit of the weight of `anything`."""
        # In double: the last bit of onnxruntime's float logarithm hangs on how many numbers there are.
        log_sigma = level[:, :1].clamp(*SIGMA_RANGE).double().log().to(level.dtype)
        powers = torch.cat([torch.ones_like(log_sigma), log_sigma, log_sigma.square()], 1)
        values = (powers @ self.coefficients).clamp(self.lowest, self.highest)
        c, d, logit = (values[:, i, None, None, None] for i in range(3))
        return c.exp() * x_mean * (1.0 - x_mean) + d.exp(), logit

    def forward(self, x_mean: Tensor, y: Tensor, mask: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """restored, variance, shaped like y."""
        sigma, flip, masking = (level[:, i, None, None, None] for i in range(3))
        variance, logit = self.pixel_prior(x_mean, level)
        gaussian, gaussian_variance = _fuse_gaussian(x_mean, variance, logit, y, sigma.square())
        kept = _keep_probability(x_mean, y, flip, masking, self.extremes)
        replaced = kept * y + (1.0 - kept) * x_mean
        replaced_variance = (1.0 - kept) * (variance + kept * (y - x_mean).square())
        switched = (flip + masking) > 0.0
        restored = torch.where(switched, replaced, gaussian).clamp(0.0, 1.0)
        seen_variance = torch.where(switched, replaced_variance, gaussian_variance)
        return torch.where(mask > 0.0, restored, x_mean), torch.where(mask > 0.0, seen_variance, variance)


def _fuse_gaussian(mean: Tensor, variance: Tensor, logit: Tensor, y: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    total = variance + noise
    # sigmoid(logit - log N(y; mean, total)) without a logarithm (see pixel_prior); -80 keeps the power finite.
    odds = torch.exp(-(logit + 0.5 * (y - mean).square() / total).clamp(min=-80.0)) / torch.sqrt(2.0 * torch.pi * total)
    anything = 1.0 / (1.0 + odds)
    near, far = mean + variance / total * (y - mean), y.clamp(0.0, 1.0)
    spread = anything * (1.0 - anything) * (far - near).square()
    fused_variance = (1.0 - anything) * variance * noise / total + anything * noise.clamp(max=1 / 12) + spread
    return (1.0 - anything) * near + anything * far, fused_variance


def _keep_probability(x_mean: Tensor, y: Tensor, flip: Tensor, masking: Tensor, extremes: Tensor) -> Tensor:
    """P(the pixel is what it was | what is seen): certain strictly between 0 and 1."""
    bright, dark = (y >= 1.0).float(), (y <= 0.0).float()
    as_it_was = torch.where(bright > 0.0, extremes[1] * x_mean, extremes[0] * (1.0 - x_mean))
    kept = (1.0 - flip) * (1.0 - masking) * as_it_was
    replaced = bright * 0.5 * flip * (1.0 - masking) + dark * (masking + 0.5 * flip * (1.0 - masking))
    return torch.where(replaced > 0.0, kept / (kept + replaced).clamp(min=1e-12), 1.0)


def calibrate(recognition: Recognition, vae: VAE, x: Tensor, generator: torch.Generator) -> BernoulliFusion:
    """Fit the fusion's pixel density on held-out clean images x (n, c, h, w) under simulated Gaussian noise.

    What is minimised is the logarithm of each image's squared error after fusion, the quantity that PSNR averages. The
    likelihood of the residuals would not do: pixels that are exactly 0 make it unbounded as the variance goes to 0.
    """
    fusion = BernoulliFusion().to(x.device)
    start = fusion.coefficients.detach().clone()
    low, high = SIGMA_RANGE
    sigma = low * (high / low) ** torch.rand(len(x), generator=generator, device=x.device)
    level = functional.pad(sigma[:, None], (0, 2))
    seen = Observation(corrupt(x, level, generator), torch.ones_like(x), level)
    with torch.no_grad():
        x_mean = vae.likelihood.mean(vae.decode(recognition.posterior(seen).mean))
    said = torch.stack([(1.0 - x_mean).mean(), x_mean.mean()]).clamp(min=1e-6)
    fusion.extremes.copy_((torch.stack([(x <= 0.0).float().mean(), (x >= 1.0).float().mean()]) / said).clamp(max=1.0))
    optimiser = torch.optim.LBFGS(fusion.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        restored, _ = fusion(x_mean, *seen)
        error = ((restored - x).square().flatten(1).mean(1) + SMALLEST_ERROR).log().mean()
        # What the images leave open stays near the start.
        value = error + SHRINKAGE * (fusion.coefficients - start).square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return fusion.eval().requires_grad_(False)
