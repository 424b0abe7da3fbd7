"""The operation denoise: noisy images y to E[x | y]."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from service.contract.corruption import NoiseName
from service.errors import InvalidOption
from service.operations.examples import PICTURE, PROGRESS
from service.operations.inference.vae import Result
from service.operations.operation import IMAGES, MASK, Inputs, Operation
from service.operations.restoration import NEEDS, OUTPUTS, WARM_UP, TiledOptions, default_noise, observed, restored
from service.operations.typical import with_typicality
from service.runtime.model import Model
from service.runtime.program import Submit

NoiseKind = Literal[NoiseName, "none", "auto"]


class DenoiseOptions(TiledOptions):
    """Options of denoise: the noise, and how to restore."""

    noise: NoiseKind | None = None
    """The kind of noise: additive Gaussian, Poisson, pixels set to 0 or 1, pixels set to 0; `processed`, which a
    camera's pipeline and JPEG leave; `none` for a mask or a blur alone; `auto` finds kinds and levels together. The
    default is `auto` where the model can and no level is named, else `gaussian`."""
    level: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = "auto"
    """Gaussian: standard deviation (images in [0, 1]); Poisson: that at a pixel of 1, 1 / sqrt(counts there);
    processed: root mean square; else the share of corrupted pixels. `auto` estimates it."""
    blur: Annotated[float, Field(gt=0, le=10)] | None = None
    """Standard deviation, in pixels, of a Gaussian blur of the image. Noise after it must be `gaussian` or `none`."""

    @property
    def noise_family(self) -> str | None:
        """The family of noise that the options name; None where they name none, or leave it to the model."""
        return None if self.noise in ("none", "auto") else self.noise


async def run(model: Model, submit: Submit, inputs: Inputs, options: DenoiseOptions) -> Result:
    """Restore noisy, blurred or masked images.

    Args:
        model: The model.
        submit: Runs a program in the batcher.
        inputs: Observed images, (n, c, h, w), and the mask.
        options: Family and level of the noise, the blur, and how to restore.

    Returns:
        The outputs that `OUTPUTS` declares.

    Raises:
        InvalidOption: The noise after a blur is not Gaussian, or the model does not know the noise.
    """
    noise = options.noise or ("gaussian" if options.blur else default_noise(model, options.level))
    if options.blur is not None and noise not in ("gaussian", "none"):
        raise InvalidOption(f"noise is {noise}; after a blur it must be gaussian or none")
    height, width = inputs.rows.shape[-2:]
    operator = None if options.blur is None else ("blur", options.blur, height, width)
    seen = observed(model, inputs, None if noise == "none" else noise, options.level, operator)
    result = await restored(model, submit, inputs, seen, options)
    if operator is not None:
        return result
    family = None if seen.family is None else model.manifest.noise_families[seen.family]
    return with_typicality(model, result, inputs, result.outputs["images"], family)


denoise = Operation(
    name="denoise",
    summary="Noisy images restored",
    description="Approximate posterior mean of the clean image given the noisy one. Values may lie outside [0, 1]. A "
    "`mask` (1 seen, 0 missing) is optional; with `blur`, the image is deblurred too.",
    options=DenoiseOptions,
    run=run,
    inputs=(IMAGES, MASK),
    outputs=OUTPUTS,
    row_wise=True,
    example={"images": [PICTURE], "noise": "gaussian", "level": 0.25},
    answer={"images": [[[[0.0, 0.9], [0.1, 0.0]]]], "level": [0.25]},
    progress=PROGRESS,
    needs=NEEDS,
    warm_up=WARM_UP,
)
