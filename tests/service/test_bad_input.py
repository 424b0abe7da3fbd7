"""Bad input gets the documented problem, and other requests are still served."""

from __future__ import annotations

import base64
import io
import socket
import struct
import zlib
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

NPY = {"content-type": "application/x-npy"}
RAW = {"content-type": "application/octet-stream"}
JSON = {"content-type": "application/json"}
PNG = {"content-type": "image/png"}
GOOD = np.zeros((1, 8, 8), np.float32)


def npy_header(shape: str, descr: str = "'<f4'") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def saved(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def with_value(value: float) -> bytes:
    x = GOOD.copy()
    x[0, 3, 3] = value
    return x.tobytes()


UNREADABLE = (400, "unreadable_body")
Case = tuple[str, dict[str, Any], int, str]
CASES: dict[str, Case] = {
    "no body": ("encode", {}, *UNREADABLE),
    "not JSON": ("encode", {"content": b"{nope", "headers": JSON}, *UNREADABLE),
    "JSON, not an object": ("encode", {"json": [1, 2]}, *UNREADABLE),
    "100,000 levels": ("encode", {"content": b'{"images":' + b"[" * 10**5, "headers": JSON}, *UNREADABLE),
    "900 levels": (
        "encode",
        {"content": b'{"images":' + b"[" * 900 + b"]" * 900 + b"}", "headers": JSON},
        422,
        "invalid_shape",
    ),
    "no images": ("encode", {"json": {"draws": 1}}, 422, "invalid_shape"),
    "an empty list": ("encode", {"json": {"images": []}}, 422, "invalid_shape"),
    "ragged rows": ("encode", {"json": {"images": [[1, 2], [3]]}}, 422, "invalid_shape"),
    "ragged rows, as many numbers": (
        "encode",
        {"json": {"images": [[[0.0] * (8 + (k == 0) - (k == 1)) for k in range(8)]]}},
        422,
        "invalid_shape",
    ),
    "lists among numbers": ("encode", {"json": {"images": [[0.5, [0.5] * 63]]}}, 422, "invalid_shape"),
    "numbers among lists": ("encode", {"json": {"images": [[0.5], 0.5]}}, 422, "invalid_shape"),
    "an integer of 30 digits": ("encode", {"content": b'{"images": [[%d]]}' % 10**29, "headers": JSON}, *UNREADABLE),
    "text for numbers": ("encode", {"json": {"images": [[["0.5"] * 8] * 8]}}, 422, "invalid_shape"),
    "null for a number": ("encode", {"json": {"images": [[[None] * 8] * 8]}}, 422, "invalid_shape"),
    "an object for images": ("encode", {"json": {"images": {"a": 1}}}, 422, "invalid_shape"),
    "a huge integer": ("encode", {"content": b'{"images": [[1e999]]}', "headers": JSON}, *UNREADABLE),
    "another size": ("encode", {"json": {"images": np.zeros((9, 8)).tolist()}}, 422, "invalid_shape"),
    "an empty image to be made larger": ("encode?fit=resize", {"json": {"images": [[]]}}, 422, "invalid_shape"),
    "not base64": ("encode", {"json": {"images": ["!!!"]}}, *UNREADABLE),
    "base64 of no picture": (
        "encode",
        {"json": {"images": [base64.b64encode(b"hello").decode()]}},
        *UNREADABLE,
    ),
    "text and numbers": ("encode", {"json": {"images": ["aGVsbG8=", 3]}}, *UNREADABLE),
    "NaN": ("encode", {"content": with_value(np.nan), "headers": RAW}, 422, "invalid_value"),
    "infinity": ("reconstruct", {"content": with_value(np.inf), "headers": RAW}, 422, "invalid_value"),
    "NaN to denoise": ("denoise", {"content": with_value(np.nan), "headers": RAW}, 422, "invalid_value"),
    "above the range": ("encode", {"content": with_value(255.0), "headers": RAW}, 422, "invalid_value"),
    "below the range": ("encode", {"content": with_value(-0.1), "headers": RAW}, 422, "invalid_value"),
    "8-bit levels to denoise": ("denoise", {"content": with_value(255.0), "headers": RAW}, 422, "invalid_value"),
    "NaN latents": ("decode", {"content": np.full(8, np.nan, "<f4").tobytes(), "headers": RAW}, 422, "invalid_value"),
    "bytes that are no rows": ("encode", {"content": b"123", "headers": RAW}, 422, "invalid_shape"),
    "an npy of objects": (
        "encode",
        {"content": npy_header("(1,)", "'|O'") + b"x", "headers": NPY},
        *UNREADABLE,
    ),
    "an npy of 10^12 elements": (
        "encode",
        {"content": npy_header("(1000000, 1000000)") + b"1234", "headers": NPY},
        *UNREADABLE,
    ),
    "an npy of negative size": (
        "encode",
        {"content": npy_header("(-1, 8, 8)"), "headers": NPY},
        *UNREADABLE,
    ),
    "a truncated npy": ("encode", {"content": saved(GOOD)[:-8], "headers": NPY}, *UNREADABLE),
    "an npy header that is code": (
        "encode",
        {"content": npy_header("__import__('os')"), "headers": NPY},
        *UNREADABLE,
    ),
    "an npy of integers": ("encode", {"content": saved(GOOD.astype(np.int64)), "headers": NPY}, *UNREADABLE),
    "an npy of complex numbers": ("encode", {"content": saved(GOOD + 1j), "headers": NPY}, *UNREADABLE),
    "an empty npy": (
        "encode",
        {"content": saved(np.zeros((0, 8, 8), np.float32)), "headers": NPY},
        422,
        "invalid_shape",
    ),
    "a 1 x 100,000 PNG": ("encode", {"content": png_header(1, 100_000), "headers": PNG}, *UNREADABLE),
    "a 100,000 x 100,000 PNG": ("encode", {"content": png_header(10**5, 10**5), "headers": PNG}, 413, "too_large"),
    "a truncated JPEG": (
        "encode",
        {"content": jpeg()[:400], "headers": {"content-type": "image/jpeg"}},
        *UNREADABLE,
    ),
    "a GIF called PNG": ("encode", {"content": b"GIF89a" + b"\0" * 50, "headers": PNG}, *UNREADABLE),
    "a picture to decode": ("decode", {"content": png_header(8, 8), "headers": PNG}, *UNREADABLE),
    "a form without a file": ("encode", {"files": {"other": b"x"}}, *UNREADABLE),
    "a form without a boundary": (
        "encode",
        {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
        *UNREADABLE,
    ),
    "an unknown media type": (
        "encode",
        {"content": b"x", "headers": {"content-type": "text/csv"}},
        415,
        "unsupported_media_type",
    ),
    "no media type": ("encode", {"content": b"x"}, 415, "unsupported_media_type"),
    "a body compressed in a way that is not read": (
        "encode",
        {"content": GOOD.tobytes(), "headers": {**RAW, "content-encoding": "br"}},
        415,
        "unsupported_media_type",
    ),
    "a body that is not compressed as it says": (
        "encode",
        {"content": GOOD.tobytes(), "headers": {**RAW, "content-encoding": "gzip"}},
        *UNREADABLE,
    ),
    "more fields than there are options": (
        "encode",
        {"json": dict.fromkeys(map(str, range(65)), 0)},
        422,
        "invalid_option",
    ),
    "a list for an option": ("encode", {"json": {"images": [], "draws": [0]}}, 422, "invalid_option"),
    "a field twice": ("encode", {"content": b'{"draws": 1, "draws": 2}', "headers": JSON}, 422, "invalid_option"),
    "a NUL in a field's name": (
        "encode",
        {"content": b'{"images": [[0]], "a\\u0000b": 1}', "headers": JSON},
        422,
        "invalid_option",
    ),
    "no time at all": (
        "encode",
        {"content": GOOD.tobytes(), "headers": {**RAW, "x-timeout-ms": "00"}},
        422,
        "invalid_option",
    ),
    "an unknown option": ("encode?drawz=1", {"content": GOOD.tobytes(), "headers": RAW}, 422, "invalid_option"),
    "an unknown JSON key": ("sample", {"json": {"counts": 3}}, 422, "invalid_option"),
    "an option of another type": ("sample?count=many", {}, 422, "invalid_option"),
    "a negative count": ("sample?count=-1", {}, 422, "invalid_option"),
    "too many draws": ("encode?draws=65", {"content": GOOD.tobytes(), "headers": RAW}, 422, "invalid_option"),
    "a level of zero": ("denoise?level=0", {"content": GOOD.tobytes(), "headers": RAW}, 422, "invalid_option"),
    "an unknown noise": ("denoise?noise=pink", {"content": GOOD.tobytes(), "headers": RAW}, 422, "invalid_option"),
    "a mask where none is taken": (
        "encode",
        {"json": {"images": GOOD.tolist(), "mask": GOOD.tolist()}},
        422,
        "invalid_option",
    ),
    "a mask of another size": (
        "denoise",
        {"json": {"images": GOOD.tolist(), "mask": [[1, 0]]}},
        422,
        "invalid_shape",
    ),
    "two masks for three images": (
        "denoise",
        {"json": {"images": np.zeros((3, 8, 8)).tolist(), "mask": np.ones((2, 8, 8)).tolist()}},
        422,
        "invalid_shape",
    ),
    "too many rows": ("sample?count=16385", {}, 413, "too_large"),
    "too many rows with draws": (
        "encode?draws=64",
        {"content": np.zeros((257, 8, 8), "<f4").tobytes(), "headers": RAW},
        413,
        "too_large",
    ),
    "a deadline that is none": (
        "sample",
        {"headers": {"x-timeout-ms": "soon"}},
        422,
        "invalid_option",
    ),
    "latents as PNG": (
        "encode",
        {"content": GOOD.tobytes(), "headers": {**RAW, "accept": "image/png"}},
        406,
        "not_acceptable",
    ),
    "samples and latents as npy": (
        "sample?latents=true",
        {"headers": {"accept": "application/x-npy"}},
        406,
        "not_acceptable",
    ),
    "an unknown model": ("models/nobody/encode", {"content": GOOD.tobytes(), "headers": RAW}, 404, "unknown_model"),
    "an unknown version": (
        "models/digits/versions/9/encode",
        {"content": GOOD.tobytes(), "headers": RAW},
        404,
        "unknown_model",
    ),
    "an unknown path": ("dream", {}, 404, "not_found"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_the_documented_problem(client: httpx.Client, case: str) -> None:
    """Status, stable code and a message of bounded length; the next request is served."""
    path, request, status, code = CASES[case]
    response = client.post(f"/v1/{path}", **request)
    problem = response.json()
    assert (response.status_code, problem["code"]) == (status, code), problem
    assert response.headers["content-type"] == "application/problem+json"
    assert problem["status"] == status
    assert 0 < len(problem["detail"]) < 500
    assert client.post("/v1/encode", content=GOOD.tobytes(), headers=RAW).status_code == 200


def test_a_wrong_shape_names_both_and_the_fix(client: httpx.Client) -> None:
    """The message names both shapes and the fix."""
    detail = client.post("/v1/encode", json={"images": np.zeros((9, 7)).tolist()}).json()["detail"]
    assert "(9, 7)" in detail
    assert "(n, 1, 8, 8)" in detail
    assert "fit=" in detail


def test_a_body_above_the_limit_names_the_setting(client: httpx.Client) -> None:
    """A body is refused by its announced length, or by the bytes that arrive."""
    head = (
        f"POST /v1/encode HTTP/1.1\r\nhost: localhost\r\ncontent-length: {64 * 2**20 + 4}\r\nconnection: close\r\n\r\n"
    )
    with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection:
        connection.sendall(head.encode())
        announced = connection.makefile().read()
    chunked = client.post("/v1/encode", content=(b"x" * 2**20 for _ in range(66)), headers=RAW)
    assert announced.startswith("HTTP/1.1 413")
    assert chunked.status_code == 413
    for text in (announced, chunked.text):
        assert "VAE_MAX_BODY_BYTES" in text


def test_a_wrong_method_is_a_problem_too(client: httpx.Client) -> None:
    """405 with the same form as every other error."""
    response = client.get("/v1/encode")
    assert (response.status_code, response.json()["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"
