"""The operation super-resolve: small images to images of the model's size."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from service.errors import InvalidOption
from service.operations.examples import PROGRESS, SMALL
from service.operations.inference.vae import Result
from service.operations.operation import IMAGES, MASK, Inputs, Operation
from service.operations.restoration import NEEDS, OUTPUTS, WARM_UP, RestoreOptions, observed, restored
from service.runtime.model import Model
from service.runtime.program import Submit


class SuperResolveOptions(RestoreOptions):
    """Options of super-resolve: the factor, the noise, and how to restore."""

    factor: Annotated[int, Field(ge=2)] = 2
    """Each pixel that is sent is the mean of factor x factor pixels of the answer."""
    level: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Standard deviation of Gaussian noise on what is sent; 0 for none."""

    def check(self, model: Model) -> None:
        """Refuse a factor that does not divide the model's height and width, where they are not free.

        Raises:
            InvalidOption: The message names the factors that do.
        """
        if model.manifest.size is not None:
            return
        _, height, width = model.input_shape
        if height % self.factor or width % self.factor:
            fitting = [str(k) for k in range(2, min(height, width) + 1) if not (height % k or width % k)]
            known = ", ".join(fitting) or "none does"
            raise InvalidOption(f"factor is {self.factor}; it must divide {height} x {width}: {known}")

    @property
    def noise_family(self) -> str | None:
        """Gaussian noise at a level above 0."""
        return "gaussian" if self.level else None

    @property
    def enlargement(self) -> int:
        """Height and width of the answer's images in those of the request's."""
        return self.factor

    def sent_shape(self, model: Model) -> tuple[int, ...]:
        """Shape (c, h, w) of one image in the request: height and width divided by the factor, rounded down.

        Height and width are 0 where they are free.
        """
        channels, *size = model.input_shape
        height, width = (length and max(1, length // self.factor) for length in size)
        return channels, height, width


async def _run(model: Model, submit: Submit, inputs: Inputs, options: SuperResolveOptions) -> Result:
    height, width = (options.factor * length for length in inputs.rows.shape[-2:])
    operator = ("shrink", options.factor, height, width)
    seen = observed(model, inputs, options.noise_family, options.level, operator)
    return await restored(model, submit, inputs, seen, options)


super_resolve = Operation(
    name="super-resolve",
    summary="Small images enlarged",
    description="Approximate posterior mean of an image, given the means of its blocks of factor x factor pixels. It "
    "takes images of the model's size divided by `factor`; the block means of its answer are what was sent.",
    options=SuperResolveOptions,
    run=_run,
    inputs=(IMAGES, MASK),
    outputs=OUTPUTS,
    row_wise=True,
    example={"images": [SMALL], "factor": 2},
    answer={"images": [[[[0.0, 0.9], [0.1, 0.0]]]]},
    progress=PROGRESS,
    needs=NEEDS,
    warm_up=WARM_UP,
)
