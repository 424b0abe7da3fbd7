"""POST encode: images to q(z|x)."""

from __future__ import annotations

from service.operations.inference import vae
from service.operations.inference.latent import Noise
from service.operations.inference.vae import Result
from service.operations.operation import DrawOptions, Inputs, Operation
from service.runtime.model import Model
from service.runtime.program import Submit


async def _run(model: Model, submit: Submit, inputs: Inputs, options: DrawOptions) -> Result:
    noise = Noise(options.seed, inputs.first)
    return await vae.encode(model.plan, submit, model.latent_shape, inputs.rows, options.draws, noise)


encode = Operation(
    name="encode",
    summary="Images to their posterior",
    description="`mean` and `log_var` (log sigma squared) of the diagonal Gaussian q(z|x), each (n, d); with `draws`, "
    "`latents` (n, draws, d) from it. A binary answer without draws stacks mean and log_var along axis 1.",
    options=DrawOptions,
    run=_run,
    takes="images",
    example={"images": ["<base64 of a PNG>"], "draws": 1, "seed": 7},
    answer={
        "mean": [[0.1, -1.2]],
        "log_var": [[-3.1, -2.7]],
        "latents": [[[0.2, -1.1]]],
        "seed": 7,
        "fingerprint": "0123456789abcdef",
    },
)
