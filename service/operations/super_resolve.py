"""POST super-resolve: small images to ones of the model's size."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from service.operations.examples import PROGRESS
from service.operations.inference.vae import Result
from service.operations.operation import Inputs, Operation
from service.operations.restoring import NEEDS, RestoreOptions, observed, restored
from service.runtime.model import Model
from service.runtime.program import Submit


class SuperResolveOptions(RestoreOptions):
    """How small the images are, and what is wanted."""

    factor: Annotated[int, Field(ge=2)] = 2
    """Each pixel that is sent is the mean of factor x factor pixels of the answer."""
    level: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Standard deviation of Gaussian noise on what is sent; 0 for none."""


async def _run(model: Model, submit: Submit, inputs: Inputs, options: SuperResolveOptions) -> Result:
    _, height, width = model.input_shape
    operator = ("shrink", options.factor, height, width)
    seen = observed(model, inputs, "gaussian" if options.level else None, options.level, operator)
    return await restored(model, submit, inputs, seen, options)


super_resolve = Operation(
    name="super-resolve",
    summary="Small images enlarged",
    description="Approximate posterior mean of an image of which means of blocks of factor x factor pixels are seen: "
    "it takes images of the model's size divided by `factor`, and its answer shrinks to what was sent.",
    options=SuperResolveOptions,
    run=_run,
    takes="images",
    example={"images": ["<base64 of a PNG>"], "factor": 2},
    answer={"images": [[[[0.0, 0.9], [0.1, 0.0]]]]},
    observed=True,
    progress=PROGRESS,
    needs=NEEDS,
)
