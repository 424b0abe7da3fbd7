"""The operation inpaint: fills in missing pixels of images."""

from __future__ import annotations

from service.operations.denoise import DenoiseOptions, NoiseKind, run
from service.operations.examples import HALF, PICTURE, PROGRESS
from service.operations.operation import IMAGES, MASK, Operation
from service.operations.restoration import NEEDS, OUTPUTS, WARM_UP


class InpaintOptions(DenoiseOptions):
    """Options of inpaint: those of denoise, but without noise by default."""

    noise: NoiseKind = "none"
    """The kind of noise on the pixels that are seen."""


inpaint = Operation(
    name="inpaint",
    summary="Missing pixels completed",
    description="Approximate posterior mean of an image some of whose pixels are missing: `mask` is 1 where a pixel is "
    "seen, or the picture is transparent where it is not. With `draws` and `completions`, several plausible images.",
    options=InpaintOptions,
    run=run,
    inputs=(IMAGES, MASK),
    outputs=OUTPUTS,
    row_wise=True,
    example={"images": [PICTURE], "mask": HALF},
    answer={"images": [[[[0.0, 0.9], [0.1, 0.0]]]]},
    masked=True,
    progress=PROGRESS,
    needs=NEEDS,
    warm_up=WARM_UP,
)
