"""Restoration: the common options of denoise, inpaint and super-resolve, and the steps from observation to answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from service.contract.calibration import calibrated
from service.contract.corruption import Observation, OperatorName, Rows
from service.contract.graphs import GRAPHS
from service.contract.images import FIT_ADVICE, Fit
from service.errors import InvalidOption, TooLarge
from service.operations.abilities import Need
from service.operations.inference.latent import Noise
from service.operations.inference.refinement import STEPS
from service.operations.inference.restoration import (
    LEAST_LEVEL,
    MOST_LEVEL,
    RestoreChoices,
    level_rows,
    prior_mean,
    restore,
)
from service.operations.inference.tiling import Tiling
from service.operations.inference.vae import Observe, Result, noted
from service.operations.operation import MEANS, PIXELS, REFINED, SEED, Asked, DrawOptions, Inputs, Tensor
from service.runtime.model import NOISE, PRIOR, Model
from service.runtime.program import Submit

NEEDS = GRAPHS["recognition"].needs
OUTPUTS = (
    replace(MEANS, meaning="Restored images, E[x | y]"),
    Tensor("std", ("n", *PIXELS), "Posterior standard deviation, with `uncertainty`", required=False),
    Tensor("std_scale", (), "Standard deviation at the top of the heat map, with `uncertainty=map`", required=False),
    Tensor("completions", ("n", "draws", *PIXELS), "Draws of restored images, with `completions`", required=False),
    Tensor("level", ("n",), "Level of the noise, as given or estimated; absent without noise", required=False),
    Tensor("elbo", ("n",), "Lower bound on log p(y), in nats, with `quality=refined`", required=False),
    replace(SEED, required=False),
)
TOP_PERCENTILE, SCALE_DIGITS = 99, 6
"""The percentile of `std` that a heat map shows as its last colour, and the digits of that number."""
MOST_THROUGH = 1024
"""Largest height and width of an image seen through an operator, which is two matrices of such sides."""
WARM_UP: tuple[dict[str, Any], ...] = ({}, {"quality": "refined"})


class RestoreOptions(DrawOptions):
    """Options of all restoration: accuracy, and further outputs."""

    quality: Literal["fast", "refined"] = "fast"
    """`fast` is one pass through the recognition model. `refined` continues from there by variational inference for
    each image: about 100 times as much work, at low priority."""
    uncertainty: bool | Literal["map"] = False
    """Whether the answer holds `std`, the posterior standard deviation of each pixel. It is calibrated: 90% of the true
    pixels lie within 1.645 `std`. With `map`, an answer in PNG is a heat map of it."""
    completions: bool = False
    """Whether the answer holds the images of all `draws`, (n, draws, c, h, w), besides their mean."""
    preview: bool = False
    """Whether progress events hold the `images` as estimated so far. Other answers ignore it."""

    @property
    def images_alone(self) -> bool:
        """Whether the answer has no other arrays than images."""
        return not (self.uncertainty or self.completions)

    @property
    def needs(self) -> Mapping[Need, Asked]:
        """What refinement and the kind of noise need of a model."""
        found: dict[Need, Asked] = {"refinement": REFINED} if self.quality == "refined" else {}
        if self.noise_family is not None:
            noise = f"{self.noise_family} {NOISE}"
            found[noise] = Asked(noise)
        return found

    @property
    def noise_family(self) -> str | None:
        """The family of noise that the options name; None where they name none."""
        return None

    def memory_numbers(self, image: int, latent: int) -> int:
        """Numbers in memory while one row of the request is answered; see `Options.memory_numbers`."""
        images = 3 + bool(self.uncertainty) + (self.draws if self.completions else 0)  # 3: observation, mask, mean
        noise = STEPS * latent if self.quality == "refined" else 0
        return images * image + self.draws * latent + noise


class TiledOptions(RestoreOptions):
    """Options of restoration that also works tile by tile."""

    tiles = True
    fit: Literal[Fit, "tile"] | None = None  # type: ignore[assignment]  # `tile` beside the base class's values
    """Bring images of another size to the model's: `resize` stretches, `pad` adds black, `crop` cuts. `tile` restores a
    larger image as overlapping tiles of the model's size, and the answer has the image's size; the model must be
    `tileable`."""

    def check(self, model: Model) -> None:
        """Refuse tiles for a model that is not tileable.

        Raises:
            InvalidOption: The message names what works.
        """
        if self.fit == "tile" and not model.manifest.tileable:
            _, height, width = model.input_shape
            raise InvalidOption(
                f"fit is tile, but model {model.manifest.name} is not tileable: it knows whole images, not parts of "
                f"larger ones; {FIT_ADVICE} brings images to its {height} x {width}"
            )


def observed(
    model: Model,
    inputs: Inputs,
    noise: str | None,
    level: float | Literal["auto"],
    operator: OperatorName | None = None,
) -> Observation:
    """Make the observation of a request.

    Args:
        model: The model.
        inputs: Observed images and their mask, (n, c, h, w) each.
        noise: Family of the noise, of those that the model was trained on; None without noise.
        level: Level of the noise, or `auto` to estimate it.
        operator: Blur or shrinking of the images before the noise.

    Returns:
        The observation, with missing pixels set to 0. Without a mask it holds the images themselves, and a mask of one
        number.

    Raises:
        TooLarge: The image behind an operator is too large.
    """
    if operator is not None and max(operator[2:]) > MOST_THROUGH:
        height, width = operator[2:]
        raise TooLarge(
            f"blur and super-resolution look at whole images of at most {MOST_THROUGH} x {MOST_THROUGH}, not "
            f"{height} x {width}; send parts of the image"
        )
    families = model.manifest.noise_families
    family = None if noise is None else families.index(noise)
    if inputs.mask is None:
        y, mask = inputs.rows, np.broadcast_to(np.float32(1.0), inputs.rows.shape)
    else:  # levels stay integers
        y, mask = np.multiply(inputs.rows, inputs.mask, dtype=inputs.rows.dtype, casting="unsafe"), inputs.mask
    levels = np.zeros((len(inputs.rows), len(families)), np.float32)
    if family is not None and level != "auto":
        levels[:, family] = level
    known = family is None or level != "auto"
    return Observation(y, mask, levels, family, known, operator)


async def restored(model: Model, submit: Submit, inputs: Inputs, seen: Observation, options: RestoreOptions) -> Result:
    """Restore an observation: E[x | y], with the further outputs that the options name.

    Args:
        model: The model.
        submit: Runs a program in the batcher.
        inputs: The inputs of the request.
        seen: Their observation.
        options: Accuracy and outputs.

    Returns:
        The outputs that `OUTPUTS` declares, of whole images.

    Raises:
        InvalidOption: `completions` is set without `draws`.
    """
    if options.completions and not options.draws:
        raise InvalidOption("completions are draws of the posterior; say how many with draws")
    estimated = seen.estimated is not None
    if not seen.known and (inputs.tiling is not None or model.manifest.size is not None):
        seen = await _of_one_level(model, submit, seen, inputs.tiling)
    refined = options.quality == "refined"
    choices = RestoreChoices(refined, options.draws, bool(options.uncertainty), options.completions, options.preview)
    noise, observe = Noise(options.seed, inputs.first), _of_whole_images(inputs.observe, inputs.tiling)
    result = await restore(model, submit, seen, choices, noise, observe)
    if options.uncertainty:
        result.outputs["std"] = _calibrated(model, result.outputs["std"], seen, options.quality)
    whole = inputs.mask is None
    sighted = np.ones(len(inputs.rows), bool) if whole else np.any(seen.mask, axis=(1, 2, 3))
    if not sighted.all():
        result = await _without_sight(model, submit, result, np.flatnonzero(~sighted), inputs)
    if estimated:
        result = _with_clipped_level(result, sighted, inputs)
    result = result if inputs.tiling is None else _joined(result, inputs.tiling)
    return _with_scale(result) if options.uncertainty == "map" else result


def _with_scale(result: Result) -> Result:
    """Add the standard deviation that a heat map shows as its last colour: one for all rows, so that they compare."""
    top = np.percentile(np.sqrt(np.square(result.outputs["std"]).mean(1)), TOP_PERCENTILE)
    return result._replace(about={**result.about, "std_scale": round(float(top), SCALE_DIGITS)})


def _calibrated(model: Model, std: Rows, seen: Observation, quality: str) -> Rows:
    """Scale standard deviations by the manifest's calibration, if it has one."""
    calibration = model.manifest.calibration
    if calibration is None:
        return std
    return calibrated(std, seen, model.manifest.noise_families, calibration.factors.get(quality, {}))


async def _of_one_level(model: Model, submit: Submit, seen: Observation, tiling: Tiling | None) -> Observation:
    """Set one noise level for each image: its estimate, or the median of the estimates of its tiles."""
    trip = await submit(model.plan("level", level_rows, 0, seen.estimated), seen.lifted())
    level = trip.arrays[0]
    if tiling is not None:
        level = np.repeat(np.median(level.reshape(tiling.images, tiling.tiles, -1), 1), tiling.tiles, axis=0)
    return seen._replace(level=level, known=True)


def _of_whole_images(observe: Observe | None, tiling: Tiling | None) -> Observe | None:
    """Make an observer of tiles from one of whole images."""
    if observe is None or tiling is None:
        return observe
    return lambda so_far: observe(_joined(so_far, tiling))


def _joined(result: Result, tiling: Tiling) -> Result:
    """Join results of tiles to results of images. Figures are means over the tiles."""
    outputs = {name: tiling.joined(array) for name, array in result.outputs.items()}
    about = {
        name: value.reshape(tiling.images, -1).mean(1) if isinstance(value, np.ndarray) else value
        for name, value in result.about.items()
    }
    return result._replace(outputs=outputs, about=about)


async def _without_sight(model: Model, submit: Submit, result: Result, unseen: NDArray[Any], inputs: Inputs) -> Result:
    """Add a note about rows whose mask hides all pixels, and put the prior's mean into them.

    A model without a prior, or of images of any size, answers as its restoration does where nothing is seen.
    """
    what = "of a tile of the image" if inputs.tiling else "of the image"
    answer = "what the model gives without any observation"
    if PRIOR in model.abilities and model.manifest.size is None:
        mean, std = await prior_mean(model, submit)
        for name, known in (("images", mean), ("std", std)):
            if name in result.outputs:
                result.outputs[name][unseen] = known
        answer = "the mean of the prior"
    detail = f"the mask hides all {what}, so the answer there is {answer}"
    return noted(result, "nothing_seen", _places(unseen, inputs), detail)


def _with_clipped_level(result: Result, sighted: NDArray[np.bool_], inputs: Inputs) -> Result:
    """Add a note about estimated levels that are at a bound."""
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
    """Indices of rows in the request; for tiles, indices of their images."""
    tiles = inputs.tiling.tiles if inputs.tiling else 1
    found: NDArray[Any] = inputs.first + np.unique(rows // tiles)
    return found
