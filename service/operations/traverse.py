"""The operation traverse: images over a grid of one or two latent axes."""

from __future__ import annotations

from dataclasses import replace
from statistics import NormalDist
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from service.errors import InvalidOption
from service.operations.inference import vae
from service.operations.inference.latent import MAX_SEED, standard_normal
from service.operations.inference.vae import Result, Rows
from service.operations.operation import LATENTS, MEANS, Inputs, Operation, PriorOptions
from service.runtime.model import PRIOR, Model
from service.runtime.program import Submit


class TraverseOptions(PriorOptions):
    """Options of traverse: the latent axes, and the size of the grid and of its images."""

    axes: Annotated[str, Field(pattern=r"^\d{1,6}(,\d{1,6})?$")] = "0,1"
    """One axis of the latents, or two with a comma between: the first runs to the right, the second up."""
    size: Annotated[int, Field(ge=2, le=128)] = 10
    """Images along each axis."""
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED)] = None
    """Seed of the draw of the prior that the axes go through; without one they go through its mean."""
    latents: bool = False
    """Whether the answer also holds the latents."""

    @property
    def images_alone(self) -> bool:
        """Whether the answer has no other arrays than images."""
        return not self.latents

    @property
    def numbers(self) -> list[int]:
        """The axes as numbers."""
        return [int(number) for number in self.axes.split(",")]

    @property
    def count(self) -> int:
        """Number of images."""
        return int(self.size ** len(self.numbers))


async def _run(model: Model, submit: Submit, inputs: Inputs, options: TraverseOptions) -> Result:
    places = np.arange(inputs.first, inputs.first + len(inputs.rows))
    eps = grid(options, model.noise_at(*model.padded(inputs.size)), places)
    return await vae.transform(model, submit, eps, latents=options.latents)


def grid(options: TraverseOptions, shape: tuple[int, ...], places: NDArray[Any]) -> Rows:
    """Noise of the prior at the medians of cells of equal probability, row by row from the top.

    Args:
        options: The axes, and images along each.
        shape: Shape of the noise of one image.
        places: Places in the grid, (n,), counted from 0.

    Returns:
        Noise, (n, *shape).

    Source:
        Kingma and Welling (2013), figure 4.

    Raises:
        InvalidOption: An axis does not exist or is repeated.
    """
    axes, width = options.numbers, int(np.prod(shape))
    if max(axes) >= width or len(set(axes)) < len(axes):
        raise InvalidOption(f"axes is {options.axes}; name one or two different latents of 0 to {width - 1}")
    medians = np.array([NormalDist().inv_cdf((k + 0.5) / options.size) for k in range(options.size)])
    middle = np.zeros(width, np.float32) if options.seed is None else standard_normal(options.seed, 1, (width,))[0]
    eps = np.tile(middle, (len(places), 1))
    eps[:, axes[0]] = medians[places % options.size]
    if len(axes) == 2:
        eps[:, axes[1]] = medians[::-1][places // options.size]
    return eps.reshape(-1, *shape)


traverse = Operation(
    name="traverse",
    summary="A map of the latents",
    description="E[x|z] over a grid of equal probability of one or two axes of the prior, with the others fixed. For a "
    "model of two latents, this shows all of its prior.",
    options=TraverseOptions,
    run=_run,
    inputs=(),
    outputs=(MEANS, replace(LATENTS, required=False)),
    row_wise=True,
    needs=("decoder", PRIOR),
    example={"axes": "0,1", "size": 10},
    answer={"images": [[[[0.0, 0.9], [0.1, 0.0]]]]},
    warm_up=({"axes": "0", "size": 2},),
)
