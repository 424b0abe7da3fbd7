"""The operation preview: images as a model gets them, which shows TIFF and 16 bits to a browser that reads neither."""

from __future__ import annotations

from service.operations.inference.vae import Result
from service.operations.operation import IMAGES, MASK, MEANS, ImageOptions, Inputs, Operation
from service.runtime.model import Model
from service.runtime.program import Submit, Trip


async def _run(_model: Model, _submit: Submit, inputs: Inputs, _options: ImageOptions) -> Result:
    return Result({"images": inputs.rows}, {}, Trip((), 0.0, 0.0))


preview = Operation(
    name="preview",
    summary="Images as the model gets them",
    description="The images of the request, read, scaled and fitted to the model; no graph runs.",
    options=ImageOptions,
    run=_run,
    inputs=(IMAGES, MASK),
    outputs=(MEANS,),
    row_wise=True,
    example={"images": ["<base64 of a PNG>"]},
    answer={"images": [[[[0.0, 0.9], [0.1, 0.0]]]]},
)
