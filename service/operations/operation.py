"""An operation: what a POST takes, its options, what it gives, how it runs. A declaration, no HTTP in it."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
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
"""A latent further from 0 may explain a result that is not finite; priors have a deviation of about 1."""


class Options(BaseModel):
    """Options of one operation: the same names in JSON and in the query string; an unknown one is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    tiles: ClassVar[bool] = False
    """Whether `fit` may be `tile`."""

    def said(self, name: str, otherwise: Any = None) -> Any:
        """An option that not every operation has; to ask pydantic for what is not there takes twenty times as long."""
        return self.__dict__.get(name, otherwise)

    @property
    def multiplicity(self) -> int:
        """Rows that one row of the request becomes."""
        return max(1, self.said("draws", 0))

    @property
    def pictures(self) -> int:
        """Pictures, as far as memory goes, that one row of the request becomes."""
        return 1


class ImageOptions(Options):
    """Options of everything that takes images."""

    fit: Fit | None = None
    """Bring images of another size to the model's: `resize` stretches, `pad` adds black, `crop` cuts."""


class LatentOptions(Options):
    """Options of everything that takes latents."""

    fingerprint: str | None = None
    """Of the model that the latents are of, as `encode` told it; another model refuses them. The header X-Fingerprint
    says the same."""


class DrawOptions(ImageOptions):
    """Options of everything that may draw from a posterior."""

    draws: Annotated[int, Field(ge=0)] = 0
    """Posterior draws an image; 0 uses the posterior's mean."""
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED)] = None
    """Seed of the draws; the answer names the one it used."""


class Inputs(NamedTuple):
    """What an operation runs on: rows of the model's shape, checked, and a mask where one was sent.

    Rows that are still to be made have nothing in them, shape (n, 0). `first` is the place of the first in the request.
    `latents` says that latents came in place of images, `tiling` that rows are tiles of larger images.
    `observe` is whom to tell how long work goes, where somebody wants to know.
    """

    rows: Rows
    mask: Rows | None = None
    first: int = 0
    latents: bool = False
    tiling: Tiling | None = None
    observe: Observe | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return self.rows.nbytes + (0 if self.mask is None else self.mask.nbytes)

    def part(self, start: int, size: int) -> Inputs:
        """Some of them, as views."""
        mask = None if self.mask is None else self.mask[start : start + size]
        return self._replace(rows=self.rows[start : start + size], mask=mask, first=self.first + start)


Run = Callable[[Model, Submit, Inputs, Any], Awaitable[Result]]
"""(model, submit, inputs, options) -> Result."""


@dataclass(frozen=True)
class Operation:
    """Everything about an endpoint that is not shared with the others."""

    name: str
    summary: str
    description: str
    options: type[Options]
    run: Run
    takes: Literal["images", "latents"] | None
    example: dict[str, Any]
    answer: dict[str, Any]
    observed: bool = False
    """Whether it takes observations: values outside the model's range, as noise has them, and a mask."""
    or_latents: bool = False
    """Whether JSON may bring `latents` in place of images."""
    masked: bool = False
    """Whether it needs a mask, which may be the transparency of a picture."""
    progress: dict[str, Any] | None = None
    """Of work that may be long: an example of what it tells while it runs."""
    needs: tuple[str, ...] = ()
    """Graphs that a model must have been exported with."""
    check: Callable[[Model, Inputs, Any], None] | None = None
    """(model, inputs, options): what it refuses beside shape and range, of the whole request."""

    async def perform(self, model: Model, submit: Submit, inputs: Inputs, options: Any) -> Result:
        """Run it, and see that every number of what it finds is finite, while it goes on as well as at the end.

        Raises:
            InvalidValue: One is not, and an input lies so far outside what the model knows that this explains it.
            InferenceFailed: One is not, and nothing explains it.
        """
        observe = inputs.observe
        if observe is not None:
            inputs = inputs._replace(observe=lambda found: observe(self._finite(found, model, inputs)))
        return self._finite(await self.run(model, submit, inputs, options), model, inputs)

    def _finite(self, result: Result, model: Model, inputs: Inputs) -> Result:
        for found in (result.outputs, result.about):
            for name, array in found.items():
                if isinstance(array, np.ndarray) and not is_finite(array):
                    raise self._explained(name, model, inputs)
        return result

    def _explained(self, name: str, model: Model, inputs: Inputs) -> ServiceError:
        """Why an output may not be finite."""
        what = "latents" if inputs.latents else self.takes
        low, high = (-LATENT_EXTREME, LATENT_EXTREME) if what == "latents" else model.manifest.value_range
        if inputs.rows.size:
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
        """The shape of one row of what it takes: of images, the model's divided by the options' `factor`, rounded down.

        Whether the factor divides it is looked at where the request's options are known, by `admit`.
        """
        if self.takes == "latents":
            return model.latent_shape
        channels, height, width = model.input_shape
        factor = options.said("factor", 1)
        return channels, max(1, height // factor), max(1, width // factor)

    def offered_by(self, model: Model) -> bool:
        """Whether the model can do it."""
        return all(graph in model.graphs for graph in self.needs)

    def check_offered(self, model: Model) -> None:
        """Raise UnsupportedOperation, naming what the model lacks, where it cannot."""
        if not self.offered_by(model):
            lacking = ", ".join(graph for graph in self.needs if graph not in model.graphs)
            raise UnsupportedOperation(
                f"model {model.manifest.name} was exported without {lacking}; {self.name} needs it"
            )


def is_finite(array: Rows) -> bool:
    """Whether all numbers are finite; their sum of squares, taken first, costs a third of looking at each."""
    flat = array.ravel()
    return math.isfinite(flat.dot(flat)) or bool(np.isfinite(array).all())


def check_refinable(model: Model, graph: str) -> None:
    """Raise UnsupportedOperation where the model lacks the graph that `quality=refined` climbs by."""
    if graph not in model.graphs:
        raise UnsupportedOperation(
            f"model {model.manifest.name} was exported without {graph}; ask for quality=fast, or export it again"
        )
