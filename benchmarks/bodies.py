"""The same images in every form that some server reads."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray
from PIL import Image

JSON, RAW, NPY, PNG = "application/json", "application/octet-stream", "application/x-npy", "image/png"
Images = NDArray[np.float32]


class Body(NamedTuple):
    """One request: where it goes, its headers, its bytes."""

    path: str
    headers: dict[str, str]
    content: bytes

    def wire(self) -> bytes:
        """The whole HTTP/1.1 request."""
        named = {"host": "127.0.0.1", **self.headers, "content-length": str(len(self.content))}
        lines = "".join(f"{name}: {value}\r\n" for name, value in named.items())
        return f"POST {self.path} HTTP/1.1\r\n{lines}\r\n".encode() + self.content


Form = Callable[[Images], Body]


def images(rows: int) -> Images:
    """Rings of different sizes on black, in 256 grey levels: about as many empty pixels as a digit has."""
    y, x = np.mgrid[:28, :28] - 13.5
    radius = 4.0 + 6.0 * np.random.default_rng(0).random((rows, 1, 1, 1))
    ring = np.exp(-((np.hypot(x, y) - radius) ** 2) / 2.0)
    grey = np.rint(np.where(ring > 0.05, ring, 0.0) * 255.0) / 255.0
    return grey.astype(np.float32)


def json(path: str, name: str = "images", *, flat: bool = False) -> Form:
    """{name: nested numbers}; flat is one list of 784 an image."""

    def form(rows: Images) -> Body:
        shaped = rows.reshape(len(rows), -1) if flat else rows
        return Body(path, {"content-type": JSON}, orjson.dumps({name: _numbers(shaped)}))

    return form


def json_one(path: str, name: str) -> Form:
    """{name: one image's nested numbers}."""
    return lambda rows: Body(path, {"content-type": JSON}, orjson.dumps({name: _numbers(rows[0])}))


def raw(path: str) -> Form:
    """Little-endian float32, nothing else."""
    return lambda rows: Body(path, {"content-type": RAW}, rows.astype("<f4").tobytes())


def npy(path: str) -> Form:
    """numpy's own file."""

    def form(rows: Images) -> Body:
        file = io.BytesIO()
        np.save(file, rows)
        return Body(path, {"content-type": NPY}, file.getvalue())

    return form


def png(path: str) -> Form:
    """The picture as the body."""
    return lambda rows: Body(path, {"content-type": PNG}, _png(rows))


def png_form(path: str, name: str) -> Form:
    """The picture as a file of a form."""

    def form(rows: Images) -> Body:
        head = (
            f'--part\r\nContent-Disposition: form-data; name="{name}"; filename="a.png"\r\nContent-Type: {PNG}\r\n\r\n'
        )
        content = head.encode() + _png(rows) + b"\r\n--part--\r\n"
        return Body(path, {"content-type": "multipart/form-data; boundary=part"}, content)

    return form


def oip(path: str) -> Form:
    """Open Inference Protocol, numbers in JSON."""

    def form(rows: Images) -> Body:
        entry = {**_tensor(rows), "data": _numbers(rows.ravel())}
        return Body(path, {"content-type": JSON}, orjson.dumps({"inputs": [entry]}))

    return form


def oip_binary(path: str) -> Form:
    """Open Inference Protocol, binary tensor data both ways."""

    def form(rows: Images) -> Body:
        entry = {**_tensor(rows), "parameters": {"binary_data_size": rows.nbytes}}
        output = {"name": "x_mean", "parameters": {"binary_data": True}}
        head = orjson.dumps({"inputs": [entry], "outputs": [output]})
        headers = {"content-type": RAW, "inference-header-content-length": str(len(head))}
        return Body(path, headers, head + rows.astype("<f4").tobytes())

    return form


def _tensor(rows: Images) -> dict[str, Any]:
    return {"name": "x", "shape": list(rows.shape), "datatype": "FP32"}


def _numbers(array: Images) -> Any:
    """Grey levels as people send them: four digits, not the seventeen of a float64."""
    return array.astype(np.float64).round(4).tolist()


def _png(rows: Images) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.rint(rows[0, 0] * 255.0).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
