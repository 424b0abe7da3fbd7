"""The description of an operation: inputs, outputs, options, examples, and how it runs. It does not depend on HTTP."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from service.contract.images import Fit
from service.errors import InferenceFailed, InvalidValue, ServiceError, UnsupportedOperation
from service.operations.inference.latent import MAX_SEED
from service.operations.inference.tiling import Tiling
from service.operations.inference.vae import Observe, Result
from service.runtime.model import Model
from service.runtime.program import Submit

Rows = NDArray[np.float32]

LATENT_EXTREME = 100.0
"""Largest usual magnitude of a latent, for error messages: priors have a standard deviation of about 1."""


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
    def scale(self) -> int:
        """Height and width of the answer's images in those of the request's."""
        return 1

    def variant(self, model: Model) -> Model:
        """The variant of a model that the options choose; the first one by default.

        Raises:
            InvalidOption: There is none; the message names those that there are.
        """
        return model

    def made_size(self, model: Model) -> tuple[int, int] | None:  # noqa: ARG002  # for subclasses
        """Height and width of the answer's images, where the options and not the request's images give them."""
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

    def memory_numbers(self, image: int, latent: int) -> int:
        """Numbers in memory while one row of the request is answered.

        Args:
            image: Numbers of an image.
            latent: Numbers of a latent.
        """
        return image + self.multiplicity * latent


class ImageOptions(Options):
    """Options of every operation that takes images."""

    fit: Fit | None = None
    """Bring images of another size to the model's: `resize` stretches, `pad` adds black, `crop` cuts."""

    @property
    def resizing(self) -> Fit | Literal["tile"] | None:
        """How images of another size are adapted."""
        return self.fit


class LatentOptions(Options):
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
        mask: 1 where a pixel is seen, 0 where it is missing, of the shape of the rows; None without a mask.
        first: Index of the first row in the request.
        latents: Whether the rows are latents in place of images.
        tiling: Places of the rows in larger images, if they are tiles.
        observe: Called with intermediate results of iterative work; None if the caller wants none.
        size: Height and width of the images of the answer, where the rows were padded to what the graphs take; None
            where nothing is to be cut back.
        levels: `uint8` where images of the answer may be uint8 levels, because a picture is written of them.
    """

    rows: Rows
    mask: Rows | None = None
    first: int = 0
    latents: bool = False
    tiling: Tiling | None = None
    observe: Observe | None = None
    size: tuple[int, int] | None = None
    levels: Literal["uint8"] | None = None

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
            a latent. A scalar has none.
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
MASK = Tensor("mask", ("n", *PIXELS), "1 where a pixel is seen, 0 where it is missing", required=False)
MEANS = Tensor("images", ("n", *PIXELS), "Mean images")
SEED = Tensor("seed", (), "Seed of the request's noise; the same request with it has the same answer", "int64")
GIVEN = {"model", "version", "fingerprint", "notes"}
"""Fields of every answer."""


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
        needs: Graphs that a model must have, beside encoder and decoder.
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
    needs: tuple[str, ...] = ()
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

    async def perform(self, model: Model, submit: Submit, inputs: Inputs, options: Any) -> Result:
        """Run the operation, and check that all outputs and progress reports are finite.

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
        return self._checked(await self.run(model, submit, inputs, options), model, inputs)

    @cached_property
    def _images(self) -> frozenset[str]:
        """Names of its outputs that are images."""
        return frozenset(tensor.name for tensor in self.outputs if tensor.shape[-2:] == PIXELS[-2:])

    def _checked(self, result: Result, model: Model, inputs: Inputs) -> Result:
        if inputs.size is not None:
            height, width = inputs.size
            cut = {
                name: np.ascontiguousarray(array[..., :height, :width]) if name in self._images else array
                for name, array in result.outputs.items()
            }
            result = result._replace(outputs=cut)
        return self._finite(result, model, inputs)

    def _finite(self, result: Result, model: Model, inputs: Inputs) -> Result:
        for found in (result.outputs, result.about):
            for name, array in found.items():
                if isinstance(array, np.ndarray) and not is_finite(array):
                    raise self._explained(name, model, inputs)
        return result

    def _explained(self, name: str, model: Model, inputs: Inputs) -> ServiceError:
        """Make the error for an output that is not finite: the input's if it is out of range, else the model's."""
        what = "latents" if inputs.latents else self.takes
        low, high = (-LATENT_EXTREME, LATENT_EXTREME) if what == "latents" else (0.0, 1.0)
        if inputs.rows.size and inputs.rows.dtype.kind == "f":
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

    def warm_up_inputs(self, model: Model, options: Any, golden: Mapping[str, Any]) -> Inputs:
        """Make the inputs of a warm-up request.

        Args:
            model: The model.
            options: Options of the request.
            golden: Golden rows, by `graph/tensor`.

        Returns:
            Two golden rows, cut to the request's shape; `options.count` empty rows for an operation without inputs.
        """
        if self.takes is None:
            return Inputs(np.empty((options.count, 0), np.float32))
        shape = self.row_shape(model, options)
        known = golden["decoder/z" if self.takes == "latents" else "encoder/x"]
        rows = np.resize(known, (2, *known.shape[1:]))
        return Inputs(np.ascontiguousarray(rows[(slice(None), *map(slice, shape))]))

    def offered_by(self, model: Model) -> bool:
        """Whether the model has the graphs that it needs."""
        return all(graph in model.graphs for graph in self.needs)

    def check_offered(self, model: Model) -> None:
        """Refuse a model that lacks a graph.

        Args:
            model: The model.

        Raises:
            UnsupportedOperation: The message names the graphs.
        """
        if not self.offered_by(model):
            lacking = ", ".join(graph for graph in self.needs if graph not in model.graphs)
            raise UnsupportedOperation(
                f"model {model.manifest.name} was exported without {lacking}; {self.name} needs it"
            )


def is_finite(array: Rows) -> bool:
    """Whether all numbers are finite."""
    if array.dtype.kind != "f":
        return True
    flat = array.ravel()  # a sum of squares takes a third of the time of np.isfinite
    return math.isfinite(flat.dot(flat)) or bool(np.isfinite(array).all())


def check_refinable(model: Model, graph: str) -> None:
    """Refuse `quality=refined` for a model that lacks the graph of the gradient.

    Args:
        model: The model.
        graph: Name of the graph.

    Raises:
        UnsupportedOperation: The message names the graph.
    """
    if graph not in model.graphs:
        raise UnsupportedOperation(
            f"model {model.manifest.name} was exported without {graph}; ask for quality=fast, or export it again"
        )
