"""POST inpaint: images of which some pixels are missing, completed."""

from __future__ import annotations

from service.operations.denoise import DenoiseOptions, NoiseKind, run
from service.operations.examples import PROGRESS
from service.operations.operation import Operation
from service.operations.restoring import NEEDS


class InpaintOptions(DenoiseOptions):
    """Those of denoise, where the pixels that are seen have no noise unless it is said."""

    noise: NoiseKind = "none"
    """The kind of noise on the pixels that are seen."""


inpaint = Operation(
    name="inpaint",
    summary="Missing pixels completed",
    description="Approximate posterior mean of an image some of whose pixels are missing: `mask` is 1 where a pixel is "
    "seen, or the picture is transparent where it is not. With `draws` and `completions`, several plausible images.",
    options=InpaintOptions,
    run=run,
    takes="images",
    example={"images": ["<base64 of a PNG>"], "mask": [[[1, 1], [0, 0]]]},
    answer={"images": [[[[0.0, 0.9], [0.1, 0.0]]]]},
    observed=True,
    masked=True,
    progress=PROGRESS,
    needs=NEEDS,
)
