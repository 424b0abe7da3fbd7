"""POST denoise: noisy images to what they are likely of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from service import vae
from service.errors import InvalidOption
from service.latent import Noise
from service.operation import DrawOptions, Inputs, Operation
from service.repository import Model
from service.vae import Result, Submit


class DenoiseOptions(DrawOptions):
    """What is known of the noise, and what is wanted."""

    noise: Literal["gaussian", "salt-and-pepper", "masking", "none"] = "gaussian"
    """The kind of noise: additive Gaussian, pixels set to 0 or 1, pixels set to 0; `none` with a mask alone."""
    level: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = "auto"
    """Gaussian: standard deviation (images in [0, 1]); else the share of spoilt pixels. `auto` estimates it."""
    quality: Literal["fast"] = "fast"
    """`fast` is one pass through the recognition model of corrupted images."""
    uncertainty: bool = False
    """Whether the answer holds `std`, the posterior standard deviation of every pixel."""


async def _run(model: Model, submit: Submit, inputs: Inputs, options: DenoiseOptions) -> Result:
    return await vae.denoise(
        model.plan,
        submit,
        model.latent_shape,
        inputs.rows,
        inputs.mask,
        None if options.noise == "none" else _column(model, options.noise),
        len(model.manifest.noise_families),
        None if options.level == "auto" else options.level,
        options.draws,
        options.uncertainty,
        Noise(options.seed, inputs.first),
    )


def _column(model: Model, noise: str) -> int:
    families = model.manifest.noise_families
    if noise not in families:
        raise InvalidOption(f"noise is {noise}, but model {model.manifest.name} knows {', '.join(families)} and none")
    return families.index(noise)


denoise = Operation(
    name="denoise",
    summary="Noisy images restored",
    description="Approximate posterior mean of the clean image: a recognition model conditioned on the noise, the "
    "decoder, and fusion with what was seen. Values may lie outside [0, 1]. A `mask` (1 seen, 0 missing) may go along.",
    options=DenoiseOptions,
    run=_run,
    takes="images",
    example={"images": ["<base64 of a PNG>"], "noise": "gaussian", "level": 0.25},
    answer={"images": [[[[0.0, 0.9], [0.1, 0.0]]]], "level": [0.25]},
    observed=True,
    needs=("recognition", "noise_level", "fusion"),
)
