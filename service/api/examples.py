"""Examples of bodies that are not text, for the OpenAPI document: those in JSON, written in every other format."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.codecs import CODECS
from service.codecs.codec import Codec
from service.codecs.payload import FLOAT, Answer
from service.operations.examples import PICTURE, SMALL
from service.operations.operation import Operation, Tensor

SUFFIXES = {"application/octet-stream": "raw", "application/x-npy": "npy"}
"""Of media types that do not end in one."""
OPAQUE, PAGED = ("JPEG", "BMP", "HEIC"), ("TIFF", "GIF")
"""Formats that show no missing pixels, HEIC because the example has none; formats that hold several rows."""
WHITE = 255
HEIC = {
    PICTURE: (
        "AAAAHGZ0eXBoZWl4AAAAAG1pZjFoZWl4bWlhZgAAAXZtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAACJpbG9j"
        "AAAAAERAAAEAAQAAAAABmgABAAAAAAAAAHAAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRtAAAAAAABAAAA9mlw"
        "cnAAAADWaXBjbwAAAHFodmNDAQQIAAAAn/gAAAAAHvAA/Pz4+AAADwNgAAEAF0ABDAH//wQIAAADAJ/4AAADAAAeugJAYQABACZCAQEECAAA"
        "AwCf+AAAAwAAHsCCBBZbqrprmwIAAAMAMgAAAwACEGIAAQAGRAHBc8GJAAAAE2NvbHJuY2x4AAEADQAGgAAAABRpc3BlAAAAAAAAAEAAAABA"
        "AAAAKGNsYXAAAAAcAAAAAQAAABwAAAAB////3AAAAAL////cAAAAAgAAAA5waXhpAAAAAAEIAAAAGGlwbWEAAAAAAAAAAQABBYECAwWEAAAA"
        "eG1kYXQAAABsKAGuMkNjQJDisgv7kw9+lCMtXLFFdtCFOKqTNoIeW72WaU2p4hWt+0Fyy+G8ftiJIN5AsH4gBwGMQNP7k+P+A22l80t0+qh5"
        "9c0O2y6zwlnhqzAZUwej5qNQfkAGr23nIXZw+Az5ofSOaRDQ"
    ),
    SMALL: (
        "AAAAHGZ0eXBoZWl4AAAAAG1pZjFoZWl4bWlhZgAAAXZtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAACJpbG9j"
        "AAAAAERAAAEAAQAAAAABmgABAAAAAAAAAEUAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRtAAAAAAABAAAA9mlw"
        "cnAAAADWaXBjbwAAAHFodmNDAQQIAAAAn/gAAAAAHvAA/Pz4+AAADwNgAAEAF0ABDAH//wQIAAADAJ/4AAADAAAeugJAYQABACZCAQEECAAA"
        "AwCf+AAAAwAAHsCCBBZbqrprmwIAAAMAMgAAAwACEGIAAQAGRAHBc8GJAAAAE2NvbHJuY2x4AAEADQAGgAAAABRpc3BlAAAAAAAAAEAAAABA"
        "AAAAKGNsYXAAAAAOAAAAAQAAAA4AAAAB////zgAAAAL////OAAAAAgAAAA5waXhpAAAAAAEIAAAAGGlwbWEAAAAAAAAAAQABBYECAwWEAAAA"
        "TW1kYXQAAABBKAGuMkNWIHD01s9pUx7WIJ4KmFdILeBs9vdfjR7dVROgbN31lXXLMIQMtXpMmo/J1PbHiP7lJGBEnsmO5JFEYrA="
    ),
}
"""Pictures as HEIC, all in base64, because no library of the service writes this format."""


def body_examples(operations: Iterable[Operation]) -> dict[str, Any]:
    """OpenAPI's examples of all bodies that are not text, the components that `references` names."""
    return {
        name: {"summary": "The body in base64", "value": base64.b64encode(content).decode()}
        for operation in operations
        for kind in MAKERS
        for codec in CODECS
        for name, content in _example(operation, kind, codec).items()
    }


def references(operation: Operation, kind: str, codec: Codec) -> dict[str, Any]:
    """OpenAPI's `examples` of a `request` or an `answer` in this format; empty where it cannot hold one."""
    return {name: {"$ref": f"#/components/examples/{name}"} for name in _example(operation, kind, codec)}


def _example(operation: Operation, kind: str, codec: Codec) -> dict[str, bytes]:
    """The example by its name."""
    content = MAKERS[kind](operation, codec) if codec.schema and not codec.events else None
    return {f"{operation.name}-{kind}-{_suffix(codec)}": content} if content else {}


def _suffix(codec: Codec) -> str:
    return SUFFIXES.get(codec.media_type, codec.media_type.rpartition("/")[2])


def _request(operation: Operation, codec: Codec) -> bytes | None:
    """The operation's example of a request, written in another format than JSON."""
    if codec.read is None or operation.takes is None:
        return None
    sent = operation.example[operation.takes]
    if operation.takes != "images":
        return _written(codec, {operation.takes: sent})
    return _pictures(tuple(sent), codec, masked=operation.masked)


@lru_cache(64)
def _pictures(sent: tuple[str, ...], codec: Codec, *, masked: bool) -> bytes | None:
    """Pictures in base64, written in another format; with `masked` their lower half is transparent."""
    images: list[Image.Image] = [Image.open(io.BytesIO(base64.b64decode(picture))) for picture in sent]
    form = codec.media_type.rpartition("/")[2].upper()
    if not codec.media_type.startswith("image/"):
        return None if masked else _written(codec, {"images": [np.asarray(image)[None] / WHITE for image in images]})
    if (masked and form in OPAQUE) or (images[1:] and form not in PAGED):
        return None
    if form == "HEIC":
        return base64.b64decode(HEIC.get(sent[0], "")) or None
    if masked:
        images = [image.convert("RGBA") for image in images]
    for image in images if masked else ():
        seen = Image.new("L", image.size)
        seen.paste(WHITE, (0, 0, image.width, image.height // 2))
        image.putalpha(seen)
    file = io.BytesIO()
    images[0].save(file, form, **({"save_all": True, "append_images": images[1:]} if images[1:] else {}))
    return file.getvalue()


def _answer(operation: Operation, codec: Codec) -> bytes | None:
    """The operation's example of an answer likewise, without what was asked for where one array cannot hold all."""
    arrays = [one for one in operation.outputs if one.name in operation.answer and one.dtype == "float32" and one.shape]
    every = _written(codec, _of(operation, arrays))
    return every or _written(codec, _of(operation, [one for one in arrays if one.required]))


def _of(operation: Operation, tensors: Iterable[Tensor]) -> dict[str, Any]:
    return {one.name: operation.answer[one.name] for one in tensors}


def _written(codec: Codec, arrays: dict[str, Any]) -> bytes | None:
    outputs: dict[str, NDArray[np.float32]] = {name: np.array(values, FLOAT) for name, values in arrays.items()}
    content = codec.write(Answer(outputs)) if codec.write else None
    return None if content is None else bytes(content)


MAKERS: dict[str, Callable[[Operation, Codec], bytes | None]] = {"request": _request, "answer": _answer}
