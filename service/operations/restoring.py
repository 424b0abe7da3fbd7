"""What the operations that restore images share: options, and the way from a request to an observation."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from service.contract.calibration import calibrated
from service.contract.corruption import Observation, OperatorName, Rows
from service.contract.images import Fit
from service.errors import InvalidOption
from service.operations.inference.latent import Noise
from service.operations.inference.restoration import LEAST_LEVEL, MOST_LEVEL, Wish, level_rows, prior_mean, restore
from service.operations.inference.tiling import Tiling
from service.operations.inference.vae import Observe, Result, noted
from service.operations.operation import DrawOptions, Inputs, check_refinable
from service.runtime.model import Model
from service.runtime.program import Submit

NEEDS = ("recognition", "noise_level", "fusion", "correction")


class RestoreOptions(DrawOptions):
    """How well, and what else."""

    quality: Literal["fast", "refined"] = "fast"
    """`fast` is one pass through the recognition model of corrupted images; `refined` goes on from there by variational
    inference for each image, some hundred times as much work, which gives way to everybody else's."""
    uncertainty: bool = False
    """Whether the answer holds `std`, the posterior standard deviation of every pixel, such that the true pixel lies
    within 1.645 of them nine times in ten."""
    completions: bool = False
    """Whether the answer holds the images of all `draws`, (n, draws, c, h, w), beside their mean."""
    preview: bool = False
    """Whether events of progress hold `images` as they are thought to be so far; without effect on other answers."""

    @property
    def pictures(self) -> int:
        """What was seen and what of it, the mean, the deviation, the completions."""
        return 3 + self.uncertainty + (self.draws if self.completions else 0)


class TiledOptions(RestoreOptions):
    """Of what can be done tile by tile."""

    tiles = True
    fit: Fit | Literal["tile"] | None = None  # type: ignore[assignment]  # one more way than for other operations
    """Bring images of another size to the model's: `resize` stretches, `pad` adds black, `crop` cuts; `tile` restores a
    larger image as overlapping tiles of the model's size, and the answer has the image's size; only where the model is
    `tileable`."""


def observed(
    model: Model,
    inputs: Inputs,
    noise: str | None,
    level: float | Literal["auto"],
    operator: OperatorName | None = None,
) -> Observation:
    """The request's rows as what was seen of images.

    Raises: InvalidOption for a family of noise that the model does not know.
    """
    families = model.manifest.noise_families
    if noise is not None and noise not in families:
        raise InvalidOption(f"noise is {noise}, but model {model.manifest.name} knows {', '.join(families)} and none")
    family = None if noise is None else families.index(noise)
    mask = np.ones_like(inputs.rows) if inputs.mask is None else inputs.mask
    levels = np.zeros((len(inputs.rows), len(families)), np.float32)
    if family is not None and level != "auto":
        levels[:, family] = level
    known = family is None or level != "auto"
    return Observation(inputs.rows * mask, mask, levels, family, known, operator)


async def restored(model: Model, submit: Submit, inputs: Inputs, seen: Observation, options: RestoreOptions) -> Result:
    """E[x | y], as the options say.

    Raises: UnsupportedOperation where the model cannot refine; InvalidOption for completions without draws.
    """
    refined = options.quality == "refined"
    if refined:
        check_refinable(model, "refinement")
    if options.completions and not options.draws:
        raise InvalidOption("completions are draws of the posterior; say how many with draws")
    estimated = seen.estimated is not None
    if inputs.tiling is not None and not seen.known:
        seen = await _of_one_level(model, submit, seen, inputs.tiling)
    wish = Wish(refined, options.draws, options.uncertainty, options.completions, options.preview)
    noise, observe = Noise(options.seed, inputs.first), _of_whole_images(inputs.observe, inputs.tiling)
    result = await restore(model.plan, submit, model.latent_shape, seen, wish, noise, observe)
    if options.uncertainty:
        result.outputs["std"] = _calibrated(model, result.outputs["std"], seen, options.quality)
    sighted: NDArray[np.bool_] = np.any(seen.mask, axis=(1, 2, 3))
    if not sighted.all():
        result = await _without_sight(model, submit, result, np.flatnonzero(~sighted), inputs)
    if estimated:
        result = _with_clipped_level(result, sighted, inputs)
    return result if inputs.tiling is None else _joined(result, inputs.tiling)


def _calibrated(model: Model, std: Rows, seen: Observation, quality: str) -> Rows:
    """As the manifest has it, if it says anything."""
    calibration = model.manifest.calibration
    if calibration is None:
        return std
    return calibrated(std, seen, model.manifest.noise_families, calibration.factors.get(quality, {}))


async def _of_one_level(model: Model, submit: Submit, seen: Observation, tiling: Tiling) -> Observation:
    """The level of an image's noise is that of all its tiles: the median of what is estimated of them."""
    trip = await submit(model.plan("level", level_rows, 0, seen.estimated), seen.lifted())
    estimates = trip.arrays[0].reshape(tiling.images, tiling.tiles, -1)
    return seen._replace(level=np.repeat(np.median(estimates, 1), tiling.tiles, axis=0), known=True)


def _of_whole_images(observe: Observe | None, tiling: Tiling | None) -> Observe | None:
    """Tells of images what is found of their tiles."""
    if observe is None or tiling is None:
        return observe
    return lambda so_far: observe(_joined(so_far, tiling))


def _joined(result: Result, tiling: Tiling) -> Result:
    """Tiles to images; of what is said a tile, the mean."""
    outputs = {name: tiling.joined(array) for name, array in result.outputs.items()}
    about = {
        name: value.reshape(tiling.images, -1).mean(1) if isinstance(value, np.ndarray) else value
        for name, value in result.about.items()
    }
    return result._replace(outputs=outputs, about=about)


async def _without_sight(model: Model, submit: Submit, result: Result, unseen: NDArray[Any], inputs: Inputs) -> Result:
    """The prior's mean where nothing was seen, which is said."""
    mean, std = await prior_mean(model.plan, submit, model.noise_shape)
    for name, known in (("images", mean), ("std", std)):
        if name in result.outputs:
            result.outputs[name][unseen] = known
    what = "of a tile of the image" if inputs.tiling else "of the image"
    detail = f"the mask hides all {what}, so the answer there is the mean of the prior"
    return noted(result, "nothing_seen", _places(unseen, inputs), detail)


def _with_clipped_level(result: Result, sighted: NDArray[np.bool_], inputs: Inputs) -> Result:
    """Says so where an estimated level is at a bound."""
    level = result.about["level"]
    clipped = np.flatnonzero(sighted & ((level <= LEAST_LEVEL) | (level >= MOST_LEVEL)))
    if not len(clipped):
        return result
    detail = (
        "the noise level estimated for the image lies outside (0, 1] and was clipped; check the scale of the image and "
        "the kind of its noise, or name the level"
    )
    return noted(result, "level_clipped", _places(clipped, inputs), detail)


def _places(rows: NDArray[Any], inputs: Inputs) -> NDArray[Any]:
    """Rows, or the images whose tiles they are, as places in the request."""
    tiles = inputs.tiling.tiles if inputs.tiling else 1
    found: NDArray[Any] = inputs.first + np.unique(rows // tiles)
    return found
