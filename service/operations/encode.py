"""The operation encode: images x to the posterior q(z|x)."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from service.contract.corruption import NoiseName
from service.errors import InvalidOption
from service.operations.abilities import ENCODING
from service.operations.examples import PICTURE
from service.operations.inference import conditional, vae
from service.operations.inference.latent import Noise
from service.operations.inference.levels import of_one_level
from service.operations.inference.vae import Result
from service.operations.operation import IMAGES, SEED, DrawOptions, Inputs, Operation, Tensor
from service.operations.restoration import default_noise, observed
from service.operations.typical import with_typicality
from service.runtime.model import Model
from service.runtime.program import Submit


class EncodeOptions(DrawOptions):
    """Options of encode: draws; and the noise of the images, which only a conditional model takes."""

    noise: Literal[NoiseName, "none", "auto"] | None = None
    """The kind of noise, as `denoise` takes it; only for a conditional model, whose latents are those of p(z|y)."""
    level: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = "auto"
    """Its level likewise."""


async def _run(model: Model, submit: Submit, inputs: Inputs, options: EncodeOptions) -> Result:
    noise = Noise(options.seed, inputs.first)
    if "completion" not in model.graphs:
        if options.noise is not None or options.level != "auto":
            raise InvalidOption(
                f"model {model.manifest.name} encodes clean images; leave noise and level out, or denoise first"
            )
        return with_typicality(model, await vae.encode(model, submit, inputs.rows, options.draws, noise), inputs)
    kind = options.noise or default_noise(model, options.level)
    seen = observed(model, inputs, None if kind == "none" else kind, options.level)
    if not seen.known:
        seen, _ = await of_one_level(model, submit, seen, None)
    return await conditional.encode(model, submit, seen, options.draws, noise)


encode = Operation(
    name="encode",
    summary="Images to their posterior",
    description="`mean` and `log_var` (log sigma squared) of the diagonal Gaussian q(z|x); with `draws`, `latents` "
    "drawn from it. In a hierarchical model, those of a group are conditional on the means of the groups above. Of a "
    "conditional model, p(z|y) of a noisy image y. "
    "A binary answer without draws stacks mean and log_var along axis 1.",
    options=EncodeOptions,
    run=_run,
    inputs=(IMAGES,),
    outputs=(
        Tensor("mean", ("n", "latent"), "Mean of q(z|x)"),
        Tensor("log_var", ("n", "latent"), "log sigma squared of q(z|x)"),
        Tensor("latents", ("n", "draws", "latent"), "Draws from q(z|x), with `draws`", required=False),
        replace(SEED, required=False),
    ),
    row_wise=True,
    needs=((*ENCODING, "completion"),),
    example={"images": [PICTURE], "draws": 1, "seed": 7},
    answer={
        "mean": [[0.1, -1.2]],
        "log_var": [[-3.1, -2.7]],
        "latents": [[[0.2, -1.1]]],
        "seed": 7,
    },
)
