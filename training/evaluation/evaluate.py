"""Evaluation of a trained model: bounds on log p(x) in nats per image, and PSNR in dB after restoration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from service.contract.manifest import digest
from training.data import as_float, binarise
from training.distributions.interface import Support
from training.distributions.noise import NOISE, corrupt
from training.errors import CheckpointError
from training.loop.checkpoint import read_checkpoint, write_checkpoint
from training.loop.precision import Precision, autocast
from training.loop.randomness import keyed_generator
from training.models.restoration import Corrupted, Recognition
from training.models.vae import VAE
from training.objectives.elbo import importance_log_likelihood
from training.progress import tell, warn

BLOCK = 100
"""Images scored between two updates of the partial result."""
DECODES = {"cpu": 200, "cuda": 20_000}
"""Rows decoded at once: on a CPU a layer's output fits the cache, on a GPU it uses all multiprocessors."""
RESTORED = 200
"""Test images that are corrupted and restored."""


class Share(NamedTuple):
    """One of several equal parts of an evaluation, counted from 1; 1 of 1 is all of it."""

    number: int = 1
    of: int = 1


ALL = Share()


@torch.inference_mode()
def likelihood(
    model: VAE,
    images: Tensor,
    draws: int,
    seed: int,
    partial: Path,
    dynamic: bool,
    *,
    precision: Precision = "float32",
    share: Share = ALL,
) -> dict[str, float | int | str]:
    """Estimate test ELBO and importance-sampled log p(x) in nats per image, with standard errors over images.

    Under Bernoulli pixels a grey level has no probability, so grey images get the ELBO alone. The noise of a block of
    images is a function of the seed and the block, so the figures do not depend on how the work was shared.

    Args:
        model: The VAE.
        images: uint8 (n, c, h, w).
        draws: Importance samples an image.
        seed: Seed of binarisation and draws.
        partial: File of the finished blocks. A share has its own file beside it. An evaluation goes on from the blocks
            in all of these files.
        dynamic: Whether to binarise the images by `seed`; otherwise they stay as they are.
        precision: Of the networks, as in training. The estimate is then of the model with such networks.
        share: The part of the images to score.

    Returns:
        Figures of the share's images by name, as in the manifest's `quality`.
    """
    identity = {
        "draws": draws,
        "seed": seed,
        "dynamic": dynamic,
        "precision": precision,
        "images": digest(images.cpu().numpy().tobytes()),
        "weights": _fingerprint(model),
    }
    files = [partial, *partial.parent.glob(f"{partial.stem}-*-of-*{partial.suffix}")]
    path = partial if share.of == 1 else partial.with_stem(f"{partial.stem}-{share.number}-of-{share.of}")
    blocks = images.split(BLOCK)
    mine = range(share.number - 1, len(blocks), share.of)
    scores = {index: score for index, score in _resume(files, identity).items() if index in mine}
    count = sum(len(blocks[index]) for index in mine)
    done = sum(len(blocks[index]) for index in mine if index in scores)
    with tqdm(total=count, initial=done, desc="evaluating", unit="image") as progress:
        for index in (index for index in mine if index not in scores):
            generator = keyed_generator(images.device, seed, 2, index)
            with autocast(precision, images.device):
                scores[index] = _score(model, blocks[index], draws, generator, dynamic).cpu()
            write_checkpoint(path, {"identity": identity, "blocks": scores})
            progress.update(len(blocks[index]))
    kind = "dynamic" if dynamic else "none (grey levels)" if is_grey(images) else "static"
    summary = _summary(torch.cat([scores[index] for index in mine], 1), draws, seed, kind)
    if precision != "float32":
        summary["precision"] = precision
    if model.likelihood.support is Support.EIGHT_BIT:
        pixels = images[0].numel()
        summary["test_elbo_bits_per_dim"] = bits_per_dim(-float(summary["test_elbo_nats"]), pixels)
        summary["test_nll_bits_per_dim"] = bits_per_dim(float(summary["test_nll_nats"]), pixels)
    return summary


def _score(model: VAE, images: Tensor, draws: int, generator: torch.Generator, dynamic: bool) -> Tensor:
    """Score images in nats: the ELBO with one draw, and the importance-weighted bound with `draws` draws.

    Returns:
        Both bounds, (2, n). The second is nan for grey images under Bernoulli pixels.
    """
    x = binarise(images, generator) if dynamic else as_float(images)
    bound = model.bound(x, model.noise(1, len(x), generator)).elbo
    if model.likelihood.support is Support.BINARY and is_grey(images) and not dynamic:
        return torch.stack([bound, torch.full_like(bound, math.nan)])
    most = DECODES[x.device.type]
    rows = max(1, most // draws)
    scores = [
        torch.stack(
            [
                importance_log_likelihood(model, part, model.noise(k, len(part), generator)) + math.log(k)
                for k in _chunks(draws, most)
            ]
        )
        for part in x.split(rows)
    ]
    return torch.stack([bound, torch.cat([torch.logsumexp(s, 0) for s in scores]) - math.log(draws)])


def is_grey(images: Tensor) -> bool:
    """Whether uint8 images have values between 0 (black) and 255 (white)."""
    return bool(((images > 0) & (images < 255)).any())


def _chunks(draws: int, most: int) -> Iterator[int]:
    for start in range(0, draws, most):
        yield min(most, draws - start)


def _summary(columns: Tensor, draws: int, seed: int, binarisation: str) -> dict[str, float | int | str]:
    n = columns.shape[1]
    means = columns.double().mean(1).tolist()
    summary: dict[str, float | int | str] = {
        "images": n,
        "seed": seed,
        "binarisation": binarisation,
        "test_elbo_nats": round(means[0], 3),
    }
    weighted = math.isfinite(means[1])
    if weighted:
        summary |= {"test_nll_nats": round(-means[1], 3), "importance_samples": draws}
    if n > 1:
        errors = (columns.double().std(1) / math.sqrt(n)).tolist()
        summary["test_elbo_standard_error_nats"] = round(errors[0], 3)
        if weighted:
            summary["test_nll_standard_error_nats"] = round(errors[1], 3)
    return summary


def bits_per_dim(nats: float, dimensions: int) -> float:
    """Convert the negative log probability of an 8-bit image to bits per dimension.

    Args:
        nats: Negative log probability of an image, in nats.
        dimensions: Number of pixels times channels.

    Returns:
        Bits per pixel and channel.
    """
    return round(nats / (dimensions * math.log(2.0)), 4)


def _resume(paths: Iterable[Path], identity: dict[str, Any]) -> dict[int, Tensor]:
    """The finished blocks by index, from all files of the same evaluation."""
    found: dict[int, Tensor] = {}
    for path in paths:
        with suppress(CheckpointError):
            found |= read_checkpoint(path, identity, torch.device("cpu"))["blocks"]
    return found


def _fingerprint(model: VAE) -> float:
    return float(sum(p.double().abs().sum() for p in model.parameters()))


@torch.inference_mode()
def restoration(
    vae: VAE, recognition: Recognition, images: Tensor, seed: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Measure restoration of seeded test images by noise family and level.

    Args:
        vae: The VAE.
        recognition: The recognition model of corrupted images.
        images: uint8 (n, c, h, w), of which at most 200 are used.
        seed: Seed of the choice and of the noise.

    Returns:
        By family and level, with data range 1: `noisy_db`, the mean PSNR of the noisy image clipped to [0, 1];
        `restored_db`, after restoration at the known level; `auto_db`, at the estimated level; `worse`, the share of
        images whose error grew; `level_error`, the mean of |log(estimate / level)|; of the restored images' PSNR also
        the standard error over the images.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:RESTORED]
    x = as_float(images[order.to(images.device)])
    table: dict[str, dict[str, dict[str, float]]] = {}
    for column, noise in enumerate(NOISE):
        for value in noise.checked:
            level = torch.zeros(len(x), len(NOISE), device=x.device)
            level[:, column] = value
            y = corrupt(x, level, keyed_generator(x.device, seed, 3, column))
            mask = torch.ones_like(x)
            estimate = torch.zeros_like(level)
            estimate[:, column] = recognition.log_level(y, mask).mean[:, column].exp()
            known, _ = recognition.restored(vae, Corrupted(y, mask, level))
            unknown, _ = recognition.restored(vae, Corrupted(y, mask, estimate))
            error = float((estimate[:, column] / value).log().abs().mean())
            table.setdefault(noise.name, {})[str(value)] = {
                **decibels(x, y, known, unknown),
                "level_error": round(error, 3),
            }
    return table


def report(table: dict[str, dict[str, dict[str, float]]]) -> None:
    """Write the result of `restoration` to standard error by family, with warnings where it improves nothing.

    Args:
        table: The result of `restoration`.
    """
    for family, rows in table.items():
        gain = mean(row["auto_db"] - row["noisy_db"] for row in rows.values())
        error = mean(row["level_error"] for row in rows.values())
        logs = [math.log(float(level)) for level in rows]
        guess = mean(abs(value - median(logs)) for value in logs)
        told = f"restoring {family}: {gain:+.1f} dB; level off by a factor of {math.exp(error):.2f} on average"
        tell(f"{told} ({math.exp(guess):.2f} for the best constant)")
        if gain <= 0.0:
            warn(f"restoring {family} noise does not raise PSNR; raise --restoration-epochs or take more images")
        if error >= guess:
            warn(f"the level of {family} noise is estimated no better than by a constant; raise --restoration-epochs")


def decibels(x: Tensor, y: Tensor, known: Tensor, unknown: Tensor) -> dict[str, float]:
    """PSNR of images before and after restoration, at a known and at an estimated level, as `restoration` has it."""

    def psnr(image: Tensor) -> Tensor:
        return -10.0 * (image - x).square().flatten(1).mean(1).clamp(min=1e-12).log10()

    before, after = psnr(y.clamp(0.0, 1.0)), psnr(known)
    figures = {
        "noisy_db": before.mean(),
        "restored_db": after.mean(),
        "auto_db": psnr(unknown).mean(),
        "worse": (after < before).float().mean(),
    }
    if len(x) > 1:
        figures["restored_standard_error_db"] = after.std() / math.sqrt(len(x))
        figures["auto_standard_error_db"] = psnr(unknown).std() / math.sqrt(len(x))
    return {name: round(float(value), 3) for name, value in figures.items()}
