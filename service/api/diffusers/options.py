"""The query string of diffusers' remote VAE."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import parse_qs

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.contract.images import Fit
from service.errors import InvalidOption, quoted

MOST_AXES = 4
MOST_FIELDS = 32
"""Most parameters of a query string, each axis of a shape counted."""
Factor = Annotated[float, Field(allow_inf_nan=False)]
Size = Annotated[int, Field(ge=1)]


class TensorOptions(BaseModel):
    """Shape and type of a tensor in the body, and the factors of latents."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: Annotated[tuple[Size, ...], Field(max_length=MOST_AXES)] | None = None
    dtype: Literal["float16", "float32", "bfloat16", "uint8"] | None = None
    scaling_factor: Annotated[Factor, Field(gt=0)] | None = None
    shift_factor: Factor = 0.0
    input_tensor_type: Literal["binary"] = "binary"
    output_tensor_type: Literal["binary"] = "binary"

    @property
    def factors(self) -> tuple[float, float]:
        """(scale, shift): latents on the wire are (latents of the model - shift) * scale."""
        return self.scaling_factor or 1.0, self.shift_factor


class EncodeOptions(TensorOptions):
    """Those of encoding. Clients do not send `fit`, but their caller may write it behind the path.

    Attributes:
        fit: How images of another size are brought to the model's.
    """

    fit: Fit | None = None


class DecodeOptions(TensorOptions):
    """Those of decoding, with the form of the answer.

    Attributes:
        height: Height of the image, for latents that Flux packs.
        width: Its width.
        do_scaling: Whether to use the factors of the model where none are sent.
    """

    image_format: Literal["jpg", "png"] = "jpg"
    output_type: Literal["pil", "pt"] = "pil"
    partial_postprocess: bool = False
    height: Size | None = None
    width: Size | None = None
    do_scaling: bool = False


def options_of(query: bytes, kind: type[TensorOptions]) -> Any:
    """Read a query string.

    Raises:
        InvalidOption: A parameter is unknown, invalid, or there twice.
    """
    try:
        found = parse_qs(query.decode("latin-1"), keep_blank_values=True, max_num_fields=MOST_FIELDS)
    except ValueError as error:
        raise InvalidOption(f"the query string has more than {MOST_FIELDS} parameters") from error
    for name, values in found.items():
        if len(values) > 1 and name != "shape":
            raise InvalidOption(f"the query string names {quoted(name)} twice; send it once")
    try:
        options = kind.model_validate(
            {name: values if name == "shape" else values[0] for name, values in found.items()}
        )
    except ValidationError as error:
        wrong = error.errors()[0]
        name = quoted(".".join(map(str, wrong["loc"])))
        raise InvalidOption(f"{name}: {wrong['msg']} (parameters: {', '.join(kind.model_fields)})") from error
    if (options.shape is None) != (options.dtype is None):
        raise InvalidOption("shape and dtype describe a tensor together; send both, or none with a picture")
    return options
