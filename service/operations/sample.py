"""The operation sample: images from the prior."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from service.operations.inference import vae
from service.operations.inference.latent import MAX_SEED, Noise
from service.operations.inference.vae import Result
from service.operations.operation import LATENTS, MEANS, SEED, Inputs, Operation, PriorOptions
from service.runtime.model import PRIOR, Model
from service.runtime.program import Submit


class SampleOptions(PriorOptions):
    """Options of sample: number and size of the images, seed and temperature."""

    count: Annotated[int, Field(ge=1)] = 1
    """Number of images."""
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED)] = None
    """Seed of the draws; the answer names the one it used. More images never change the first ones."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 1.0
    """Scale of the noise that the prior makes latents of. 1 is the prior; less gives more typical images."""
    latents: bool = False
    """Whether the answer also holds the latents."""

    @property
    def images_alone(self) -> bool:
        """Whether the answer has no other arrays than images."""
        return not self.latents


async def _run(model: Model, submit: Submit, inputs: Inputs, options: SampleOptions) -> Result:
    noise, shape = Noise(options.seed, inputs.first), model.noise_at(*model.padded(inputs.size))
    return await vae.sample(model, submit, shape, len(inputs.rows), options.temperature, options.latents, noise)


sample = Operation(
    name="sample",
    summary="New images",
    description="E[x|z] for z drawn from the prior p(z). Options in the query string or as JSON; no body is needed.",
    options=SampleOptions,
    run=_run,
    inputs=(),
    outputs=(MEANS, SEED, replace(LATENTS, required=False)),
    row_wise=True,
    needs=("decoder", PRIOR),
    example={"count": 1, "seed": 7},
    answer={"images": [[[[0.0, 0.9], [0.1, 0.0]]]], "seed": 7},
)
