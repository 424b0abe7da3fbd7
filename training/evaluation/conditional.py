"""Figures of a conditional model: decibels, what its latents gain, and factors that make its intervals hold."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from service.contract.calibration import ways, widened
from service.contract.corruption import (
    LEAST_VARIANCE,
    NoiseName,
    Observation,
    OperatorName,
    operator_of,
    projected,
)
from service.contract.images import Pixels
from service.contract.manifest import Calibration, Curve
from training.data import as_float
from training.distributions.camera import compressed, luma
from training.distributions.spoiling import NAMES, Spoilt
from training.evaluation.calibrate import FEWEST, least_factor
from training.evaluation.evaluate import decibels
from training.evaluation.measures import DEVIATIONS, LEAST_STD
from training.loop.conditional_stages import Parts
from training.loop.randomness import keyed_generator
from training.models.conditional import EstimateLevels, EstimateNoise, Restore, estimated, latent_bound
from training.progress import tell, warn

SIGMAS = (5, 15, 25, 50)
"""Standard deviations at which a model is tried, in grey levels."""
QUALITIES = (20, 80)
"""Qualities of JPEG at which a model is tried."""
BOUND_SIGMA = 25
"""Standard deviation at which the bound is measured, in grey levels."""
KNOTS = (1, 2, 5, 10, 15, 25, 35, 50, 75)
"""Standard deviations at which intervals are calibrated, in grey levels."""
KNOT_QUALITIES = (90, 75, 50, 30, 15)
"""Qualities of JPEG likewise, so that their levels rise."""
FACTOR_SIDES = (2, 4)
TEMPERED = (5, 10, 25, 50, 75)
"""Standard deviations at which temperatures are found, in grey levels."""
TEMPERATURES = (1.0, 1.1, 1.25, 1.5)
"""Temperatures that are tried; what lies between them is interpolated."""
TEMPERED_IMAGES, TEMPERED_DRAWS, BLOCK = 16, 4, 8
"""Images and draws of each, and the height and width of the blocks in pixels."""
ROWS = 16
"""Images at a time."""


class Case(NamedTuple):
    """One corruption of the same images.

    Attributes:
        family: Of the noise.
        name: Of the corruption.
        spoilt: The images.
    """

    family: NoiseName
    name: str
    spoilt: Spoilt


def images_of(images: Tensor, channels: int) -> Tensor:
    """Float images (n, channels, h, w) in [0, 1] of uint8 ones, grey by luma, on the CPU."""
    x = as_float(images.cpu())
    return luma(x) if x.shape[1] > channels else x


@torch.inference_mode()
def conditional_figures(parts: Parts, images: Tensor, seed: int) -> dict[str, Any]:
    """Measure what a model restores, and what its latents gain.

    Args:
        parts: The networks, on the CPU.
        images: uint8 test images (n, c, h, w).
        seed: Of the noise.

    Returns:
        `restoration`: by family and corruption what `evaluate.restoration` has for a level. `images` and `seed`.
        `gain_by_latents_nats_per_pixel`: of the bound on log p(x | y), over the decoder without latents.
    """
    x = images_of(images, parts.channels)
    table: dict[str, dict[str, dict[str, float]]] = {}
    for case in _cases(x, seed):
        column = NAMES.index(case.family)
        _, y, mask, level = case.spoilt
        alone, joint = (_of_rows(kind(parts.level), y, mask) for kind in (EstimateLevels, EstimateNoise))
        known, unknown = (_restored(parts, y, mask, one)[0].clamp(0.0, 1.0) for one in (level, joint))
        error = (alone[:, column] / level[:, column]).log().abs().mean()
        table.setdefault(case.family, {})[case.name] = {
            **decibels(x, y, known, unknown),
            "level_error": round(float(error), 3),
        }
    return {
        "images": len(x),
        "seed": seed,
        "gain_by_latents_nats_per_pixel": round(_gain(parts, x, seed), 3),
        "restoration": table,
    }


def _cases(x: Tensor, seed: int) -> Iterator[Case]:
    for sigma in SIGMAS:
        yield Case("gaussian", f"{sigma}/255", _noisy(x, sigma, seed))
    for quality in QUALITIES:
        yield Case("processed", f"JPEG {quality}", _compressed(x, quality, seed))


def _noisy(x: Tensor, sigma: float, seed: int) -> Spoilt:
    noise = torch.randn(x.shape, generator=keyed_generator(x.device, seed, 17, int(sigma)))
    level = torch.tensor([[sigma / 255.0, 0.0]]).expand(len(x), -1)
    return Spoilt(x, x + sigma / 255.0 * noise, torch.ones_like(x), level)


def _compressed(x: Tensor, quality: int, seed: int) -> Spoilt:
    y = compressed(x, np.random.default_rng((seed, 18, quality)), quality, quality)
    level = (y - x).square().mean((1, 2, 3)).sqrt().clamp(min=1e-4)
    return Spoilt(x, y, torch.ones_like(x), torch.stack([torch.zeros_like(level), level], 1))


def _missing(x: Tensor, seed: int) -> Spoilt:
    """Half of the pixels scattered, and a block of an eighth of the height and width."""
    mask = (torch.rand(len(x), 1, *x.shape[2:], generator=keyed_generator(x.device, seed, 19)) < 0.5).float()
    top, left = (3 * side // 8 for side in x.shape[2:])
    mask[:, :, top : top + x.shape[2] // 8, left : left + x.shape[3] // 8] = 0.0
    return Spoilt(x, x * mask, mask.expand_as(x).contiguous(), torch.zeros(len(x), 2))


def _shrunk(x: Tensor, factor: int) -> tuple[Spoilt, OperatorName]:
    """Means of blocks, and the operator that takes them."""
    small = torch.nn.functional.avg_pool2d(x, factor)
    y = torch.nn.functional.interpolate(small, scale_factor=float(factor), mode="nearest")
    height, width = x.shape[2:]
    seen = Spoilt(x, y, torch.full_like(x, 1.0 / factor**2), torch.zeros(len(x), 2))
    return seen, ("shrink", factor, height, width)


def _of_rows(function: Any, *rows: Tensor) -> Any:
    """The function of a few rows at a time."""
    found = [function(*part) for part in zip(*(row.split(ROWS) for row in rows), strict=True)]
    if isinstance(found[0], Tensor):
        return torch.cat(found)
    return [torch.cat(part) for part in zip(*found, strict=True)]


def _restored(parts: Parts, y: Tensor, mask: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    restore = Restore(parts.trunk, parts.latents)
    restored, variance = _of_rows(lambda *rows: restore(*rows)[:2], y, mask, level)
    return restored, variance


def _gain(parts: Parts, x: Tensor, seed: int) -> float:
    """Nats a pixel that the latents gain at a middle level."""
    generator = keyed_generator(x.device, seed, 20)

    def gained(*rows: Tensor) -> Tensor:
        spoilt = Spoilt(*rows)
        seen = estimated(parts.trunk, *rows[1:])
        bound = latent_bound(parts.latents, seen, spoilt.x, parts.latents.noise(spoilt.x, generator))
        return bound.log_likelihood - bound.kl.sum(0) - bound.without

    return float(_of_rows(gained, *_noisy(x, BOUND_SIGMA, seed)).mean()) / math.prod(x.shape[2:])


def report_conditional(variant: str, figures: dict[str, Any]) -> None:
    """Write the figures of a variant to standard error, with warnings where it improves nothing."""
    for family, rows in figures["restoration"].items():
        for name, row in rows.items():
            told = ", ".join(f"{what} {row[f'{what}_db']:.2f}" for what in ("noisy", "restored", "auto"))
            tell(f"{variant}, {family} {name}: {told} dB; level off by {100 * row['level_error']:.0f} %")
            if row["auto_db"] <= row["noisy_db"]:
                warn(f"{variant}: restoring {family} {name} does not raise PSNR; raise epochs in [trunk.train]")
    tell(f"{variant}: latents gain {figures['gain_by_latents_nats_per_pixel']:g} nats a pixel")


@torch.inference_mode()
def calibration_of(parts: Parts, images: Tensor, seed: int) -> Calibration:
    """Factors of `std` with which mean +- 1.645 std holds 90 % of the true pixels of held-out images.

    Args:
        parts: The networks, on the CPU.
        images: uint8 (n, c, h, w), not used in training.
        seed: Of the corruptions.

    Returns:
        Curves over the level of each noise family, and factors for missing pixels and means of blocks.
    """
    x = images_of(images, parts.channels)
    noisy = {sigma / 255.0: _noisy(x, sigma, seed) for sigma in KNOTS}
    processed = {}
    for quality in KNOT_QUALITIES:
        spoilt = _compressed(x, quality, seed)
        processed[round(float(spoilt.level[:, 1].median()), 5)] = spoilt
    curves = {str(family): _curve(parts, of) for family, of in zip(NAMES, (noisy, processed), strict=True)}
    factors: dict[str, float] = {}
    for spoilt, operator in ((_missing(x, seed), None), *(_shrunk(x, factor) for factor in FACTOR_SIDES)):
        y, mask, level = (part.numpy() for part in spoilt[1:])
        observation = Observation(y, mask, level, None, True, operator)
        mean, std = _told(parts, spoilt)
        if operator is not None:
            mean = _agreeing(operator, mean, std, y)
        for way, where in ways(observation, NAMES).items():
            of_it = np.broadcast_to(where, mean.shape)
            if of_it.sum() >= FEWEST:
                factors[way] = factor_for(mean[of_it], std[of_it], x.numpy()[of_it])
    return Calibration(factors={"fast": factors}, curves={"fast": curves}, images=len(x), seed=seed)


@torch.inference_mode()
def temperature_of(parts: Parts, images: Tensor, seed: int) -> dict[str, list[float]]:
    """Temperatures at which draws vary as much as the restored images are wrong, in the means of blocks.

    Pixels show whether single deviations are right, means of blocks whether what is wrong together varies together. The
    prior of the latents is too narrow there, the more so the stronger the noise.

    Args:
        parts: The networks, on the CPU.
        images: uint8 (n, c, h, w), not used in training.
        seed: Of noise and draws.

    Returns:
        `levels` and `factors`, as `Temperature` takes them.
    """
    x = images_of(images[:TEMPERED_IMAGES], parts.channels)
    factors = [_temperature(parts, _noisy(x, sigma, seed), seed) for sigma in TEMPERED]
    return {"levels": [sigma / 255.0 for sigma in TEMPERED], "factors": factors}


def _temperature(parts: Parts, spoilt: Spoilt, seed: int) -> float:
    generator = keyed_generator(spoilt.x.device, seed, 21)
    ladder, below = parts.latents, functools.partial(torch.nn.functional.avg_pool2d, kernel_size=BLOCK)

    def varied(*rows: Tensor) -> Tensor:
        """(n, 1 + temperatures): squared errors of means of blocks, and variances that draws have there."""
        x, *seen = rows
        known = estimated(parts.trunk, *seen)
        found = [below((x - known.restored) / known.sigma).square().mean((1, 2, 3))]
        eps = [ladder.noise(x, generator) for _ in range(TEMPERED_DRAWS)]
        for factor in TEMPERATURES:
            draws = [ladder(known.features, factor * one) for one in eps]
            between = torch.stack([below(one.mean) for one in draws]).var(0).mean((1, 2, 3))
            within = torch.stack([(2.0 * one.log_std).exp() for one in draws]).mean((0, 2, 3, 4))
            found.append(between + within / BLOCK**2)
        return torch.stack(found, 1)

    wrong, *spread = _of_rows(varied, *spoilt).mean(0).tolist()
    return round(float(np.interp(wrong, spread, TEMPERATURES)), 3)


def _agreeing(operator: OperatorName, mean: Pixels, std: Pixels, y: Pixels) -> Pixels:
    """The mean brought into agreement with means of blocks, as the service gives it."""
    known = operator_of(operator)
    least = np.full((len(y), 1, 1, 1), LEAST_VARIANCE, np.float32)
    seen = known.seen(y)
    return projected(known, mean, np.square(std), seen, np.ones_like(seen), least)[0]


def _curve(parts: Parts, of: dict[float, Spoilt]) -> Curve:
    levels = sorted(of)
    factors = [factor_for(*_told(parts, of[level]), of[level].x.numpy()) for level in levels]
    return Curve(levels=levels, factors=factors)


def _told(parts: Parts, spoilt: Spoilt) -> tuple[Pixels, Pixels]:
    """Mean and standard deviation of each pixel."""
    restored, variance = _restored(parts, *spoilt[1:])
    return restored.clamp(0.0, 1.0).numpy(), variance.sqrt().numpy()


def factor_for(mean: Pixels, std: Pixels, x: Pixels) -> float:
    """The least of `FACTORS` with which the share `PROMISED` of the pixels is covered.

    Pixels whose deviation is at most `LEAST_STD` do not count where there are others: smooth areas, of which a set of
    photographs has many and another few, are covered too often.
    """
    uncertain = std > LEAST_STD
    if uncertain.sum() >= FEWEST:
        mean, std, x = mean[uncertain], std[uncertain], x[uncertain]
    error = np.abs(x - mean)

    def covered(factor: float) -> float:
        return float((error <= DEVIATIONS * widened(std, np.float32(factor))).mean())

    return least_factor(covered)
