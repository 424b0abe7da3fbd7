"""Arrays in bodies: .npy headers, types, axes, rounding, base64, and values that are no numbers."""

from __future__ import annotations

import base64
import io
import json
import re
import struct
from contextlib import suppress
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from service.codecs import npy, structured
from service.codecs.payload import Intake, Meter, as_images, as_rows
from service.errors import InvalidShape, InvalidValue, ServiceError

NPY = {"content-type": "application/x-npy", "accept": "application/json"}
JSON = {"content-type": "application/json"}


def saved(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def with_header(text: bytes, data: bytes = b"", version: int = 1) -> bytes:
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + data


def header(shape: str, descr: str = "'<f4'", fortran: str = "False") -> bytes:
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n".encode()


def mean(client: httpx.Client, path: str = "encode", **request: Any) -> Any:
    answer = client.post(f"/v1/{path}", **request)
    assert answer.status_code == 200, answer.text
    return answer.json()["mean"]


BROKEN: dict[str, bytes] = {
    "negative sides that multiply to a length": with_header(header("(-1, -64)"), bytes(256)),
    "sides of 10^30 and 0": with_header(header("(10**30, 0)")),
    "sides of 30 digits and 0": with_header(header(f"({10**30}, 0)")),
    "70 axes": with_header(header(str((1,) * 70)), bytes(4)),
    "a shape that is True": with_header(header("True"), bytes(4)),
    "a side that is True": with_header(header("(True, 8, 8)"), bytes(256)),
    "a side that is no whole number": with_header(header("(8.0, 8)"), bytes(256)),
    "a shape that is a list": with_header(header("[8, 8]"), bytes(256)),
    "a shape that is a text": with_header(header("'8'"), bytes(256)),
    "a shape that is missing": with_header(b"{'descr': '<f4', 'fortran_order': False}"),
    "another key": with_header(header("(8, 8), 'a': 1"), bytes(256)),
    "records": with_header(header("(8, 8)", "[('a', '<f4')]"), bytes(256)),
    "a type that is a number": with_header(header("(8, 8)", "4"), bytes(256)),
    "a type of 10^9 bytes": with_header(header("(1,)", "'<f999999999'"), bytes(4)),
    "an order that is a number": with_header(header("(8, 8)", fortran="1"), bytes(256)),
    "deep brackets": with_header(b"(" * 3000),
    "deep signs": with_header(b"-" * 3000 + b"1"),
    "NUL": with_header(b"\0" * 100),
    "no UTF-8": with_header(b"\xff" * 100, version=3),
    "a set": with_header(b"{1, 2}"),
    "a dictionary of lists": with_header(b"{[]: 1}"),
    "a header longer than the file": b"\x93NUMPY\x01\0\xff\xff{}",
    "a version to come": with_header(header("(8, 8)"), bytes(256), version=9),
    "nothing but the magic": b"\x93NUMPY",
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_header_is_the_callers_mistake(client: httpx.Client, case: str) -> None:
    """A broken .npy header is a 400, in a body and in a form."""
    for request in ({"content": BROKEN[case], "headers": NPY}, {"files": {"file": ("a", BROKEN[case])}}):
        answer = client.post("/v1/encode", **request)  # type: ignore[arg-type]
        assert answer.status_code in (400, 422), answer.text
        assert answer.json()["code"] in ("unreadable_body", "invalid_shape")


NAMES = st.sampled_from(["'<f4'", "'>f8'", "'|u1'", "'?'", "'O'", "'<M8[s]'", "'<U4'", "''", "None", "'<f16'", "{}"])
SIDES = st.one_of(
    st.integers(-3, 10).map(str), st.sampled_from(["10**9", "True", "1.0", "'a'", "-0", "()", str(2**64)])
)


@given(NAMES, st.lists(SIDES, max_size=10), st.sampled_from(["True", "False", "0", "None"]), st.integers(0, 300))
def test_no_header_raises_what_is_not_promised(name: str, sides: list[str], fortran: str, length: int) -> None:
    """A .npy header of any type, shape and order raises only documented errors."""
    text = header(f"({', '.join(sides)}{',' if len(sides) == 1 else ''})", name, fortran)
    with suppress(ServiceError):
        array = npy.parse(with_header(text, bytes(length)), Intake("images", (1, 8, 8), Meter()))
        assert array.nbytes == length


@given(st.binary(max_size=80), st.integers(0, 4))
def test_no_bytes_as_header_raise_what_is_not_promised(text: bytes, version: int) -> None:
    """Arbitrary bytes as a .npy header raise only documented errors."""
    with suppress(ServiceError):
        npy.parse(with_header(text, version=version), Intake("images", (1, 8, 8), Meter()))


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(0, 1), st.integers(-(2**63), 2**64), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=12,
)


@given(
    st.dictionaries(
        st.one_of(st.sampled_from(["images", "latents", "mask", "draws", "a\0b"]), st.text(max_size=4)), VALUES
    ),
    st.sampled_from(["images", "latents", ""]),
)
def test_no_json_raises_what_is_not_promised(content: dict[str, Any], name: str) -> None:
    """JSON of any structure raises only documented errors."""
    shape = (8,) if name == "latents" else (1, 2, 2)
    intake = Intake(name, shape, Meter(), masked=True, or_latents=name == "images")
    with suppress(ServiceError):
        payload = structured.read(json.dumps(content).encode(), "", intake)
        if payload.array is not None:
            as_rows(payload.array, shape, name)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"images": [[NaN]]}', "NaN"),
        ('{"images": [[-Infinity, 1]]}', "-Infinity"),
        ('{"images": [[0.5]], "draws": nan}', "nan"),
        ('{"a\\u0000b": 1}', "a?b"),
        ('{"draws": 1, "images": [[0]], "draws": 2}', "twice"),
    ],
)
def test_what_is_wrong_with_json_is_said(client: httpx.Client, text: str, word: str) -> None:
    """The message leads to the place of the error in the JSON."""
    answer = client.post("/v1/encode", content=text, headers=JSON)
    assert answer.status_code in (400, 422)
    assert word in answer.json()["detail"]


SHAPE = (3, 6, 4)


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("read", [as_rows, as_images])
def test_the_last_axis_may_be_the_channels(read: Any, bare: bool) -> None:
    """(h, w, c) and (n, h, w, c), for colour and for grey."""
    for channels in (1, 3, 4):
        x = np.random.default_rng(0).random((2, channels, 6, 4)).astype(np.float32)
        x = x[:1] if bare else x
        moved = np.moveaxis(x, 1, -1)
        assert np.array_equal(read(moved[0] if bare else moved, (channels, 6, 4), "images"), x)


def test_the_models_own_shape_comes_first() -> None:
    """Where both readings are possible, channels come before height."""
    x = np.random.default_rng(0).random((2, 3, 6, 3)).astype(np.float32)
    assert np.array_equal(as_rows(x, (3, 6, 3), "images"), x)
    assert np.array_equal(as_images(x, (3, 6, 3), "images"), x)
    assert as_rows(np.zeros((3, 8, 8)), (1, 8, 8), "images").shape == (3, 1, 8, 8)
    assert as_images(np.zeros((3, 8, 8)), (1, 8, 8), "images").shape == (3, 1, 8, 8)
    assert as_images(np.zeros((5, 9, 7)), (1, 8, 8), "images").shape == (5, 1, 9, 7)
    assert as_images(np.zeros((28, 28, 1)), (1, 8, 8), "images").shape == (1, 1, 28, 28)
    assert as_images(np.zeros((9, 224, 200, 3)), (3, 32, 32), "images").shape == (9, 3, 224, 200)


@pytest.mark.parametrize("shape", [(224, 224, 3), (3, 224, 224), (224, 224, 4), (2, 224, 224, 3), (2, 3, 224, 224)])
@pytest.mark.parametrize("path", ["encode", "encode?fit=resize", "denoise?fit=pad", "denoise?fit=tile"])
def test_colour_is_never_read_as_grey_images(client: httpx.Client, shape: tuple[int, ...], path: str) -> None:
    """An array of colour images is refused, with advice to convert it to grey."""
    answer = client.post(f"/v1/{path}", content=saved(np.zeros(shape, np.float32)), headers=NPY)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_shape")
    assert "grey" in answer.json()["detail"]
    assert "fit=" not in answer.json()["detail"]


@pytest.mark.parametrize("path", ["encode", "encode?fit=resize"])
@pytest.mark.parametrize("shape", [(5, 64), (64,)])
def test_flat_rows_are_to_be_reshaped(client: httpx.Client, shape: tuple[int, ...], path: str) -> None:
    """Flat rows are refused, with advice to reshape them."""
    detail = client.post(f"/v1/{path}", json={"images": np.zeros(shape).tolist()}).json()["detail"]
    assert f"reshape it to ({shape[0] if len(shape) == 2 else ''}" in detail
    assert "1, 8, 8)" in detail
    assert "fit=" not in detail


def test_grey_images_for_a_model_of_colours() -> None:
    """Grey images for a colour model get advice that works."""
    for shape in ((28, 28), (5, 28, 28), (5, 1, 28, 28), (28, 28, 1)):
        for read in (as_rows, as_images):
            with pytest.raises(InvalidShape) as refused:
                read(np.zeros(shape), SHAPE, "images")
            assert "fit=" not in str(refused.value)


@pytest.mark.parametrize("kind", [np.uint8, bool, ">f4", ">f8", "<f2"])
def test_8_bit_and_black_and_white_arrays(client: httpx.Client, kind: Any) -> None:
    """0 to 255 are 255ths, bool is 0 and 1, and so is every float type, of either byte order."""
    bits = np.random.default_rng(0).integers(0, 2, (3, 8, 8))
    values = bits * 255 if kind is np.uint8 else bits
    expected = mean(client, json={"images": bits.tolist()})
    assert mean(client, content=saved(values.astype(kind)), headers=NPY) == expected
    levels = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)
    expected = mean(client, json={"images": (levels / 255).tolist()})
    assert np.allclose(mean(client, content=saved(levels), headers=NPY), expected, atol=1e-5)


def test_8_bit_images_of_0_and_1_are_ambiguous(client: httpx.Client) -> None:
    """uint8 images of 0 and 1 are refused, unless they are black or another image shows the scale."""
    bits = np.eye(8, dtype=np.uint8)
    answer = client.post("/v1/encode", content=saved(bits), headers=NPY)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_value")
    assert "bool" in answer.json()["detail"]
    assert mean(client, content=saved(0 * bits), headers=NPY) == mean(client, json={"images": (0 * bits).tolist()})
    both = np.stack([bits, 255 * bits])
    assert np.allclose(
        mean(client, content=saved(both), headers=NPY), mean(client, json={"images": (both / 255).tolist()})
    )


@pytest.mark.parametrize(("scale", "taken"), [(1, True), (255, True), (128, False), (2, False)])
def test_8_bit_masks(scale: int, taken: bool) -> None:
    """A uint8 mask may have 0 and 1, or 0 and 255."""
    mask = np.eye(8, dtype=np.uint8)
    if taken:
        assert np.array_equal(as_rows(mask * np.uint8(scale), (1, 8, 8), "mask")[0, 0], mask)
    else:
        with pytest.raises(InvalidValue, match="255"):
            as_rows(mask * np.uint8(scale), (1, 8, 8), "mask")
    with pytest.raises(InvalidValue, match="255"):
        as_rows(mask + 254 * (mask.T[::-1]), (1, 8, 8), "mask")


@pytest.mark.parametrize("kind", [np.uint8, bool])
def test_latents_are_floats(client: httpx.Client, kind: Any) -> None:
    """Integers are refused by their type."""
    answer = client.post("/v1/decode", content=saved(np.zeros((1, 8), kind)), headers=NPY)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_shape")
    assert np.dtype(kind).name in answer.json()["detail"]


@pytest.mark.parametrize("value", [1.0000001, 1.000001, -1e-7, -1e-6])
def test_rounding_is_no_error(client: httpx.Client, value: float) -> None:
    """A value outside by a millionth is moved to the bound."""
    bound = np.clip(value, 0, 1)
    for accept in ("application/json", "application/x-npy"):
        headers = {**NPY, "accept": accept}
        near, exact = (
            client.post("/v1/reconstruct", content=saved(np.full((8, 8), one)), headers=headers)
            for one in (value, bound)
        )
        assert near.status_code == 200
        assert near.content == exact.content


@pytest.mark.parametrize("kind", [np.float32, np.float64, ">f8"])
@pytest.mark.parametrize(
    ("values", "status"),
    [((-0.0, 1.0), 200), ((-0.0, 1.5), 422), ((-0.0, -0.5), 422), ((-0.5, 2.0), 422), ((0.5, np.nan), 422),
     ((0.5, np.inf), 422), ((0.5, -np.inf), 422)],
)  # fmt: skip
def test_zero_below_zero_is_zero(client: httpx.Client, kind: str, values: tuple[float, float], status: int) -> None:
    """-0.0 is 0, and does not hide a value outside the range: its bits exceed all positive numbers."""
    image = np.full((8, 8), 0.25, kind)
    image[3, 3:5] = values
    headers = {"content-type": "application/x-npy"}
    assert client.post("/v1/encode", content=saved(image), headers=headers).status_code == status


@pytest.mark.parametrize("value", [1.00001, 1.0000021, -2e-6, 255.0, 3e38])
def test_a_message_shows_how_far_a_value_lies_outside(client: httpx.Client, value: float) -> None:
    """The message never shows a number that would be in the range."""
    detail = client.post("/v1/encode", json={"images": np.full((8, 8), value).tolist()}).json()["detail"]
    printed = [float(number) for number in re.findall(r"-?\d[\d.]*(?:e[+-]?\d+)?", detail.split(";")[0])]
    assert any(number < 0 or number > 1 for number in printed), detail


def test_what_float32_cannot_hold_is_said(client: httpx.Client) -> None:
    """A number that would become infinity in float32 is refused."""
    answer = client.post("/v1/decode", json={"latents": [[1e300] * 8]})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_value")
    assert "float32" in answer.json()["detail"]


def texts(body: bytes) -> dict[str, str]:
    plain = base64.b64encode(body).decode()
    return {
        "line breaks": base64.encodebytes(body).decode(),
        "CRLF": "\r\n".join(plain[k : k + 60] for k in range(0, len(plain), 60)),
        "url-safe": base64.urlsafe_b64encode(body).decode(),
        "unpadded": plain.rstrip("="),
        "url-safe, unpadded, spaced": " " + base64.urlsafe_b64encode(body).decode().rstrip("=") + "\n",
        "a data URL": f"data:image/png;base64,{plain}",
        "a data URL of capitals": f"DATA:image/png;BASE64,{plain}",
        "a data URL with parameters": f"data:image/png;name=a.png;base64,{base64.encodebytes(body).decode()}",
    }


@pytest.mark.parametrize("kind", list(texts(b"")))
def test_every_way_to_write_base64(client: httpx.Client, kind: str) -> None:
    """Every alphabet, padding and line break of base64 gives the same answer."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 8), np.uint8))
    expected = mean(client, json={"images": (np.asarray(image) / 255).tolist()})
    file = io.BytesIO()
    image.save(file, "PNG")
    for tail in (b"", b"\xfb\xff", b"\xff\xef\xfe\xff"):  # after the end of the picture
        assert np.allclose(mean(client, json={"images": [texts(file.getvalue() + tail)[kind]]}), expected, atol=1e-5)


@pytest.mark.parametrize("text", ["data:image/png,abc", "a", "aGVsbG8==x", "äöü", "\0", "data:", "data:;base64,!"])
def test_what_is_no_base64(client: httpx.Client, text: str) -> None:
    """Invalid base64 is refused without the decoder's own words."""
    answer = client.post("/v1/encode", json={"images": [text]})
    assert (answer.status_code, answer.json()["code"]) == (400, "unreadable_body")


LONG = "\x07é" * 5000
REPEATED: dict[str, dict[str, Any]] = {
    "a media type": {"url": "/v1/encode", "content": b"x", "headers": {"content-type": "<c>a" * 500}},
    "an option": {"url": "/v1/sample", "json": {LONG: 1}},
    "a fingerprint": {"url": "/v1/sample", "headers": {"x-fingerprint": "<a'" * 500}},
    "a field": {"url": "/v1/sample", "files": {"a" * 3000: (None, b"1")}},
    "no picture": {"url": "/v1/encode", "content": b"nothing", "headers": {"content-type": "image/png"}},
    "half a picture": {"url": "/v1/encode", "content": b"\x89PNG\r\n\x1a\n", "headers": {"content-type": "image/png"}},
    "an .npy of objects": {"url": "/v1/encode", "content": with_header(header("(1,)", "'|O'"), b"x"), "headers": NPY},
    "a time": {"url": "/v1/sample", "headers": {"x-timeout-ms": "9" * 400}},
}


@pytest.mark.parametrize("case", REPEATED)
def test_messages_are_short_and_plain(client: httpx.Client, case: str) -> None:
    """Messages hold no address, no Python, and no text of a length that the client chooses."""
    answer = client.post(**REPEATED[case])
    assert 400 <= answer.status_code < 500, answer.text
    detail = answer.json()["detail"]
    assert len(detail) < 500
    for word in (" object at ", "0x", "b'", 'b"', "\\x", "Error(", "\n"):
        assert word not in detail


def test_an_option_named_twice_in_the_query_is_refused(client: httpx.Client) -> None:
    """A repeated option is refused in the query string as in a form and in JSON."""
    answer = client.post("/v1/sample?count=1&count=2")
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_option")
