"""Encodes the same images for each server, and decodes its answers."""

from __future__ import annotations

import io
import json as standard_json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray
from PIL import Image

JSON, RAW, NPY, PNG = "application/json", "application/octet-stream", "application/x-npy", "image/png"
LEVEL = 0.25
"""Standard deviation of the Gaussian noise that requests with a PNG state."""
GREY = 1.0 / 255.0
Images = NDArray[np.float32]


class Body(NamedTuple):
    """One request: path, headers, body."""

    path: str
    headers: dict[str, str]
    content: bytes
    method: str = "POST"

    def wire(self) -> bytes:
        """The whole HTTP/1.1 request."""
        named = {"host": "127.0.0.1", **self.headers, "content-length": str(len(self.content))}
        lines = "".join(f"{name}: {value}\r\n" for name, value in named.items())
        return f"{self.method} {self.path} HTTP/1.1\r\n{lines}\r\n".encode() + self.content


class Form(NamedTuple):
    """Format of a server: builds a request from images, and reads the numbers of its answer.

    step: what those numbers are rounded to.
    """

    ask: Callable[[Images], Body]
    read: Callable[[bytes], Images]
    step: float = 0.0


def images(rows: int) -> Images:
    """Rings of different sizes on black, in 256 grey levels: about as many empty pixels as a digit has."""
    y, x = np.mgrid[:28, :28] - 13.5
    radius = 4.0 + 6.0 * np.random.default_rng(0).random((rows, 1, 1, 1))
    ring = np.exp(-((np.hypot(x, y) - radius) ** 2) / 2.0)
    grey = np.rint(np.where(ring > 0.05, ring, 0.0) * 255.0) / 255.0
    return grey.astype(np.float32)


def json(path: str, name: str = "images", *, flat: bool = False) -> Form:
    """{name: nested numbers} both ways; flat is one list of 784 an image."""

    def ask(rows: Images) -> Body:
        shaped = rows.reshape(len(rows), -1) if flat else rows
        return Body(path, {"content-type": JSON}, orjson.dumps({name: _numbers(shaped)}))

    return Form(ask, lambda content: _array(orjson.loads(content)[name]))


def json_to_list(path: str, name: str) -> Form:
    """{name: nested numbers} as the request, nested numbers as the answer."""
    return json(path, name)._replace(read=lambda content: _array(orjson.loads(content)))


def json_one(path: str, name: str) -> Form:
    """{name: one image's nested numbers} both ways."""
    form = json(path, name)
    return form._replace(ask=lambda rows: Body(path, {"content-type": JSON}, orjson.dumps({name: _numbers(rows[0])})))


def raw(path: str) -> Form:
    """Little-endian float32, nothing else."""
    return Form(lambda rows: Body(path, {"content-type": RAW}, rows.astype("<f4").tobytes()), _floats)


def npy(path: str) -> Form:
    """numpy's own file."""

    def ask(rows: Images) -> Body:
        file = io.BytesIO()
        np.save(file, rows)
        return Body(path, {"content-type": NPY}, file.getvalue())

    return Form(ask, lambda content: np.load(io.BytesIO(content)))


def png(path: str) -> Form:
    """The picture as the body, its noise's level in the path."""
    return Form(lambda rows: Body(f"{path}?level={LEVEL}", {"content-type": PNG}, _png(rows)), _pixels, GREY)


def png_form(path: str, name: str) -> Form:
    """The picture as a file of a form, its noise's level as a field."""

    def ask(rows: Images) -> Body:
        part = "--part\r\nContent-Disposition: form-data; name="
        level = f'{part}"level"\r\n\r\n{LEVEL}\r\n'
        head = f'{part}"{name}"; filename="a.png"\r\nContent-Type: {PNG}\r\n\r\n'
        content = (level + head).encode() + _png(rows) + b"\r\n--part--\r\n"
        return Body(path, {"content-type": "multipart/form-data; boundary=part"}, content)

    return Form(ask, _pixels, GREY)


def oip(path: str, given: str = "x") -> Form:
    """Open Inference Protocol, numbers in JSON; `given` is the name of the input."""

    def ask(rows: Images) -> Body:
        entry = {**_tensor(rows, given), "data": _numbers(rows.ravel())}
        return Body(path, {"content-type": JSON}, orjson.dumps({"inputs": [entry]}))

    return Form(ask, lambda content: _array(orjson.loads(content)["outputs"][0]["data"]))


def oip_binary(path: str, given: str = "x", made: str = "x_mean") -> Form:
    """Open Inference Protocol, binary tensor data both ways; `given` and `made` are the names of the tensors."""

    def ask(rows: Images) -> Body:
        entry = {**_tensor(rows, given), "parameters": {"binary_data_size": rows.nbytes}}
        output = {"name": made, "parameters": {"binary_data": True}}
        head = orjson.dumps({"inputs": [entry], "outputs": [output]})
        headers = {"content-type": RAW, "inference-header-content-length": str(len(head))}
        return Body(path, headers, head + rows.astype("<f4").tobytes())

    def read(content: bytes) -> Images:
        _, head = standard_json.JSONDecoder().raw_decode(content.decode("latin-1"))
        return _floats(content[head:])

    return Form(ask, read)


def _tensor(rows: Images, name: str) -> dict[str, Any]:
    return {"name": name, "shape": list(rows.shape), "datatype": "FP32"}


def _numbers(array: Images) -> Any:
    """Grey levels rounded to four digits, as clients send them."""
    return array.astype(np.float64).round(4).tolist()


def _array(numbers: Any) -> Images:
    return np.array(numbers, np.float32)


def _floats(content: bytes) -> Images:
    return np.frombuffer(content, "<f4")


def _pixels(content: bytes) -> Images:
    return np.asarray(Image.open(io.BytesIO(content), formats=["PNG"]), np.float32) / np.float32(255.0)


def _png(rows: Images) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.rint(rows[0, 0] * 255.0).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
