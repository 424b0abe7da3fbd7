"""POST denoise: noisy images to what they are likely of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from service.contract.corruption import NoiseFamily
from service.errors import InvalidOption
from service.operations.examples import PROGRESS
from service.operations.inference.vae import Result
from service.operations.operation import Inputs, Operation
from service.operations.restoring import NEEDS, TiledOptions, observed, restored
from service.runtime.model import Model
from service.runtime.program import Submit

NoiseKind = Literal[NoiseFamily, "none"]


class DenoiseOptions(TiledOptions):
    """What is known of the noise, and what is wanted."""

    noise: NoiseKind = "gaussian"
    """The kind of noise: additive Gaussian, Poisson, pixels set to 0 or 1, pixels set to 0; `none` with a mask or a
    blur alone."""
    level: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = "auto"
    """Gaussian: standard deviation (images in [0, 1]); Poisson: that at a pixel of 1, 1 / sqrt(counts there); else the
    share of spoilt pixels. `auto` estimates it."""
    blur: Annotated[float, Field(gt=0, le=10)] | None = None
    """Standard deviation in pixels of the Gaussian blur that the image was seen through, before Gaussian noise or none.
    """


async def run(model: Model, submit: Submit, inputs: Inputs, options: DenoiseOptions) -> Result:
    """What is seen restored, as the options say.

    Raises: InvalidOption for a blur before noise of another kind.
    """
    if options.blur is not None and options.noise not in ("gaussian", "none"):
        raise InvalidOption(f"noise is {options.noise}; after a blur it must be gaussian or none")
    _, height, width = model.input_shape
    operator = None if options.blur is None else ("blur", options.blur, height, width)
    seen = observed(model, inputs, None if options.noise == "none" else options.noise, options.level, operator)
    return await restored(model, submit, inputs, seen, options)


denoise = Operation(
    name="denoise",
    summary="Noisy images restored",
    description="Approximate posterior mean of the clean image: a recognition model conditioned on the noise, the "
    "decoder, fusion with what was seen. Values may lie outside [0, 1]. A `mask` (1 seen, 0 missing) may go along; "
    "with `blur`, the image is sharpened too.",
    options=DenoiseOptions,
    run=run,
    takes="images",
    example={"images": ["<base64 of a PNG>"], "noise": "gaussian", "level": 0.25},
    answer={"images": [[[[0.0, 0.9], [0.1, 0.0]]]], "level": [0.25]},
    observed=True,
    progress=PROGRESS,
    needs=NEEDS,
)
