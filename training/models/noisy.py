"""Models of noisy images that were never clean: a ladder VAE of the clean signal, and a network of its posterior mean.

Both see a noisy image after the stabilising transform, t. The VAE has p(t|z) = N(s(z), 1) and is trained on the ELBO of
noisy images. The mean network is trained on the same images by an unbiased estimate of its error.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.distributions.gaussian import SpatialGaussian
from training.distributions.likelihoods.noise import UnitNoise
from training.distributions.poisson_gaussian import NO_GAUSSIAN, PoissonGaussian, estimated, estimated_alone
from training.models.ladder import LadderVAE
from training.models.vae import Bound
from training.networks.trunk import PlainResidual, Trunk

MOVED = 0.2
"""Noise that recorrupted pairs add to the one image, in standard deviations of its own noise. The images that are
restored lack it, so that a small one is better: 0.2 gains 0.3 dB on BSD68 over 0.5."""
CONTINUOUS = 0.3
"""Standard deviation of what makes counts continuous, in units of the noise. They are whole numbers: of those a network
would tell what was added to the one image, and with it the other."""
DENSE = 0.5
"""Distance between two counts, in units of the noise, below which less of it is enough."""
AROUND = 5
"""Side of the window whose mean, without the pixel itself, tells a pixel's noise."""
GREY = 0.5
"""What the trunk takes for the middle of its range."""
SPREAD = (-8.0, 4.0)
"""Bounds of the logarithm of a posterior variance in units of the noise's."""
MOMENT_BLOCKS = 2
"""Residual blocks of the network that gives the moments of draws."""
UNKNOWN_VARIANCE = 1.0
"""Variance of a missing pixel after standardisation."""


class Seen(NamedTuple):
    """What the mean network has seen of noisy images.

    Attributes:
        t: The mean of the clean signal after the transform, (n, 1, h, w).
        features: (n, k, h/2, w/2).
    """

    t: Tensor
    features: Tensor


class MeanNetwork(nn.Module):
    """E[s|y] in one pass.

    Args:
        trunk: The network.
        likelihood: It standardises the transformed image.
    """

    def __init__(self, trunk: Trunk, likelihood: UnitNoise) -> None:
        super().__init__()
        self.trunk, self.likelihood = trunk, likelihood

    def forward(self, t: Tensor, mask: Tensor, std: Tensor) -> Seen:
        """Map transformed images, mask and the noise's standard deviation (n, 1, h, w) to the mean, and features."""
        known = (mask > 0.0).to(t.dtype)
        standard = self.likelihood.standardised(t) * known
        # In units of the standardised image noise has the deviation std / scale; of a missing pixel nothing is known.
        sigma = known * std / self.likelihood.scale + (1.0 - known) * math.sqrt(UNKNOWN_VARIANCE)
        kind = functional.avg_pool2d(torch.zeros_like(t), 2)
        features = self.trunk.features(standard + GREY, sigma, kind)
        return Seen(self.likelihood.mean(standard - sigma * self.trunk.residual(features)), features)

    def seen(self, y: Tensor, mask: Tensor, noise: PoissonGaussian) -> Seen:
        """The same for noisy images (n, 1, h, w)."""
        return self(noise.stabilised(y), mask, told_std(noise, around(y)))

    def restored(self, y: Tensor, mask: Tensor, noise: PoissonGaussian) -> tuple[Tensor, Seen]:
        """E[s|y] in the image's own units, (n, 1, h, w), and what was seen."""
        seen = self.seen(y, mask, noise)
        return noise.unbiased(seen.t), seen


def around(y: Tensor) -> Tensor:
    """The signal near each pixel: mean of the pixels around it without itself, shaped like y."""
    reach = AROUND // 2
    every = functional.avg_pool2d(functional.pad(y, (reach,) * 4, mode="reflect"), AROUND, 1)
    return (AROUND**2 * every - y) / (AROUND**2 - 1)


def recorrupted_bound(model: MeanNetwork, y: Tensor, noise: PoissonGaussian, generator: torch.Generator) -> Bound:
    """An unbiased estimate of the mean network's error, from noisy images alone; its negative, with a KL of 0.

    Each transformed image t is split into t + a e and t - e / a, where e has the variance of the noise in t; their
    noises are then uncorrelated, so that the error of the one from the other differs from the error of the clean signal
    by a constant. Both e and -e are taken, so that most of what e adds to the gradient cancels. Counts are made
    continuous first. The variance of a pixel is that of the signal around it.
    Source: Pang et al. (2021), "Recorrupted-to-Recorrupted: unsupervised deep learning for image denoising", theorem 1;
    with a small it is Stein's unbiased risk estimate.

    Args:
        model: The mean network.
        y: Noisy images (n, 1, h, w).
        noise: Of these.
        generator: Source of e.
    """
    near, a = around(y), MOVED
    more = blurring(noise, near)
    t = noise.stabilised(y) + more * torch.randn(y.shape, generator=generator, device=y.device)
    variance = noise.left(near) + more.square()
    e = variance.sqrt() * torch.randn(y.shape, generator=generator, device=y.device)
    e, t = torch.cat([e, -e]), torch.cat([t, t])
    both = PoissonGaussian(*(torch.cat([part, part]) for part in noise))
    given = t + a * e
    # Of what the network is given alone: that of the image itself would tell it e.
    std = told_std(both, around(both.unbiased(given)))
    found = model(given, torch.ones_like(t), std).t
    square = (found - t + e / a).square() - (e / a).square()
    log_likelihood = -0.5 * square.flatten(1).sum(1).unflatten(0, (2, -1)).mean(0)
    return Bound(log_likelihood, torch.zeros_like(log_likelihood))


def told_std(noise: PoissonGaussian, s: Tensor) -> Tensor:
    """Standard deviation of the noise around the signal s, after the transform, that the mean network takes as input.

    It is that of recorrupted images, on which the network is trained; the noise of an image itself is weaker.
    """
    return ((noise.left(s) + blurring(noise, s).square()) * (1.0 + MOVED**2)).sqrt()


def blurring(noise: PoissonGaussian, s: Tensor) -> Tensor:
    """Standard deviation of what makes counts around the signal s continuous; 0 for Gaussian noise."""
    return CONTINUOUS * (noise.one_count(s) / DENSE).clamp(max=1.0)


class NoisyVAE(nn.Module):
    """The ladder VAE of the clean signal, whose encoder takes the mean network's features and the noisy image.

    Args:
        vae: The ladder; its encoder takes 1 + k / 4 planes.
        features: k, the number of features.
    """

    def __init__(self, vae: LadderVAE, features: int) -> None:
        super().__init__()
        self.vae = vae
        self.moments = nn.Sequential(
            nn.Conv2d(features + 8, features, 3, padding=1),
            *(PlainResidual(features) for _ in range(MOMENT_BLOCKS)),
            nn.Conv2d(features, 8, 3, padding=1),
        )
        nn.init.zeros_(self.moments[-1].weight)  # type: ignore[arg-type]

    @property
    def likelihood(self) -> UnitNoise:
        """p(t|z)."""
        found = self.vae.likelihood
        assert isinstance(found, UnitNoise)
        return found

    def encoded(self, t: Tensor, seen_features: Tensor) -> Tensor:
        """What the encoder takes, (n, 1 + k / 4, h, w)."""
        return torch.cat([self.likelihood.standardised(t), functional.pixel_shuffle(seen_features, 2)], 1)

    def moments_of(self, t: Tensor, seen: Seen, noise: PoissonGaussian) -> tuple[Tensor, Tensor]:
        """Mean and log variance of draws of the clean signal given a transformed image, (n, 1, h, w) each.

        The mean network is trained on an error whose estimate is unbiased for Gaussian noise. With counts it leaves
        bright pixels of dark images as they are, which the VAE removes, so that their mean is that of the VAE's draws.
        """
        images = torch.cat([self.likelihood.standardised(t), self.likelihood.standardised(seen.t)], 1)
        planes = torch.cat([functional.pixel_unshuffle(images, 2), seen.features], 1)
        shift, log_variance = functional.pixel_shuffle(self.moments(planes).float(), 2).chunk(2, 1)
        return seen.t + shift * (noise.gain > 0.0), log_variance.clamp(*SPREAD)

    def restored(self, y: Tensor, mask: Tensor, noise: PoissonGaussian, seen: Seen) -> tuple[Tensor, Tensor]:
        """E[s|y] and Var[s|y] in the image's units, (n, 1, h, w) each; missing pixels as the mean network has them."""
        known = noise.stabilised(y)
        mean, log_variance = self.moments_of(torch.where(mask > 0.0, known, seen.t), seen, noise)
        restored = noise.unbiased(mean)
        return restored, log_variance.exp() * noise.variance(restored)

    def bound(self, y: Tensor, noise: PoissonGaussian, seen: Seen, eps: Tensor) -> Bound:
        """The bound on log p(t) of noisy images (n, 1, h, w) after the transform, differentiable in all networks.

        The gradient of one more term, whose value is left out, trains the moments: it is their log density of draws of
        the clean signal.

        Args:
            y: The images.
            noise: Of these.
            seen: What the mean network has seen of them.
            eps: Standard normal noise, (L, n, *latent_shape).

        Source: Kingma and Welling (2013), equation 10, with p(t|z) as in Prakash et al. (2021), "Fully unsupervised
        diversity denoising with convolutional variational autoencoders".
        """
        t = noise.stabilised(y)
        posterior = self.vae.posterior(self.encoded(t, seen.features))
        z, q, parameters = self.vae.infer(posterior, eps)
        log_likelihood = self.likelihood.log_prob(parameters, t).mean(0)
        mean, log_variance = self.moments_of(t, seen, noise)
        square = (self.likelihood.mean(parameters.detach()) - mean).square().mean(0)
        fit = -0.5 * (square * torch.exp(-log_variance) + log_variance).flatten(1).sum(1)
        return Bound(log_likelihood + fit - fit.detach(), self.vae.prior.kl(q, z))


def noise_seen(y: Tensor, mask: Tensor, level: Tensor) -> PoissonGaussian:
    """The noise of images (n, 1, h, w) of a level (n, 2), as the graphs take it.

    A level cannot tell a black level above 0. Where it has Poisson noise and no Gaussian noise, the black level is that
    of the blind estimate.
    """
    told = PoissonGaussian.of_level(level)
    alone = (level[:, 1] <= NO_GAUSSIAN)[:, None, None, None] & (told.gain > 0.0)
    return PoissonGaussian(told.gain, torch.where(alone, -told.gain * estimated(y, mask).black, told.offset))


class RestoreNoisy(nn.Module):
    """E[s|y], Var[s|y] and features: the graph `restoration`."""

    def __init__(self, mean: MeanNetwork, model: NoisyVAE) -> None:
        super().__init__()
        self.mean, self.model = mean, model

    def forward(self, y: Tensor, mask: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map y and mask (n, 1, h, w) and level (n, 2) to two images and (n, k, h/2, w/2)."""
        noise = noise_seen(y, mask, level)
        seen = self.mean.seen(y, mask, noise)
        restored, variance = self.model.restored(y, mask, noise, seen)
        return restored, variance, seen.features


class CompleteNoisy(nn.Module):
    """A draw of the clean signal given y, z and its density: the graph `completion`."""

    def __init__(self, model: NoisyVAE) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, y: Tensor, mask: Tensor, level: Tensor, restored: Tensor, features: Tensor, eps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Draw z ~ q(z|y), and decode it.

        Args:
            y: (n, 1, h, w).
            mask: Likewise. Where a pixel is missing, the encoder takes the restored one.
            level: (n, 2).
            restored: E[s|y], (n, 1, h, w).
            features: What `RestoreNoisy` gave.
            eps: Standard normal noise (n, d, h/f, w/f).

        Returns:
            s(z) (n, 1, h, w), and its variance given z, which is 0; z, and mean and log_var of q of each number given
            those of coarser grids, shaped like eps; log q(z|y) in nats, (n,).
        """
        model, noise = self.model, noise_seen(y, mask, level)
        t = noise.stabilised(torch.where(mask > 0.0, y, restored))
        z, q, parameters = model.vae.infer(model.vae.posterior(model.encoded(t, features)), eps[None])
        completion = noise.unbiased(model.likelihood.mean(parameters[0]))
        mean, log_var = (part[0] for part in q)
        # In double: the last bit of onnxruntime's sums in float depends on the number of rows.
        log_q = SpatialGaussian(mean.double(), log_var.double()).log_prob(z[0].double())
        return completion, torch.zeros_like(completion), z[0], mean, log_var, log_q.float()


class EstimateNoisy(nn.Module):
    """The level of Poisson and Gaussian noise: of both together, or of each as if it were alone."""

    def __init__(self, *, alone: bool) -> None:
        super().__init__()
        self.alone = alone

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        """Map y and mask (n, 1, h, w) to levels (n, 2)."""
        level = estimated_alone(y, mask) if self.alone else estimated(y, mask).level
        return level.clamp(max=1.0)
