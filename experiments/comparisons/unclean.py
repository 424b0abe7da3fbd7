"""Models of images that were never clean, measured in torch on images whose clean version is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from experiments.comparisons.noise2void import trained as noise2void
from training.config import NoisyRun, load_as
from training.distributions.likelihoods.noise import Camera
from training.distributions.poisson_gaussian import PoissonGaussian, estimated
from training.errors import DataError
from training.loop.noisy_stages import STAGES, NoisyParts, trained_noisy

Restored = Callable[[Tensor, PoissonGaussian], Tensor]
"""Noisy image (1, 1, h, w) and its noise -> restored image."""


class Pair(NamedTuple):
    """A noisy image and the clean one that it is scored with, (1, 1, h, w) each."""

    name: str
    noisy: Tensor
    clean: Tensor


class UncleanOptions(NamedTuple):
    """What is measured.

    Attributes:
        config: TOML of the trained run.
        data: Its noisy images.
        clean: `micrographs/` of W2S, or a folder of grey photographs.
        run: Folder of its checkpoints; None is runs/<name>.
        sigma: Noise added to photographs, where white is 255; None takes W2S.
        every: Take every so many images.
        noise2void_epochs: Epochs of Noise2Void, trained on the same noisy images; None leaves it out.
    """

    config: Path
    data: Path
    clean: Path
    run: Path | None = None
    sigma: float | None = None
    every: int = 1
    noise2void_epochs: int | None = None

    @classmethod
    def of(cls, options: Any) -> UncleanOptions:
        """Those of a command line."""
        return cls(**{name: getattr(options, name) for name in cls._fields})


def unclean(options: UncleanOptions) -> dict[str, float]:
    """Mean decibels of each way in which a trained model restores, and of Noise2Void.

    Raises:
        TrainingError: The run is not trained, or Noise2Void's training fails.
    """
    run = load_as(NoisyRun, options.config)
    folder = options.run or Path("runs") / run.name
    parts = NoisyParts(*(trained_noisy(run, stage, folder, torch.device("cpu")) for stage in STAGES))
    every = methods(run, parts)
    if options.noise2void_epochs is not None:
        images = run.data.load(options.data, run.model.likelihood.known())
        network = noise2void(images, folder / "noise2void", options.noise2void_epochs)
        every["Noise2Void"] = lambda y, _noise: network(y)
    if options.sigma is None:
        pairs = list(w2s_pairs(options.clean))[:: options.every]
        return measured(pairs, every, run.multiple_of, run.model.likelihood.known(), affine=True)
    pairs = list(photograph_pairs(options.clean, options.sigma))[:: options.every]
    return measured(pairs, every, run.multiple_of, run.model.likelihood.known(), affine=False)


def noisy_copies(source: Path, target: Path, sigma: float, seed: int = 0) -> int:
    """Write each photograph below a folder in grey with one fixed draw of Gaussian noise, as TIFF in floating point.

    Args:
        source: Folder of clean photographs.
        target: Folder that the noisy ones are written into.
        sigma: Standard deviation of the noise; white is 255.
        seed: Seed of the noise.

    Returns:
        Their number.

    Raises:
        DataError: There is no photograph.
    """
    paths = sorted(path for path in source.rglob("*") if path.suffix in (".webp", ".png", ".jpg"))
    if not paths:
        raise DataError(f"{source} holds no photographs")
    target.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(paths):
        rng = np.random.default_rng((seed, number))
        grey = np.asarray(Image.open(path).convert("L"), np.float32) / np.float32(255.0)
        noisy = grey + np.float32(sigma / 255.0) * rng.standard_normal(grey.shape, np.float32)
        Image.fromarray(noisy).save(target / f"{number:04}.tif")
    return len(paths)


def w2s_pairs(micrographs: Path) -> Iterator[Pair]:
    """The test frames of W2S with the means of 400 frames."""
    for path in sorted((micrographs / "w2s" / "test" / "noisy").glob("*.png")):
        yield Pair(path.stem, _read(path), _read(path.parents[1] / "target" / path.name))


def photograph_pairs(folder: Path, sigma: float, seed: int = 0) -> Iterator[Pair]:
    """Grey photographs with Gaussian noise that is seeded by image and not cut off; white of `sigma` is 255."""
    for number, path in enumerate(sorted(folder.glob("*.png"))):
        x = _read(path)
        noise = np.random.default_rng((seed, 7, number)).standard_normal(x.shape, np.float32)
        yield Pair(path.stem, x + sigma / 255.0 * torch.from_numpy(noise), x)


def _read(path: Path) -> Tensor:
    levels: NDArray[np.float32] = np.asarray(Image.open(path).convert("L"), np.float32)
    return torch.from_numpy(levels / np.float32(255.0))[None, None]


def psnr(found: Tensor, clean: Tensor, *, affine: bool) -> float:
    """Decibels; `affine`: after the scale and shift of `found` that fit best, for frames stretched to 8 bits each."""
    found, clean = found.double(), clean.double()
    if affine:
        centred = found - found.mean()
        slope = (centred * (clean - clean.mean())).sum() / centred.square().sum().clamp(min=1e-12)
        found = slope * centred + clean.mean()
    else:
        found = found.clamp(0.0, 1.0)
    return -10.0 * math.log10(float((found - clean).square().mean()))


def methods(run: NoisyRun, parts: NoisyParts, draws: tuple[int, ...] = (1, 16)) -> dict[str, Restored]:
    """The ways in which a model restores: its mean, the mean network, the VAE at the means of q, and means of draws."""

    def mean(y: Tensor, noise: PoissonGaussian) -> Tensor:
        seen = parts.trunk.seen(y, torch.ones_like(y), noise)
        return parts.vae.restored(y, torch.ones_like(y), noise, seen)[0]

    def alone(y: Tensor, noise: PoissonGaussian) -> Tensor:
        return parts.trunk.restored(y, torch.ones_like(y), noise)[0]

    def of_draws(number: int) -> Restored:
        def restored(y: Tensor, noise: PoissonGaussian) -> Tensor:
            seen = parts.trunk.seen(y, torch.ones_like(y), noise)
            posterior = parts.vae.vae.posterior(parts.vae.encoded(noise.stabilised(y), seen.features))
            step = 2 ** len(run.model.network.channels)
            shape = (1, parts.vae.vae.latent_shape[0], *(side // step for side in y.shape[2:]))
            generator, total = torch.Generator().manual_seed(0), torch.zeros_like(y)
            for _ in range(max(1, number)):
                eps = torch.randn(1, *shape, generator=generator) if number else torch.zeros(1, *shape)
                parameters = parts.vae.vae.infer(posterior, eps).parameters[0]
                total += noise.unbiased(parts.vae.likelihood.mean(parameters))
            return total / max(1, number)

        return restored

    named = {f"mean of {number} draws" if number > 1 else "one draw": of_draws(number) for number in draws}
    return {"mean": mean, "mean network alone": alone, "VAE at the means of q": of_draws(0), **named}


@torch.no_grad()
def measured(
    pairs: list[Pair], every: dict[str, Restored], multiple_of: int, known: Camera | None, *, affine: bool
) -> dict[str, float]:
    """Mean decibels of each method.

    Args:
        pairs: The images.
        every: The methods by name.
        multiple_of: What divides height and width; images are padded by reflection.
        known: The noise; None finds it in each image.
        affine: As `psnr` has it.
    """
    found: dict[str, list[float]] = {"noisy": [], **{name: [] for name in every}}
    for _, y, x in tqdm(pairs, unit="image", leave=False):
        height, width = y.shape[2:]
        padded = functional.pad(y, (0, -width % multiple_of, 0, -height % multiple_of), mode="reflect")
        noise = estimated(y, torch.ones_like(y)) if known is None else _of(known)
        found["noisy"].append(psnr(y, x, affine=affine))
        for name, restored in every.items():
            found[name].append(psnr(restored(padded, noise)[..., :height, :width], x, affine=affine))
    return {name: round(float(np.mean(values)), 3) for name, values in found.items()}


def _of(known: Camera) -> PoissonGaussian:
    return PoissonGaussian(*(torch.full((1, 1, 1, 1), value) for value in (known.gain, known.offset)))
