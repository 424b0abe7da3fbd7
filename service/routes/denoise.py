"""POST denoise: noisy images to what they are likely of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from service.operation import Inputs, Operation
from service.repository import Model
from service.routes.restoring import NEEDS, PROGRESS, TiledOptions, observed, restored
from service.vae import Result, Submit

NoiseKind = Literal["gaussian", "salt-and-pepper", "masking", "none"]


class DenoiseOptions(TiledOptions):
    """What is known of the noise, and what is wanted."""

    noise: NoiseKind = "gaussian"
    """The kind of noise: additive Gaussian, pixels set to 0 or 1, pixels set to 0; `none` with a mask alone."""
    level: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = "auto"
    """Gaussian: standard deviation (images in [0, 1]); else the share of spoilt pixels. `auto` estimates it."""


async def run(model: Model, submit: Submit, inputs: Inputs, options: DenoiseOptions) -> Result:
    """What is seen restored, as the options say."""
    seen = observed(model, inputs, None if options.noise == "none" else options.noise, options.level)
    return await restored(model, submit, inputs, seen, options)


denoise = Operation(
    name="denoise",
    summary="Noisy images restored",
    description="Approximate posterior mean of the clean image: a recognition model conditioned on the noise, the "
    "decoder, and fusion with what was seen. Values may lie outside [0, 1]. A `mask` (1 seen, 0 missing) may go along.",
    options=DenoiseOptions,
    run=run,
    takes="images",
    example={"images": ["<base64 of a PNG>"], "noise": "gaussian", "level": 0.25},
    answer={"images": [[[[0.0, 0.9], [0.1, 0.0]]]], "level": [0.25]},
    observed=True,
    progress=PROGRESS,
    needs=NEEDS,
)
