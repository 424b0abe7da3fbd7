"""Restoration: the common options of denoise, inpaint and super-resolve, and the steps from observation to answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from service.contract.calibration import calibrated
from service.contract.corruption import Observation, OperatorName, Rows, blocks_of
from service.contract.images import FIT_ADVICE, Fit
from service.errors import InvalidOption, TooLarge
from service.operations.abilities import REFINING, RESTORING, Need
from service.operations.inference import conditional
from service.operations.inference.latent import Noise
from service.operations.inference.levels import LEAST_LEVEL, MOST_LEVEL, of_one_level
from service.operations.inference.refinement import STEPS
from service.operations.inference.restoration import RestoreChoices, prior_mean, restore
from service.operations.inference.tiling import Tiling
from service.operations.inference.vae import Observe, Result, noted
from service.operations.operation import MEANS, PIXELS, REFINED, SEED, Asked, DrawOptions, Inputs, Tensor
from service.runtime.model import NOISE, PRIOR, Model
from service.runtime.program import Submit, Trip

NEEDS = (RESTORING,)
OUTPUTS = (
    replace(MEANS, meaning="Restored images, E[x | y]"),
    Tensor("std", ("n", *PIXELS), "Posterior standard deviation, with `uncertainty`", required=False),
    Tensor("std_scale", (), "Standard deviation at the top of the heat map, with `uncertainty=map`", required=False),
    Tensor("completions", ("n", "draws", *PIXELS), "Draws of restored images, with `completions`", required=False),
    Tensor("level", ("n",), "Level of the noise, as given or estimated; absent without noise", required=False),
    Tensor("noise", ("n",), "Kind of the noise, with `noise=auto`: of several the loudest", "string", required=False),
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
    """`fast` is one pass through the networks. `refined` takes up to 100 times as long, at low priority: variational
    inference for each image or, of a conditional model, the mean over 8 flips and rotations; with a mask, a blur or a
    factor, 10 to 24 steps of plug-and-play splitting."""
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
        found: dict[Need, Asked] = {REFINING: REFINED} if self.quality == "refined" else {}
        if self.noise_family is not None:
            noise = f"{self.noise_family} {NOISE}"
            found[noise] = Asked(noise)
        return found

    @property
    def noise_family(self) -> str | None:
        """The family of noise that the options name; None where they name none."""
        return None

    def memory_numbers(self, model: Model, image: int, latent: int) -> int:
        """Numbers in memory while one row of the request is answered; see `Options.memory_numbers`."""
        images = 3 + bool(self.uncertainty) + (self.draws if self.completions else 0)  # 3: observation, mask, mean
        noise = STEPS * latent if self.quality == "refined" and "refinement" in model.graphs else 0
        return images * image + self.draws * latent + noise

    def memory_levels(self, model: Model, image: int) -> int:  # noqa: ARG002  # the base class's signature
        """The answer; refinement holds a few images as floats."""
        return image * (8 if self.quality == "refined" else 1)


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
        noise: Family of the noise; None without noise; `auto` for all families together.
        level: Level of the noise, or `auto` to estimate it.
        operator: Blur or shrinking of the images before the noise.

    Returns:
        The observation, with missing pixels set to 0. Without a mask it holds the images themselves, and a mask of one
        number.

    Raises:
        InvalidOption: The model was not trained on this family of noise, or cannot estimate it.
        TooLarge: The image behind an operator is too large.
    """
    local = "restoration" in model.graphs and operator is not None and operator[0] == "shrink"
    if operator is not None and not local and max(operator[2:]) > MOST_THROUGH:
        height, width = operator[2:]
        raise TooLarge(
            f"blur and super-resolution look at whole images of at most {MOST_THROUGH} x {MOST_THROUGH}, not "
            f"{height} x {width}; send parts of the image"
        )
    families = model.manifest.noise_families
    _check_noise(model, noise, level)
    family = None if noise in (None, "auto") else families.index(noise)
    if inputs.mask is None:
        one: Any = np.float32(1.0) if inputs.rows.dtype.kind == "f" else np.True_
        y, mask = inputs.rows, np.broadcast_to(one, inputs.rows.shape)
    else:  # levels stay integers, their masks booleans
        y, mask = np.multiply(inputs.rows, inputs.mask, dtype=inputs.rows.dtype, casting="unsafe"), inputs.mask
    levels = np.zeros((len(inputs.rows), len(families)), np.float32)
    if family is not None and level != "auto":
        levels[:, family] = level
    return Observation(y, mask, levels, family, noise is None or level != "auto", operator)


def default_noise(model: Model, level: float | Literal["auto"]) -> str:
    """The kind of noise of a request that names none."""
    return "auto" if "noise" in model.graphs and level == "auto" else "gaussian"


def _check_noise(model: Model, noise: str | None, level: float | Literal["auto"]) -> None:
    """Refuse noise that the model does not know, or cannot estimate.

    Raises:
        InvalidOption: The message names what works.
    """
    name, families = model.manifest.name, model.manifest.noise_families
    if noise == "auto":
        if "noise" not in model.graphs:
            raise InvalidOption(
                f"noise is auto, but model {name} does not tell kinds of noise apart; name one of {', '.join(families)}"
            )
        if level != "auto":
            raise InvalidOption(
                f"level is {level:g}, but noise is auto: a level is that of one kind of noise; name the kind with "
                f"noise ({', '.join(families)}), or leave level out"
            )
    elif noise is not None and noise not in families:
        raise InvalidOption(f"noise is {noise}, but model {name} knows {', '.join(families)} and none")
    elif noise is not None and level == "auto" and "noise_level" not in model.graphs:
        other = ", or leave noise and level out" if "noise" in model.graphs else ""
        raise InvalidOption(f"model {name} does not estimate the level of {noise} noise alone; name level{other}")


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
    _check_draws(model, seen, options)
    _check_prior(model, inputs, seen, options)
    every, estimated = seen.family is None and not seen.known, seen.estimated is not None
    one = every or inputs.tiling is not None or model.manifest.size is not None or "restoration" in model.graphs
    before = Trip((), 0.0, 0.0)
    if not seen.known and one:
        seen, before = await of_one_level(model, submit, seen, inputs.tiling)
    result = await _answered(model, submit, inputs, seen, options)
    if options.uncertainty:
        result.outputs["std"] = _calibrated(model, result.outputs["std"], seen, options.quality)
    whole = inputs.mask is None
    sighted = np.ones(len(inputs.rows), bool) if whole else np.any(seen.mask, axis=(1, 2, 3))
    if not sighted.all():
        result = await _without_sight(model, submit, result, np.flatnonzero(~sighted), inputs)
    if every:
        result = _with_kinds(model, result, seen)
    if estimated or every:
        result = _with_clipped_level(result, sighted, inputs)
    result = result._replace(trip=result.trip.after(before))
    result = result if inputs.tiling is None else _joined(result, inputs.tiling)
    return _with_scale(result) if options.uncertainty == "map" else result


def _with_scale(result: Result) -> Result:
    """Add the standard deviation that a heat map shows as its last colour: one for all rows, so that they compare."""
    top = np.percentile(np.sqrt(np.square(result.outputs["std"]).mean(1)), TOP_PERCENTILE)
    return result._replace(about={**result.about, "std_scale": round(float(top), SCALE_DIGITS)})


def _check_draws(model: Model, seen: Observation, options: RestoreOptions) -> None:
    """Refuse draws that the model cannot make.

    Raises:
        InvalidOption: The message names what works.
    """
    if options.completions and not options.draws:
        raise InvalidOption("completions are draws of the posterior; say how many with draws")
    if not options.draws or "restoration" not in model.graphs:
        return
    name = model.manifest.name
    if "completion" not in model.graphs:
        raise InvalidOption(f"draws is {options.draws}, but model {name} gives the mean alone; leave draws out")
    if options.quality == "refined":
        raise InvalidOption(f"model {name} draws with quality=fast alone; leave out draws or quality")
    if blocks_of(seen.operator) is None:
        raise InvalidOption(f"model {name} draws no images behind a blur; leave out draws or blur")


def _check_prior(model: Model, inputs: Inputs, seen: Observation, options: RestoreOptions) -> None:
    """Refuse splitting for a conditional model that cannot be its prior.

    Raises:
        InvalidOption: The message names what works.
    """
    blurred = blocks_of(seen.operator) is None
    split = blurred or (options.quality == "refined" and (seen.operator is not None or inputs.mask is not None))
    if split and "restoration" in model.graphs and "gaussian" not in model.manifest.noise_families:
        what = "a blur" if blurred else "quality=refined with a mask or a factor"
        raise InvalidOption(f"{what} needs a model of gaussian noise, which {model.manifest.name} is not; leave it out")


async def _answered(model: Model, submit: Submit, inputs: Inputs, seen: Observation, options: RestoreOptions) -> Result:
    """The images, and what else the options ask for, by the graphs that the model has."""
    choices = RestoreChoices(
        options.quality == "refined",
        options.draws,
        bool(options.uncertainty),
        options.completions,
        options.preview,
        inputs.mask is not None,
    )
    noise, observe = Noise(options.seed, inputs.first), _of_whole_images(inputs.observe, inputs.tiling)
    answer = conditional.restore if "restoration" in model.graphs else restore
    result = await answer(model, submit, seen, choices, noise, observe)
    if seen.family is None or "level" in result.about:
        return result
    level = np.ascontiguousarray(seen.level[:, seen.family])
    return result._replace(about={**result.about, "level": level})


def _with_kinds(model: Model, result: Result, seen: Observation) -> Result:
    """Add the level of all noise together, and for each image the kind of noise that is loudest."""
    names = [*model.manifest.noise_families, "none"]
    loudest = np.where(seen.level.any(1), seen.level.argmax(1), len(names) - 1)
    return result._replace(about={**result.about, "level": seen.total, "noise": [names[k] for k in loudest]})


def _calibrated(model: Model, std: Rows, seen: Observation, quality: str) -> Rows:
    """Scale standard deviations by the manifest's calibration, if it has one."""
    calibration = model.manifest.calibration
    if calibration is None:
        return std
    factors, curves = calibration.factors.get(quality, {}), calibration.curves.get(quality, {})
    return calibrated(std, seen, model.manifest.noise_families, factors, curves)


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
    if "noise" in about:  # all tiles of an image have one level
        about["noise"] = about["noise"][:: tiling.tiles]
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
    low = level <= LEAST_LEVEL if "noise" not in result.about else np.zeros_like(sighted)  # no noise is a kind
    clipped = np.flatnonzero(sighted & (low | (level >= MOST_LEVEL)))
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
