"""POST inpaint: images of which some pixels are missing, completed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from service.operation import Inputs, Operation
from service.repository import Model
from service.routes.restoring import NEEDS, TiledOptions, observed, restored
from service.vae import Result, Submit


class InpaintOptions(TiledOptions):
    """What is known of the pixels that are seen, and what is wanted."""

    noise: Literal["gaussian", "salt-and-pepper", "masking", "none"] = "none"
    """The kind of noise on the pixels that are seen."""
    level: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = "auto"
    """Of the noise, where there is any; see denoise."""


async def _run(model: Model, submit: Submit, inputs: Inputs, options: InpaintOptions) -> Result:
    seen = observed(model, inputs, None if options.noise == "none" else options.noise, options.level)
    return await restored(model, submit, inputs, seen, options)


inpaint = Operation(
    name="inpaint",
    summary="Missing pixels completed",
    description="Approximate posterior mean of an image some of whose pixels are missing: `mask` is 1 where a pixel is "
    "seen, or the picture is transparent where it is not. With `draws` and `completions`, several plausible images.",
    options=InpaintOptions,
    run=_run,
    takes="images",
    example={"images": ["<base64 of a PNG>"], "mask": [[[1, 1], [0, 0]]]},
    answer={"images": [[[[0.0, 0.9], [0.1, 0.0]]]]},
    observed=True,
    masked=True,
    needs=NEEDS,
)
