"""Conditional models of photographs: E[x | y] by a trunk, then latents given y for what it leaves open.

Trained in two stages, because a bound on log p(x | y) that trains both at once gives a worse mean.
Source: Kingma and Welling (2013), with everything given y, as Sohn et al. (2015), equation 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.distributions.gaussian import SpatialGaussian
from training.distributions.spoiling import GREY, Spoilt
from training.models.vae import Bound
from training.networks.level import LevelNetwork, NoiseEstimate
from training.networks.spatial_ladder import GroupOfLatents, SpatialLadder, log_density
from training.networks.trunk import Trunk

SHRUNK_STD = 0.2
"""What stands for the standard deviation of a pixel around the mean of a large block."""
WHOLE = 1.0 - 1e-6
"""Mask above which a pixel counts as observed alone."""
NO_NOISE = 1e-4
"""Least standard deviation that errors are divided by."""
MOST_ERROR = 30.0
"""Largest error in units of the noise that the latents are trained on."""
LEAST_ERROR = 1e-6
"""Mean squared error, 60 dB, below which an image gains nothing."""
LEAST_LEVEL = 0.4 / 255.0
"""Added to levels whose ratio counts, so that those of clean images need not be exact."""
LEAST_TOLD = 1.2 / 255.0
"""Level below which the kind of the noise does not count."""
OVERESTIMATE = 3.0
"""Weight of the error of a level of processed noise that is too high: it costs detail, one too low leaves noise."""
BLOCKS = (4, 8)
"""Heights and widths of the blocks whose means train the latents too."""
KIND_WEIGHT = 0.15
"""Weight of the log probability of the noise's kind."""


class Conditions(NamedTuple):
    """A corrupted image as the trunk takes it.

    Attributes:
        y: (n, c, h, w), with grey where a pixel is missing.
        sigma: Standard deviation of each pixel's noise, (n, 1, h, w); 1 where it is missing.
        kind: -1 where pixels are means of blocks, 1 where processed noise is the stronger, else 0, (n, 1, h/2, w/2).
    """

    y: Tensor
    sigma: Tensor
    kind: Tensor


def conditions(y: Tensor, mask: Tensor, level: Tensor) -> Conditions:
    """Bring a corrupted image to the form that the trunk takes.

    Args:
        y: (n, c, h, w).
        mask: 1 where a pixel is observed, 0 where it is missing, 1/k^2 where it is the mean of k x k pixels; of several
            channels the least counts.
        level: Levels of Gaussian and of processed noise, (n, 2).
    """
    seen = mask.amin(1, keepdim=True)
    noise = level.square().sum(1)[:, None, None, None]
    shrunk = torch.where(seen < WHOLE, SHRUNK_STD * (1.0 - seen), 0.0)
    sigma = torch.where(seen > 0.0, (noise + shrunk.square()).sqrt(), 1.0)
    processed = (level[:, 1] > level[:, 0]).to(y.dtype)[:, None, None, None]
    kind = torch.where((seen > 0.0) & (seen < WHOLE), -1.0, processed)
    return Conditions(torch.where(mask > 0.0, y, GREY), sigma, functional.avg_pool2d(kind, 2))


class Estimate(NamedTuple):
    """What the trunk makes of a corrupted image.

    Attributes:
        restored: E[x | y], (n, c, h, w).
        sigma: Of `Conditions`.
        features: (n, k, h/2, w/2).
    """

    restored: Tensor
    sigma: Tensor
    features: Tensor


def estimated(trunk: Trunk, y: Tensor, mask: Tensor, level: Tensor) -> Estimate:
    """Run the trunk on corrupted images, as `conditions` takes them."""
    known = conditions(y, mask, level)
    features = trunk.features(*known)
    return Estimate(known.y - known.sigma * trunk.residual(features), known.sigma, features)


class Restore(nn.Module):
    """E[x | y], Var[x | y] and features: the graph `restoration`."""

    def __init__(self, trunk: Trunk, ladder: SpatialLadder) -> None:
        super().__init__()
        self.trunk, self.head = trunk, ladder.head

    def forward(self, y: Tensor, mask: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map y and mask (n, c, h, w) and level (n, 2) to two images and (n, k, h/2, w/2)."""
        seen = estimated(self.trunk, y, mask, level)
        return seen.restored, (seen.sigma * self.head(seen.features).exp()).square(), seen.features


class Temperature(nn.Module):
    """What the noise of a draw is multiplied by, depending on the level of the noise in y.

    Args:
        levels: Two levels or more, ascending.
        factors: The factor at each. Between them it is linear in the logarithm of the level, beyond them constant.
    """

    logs: Tensor
    spans: Tensor
    slopes: Tensor

    def __init__(self, levels: Sequence[float], factors: Sequence[float]) -> None:
        super().__init__()
        logs, known = torch.tensor(levels).log(), torch.tensor(factors)
        self.first = float(known[0])
        self.register_buffer("logs", logs[:-1])
        self.register_buffer("spans", logs.diff())
        self.register_buffer("slopes", known.diff() / logs.diff())

    def forward(self, level: Tensor) -> Tensor:
        """Levels (n, F) of all families to factors (n, 1, 1, 1)."""
        log = level.square().sum(1, keepdim=True).sqrt().clamp(min=LEAST_LEVEL).log()
        found = self.first + (torch.minimum((log - self.logs).clamp(min=0.0), self.spans) * self.slopes).sum(1)
        return found[:, None, None, None]


class Complete(nn.Module):
    """A draw of x given y, z and its density: the graph `completion`.

    Args:
        ladder: The latents.
        temperature: Of the draws; None is 1.
    """

    def __init__(self, ladder: SpatialLadder, temperature: Temperature | None = None) -> None:
        super().__init__()
        self.ladder, self.temperature = ladder, temperature

    def forward(
        self, y: Tensor, mask: Tensor, level: Tensor, restored: Tensor, features: Tensor, eps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Draw z ~ p(z | y), and decode it.

        Args:
            y: (n, c, h, w).
            mask: Likewise.
            level: (n, 2).
            restored: E[x | y], (n, c, h, w).
            features: What `Restore` gave.
            eps: Standard normal noise (n, d, h/f, w/f).

        Returns:
            E[x | y, z] and Var[x | y, z] (n, c, h, w); z, and mean and log_var of p of each number given those of
            coarser grids, shaped like eps; log p(z | y) in nats, (n,).
        """
        sigma = conditions(y, mask, level).sigma
        found = self.ladder(features, eps if self.temperature is None else self.temperature(level) * eps)
        z, mean, log_var = (self.ladder.packed([group[part] for group in found.groups]) for part in range(3))
        # In double: the last bit of onnxruntime's sums in float depends on the number of rows.
        log_p = SpatialGaussian(mean.double(), log_var.double()).log_prob(z.double())
        variance = (sigma * found.log_std.exp()).square()
        return restored + sigma * found.mean, variance, z, mean, log_var, log_p.float()


def trunk_bound(trunk: Trunk, spoilt: Spoilt) -> Bound:
    """log p(x | y) in nats of an image, Gaussian around E[x | y] with the variance that suits each image best.

    So every image gains by decibels, whatever its noise. There are no latents: the KL is 0.
    """
    restored = estimated(trunk, *spoilt[1:]).restored
    error = (restored - spoilt.x).square().mean((1, 2, 3)) + LEAST_ERROR
    log_likelihood = -0.5 * spoilt.x[0].numel() * (error.log() + 1.0 + math.log(2.0 * math.pi))
    return Bound(log_likelihood, torch.zeros_like(log_likelihood))


class LatentBound(NamedTuple):
    """Terms of a bound on log p(e | y), e = (x - E[x | y]) / sigma, in nats of an image, (n,) each.

    Attributes:
        log_likelihood: E[log p(e | z, y)] under q(z | x, y), one draw.
        kl: KL of each group from its prior, finest first, (groups, n).
        without: log p(e | y) of the decoder without latents.
        blocks: log densities of the means of blocks of e - E[e | z, y], as `block_density` gives them. They are no part
            of the bound.
    """

    log_likelihood: Tensor
    kl: Tensor
    without: Tensor
    blocks: Tensor


def latent_bound(ladder: SpatialLadder, seen: Estimate, x: Tensor, eps: Tensor) -> LatentBound:
    """The bound of images x (n, c, h, w), of which the trunk has seen `seen`, with noise as `ladder.noise` gives it."""
    error = ((x - seen.restored) / seen.sigma.clamp(min=NO_NOISE)).clamp(-MOST_ERROR, MOST_ERROR)
    found = ladder(seen.features, eps, error)
    left = error - found.mean
    parts = (log_density(left, found.log_std), log_density(error, ladder.head(seen.features)))
    with_latents, without = (part.flatten(1).sum(1) for part in parts)
    kl = torch.stack([_total(group) for group in found.groups])
    return LatentBound(with_latents, kl, without, block_density(left, found.log_std))


def block_density(left: Tensor, log_std: Tensor) -> Tensor:
    """Log density of the means of `BLOCKS` of what the latents leave, if its pixels are independent.

    The bound hardly rewards latents for what neighbouring pixels have in common, because their own deviation is much
    larger. But means of regions depend on nothing else. Without this term the variance of such means over draws of the
    model was 0.5 to 0.7 of the true one, with it 0.8 to 1.0.

    Args:
        left: e - E[e | z, y], (n, c, h, w).
        log_std: Its log standard deviation given z, of the same shape.

    Returns:
        Nats of an image, (n,).
    """
    found = torch.zeros(len(left), device=left.device)
    for size in BLOCKS:
        variance = functional.avg_pool2d((2.0 * log_std).exp(), size) / size**2
        density = log_density(functional.avg_pool2d(left, size), 0.5 * variance.log())
        found = found + density.flatten(1).sum(1)
    return found


def _total(group: GroupOfLatents) -> Tensor:
    assert group.kl is not None
    return group.kl.flatten(1).sum(1)


def ladder_objective(bound: LatentBound, places: list[int], free_nats: tuple[float, ...]) -> Bound:
    """The bound that trains the latents, the density of blocks, and the bound of the decoder without latents.

    The last one shares nothing with the others.

    Args:
        bound: Of a minibatch.
        places: Places of each grid, finest first.
        free_nats: Nats a place below which a group's KL has no gradient.

    Source of the free nats: Kingma et al. (2016), appendix C.8.
    """
    kl = [
        part.detach() if float(part.detach().mean()) < free * number else part
        for part, free, number in zip(bound.kl, free_nats, places, strict=True)
    ]
    return Bound(bound.log_likelihood + bound.blocks + bound.without, torch.stack(kl).sum(0))


class EstimateLevels(nn.Module):
    """The level of each family as if it were alone: the graph `noise_level`."""

    def __init__(self, network: LevelNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        """Map y and mask (n, c, h, w) to levels (n, 2)."""
        return _levels(self.network(y, mask))


class EstimateNoise(nn.Module):
    """The levels of all families, of which the likelier one is at work: the graph `noise`."""

    def __init__(self, network: LevelNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        """Map y and mask (n, c, h, w) to levels (n, 2)."""
        found: NoiseEstimate = self.network(y, mask)
        processed = (found.logit > 0.0).to(y.dtype)[:, None]
        return _levels(found) * torch.cat([1.0 - processed, processed], 1)


def _levels(found: NoiseEstimate) -> Tensor:
    return torch.stack([found.log_gaussian, found.log_processed], 1).exp().clamp(max=1.0)


def level_bound(network: LevelNetwork, spoilt: Spoilt, clean: Tensor) -> Bound:
    """Log densities of the level and of its family, up to constants, (n,): there are no latents, and the KL is 0.

    The logarithm of the level has about a Laplace distribution, so that a few misjudged images do not rule. Nothing
    tells the family of a clean image, so the levels of both are 0 there.

    Args:
        network: What is trained.
        spoilt: Images with one family of noise each.
        clean: (n,), whether an image of Gaussian noise is seen without it.
    """
    processed = spoilt.level[:, 1] > 0.0
    clean = clean & ~processed
    seen = (spoilt.mask > 0.0).to(spoilt.x.dtype)
    y = torch.where(clean[:, None, None, None], torch.where(seen > 0.0, spoilt.x, GREY), spoilt.y)
    left = ((spoilt.y - spoilt.x).square() * seen).mean((1, 2, 3)).sqrt()
    level = torch.where(processed, left, torch.where(clean, 0.0, spoilt.level[:, 0]))
    found = network(y, seen)
    known = (level + LEAST_LEVEL).log()
    as_gaussian, as_processed = (
        functional.smooth_l1_loss((log.exp() + LEAST_LEVEL).log(), known, beta=0.1, reduction="none")
        for log in (found.log_gaussian, found.log_processed)
    )
    too_high = found.log_processed.exp() > level
    weighted = as_processed * torch.where(processed & too_high, OVERESTIMATE, 1.0)
    error = torch.where(processed, weighted, as_gaussian) + clean * as_processed
    kind = functional.binary_cross_entropy_with_logits(found.logit, processed.to(known.dtype), reduction="none")
    log_likelihood = -error - KIND_WEIGHT * kind * (level > LEAST_TOLD)
    return Bound(log_likelihood, torch.zeros_like(log_likelihood))
