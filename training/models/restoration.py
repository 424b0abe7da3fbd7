"""Restoration: a recognition model q(z | y, mask, level) of corrupted images y, and estimates of E[x | y] from it.

An encoder trained on clean images fails on noisy ones: the reconstruction of a noisy digit is worse than the noisy
digit. So a second recognition model is trained on simulated corruptions, conditioned on their level. Bayes' rule fuses
each pixel of the decoder with the observed one; a small network corrects the result towards E[x | y], with all pixels
as its input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from service.contract.corruption import LEAST_VARIANCE, Operator, operator_of
from training.distributions.gaussian import DiagonalGaussian, of_rows
from training.distributions.noise import NOISE, Additive, Gaussian, Replacement, corrupt, noise_variance, replacement
from training.models.vae import VAE, Bound

NO_NOISE_ODDS = 0.10
"""Weight of no noise at all among the families' `odds`."""
SIGMA_RANGE = (Gaussian.low, Gaussian.high)
ROUGHNESS = (0.01, 1.0)
"""Bounds of the classical estimate of sigma."""
THROUGH = 6
"""One simulated image in so many is seen through an operator: means of blocks, or a blur."""
BLURS = (0.5, 2.5)
"""Standard deviations of simulated blurs in pixels."""
SMALLEST_ERROR = 1e-6
"""Mean squared error, 60 dB, below which an image gains nothing."""
ERROR_WEIGHT = 0.05
"""Weight of the logarithm of an image's error; a Gaussian of unknown variance would give it 1 / 2 a pixel."""
SPREAD_WEIGHT = 0.05
"""Weight of the error of the standard deviations."""
MEAN_ABSOLUTE = math.sqrt(2.0 / math.pi)
"""Mean absolute value of a standard normal number."""
EXTREMES_WEIGHT = 0.01
"""Weight of the log probability of which pixels are exactly black or white."""


class Corrupted(NamedTuple):
    """Corrupted images as the recognition model takes them.

    Attributes:
        y: Observed pixels (n, c, h, w), 0 where missing.
        mask: 1 where a pixel is observed, 0 where it is missing, else the sum of the squared weights with which pixels
            were averaged.
        level: Noise level (n, F) by family.
    """

    y: Tensor
    mask: Tensor
    level: Tensor


def simulate(x: Tensor, generator: torch.Generator) -> Corrupted:
    """Corrupt images at random, each by one noise family or none at a random level.

    A third of the images also lose known pixels, scattered or at one side. One image in `THROUGH` is seen through an
    operator instead, the same for all of them, with Gaussian noise or none.
    """
    n, device = len(x), x.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    odds = torch.tensor([*(noise.odds for noise in NOISE), NO_NOISE_ODDS], device=device)
    family = torch.multinomial(odds, n, True, generator=generator)
    levels = torch.stack([noise.drawn(uniform(n)) for noise in NOISE], 1)
    level = levels * functional.one_hot(family, len(odds))[:, : len(NOISE)]
    y = corrupt(x, level, generator, uniform(n, 1, 1, 1) < 0.5)
    mask = _random_mask(x, uniform)
    seen = Corrupted(y * mask, mask, level)
    if n >= THROUGH:
        level[: n // THROUGH, 1:] = 0.0
        through = see_through(_random_operator(x, uniform), x[: n // THROUGH], level[: n // THROUGH], generator)
        for whole, part in zip(seen, through, strict=True):
            whole[: n // THROUGH] = part
    return seen


def see_through(operator: Operator, x: Tensor, level: Tensor, generator: torch.Generator) -> Corrupted:
    """x (n, c, h, w) seen through the operator with noise of `level` (n, F), brought back to the size of x."""
    y = corrupt(torch.from_numpy(operator.seen(x.cpu().numpy())).to(x.device), level, generator)
    lifted, mask = operator.lifted(y.cpu().numpy(), np.ones(y.shape, np.float32))
    return Corrupted(torch.from_numpy(lifted).to(x.device), torch.from_numpy(mask).to(x.device), level)


def _random_operator(x: Tensor, draw: Callable[..., Tensor]) -> Operator:
    """Means of blocks of a size that divides the image, or, with the same probability, a Gaussian blur."""
    height, width = x.shape[2:]
    factors = [k for k in range(2, min(height, width) // 2 + 1) if not (height % k or width % k)]
    choice, size = draw(2).tolist()
    if factors and choice < 0.5:
        return operator_of(("shrink", factors[int(size * len(factors))], height, width))
    low, high = BLURS
    return operator_of(("blur", low + (high - low) * size, height, width))


def _random_mask(x: Tensor, draw: Callable[..., Tensor]) -> Tensor:
    """Random masks (n, c, h, w): a sixth lose scattered pixels, a sixth up to 70 % from one side, the rest none."""
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


class Fusion(nn.Module):
    """E[x | y, z] and Var[x | y, z] of each pixel independently, given the decoder's mean.

    Under additive noise the density of the pixel given z is a mixture: N(mean, c mean (1 - mean) + d), and with a small
    weight the uniform one on [0, 1], so that a stroke that the decoder missed is kept. c, d and the weight are
    quadratics in log sigma, fitted with the recognition model. Under replacing noise the posterior odds that a pixel
    was kept are those of the decoder for the observed value, times the odds that a clean pixel is exactly 0 or 1. Where
    mask is below 1 the pixel counts as missing.
    """

    lowest: Tensor
    highest: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Flat, so that no optimiser takes it for a matrix of weights.
        self.coefficients = nn.Parameter(torch.tensor([-1.0, -6.0, -5.0, *[0.0] * 6]))
        self.extreme_logits = nn.Parameter(torch.zeros(2))
        # log c, log d, logit: variances between a thousandth of a grey level and that of any image in [0, 1].
        self.register_buffer("lowest", torch.tensor([-14.0, -14.0, -1e4]), persistent=False)
        self.register_buffer("highest", torch.tensor([1.4, -1.4, 1e4]), persistent=False)

    @property
    def extremes(self) -> Tensor:
        """P(a dark clean pixel is exactly 0) and P(a bright one is exactly 1), (2,)."""
        return self.extreme_logits.sigmoid()

    def pixel_prior(self, x_mean: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Variance of the pixel around the decoder's mean, and the logit of the weight of the uniform density."""
        # In double: the last bit of onnxruntime's float logarithm depends on the number of elements.
        sigma = noise_variance(level, 0.5).sqrt()[:, :, 0, 0]
        log_sigma = sigma.clamp(*SIGMA_RANGE).double().log().to(level.dtype)
        values = quadratics(self.coefficients, log_sigma).clamp(self.lowest, self.highest)
        c, d, logit = (values[:, i, None, None, None] for i in range(3))
        return c.exp() * x_mean * (1.0 - x_mean) + d.exp(), logit

    def extremes_log_prob(self, x_mean: Tensor, x: Tensor) -> Tensor:
        """log P(which pixels are exactly black, and which exactly white) in nats, (n,): the fit of `extremes`."""
        black, white = self.extremes
        chances = torch.stack([black * (1.0 - x_mean), white * x_mean]).clamp(1e-6, 1.0 - 1e-6)
        found = torch.stack([x <= 0.0, x >= 1.0])
        return torch.where(found, chances, 1.0 - chances).log().sum((0, 2, 3, 4))

    def forward(self, x_mean: Tensor, y: Tensor, mask: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """restored, variance, shaped like y."""
        replacing = replacement(level)
        variance, logit = self.pixel_prior(x_mean, level)
        noise = noise_variance(level, torch.maximum(x_mean, y.clamp(max=1.0)))
        gaussian, gaussian_variance = _fuse_gaussian(x_mean, variance, logit, y, noise)
        kept = _keep_probability(x_mean, y, replacing, self.extremes)
        replaced = kept * y + (1.0 - kept) * x_mean
        replaced_variance = (1.0 - kept) * (variance + kept * (y - x_mean).square())
        restored = torch.where(replacing.at_work, replaced, gaussian).clamp(0.0, 1.0)
        seen_variance = torch.where(replacing.at_work, replaced_variance, gaussian_variance)
        return torch.where(mask >= 1.0, restored, x_mean), torch.where(mask >= 1.0, seen_variance, variance)


def _fuse_gaussian(mean: Tensor, variance: Tensor, logit: Tensor, y: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    total = variance + noise
    # sigmoid(logit - log N(y; mean, total)) without a logarithm (see pixel_prior); -80 keeps the power finite.
    odds = torch.exp(-(logit + 0.5 * (y - mean).square() / total).clamp(min=-80.0)) / torch.sqrt(2.0 * torch.pi * total)
    anything = 1.0 / (1.0 + odds)
    near, far = mean + variance / total * (y - mean), y.clamp(0.0, 1.0)
    spread = anything * (1.0 - anything) * (far - near).square()
    fused_variance = (1.0 - anything) * variance * noise / total + anything * noise.clamp(max=1 / 12) + spread
    return (1.0 - anything) * near + anything * far, fused_variance


def _keep_probability(x_mean: Tensor, y: Tensor, replacing: Replacement, extremes: Tensor) -> Tensor:
    """P(the pixel was not replaced | y): 1 strictly between 0 and 1."""
    bright, dark = (y >= 1.0).float(), (y <= 0.0).float()
    as_it_was = torch.where(bright > 0.0, extremes[1] * x_mean, extremes[0] * (1.0 - x_mean))
    kept = replacing.kept * as_it_was
    replaced = bright * sum(replacing.white) + dark * sum(replacing.black)
    return torch.where(replaced > 0.0, kept / (kept + replaced).clamp(min=1e-12), 1.0)


class Correction(nn.Module):
    """E[x | y] and Var[x | y] from the fusion's, by a network that sees all pixels.

    The network gives each pixel's shift in standard deviations, and the logarithm of the factor of its variance.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, fused: Tensor, variance: Tensor, y: Tensor, mask: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """restored, variance, shaped like fused (n, c, h, w). `network` maps 4 c + F planes to 2 c."""
        std = (variance + LEAST_VARIANCE).sqrt() - math.sqrt(LEAST_VARIANCE)  # 0 where the pixel is certain
        said = self.network(torch.cat([fused, std, y.clamp(-1.0, 2.0), mask, planes(level, y)], 1)).float()
        moved, wider = said.chunk(2, 1)
        restored = (fused + std * moved).clamp(0.0, 1.0)
        return restored, variance * wider.clamp(-8.0, 8.0).exp()


class Recognition(nn.Module):
    """q(z | y, mask, level) and q(log level | y, mask), both diagonal Gaussians, and E[x | y].

    Args:
        network: An encoder of 2 c + F planes: y, mask, and one constant plane a level.
        level_network: An encoder of 2 c planes: y and mask.
        correction: A network as `Correction` takes it.
    """

    def __init__(self, network: nn.Module, level_network: nn.Module, correction: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.level_network = level_network
        self.fusion = Fusion()
        self.correction = Correction(correction)
        # Levels of additive noise begin as the classical estimate, the others at a constant.
        nothing, additive = [0.0] * len(NOISE), [float(isinstance(noise, Additive)) for noise in NOISE]
        # Flat, so that no optimiser takes it for a matrix of weights.
        self.roughness = nn.Parameter(torch.tensor([*nothing, *additive, *nothing]))

    def posterior(self, seen: Corrupted) -> DiagonalGaussian:
        """q(z | y, mask, level): mean and log_var (n, *latent_shape)."""
        return of_rows(*self.network(torch.cat([seen.y, seen.mask, planes(seen.level, seen.y)], 1)))

    def log_level(self, y: Tensor, mask: Tensor) -> DiagonalGaussian:
        """q(log level | y, mask): mean and log_var (n, F), each column as if its family were the one at work.

        For additive noise the network corrects a classical estimate, which shortens training.
        """
        mean, log_var = self.level_network(torch.cat([y, mask], 1))
        classical = quadratics(self.roughness, log_roughness(y, mask)[:, None])
        return DiagonalGaussian(mean.float() + classical, log_var.float())

    def restored(self, vae: VAE, seen: Corrupted) -> tuple[Tensor, Tensor]:
        """E[x | y] and Var[x | y] (n, c, h, w): the decoder at the posterior's mean, fused and corrected."""
        x_mean = vae.x_mean(self.posterior(seen).mean)
        restored: tuple[Tensor, Tensor] = self.correction(*self.fusion(x_mean, *seen), *seen)
        return restored


def quadratics(coefficients: Tensor, at: Tensor) -> Tensor:
    """Values of k quadratics, (n, k), with coefficients (3 k,), those of the constants first, at (n, 1)."""
    powers = torch.cat([torch.ones_like(at), at, at.square()], 1)
    return (powers[:, :, None] * coefficients.view(3, -1)).sum(1)


def log_roughness(y: Tensor, mask: Tensor) -> Tensor:
    """log sigma estimated from the mean absolute Laplacian, (n,), for y and mask (n, c, h, w).

    Takes pixels whose neighbours are all observed.
    Source: Immerkaer (1996), "Fast noise variance estimation", equation 3.
    """
    channels = y.shape[1]
    kernel = torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]], device=y.device)
    kernel = kernel.expand(channels, 1, 3, 3)
    response = functional.conv2d(y, kernel, groups=channels).abs()
    known = (functional.avg_pool2d(mask, 3, 1) > 1.0 - 1e-6).to(y.dtype)
    count = known.sum((1, 2, 3))
    mean = (response * known).sum((1, 2, 3)) / count.clamp(min=1.0)
    sigma = (math.sqrt(0.5 * math.pi) / 6.0 * mean).clamp(*ROUGHNESS)
    sigma = torch.where(count > 0.0, sigma, math.sqrt(SIGMA_RANGE[0] * SIGMA_RANGE[1]))
    return sigma.double().log().to(y.dtype)  # in double for the reason given in Fusion.pixel_prior


def planes(level: Tensor, like: Tensor) -> Tensor:
    """Levels as constant planes: (n, F) -> (n, F, h, w)."""
    return level[:, :, None, None].expand(-1, -1, *like.shape[2:])


def restoration_bound(recognition: Recognition, vae: VAE, x: Tensor, seen: Corrupted, eps: Tensor) -> Bound:
    """A bound on log p(x) from a corrupted view of x, plus the terms that train the rest of the recognition model.

    These are log q(level | y); the logarithm of each image's squared error after fusion and after correction, which is
    what PSNR averages; the error of the standard deviations; the log probability of black and white pixels. (The
    likelihood of the residuals would not do: pixels that are exactly 0 make it unbounded as the variance goes to 0.)
    The decoder is fixed.
    Source: Im et al. (2015), "Denoising criterion for variational auto-encoding framework", equation 5.
    """
    posterior = recognition.posterior(seen)
    bound = vae.bound(x, eps, posterior)
    present = seen.level > 0
    log_level = torch.where(present, seen.level, 1.0).log()
    estimate = recognition.log_level(seen.y, seen.mask)
    per_column = DiagonalGaussian(estimate.mean[..., None], estimate.log_var[..., None])
    level_log_prob = (per_column.log_prob(log_level[..., None]) * present).sum(1)
    x_mean = vae.x_mean(posterior.mean)
    fused, fused_variance = recognition.fusion(x_mean, *seen)
    restored, variance = recognition.correction(fused, fused_variance, *seen)
    log_error = _log_error(fused, x) + _log_error(restored, x)
    rest = (
        -SPREAD_WEIGHT * _misjudged((restored - x).detach().abs(), (variance + LEAST_VARIANCE).sqrt())
        + EXTREMES_WEIGHT * recognition.fusion.extremes_log_prob(x_mean.detach(), x)
        - ERROR_WEIGHT * x[0].numel() * log_error
    )
    return Bound(bound.log_likelihood + level_log_prob + rest, bound.kl)


def _misjudged(error: Tensor, std: Tensor) -> Tensor:
    """Squared difference between |error| and its mean under N(0, std^2), summed over the image's pixels, (n,).

    It is relative to the image's mean squared error. Unlike a log density it is bounded as std goes to 0.
    """
    scale = error.square().flatten(1).mean(1) + SMALLEST_ERROR
    return (error - MEAN_ABSOLUTE * std).square().flatten(1).sum(1) / scale


def _log_error(restored: Tensor, x: Tensor) -> Tensor:
    """Logarithm of each image's mean squared error, (n,)."""
    return ((restored - x).square().flatten(1).mean(1) + SMALLEST_ERROR).log()
