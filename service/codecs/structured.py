"""application/json: named arrays and options in one object."""

from __future__ import annotations

import base64
import binascii
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from service.codecs import image
from service.codecs.payload import Answer, Body, Intake, Payload
from service.errors import InvalidShape, Unreadable


def read(body: Body, _content_type: str, intake: Intake) -> Payload:
    """{"images" or "latents": nested numbers or base64 pictures, "mask": ..., and any option by its name}."""
    try:
        content = orjson.loads(body or b"{}")
    except orjson.JSONDecodeError as error:
        raise Unreadable(f"the body is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise Unreadable('the body must be a JSON object such as {"images": [...]}')
    array = _array(content.pop(intake.name), intake) if intake.name in content else None
    mask = _numbers(content.pop("mask"), "mask") if "mask" in content else None
    return Payload(array, mask, content)


def write(answer: Answer) -> bytes:
    """Every output by its name, as nested numbers, then what is said about them."""
    arrays = {name: np.ascontiguousarray(array) for name, array in answer.outputs.items()}
    return orjson.dumps({**arrays, **answer.about}, option=orjson.OPT_SERIALIZE_NUMPY)


def _array(value: Any, intake: Intake) -> NDArray[Any]:
    texts = [value] if isinstance(value, str) else value
    if not (isinstance(texts, list) and texts and isinstance(texts[0], str)):
        return _numbers(value, intake.name)
    pictures = [image.parse(_base64(text), intake) for text in texts]
    if len({picture.shape for picture in pictures}) > 1:
        raise InvalidShape("the pictures of one request must be of one size; send them one by one")
    return np.stack(pictures)


def _base64(text: Any) -> bytes:
    if not isinstance(text, str):
        raise InvalidShape("images must be all numbers or all base64 strings")
    payload = text.split(",", 1)[-1] if text.startswith("data:") else text
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Unreadable(f"a string in images is not base64 ({error})") from error


def _numbers(value: Any, name: str) -> NDArray[Any]:
    """Nested lists of numbers; numpy would read text as numbers and None as NaN, so its own choice of type decides."""
    try:
        array = np.array(value)
    except ValueError as error:
        raise InvalidShape(f"{name} must be a rectangular array of numbers; its rows differ in length") from error
    if array.dtype.kind not in "fiu" or array.ndim == 0:
        raise InvalidShape(f"{name} must be nested lists of numbers, without text, null, true or false")
    return array
