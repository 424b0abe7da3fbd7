"""The operation decode: latents z to mean images E[x|z]."""

from __future__ import annotations

from service.operations.examples import LATENT
from service.operations.inference import vae
from service.operations.inference.vae import Result
from service.operations.operation import LATENTS, MEANS, Inputs, LatentOptions, Operation
from service.runtime.model import Model
from service.runtime.program import Submit


async def _run(model: Model, submit: Submit, inputs: Inputs, _options: LatentOptions) -> Result:
    return await vae.decode(model, submit, inputs.rows)


decode = Operation(
    name="decode",
    summary="Latents to images",
    description="Mean image E[x|z] of each latent.",
    options=LatentOptions,
    run=_run,
    inputs=(LATENTS,),
    outputs=(MEANS,),
    row_wise=True,
    needs=("decoder",),
    example={"latents": [LATENT]},
    answer={"images": [[[[0.0, 0.9], [0.1, 0.0]]]]},
)
