"""The operation reconstruct: encodes images and decodes their latents."""

from __future__ import annotations

from dataclasses import replace

from service.operations.abilities import ENCODING
from service.operations.examples import PICTURE
from service.operations.inference import vae
from service.operations.inference.latent import Noise
from service.operations.inference.vae import Result
from service.operations.operation import IMAGES, MEANS, SEED, DrawOptions, Inputs, Operation
from service.operations.typical import with_typicality
from service.runtime.model import Model
from service.runtime.program import Submit


async def _run(model: Model, submit: Submit, inputs: Inputs, options: DrawOptions) -> Result:
    result = await vae.reconstruct(model, submit, inputs.rows, options.draws, Noise(options.seed, inputs.first))
    return with_typicality(model, result, inputs)


reconstruct = Operation(
    name="reconstruct",
    summary="Images encoded and decoded",
    description="The decoder's mean at the posterior's mean or, with `draws`, averaged over draws of the posterior.",
    options=DrawOptions,
    run=_run,
    inputs=(IMAGES,),
    outputs=(MEANS, replace(SEED, required=False)),
    row_wise=True,
    needs=(ENCODING, "decoder"),
    example={"images": [PICTURE]},
    answer={"images": [[[[0.0, 0.9], [0.1, 0.0]]]]},
)
