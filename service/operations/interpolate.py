"""POST interpolate: images between two."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from service.errors import InvalidShape
from service.operations.inference import vae
from service.operations.inference.vae import Result
from service.operations.operation import ImageOptions, Inputs, LatentOptions, Operation
from service.runtime.model import Model
from service.runtime.program import Submit


class InterpolateOptions(ImageOptions, LatentOptions):
    """How to get from one to the other."""

    steps: Annotated[int, Field(ge=2)] = 8
    """Images in all, the two ends among them."""
    path: Literal["spherical", "linear"] = "spherical"
    """Through the latents between: along an arc, which keeps a length typical of the prior, or along a line."""
    latent_walk: bool = False
    """Whether the answer holds the latents on the way, as `latents`."""

    @property
    def multiplicity(self) -> int:
        """Rows that one row of the request becomes."""
        return self.steps

    @property
    def pictures(self) -> int:
        """As many."""
        return self.steps


async def _run(model: Model, submit: Submit, inputs: Inputs, options: InterpolateOptions) -> Result:
    if len(inputs.rows) != 2:
        kind = "latents" if inputs.latents else "images"
        raise InvalidShape(f"interpolate takes two {kind}, not {len(inputs.rows)}")
    return await vae.interpolate(
        model.plan,
        submit,
        inputs.rows,
        options.steps,
        encoded=inputs.latents,
        spherical=options.path == "spherical",
        latents=options.latent_walk,
    )


interpolate = Operation(
    name="interpolate",
    summary="From one image to another",
    description="E[x|z] for latents on the way from one image's posterior mean to another's, or between two `latents`.",
    options=InterpolateOptions,
    run=_run,
    takes="images",
    or_latents=True,
    example={"images": ["<base64 of a PNG>", "<base64 of another>"], "steps": 8},
    answer={"images": [[[[0.0, 0.9], [0.1, 0.0]]]], "latents": [[0.3, -0.8]]},
)
