"""The operation interpolate: images on a path between two images or latents."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from service.errors import InvalidShape, UnsupportedOperation
from service.operations.abilities import ENCODING, lacking
from service.operations.examples import OTHER, PICTURE
from service.operations.inference import vae
from service.operations.inference.vae import Result
from service.operations.operation import IMAGES, LATENTS, PIXELS, ImageOptions, Inputs, LatentOptions, Operation, Tensor
from service.runtime.model import ONE_GROUP, Model
from service.runtime.program import Submit


class InterpolateOptions(ImageOptions, LatentOptions):
    """Options of interpolate: number of images, and the path."""

    steps: Annotated[int, Field(ge=2)] = 8
    """Number of images, the two ends included."""
    path: Literal["spherical", "linear"] = "spherical"
    """Path of the latents: an arc, which keeps lengths that are typical of the prior, or a line."""
    latent_walk: bool = False
    """Whether the answer also holds the latents on the path, as `latents`."""

    @property
    def multiplicity(self) -> int:
        """Rows that one row of the request becomes."""
        return self.steps

    @property
    def images_alone(self) -> bool:
        """Whether the answer has no other arrays than images."""
        return not self.latent_walk

    def memory_numbers(self, model: Model, image: int, latent: int) -> int:  # noqa: ARG002  # the base class's signature
        """Numbers in memory for one row of the request: an image and a latent for each step."""
        return self.steps * (image + latent)


def _check(model: Model, inputs: Inputs, _options: InterpolateOptions) -> None:
    if not inputs.latents and lacking(model, (ENCODING,)):
        raise UnsupportedOperation(f"model {model.manifest.name} has no encoder; send latents in place of images")


async def _run(model: Model, submit: Submit, inputs: Inputs, options: InterpolateOptions) -> Result:
    if len(inputs.rows) != 2:
        kind = "latents" if inputs.latents else "images"
        raise InvalidShape(f"interpolate takes two {kind}, not {len(inputs.rows)}")
    return await vae.interpolate(
        model,
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
    description="E[x|z] for latents on a path between the posterior means of two images, or between two `latents`.",
    options=InterpolateOptions,
    run=_run,
    inputs=(replace(IMAGES, required=False), replace(LATENTS, required=False)),
    outputs=(
        Tensor("images", ("steps", *PIXELS), "Mean images on the path"),
        Tensor("latents", ("steps", "latent"), "Latents on the path, with `latent_walk`", required=False),
    ),
    row_wise=False,
    needs=("decoder", ONE_GROUP),
    check=_check,
    example={"images": [PICTURE, OTHER], "steps": 8},
    answer={"images": [[[[0.0, 0.9], [0.1, 0.0]]]]},
)
