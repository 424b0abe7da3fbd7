"""The operation encode: images x to the posterior q(z|x)."""

from __future__ import annotations

from dataclasses import replace

from service.operations.abilities import ENCODING
from service.operations.inference import vae
from service.operations.inference.latent import Noise
from service.operations.inference.vae import Result
from service.operations.operation import IMAGES, SEED, DrawOptions, Inputs, Operation, Tensor
from service.operations.typical import with_typicality
from service.runtime.model import Model
from service.runtime.program import Submit


async def _run(model: Model, submit: Submit, inputs: Inputs, options: DrawOptions) -> Result:
    result = await vae.encode(model, submit, inputs.rows, options.draws, Noise(options.seed, inputs.first))
    return with_typicality(model, result, inputs)


encode = Operation(
    name="encode",
    summary="Images to their posterior",
    description="`mean` and `log_var` (log sigma squared) of the diagonal Gaussian q(z|x); with `draws`, `latents` "
    "drawn from it. In a hierarchical model, those of a group are conditional on the means of the groups above. "
    "A binary answer without draws stacks mean and log_var along axis 1.",
    options=DrawOptions,
    run=_run,
    inputs=(IMAGES,),
    outputs=(
        Tensor("mean", ("n", "latent"), "Mean of q(z|x)"),
        Tensor("log_var", ("n", "latent"), "log sigma squared of q(z|x)"),
        Tensor("latents", ("n", "draws", "latent"), "Draws from q(z|x), with `draws`", required=False),
        replace(SEED, required=False),
    ),
    row_wise=True,
    needs=(ENCODING,),
    example={"images": ["<base64 of a PNG>"], "draws": 1, "seed": 7},
    answer={
        "mean": [[0.1, -1.2]],
        "log_var": [[-3.1, -2.7]],
        "latents": [[[0.2, -1.1]]],
        "seed": 7,
        "fingerprint": "0123456789abcdef",
    },
)
