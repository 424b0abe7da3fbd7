"""Restoration: q(z | y, mask, level) for corrupted images y, and what the decoder then says fused with what is seen.

An encoder trained on clean images does not know noise: encoding a noisy digit and decoding it gives a worse picture
than the noisy one. So a second recognition model is trained on simulated corruptions, conditioned on their level. The
decoder's pixels are fused with those that are seen by Bayes' rule, each for itself; a small network that sees them
together corrects the result towards E[x | y].
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
from training.distributions.gaussian import DiagonalGaussian
from training.models.vae import VAE, Bound

FAMILIES = ("gaussian", "salt-and-pepper", "masking", "poisson")
"""Noise families in the order of the level's columns: standard deviation, share of flipped, share of zeroed pixels,
standard deviation at a pixel of 1."""
SIGMA_RANGE = (0.015, 0.8)
SHARE_RANGES = ((0.02, 0.6), (0.05, 0.9))
FAMILY_ODDS = (0.58, 0.12, 0.10, 0.10, 0.10)
"""How often each family is simulated; the last is none at all."""
ROUGHNESS = (0.01, 1.0)
"""Bounds of the classical estimate of sigma."""
ADDITIVE = (1.0, 0.0, 0.0, 1.0)
"""By family: 1 where the level begins as that estimate."""
THROUGH = 6
"""One image in so many is seen through an operator: means of blocks, or a blur."""
BLURS = (0.5, 2.5)
"""Standard deviations of simulated blurs in pixels."""
SMALLEST_ERROR = 1e-6
"""60 dB: an image restored that well need not get better."""
ERROR_WEIGHT = 0.05
"""Of the logarithm of an image's error, for which a Gaussian of unknown variance would have 1 / 2 a pixel."""
SPREAD_WEIGHT = 0.05
"""Of how wrong it is what is said of a pixel's error."""
MEAN_ABSOLUTE = math.sqrt(2.0 / math.pi)
"""Of a Gaussian, in standard deviations."""
EXTREMES_WEIGHT = 0.01
"""Of how often a pixel is exactly black or white."""


class Observation(NamedTuple):
    """What is seen of an image: y and mask (n, c, h, w), level (n, F). Missing pixels (mask 0) are 0 in y.

    Where a pixel is the mean of several, brought back to the image's size, mask is the sum of its weights' squares.
    """

    y: Tensor
    mask: Tensor
    level: Tensor


def corrupt(x: Tensor, level: Tensor, generator: torch.Generator, clip: Tensor | None = None) -> Tensor:
    """y ~ p(y | x, level): Poisson and additive Gaussian noise, then salt and pepper, then masking (pixels set to 0).

    Shapes: x (n, c, h, w); level (n, F), zero where a family is absent; clip (n, 1, 1, 1): cut y to [0, 1], as an
    8-bit image does.
    Source: the three corruptions of Vincent et al. (2010), section 3.3; Poisson: counts of mean x / level^2.
    """
    sigma, flip, masking, poisson = (column[:, None, None, None] for column in level.unbind(1))
    counts = torch.where(poisson > 0.0, x.clamp(min=0.0) / poisson.square().clamp(min=1e-12), 0.0)
    y = torch.where(poisson > 0.0, torch.poisson(counts, generator) * poisson.square(), x)
    y = y + sigma * torch.randn(x.shape, generator=generator, device=x.device)
    if clip is not None:
        y = torch.where(clip, y.clamp(0.0, 1.0), y)
    u = torch.rand(x.shape, generator=generator, device=x.device)
    y = torch.where(u < flip, (u < 0.5 * flip).to(y.dtype), y)
    return y * (torch.rand(x.shape, generator=generator, device=x.device) >= masking)


def simulate(x: Tensor, generator: torch.Generator) -> Observation:
    """Corrupt each image by a random family at a random level; a third also loses known pixels, scattered or a half.

    One image in `THROUGH` is first seen through an operator, the same for all of them, under Gaussian noise or none.
    """
    n, device = len(x), x.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    family = torch.multinomial(torch.tensor(FAMILY_ODDS, device=device), n, True, generator=generator)
    low, high = SIGMA_RANGE
    sigma = low * (high / low) ** uniform(n)
    shares = [low + (high - low) * uniform(n) for low, high in SHARE_RANGES]
    poisson = low * (high / low) ** uniform(n)
    level = torch.stack([sigma, *shares, poisson], 1) * functional.one_hot(family, len(FAMILY_ODDS))[:, : len(FAMILIES)]
    y = corrupt(x, level, generator, uniform(n, 1, 1, 1) < 0.5)
    mask = _random_mask(x, uniform)
    seen = Observation(y * mask, mask, level)
    if n >= THROUGH:
        level[: n // THROUGH, 1:] = 0.0
        through = see_through(_random_operator(x, uniform), x[: n // THROUGH], level[: n // THROUGH], generator)
        for whole, part in zip(seen, through, strict=True):
            whole[: n // THROUGH] = part
    return seen


def see_through(operator: Operator, x: Tensor, level: Tensor, generator: torch.Generator) -> Observation:
    """x (n, c, h, w) through the operator under noise of `level`, brought back to the image's size."""
    y = corrupt(torch.from_numpy(operator.seen(x.cpu().numpy())).to(x.device), level, generator)
    lifted, mask = operator.lifted(y.cpu().numpy(), np.ones(y.shape, np.float32))
    return Observation(torch.from_numpy(lifted).to(x.device), torch.from_numpy(mask).to(x.device), level)


def _random_operator(x: Tensor, draw: Callable[..., Tensor]) -> Operator:
    """Means of blocks of a size that divides the image, or as often a Gaussian blur."""
    height, width = x.shape[2:]
    factors = [k for k in range(2, min(height, width) // 2 + 1) if not (height % k or width % k)]
    choice, size = draw(2).tolist()
    if factors and choice < 0.5:
        return operator_of(("shrink", factors[int(size * len(factors))], height, width))
    low, high = BLURS
    return operator_of(("blur", low + (high - low) * size, height, width))


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


class Fusion(nn.Module):
    """E[x | y, z] and Var[x | y, z] of every pixel for itself, given the decoder's mean.

    Under Gaussian or Poisson noise the pixel's density given z is a mixture: N(mean, c mean (1 - mean) + d), and with a
    small weight anything in [0, 1], so that a stroke that the decoder missed is believed, not erased. c, d and the
    weight are quadratics in log sigma, fitted with the recognition model. Under salt and pepper, or masking noise, a
    pixel is kept with the odds that the decoder gives to what is seen, times those of a clean pixel to be exactly 0 or
    1. Where mask is below 1 the pixel itself is not seen.
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
        """How often a clean pixel is exactly 0, and exactly 1, where the decoder's mean says dark, and bright."""
        return self.extreme_logits.sigmoid()

    def pixel_prior(self, x_mean: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Variance of the pixel around the decoder's mean, and the logit of the weight of `anything`."""
        # In double: the last bit of onnxruntime's float logarithm hangs on how many numbers there are.
        sigma = noise_variance(level, 0.5).sqrt()[:, :, 0, 0]
        log_sigma = sigma.clamp(*SIGMA_RANGE).double().log().to(level.dtype)
        values = quadratics(self.coefficients, log_sigma).clamp(self.lowest, self.highest)
        c, d, logit = (values[:, i, None, None, None] for i in range(3))
        return c.exp() * x_mean * (1.0 - x_mean) + d.exp(), logit

    def extremes_log_prob(self, x_mean: Tensor, x: Tensor) -> Tensor:
        """log P(which pixels are exactly black, which exactly white) in nats, (n,), by which they are fitted."""
        black, white = self.extremes
        chances = torch.stack([black * (1.0 - x_mean), white * x_mean]).clamp(1e-6, 1.0 - 1e-6)
        found = torch.stack([x <= 0.0, x >= 1.0])
        return torch.where(found, chances, 1.0 - chances).log().sum((0, 2, 3, 4))

    def forward(self, x_mean: Tensor, y: Tensor, mask: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """restored, variance, shaped like y."""
        flip, masking = (level[:, i, None, None, None] for i in (1, 2))
        variance, logit = self.pixel_prior(x_mean, level)
        noise = noise_variance(level, torch.maximum(x_mean, y.clamp(max=1.0)))
        gaussian, gaussian_variance = _fuse_gaussian(x_mean, variance, logit, y, noise)
        kept = _keep_probability(x_mean, y, flip, masking, self.extremes)
        replaced = kept * y + (1.0 - kept) * x_mean
        replaced_variance = (1.0 - kept) * (variance + kept * (y - x_mean).square())
        switched = (flip + masking) > 0.0
        restored = torch.where(switched, replaced, gaussian).clamp(0.0, 1.0)
        seen_variance = torch.where(switched, replaced_variance, gaussian_variance)
        return torch.where(mask >= 1.0, restored, x_mean), torch.where(mask >= 1.0, seen_variance, variance)


def noise_variance(level: Tensor, at: Tensor | float) -> Tensor:
    """Of Gaussian and Poisson noise together at pixels of that value, (n, 1, 1, 1) or shaped like them."""
    sigma, poisson = (level[:, i, None, None, None] for i in (0, 3))
    return sigma.square() + poisson.square() * at


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


class Correction(nn.Module):
    """E[x | y] and Var[x | y] of all pixels together, from what fusion says of each: by how many of its standard
    deviations it is off, and how wide it should have been.
    """  # noqa: D205  # one promise

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, fused: Tensor, variance: Tensor, y: Tensor, mask: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """restored, variance, shaped like fused (n, c, h, w). `network` maps 4 c + F planes to 2 c."""
        std = (variance + LEAST_VARIANCE).sqrt() - math.sqrt(LEAST_VARIANCE)  # 0 where nothing is open
        said = self.network(torch.cat([fused, std, y.clamp(-1.0, 2.0), mask, planes(level, y)], 1)).float()
        moved, wider = said.chunk(2, 1)
        restored = (fused + std * moved).clamp(0.0, 1.0)
        return restored, variance * wider.clamp(-8.0, 8.0).exp()


class Recognition(nn.Module):
    """q(z | y, mask, level) and q(level | y, mask), both diagonal Gaussians, the second over log level; and E[x | y].

    `network` is an encoder of 2 c + F planes (y, mask, one constant plane a level), `level_network` of 2 c planes,
    `correction` a network as `Correction` takes it.
    """

    def __init__(self, network: nn.Module, level_network: nn.Module, correction: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.level_network = level_network
        self.fusion = Fusion()
        self.correction = Correction(correction)
        # Flat, so that no optimiser takes it for a matrix of weights.
        self.roughness = nn.Parameter(torch.tensor([*[0.0] * 4, *ADDITIVE, *[0.0] * 4]))

    def posterior(self, seen: Observation) -> DiagonalGaussian:
        """q(z | y, mask, level): mean and log_var (n, d)."""
        mean, log_var = self.network(torch.cat([seen.y, seen.mask, planes(seen.level, seen.y)], 1))
        return DiagonalGaussian(mean.float(), log_var.float())

    def log_level(self, y: Tensor, mask: Tensor) -> DiagonalGaussian:
        """q(log level | y, mask): mean and log_var (n, F), each column as if its family were the one at work.

        The network corrects a classical estimate where noise is additive, so that few steps suffice.
        """
        mean, log_var = self.level_network(torch.cat([y, mask], 1))
        classical = quadratics(self.roughness, log_roughness(y, mask)[:, None])
        return DiagonalGaussian(mean.float() + classical, log_var.float())

    def restored(self, vae: VAE, seen: Observation) -> tuple[Tensor, Tensor]:
        """E[x | y] and Var[x | y] (n, c, h, w): the decoder at the posterior's mean, fused and corrected."""
        x_mean = vae.x_mean(self.posterior(seen).mean)
        restored: tuple[Tensor, Tensor] = self.correction(*self.fusion(x_mean, *seen), *seen)
        return restored


def quadratics(coefficients: Tensor, at: Tensor) -> Tensor:
    """k quadratics, (n, k): coefficients (3 k,), those of the constants first; at (n, 1)."""
    powers = torch.cat([torch.ones_like(at), at, at.square()], 1)
    return (powers[:, :, None] * coefficients.view(3, -1)).sum(1)


def log_roughness(y: Tensor, mask: Tensor) -> Tensor:
    """The logarithm of sigma as the Laplacian's mean size tells it, (n,): y and mask (n, c, h, w), 1 where seen.

    Source: Immerkaer (1996), "Fast noise variance estimation", equation 3, over pixels whose neighbours are all seen.
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
    return sigma.double().log().to(y.dtype)  # in double for the reason told in Fusion.pixel_prior


def planes(level: Tensor, like: Tensor) -> Tensor:
    """One constant plane a level: (n, F) -> (n, F, h, w)."""
    return level[:, :, None, None].expand(-1, -1, *like.shape[2:])


def restoration_bound(recognition: Recognition, vae: VAE, x: Tensor, seen: Observation, eps: Tensor) -> Bound:
    """A bound on log p(x) from a corrupted view of x, plus what trains the rest of the recognition model.

    That is log q(level | y); the logarithm of each image's squared error after fusion and after correction, the
    quantity that PSNR averages; what is said of each pixel's error. (The likelihood of the residuals would not do:
    pixels that are exactly 0 make it unbounded as the variance goes to 0.) The decoder is fixed.
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
    """How far |error| is from what a Gaussian of standard deviation std lets expect, squared, in units of the image's.

    Unlike a log density it is bounded, by the number of pixels, however sure of a wrong pixel std is.
    """
    scale = error.square().flatten(1).mean(1) + SMALLEST_ERROR
    return (error - MEAN_ABSOLUTE * std).square().flatten(1).sum(1) / scale


def _log_error(restored: Tensor, x: Tensor) -> Tensor:
    """The logarithm of each image's mean squared error, (n,)."""
    return ((restored - x).square().flatten(1).mean(1) + SMALLEST_ERROR).log()
