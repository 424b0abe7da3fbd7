"""The description of an operation: inputs, outputs, options, examples, and how it runs. It does not depend on HTTP."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from service.contract.images import Fit
from service.errors import InferenceFailed, InvalidOption, InvalidValue, ServiceError
from service.operations.abilities import ENCODING, Need, check_able, lacking
from service.operations.inference.latent import MAX_SEED
from service.operations.inference.tiling import Tiling
from service.operations.inference.vae import Observe, Result, noted
from service.runtime.model import Model
from service.runtime.program import Submit, Trip
from service.runtime.tiling import Levels

Rows = NDArray[np.float32]

NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,3})?"
"""A decimal number, as a pattern."""
GOLDEN_IMAGES = ("encoder/x", "posterior/x", "recognition/y", "restoration/y")
"""Golden rows that are images."""
TILED_NOTE = (
    "the image was worked off in blended tiles, because it is large; the model looks at whole images, so the answer "
    "differs from that of the whole image"
)
LATENT_EXTREME = 100.0
"""Largest usual magnitude of a latent, for error messages: priors have a standard deviation of about 1."""


class Asked(NamedTuple):
    """What needs something of a model.

    Attributes:
        option: The option or what it says, such as `quality=refined`.
        advice: What else works, to be appended to a message; may be empty.
    """

    option: str
    advice: str = ""


REFINED = Asked("quality=refined", "; or ask for quality=fast")


class Options(BaseModel):
    """Options of one operation, with the same names in JSON and in the query string. Unknown names are errors.

    A subclass inherits the input adapters that its operation offers, such as `fit`. Other layers use them through the
    methods of this class, never by the name of an option.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    tiles: ClassVar[bool] = False
    """Whether larger images can be processed tile by tile."""

    @property
    def resizing(self) -> Fit | Literal["tile"] | None:
        """How images of another size are adapted; None accepts only images of the model's size."""
        return None

    @property
    def multiplicity(self) -> int:
        """Rows that one row of the request becomes."""
        return 1

    @property
    def enlargement(self) -> int:
        """Height and width of the answer's images in those of the request's."""
        return 1

    @property
    def needs(self) -> Mapping[Need, Asked]:
        """What these options need of a model, beside what the operation needs, and by which option."""
        return {}

    def variant(self, model: Model) -> Model:
        """The variant of a model that the options choose; the first one by default.

        Raises:
            InvalidOption: There is none; the message names those that there are.
        """
        return model

    def made_size(self, model: Model) -> tuple[int, int] | None:  # noqa: ARG002  # subclasses need it
        """Height and width of the answer's images, where the options give them and not the images of the request."""
        return None

    @property
    def scaling(self) -> str | None:
        """The numbers that are black and white in picture files, as `ImageOptions.scale` says; None where files do."""
        return None

    @property
    def images_alone(self) -> bool:
        """Whether an answer that has images has no other arrays, so that a picture holds it."""
        return True

    def check(self, model: Model) -> None:
        """Refuse options that the model cannot serve.

        Args:
            model: The model.

        Raises:
            InvalidOption: The message names what works.
        """

    def sent_shape(self, model: Model) -> tuple[int, ...]:
        """Shape (c, h, w) of one image in the request, before it is adapted to the model."""
        return model.input_shape

    def memory_numbers(self, model: Model, image: int, latent: int) -> int:  # noqa: ARG002  # subclasses need it
        """Numbers in memory while one row of the request is answered.

        Args:
            model: The model.
            image: Numbers of an image.
            latent: Numbers of a latent.
        """
        return image + self.multiplicity * latent

    def memory_levels(self, model: Model, image: int) -> int:
        """Numbers of images likewise, where images of the answer are levels and those of the request stay levels."""
        return self.memory_numbers(model, image, 0)


class ImageOptions(Options):
    """Options of every operation that takes images."""

    fit: Fit | None = None
    """Bring images of another size to the model's: `resize` stretches, `pad` adds black, `crop` cuts."""
    scale: Annotated[str, Field(pattern=rf"^(auto|{NUMBER},{NUMBER})$", max_length=80)] | None = None
    """The numbers that are black and white in picture files, as in `0,4095`; `auto` is the least and the largest number
    of the request. Answers in TIFF, and in PNG of integers, have the same scale. Needed for TIFF of floats, of 32 bits
    or with signs; all others take 0 and white of 8 or 16 bits without it."""

    @property
    def scaling(self) -> str | None:
        """The numbers of black and white in picture files."""
        return self.scale

    @property
    def resizing(self) -> Fit | Literal["tile"] | None:
        """How images of another size are adapted."""
        return self.fit


class ChannelOptions(Options):
    """Options of every operation that makes images of something else."""

    channels: Annotated[int, Field(ge=1)] | None = None
    """Channels of the images, 1 or 3 say, of a model that has variants for several; the default is its first."""

    def variant(self, model: Model) -> Model:
        """The variant that makes images of these channels.

        Raises:
            InvalidOption: There is none; the message names those that there are.
        """
        if self.channels is None:
            return model
        if self.channels not in model.variants:
            known = " or ".join(map(str, sorted(model.variants)))
            raise InvalidOption(
                f"channels is {self.channels}, but images of model {model.manifest.name} have {known}; leave it out"
            )
        return model.variants[self.channels]


class PriorOptions(ChannelOptions):
    """Options of every operation that makes images of the prior."""

    height: Annotated[int, Field(ge=1)] | None = None
    """Height of the images; only for a model whose images may have any size, which needs it."""
    width: Annotated[int, Field(ge=1)] | None = None
    """Width of the images likewise."""

    def check(self, model: Model) -> None:
        """Refuse a size for a model of one size, and ask for one where sizes are free.

        Raises:
            InvalidOption: The message names what works.
        """
        name, free = model.manifest.name, model.manifest.size
        if free is None:
            if self.height is not None or self.width is not None:
                _, height, width = model.input_shape
                raise InvalidOption(
                    f"model {name} makes images of {height} x {width} and no others; leave out height and width"
                )
        elif self.height is None or self.width is None:
            raise InvalidOption(
                f"model {name} makes images of any size up to {free.max} x {free.max}; name one with height and width"
            )
        elif max(self.height, self.width) > free.max:
            raise InvalidOption(
                f"height and width are {self.height} and {self.width}; model {name} makes images of at most "
                f"{free.max} x {free.max}"
            )

    def made_size(self, model: Model) -> tuple[int, int] | None:
        """Height and width of the images; None where the model has one size."""
        if model.manifest.size is None or self.height is None or self.width is None:
            return None
        return self.height, self.width


class LatentOptions(ChannelOptions):
    """Options of every operation that takes latents."""

    fingerprint: str | None = None
    """Fingerprint of the model that encoded the latents, as `encode` returned it; another model refuses them. The
    header X-Fingerprint does the same."""


class DrawOptions(ImageOptions):
    """Options of every operation that can draw from a posterior."""

    draws: Annotated[int, Field(ge=0)] = 0
    """Posterior draws an image; 0 uses the posterior's mean."""
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED)] = None
    """Seed of the draws; the answer names the one it used."""

    @property
    def multiplicity(self) -> int:
        """Rows that one row of the request becomes."""
        return max(1, self.draws)


class Inputs(NamedTuple):
    """Inputs of an operation: checked rows of the model's shape.

    Attributes:
        rows: Images (n, c, h, w) or latents (n, ...). (n, 0) for an operation without inputs that makes n rows.
        mask: 1 where a pixel is seen, 0 where it is missing, of the shape of the rows: booleans beside images that are
            levels; None without a mask.
        first: Index of the first row in the request.
        latents: Whether the rows are latents in place of images.
        tiling: Places of the rows in larger images, if they are tiles.
        size: Height and width of the answer's images, which are cut to it because rows are padded below and to the
            right; None for a model of one size.
        observe: Called with intermediate results of iterative work; None if the caller wants none.
        levels: Type of the levels that images of the answer may be, because a picture is written of them.
        raw: Whether images of the answer may lie beyond [0, 1], where a decoder of [-1, 1] goes beyond.
    """

    rows: Rows
    mask: Rows | NDArray[np.bool_] | None = None
    first: int = 0
    latents: bool = False
    tiling: Tiling | None = None
    size: tuple[int, int] | None = None
    observe: Observe | None = None
    levels: Levels | None = None
    raw: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.rows.nbytes + (0 if self.mask is None else self.mask.nbytes)

    def part(self, start: int, size: int) -> Inputs:
        """Views of the rows from `start` to `start + size`."""
        mask = None if self.mask is None else self.mask[start : start + size]
        return self._replace(rows=self.rows[start : start + size], mask=mask, first=self.first + start)


Run = Callable[[Model, Submit, Inputs, Any], Coroutine[Any, Any, Result]]
"""(model, submit, inputs, options) -> Result."""


@dataclass(frozen=True)
class Tensor:
    """A named input or output of an operation.

    Attributes:
        name: Its name in JSON.
        shape: One symbol an axis, such as `n`, `draws`, `channels`, `height`, `width`; `latent` stands for all axes of
            a latent, and a number for itself. A scalar has none.
        meaning: Its content, for the documentation.
        dtype: Type of its elements.
        required: Whether every JSON request, or every answer, contains it.
    """

    name: str
    shape: tuple[str, ...]
    meaning: str
    dtype: Literal["float32", "int64", "string"] = "float32"
    required: bool = True


PIXELS = ("channels", "height", "width")
IMAGES = Tensor("images", ("n", *PIXELS), "Images; numbers lie in [0, 1]")
LATENTS = Tensor("latents", ("n", "latent"), "Latents, of the model's latent shape")
MASK = Tensor("mask", ("n", "1", *PIXELS[1:]), "1 where a pixel is seen, 0 where it is missing", required=False)
MEANS = Tensor("images", ("n", *PIXELS), "Mean images")
SEED = Tensor("seed", (), "Seed of the request's noise; the same request with it has the same answer", "int64")
IDENTIFYING = ("model", "version", "fingerprint")
"""Fields of every answer, which say what has given it."""
GIVEN = {*IDENTIFYING, "notes"}
"""Fields that any answer may have."""


@dataclass(frozen=True)
class Operation:
    """An operation. OpenAPI, validation, streaming, memory estimates and warm-up are derived from it.

    Attributes:
        name: Its name in paths.
        summary: A few words for the list of operations.
        description: What it computes.
        options: Its options, which are also its input adapters.
        run: Computes the outputs.
        inputs: Its inputs. Further ones are alternatives to the first, except a mask, which accompanies it.
        outputs: Its outputs.
        row_wise: Whether row k of its outputs depends only on row k of its inputs. Only then may a long answer be
            computed and sent in parts.
        example: An example of a request in JSON.
        answer: An example of an answer in JSON.
        masked: Whether it needs a mask. The transparency of a picture may be one.
        progress: For iterative work, an example of a progress event.
        needs: What a model must have: graphs, `PRIOR` or `ONE_GROUP`, or alternatives; see
            service/operations/abilities.py.
        check: Refuses whole requests for other reasons than shape and range: (model, inputs, options).
        warm_up: Options of the requests that run before a model serves. The programs that they submit are timed;
            programs without a timing never run in the event loop.

    Raises:
        ValueError: `warm_up` is empty, or an example has a field that is not declared.
    """

    name: str
    summary: str
    description: str
    options: type[Options]
    run: Run
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    row_wise: bool
    example: dict[str, Any]
    answer: dict[str, Any]
    masked: bool = False
    progress: dict[str, Any] | None = None
    needs: tuple[Need, ...] = ()
    check: Callable[[Model, Inputs, Any], None] | None = None
    warm_up: tuple[dict[str, Any], ...] = ({},)

    def __post_init__(self) -> None:
        if not self.warm_up:
            raise ValueError(f"operation {self.name} has no warm-up; list the options of one request at least")
        taken = {*self.options.model_fields, *(tensor.name for tensor in self.inputs)}
        given = {*GIVEN, *(tensor.name for tensor in self.outputs)}
        unknown = {*(self.example.keys() - taken), *(self.answer.keys() - given)}
        if unknown:
            raise ValueError(f"examples of {self.name} hold {', '.join(sorted(unknown))}; declare inputs and outputs")

    @cached_property
    def defaults(self) -> Options:
        """The options of a request that names none."""
        return self.options()

    @cached_property
    def takes(self) -> str | None:
        """Name of its first input; None without inputs."""
        return self.inputs[0].name if self.inputs else None

    @cached_property
    def or_latents(self) -> bool:
        """Whether JSON may contain latents in place of images."""
        return LATENTS.name in [tensor.name for tensor in self.inputs[1:]]

    @cached_property
    def observed(self) -> bool:
        """Whether it accepts a mask, and noisy values outside the model's range."""
        return MASK.name in [tensor.name for tensor in self.inputs]

    @cached_property
    def _images(self) -> frozenset[str]:
        """Names of its outputs that are images."""
        return frozenset(tensor.name for tensor in self.outputs if tensor.shape[-2:] == PIXELS[-2:])

    async def perform(self, model: Model, submit: Submit, inputs: Inputs, options: Any) -> Result:
        """Run the operation, cut images to their size, and check that all outputs and progress reports are finite.

        Args:
            model: The model.
            submit: Runs a program in the batcher.
            inputs: Checked inputs.
            options: Options of this operation's class.

        Returns:
            The outputs by name, with durations and notes.

        Raises:
            InvalidValue: A number is not finite, and an input lies outside the model's range.
            InferenceFailed: A number is not finite, although the input is in the range.
        """
        observe = inputs.observe
        if observe is not None:
            inputs = inputs._replace(observe=lambda found: observe(self._checked(found, model, inputs)))
            submit = partial(submit, watch=partial(_watched, observe))
        result = await self.run(model, submit, inputs, options)
        if result.trip.tiled and not (model.manifest.tiles and model.manifest.tiles.exact):
            rows = range(inputs.first, inputs.first + len(inputs.rows))
            result = noted(result, "tiled", rows, TILED_NOTE)
        return self._checked(result, model, inputs)

    def _checked(self, result: Result, model: Model, inputs: Inputs) -> Result:
        """The result with images of their size, in [0, 1] where a decoder of [-1, 1] goes beyond, if it is finite."""
        if inputs.size is not None:
            height, width = inputs.size
            cut = {
                name: np.ascontiguousarray(array[..., :height, :width]) if name in self._images else array
                for name, array in result.outputs.items()
            }
            result = result._replace(outputs=cut)
        images = result.outputs.get("images")
        if images is not None and images.dtype.kind == "f" and model.manifest.value_range[0] < 0.0 and not inputs.raw:
            result = result._replace(outputs={**result.outputs, "images": np.clip(images, 0, 1)})
        for found in (result.outputs, result.about):
            for name, array in found.items():
                if isinstance(array, np.ndarray) and not is_finite(array):
                    raise self._explained(name, model, inputs)
        return result

    def _explained(self, name: str, model: Model, inputs: Inputs) -> ServiceError:
        """Make the error for an output that is not finite: the input's if it is out of range, else the model's."""
        what = "latents" if inputs.latents else self.takes
        low, high = (-LATENT_EXTREME, LATENT_EXTREME) if what == "latents" else (0.0, 1.0)
        if inputs.rows.size and inputs.rows.dtype == np.float32:  # integer levels are in the range
            least, most = inputs.rows.min(), inputs.rows.max()
            if least < low or most > high:
                return InvalidValue(
                    f"{name} would not be finite: {what} has values from {least!s} to {most!s}, and the model knows "
                    f"values in [{low:.9g}, {high:.9g}]"
                )
        return InferenceFailed(
            f"{name} of model {model.manifest.name} would not be finite, though the input is in its range; "
            "try another version of the model"
        )

    def row_shape(self, model: Model, options: Any) -> tuple[int, ...]:
        """Shape of one row in the request, without n. The options need not be checked."""
        shape: tuple[int, ...] = model.latent_shape if self.takes == "latents" else options.sent_shape(model)
        return shape

    def warm_up_options(self, model: Model) -> list[Any]:
        """Make the options of the warm-up requests; images of free size get that of the golden ones."""
        free = model.manifest.size is not None and issubclass(self.options, PriorOptions)
        size = dict(zip(("height", "width"), model.manifest.golden_size(), strict=True)) if free else {}
        return [self.options(**chosen, **size) for chosen in self.warm_up]

    def warm_up_inputs(self, model: Model, options: Any, golden: Mapping[str, Any]) -> Inputs:
        """Make the inputs of a warm-up request.

        Args:
            model: The model.
            options: Options of the request.
            golden: Golden rows, by `graph/tensor`.

        Returns:
            Two rows of golden numbers in the request's shape; `options.count` empty rows for an operation without
            inputs.
        """
        if self.takes is None:
            return Inputs(np.empty((options.count, 0), np.float32), size=options.made_size(model))
        images = next((golden[name] for name in GOLDEN_IMAGES if name in golden), None)
        if self.takes == "latents" or images is None or (self.or_latents and lacking(model, (ENCODING,))):
            return Inputs(np.resize(golden["decoder/z"], (2, *golden["decoder/z"].shape[1:])), latents=True)
        height, width = (
            length // options.enlargement for length in model.padded(images.shape[2:], options.enlargement)
        )
        return Inputs(np.resize(images, (2, images.shape[1], height, width)))

    def offered_by(self, model: Model, options: Options | None = None) -> bool:
        """Whether the model has what the operation, and a request with these options, needs."""
        return lacking(model, self.needs if options is None else (*self.needs, *options.needs)) is None

    def check_offered(
        self, model: Model, served: Mapping[str, dict[str, Model]], options: Options | None = None
    ) -> None:
        """Refuse a model that lacks what the operation needs, or what a request with these options needs.

        Args:
            model: The model.
            served: All served models by name and version, for the message.
            options: The options of the request.

        Raises:
            UnsupportedOperation: The message names the reason, and the models that can.
        """
        if self.offered_by(model, options):
            return
        check_able(model, self.needs, self.name, served)
        assert options is not None
        need = lacking(model, options.needs)
        assert need is not None
        option, advice = options.needs[need]
        check_able(model, (*self.needs, *options.needs), f"{self.name} with {option}", served, advice)


def _watched(observe: Observe, done: int, tiles: int) -> None:
    """Report the tiles that are done."""
    observe(Result({}, {"tile": done, "tiles": tiles}, Trip((), 0.0, 0.0)))


def is_finite(array: Rows) -> bool:
    """Whether all numbers are finite."""
    if array.dtype.kind != "f":
        return True
    flat = array.ravel()  # a sum of squares takes a third of the time of np.isfinite
    return math.isfinite(flat.dot(flat)) or bool(np.isfinite(array).all())
