"""Forms: several files, masks, empty and unknown fields, and malformed bodies."""

from __future__ import annotations

import base64
import io
from contextlib import suppress
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from service.codecs import multipart
from service.codecs.payload import Intake, Meter
from service.errors import ServiceError

JSON = {"accept": "application/json"}
Files = list[tuple[str, tuple[str, bytes]]]


def png(values: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.rint(np.asarray(values).reshape(8, 8) * 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(array, np.float32))
    return file.getvalue()


def part(name: str, content: bytes, further: str = "") -> bytes:
    return f'--x\r\nContent-Disposition: form-data; name="{name}"{further}\r\n\r\n'.encode() + content + b"\r\n"


def post(client: httpx.Client, path: str, *parts: bytes, end: bytes = b"--x--\r\n") -> httpx.Response:
    headers = {"content-type": "multipart/form-data; boundary=x", **JSON}
    return client.post(f"/v1/{path}", content=b"".join(parts) + end, headers=headers)


@pytest.mark.parametrize("form", ["png", "npy", "both", "npy of several"])
def test_several_files_are_several_rows(client: httpx.Client, images: Any, form: str) -> None:
    """Rows keep the order of the form."""
    expected = client.post("/v1/encode", json={"images": images.tolist()}).json()
    each = {
        "png": [png(row) for row in images],
        "npy": [npy(row[0]) for row in images],
        "both": [npy(images[0]), png(images[1]), npy(images[2:])],
        "npy of several": [npy(images[:2]), npy(images[2])],
    }[form]
    files: Files = [("file", ("a", content)) for content in each]
    found = client.post("/v1/encode", files=files, headers=JSON)
    assert found.status_code == 200, found.text
    assert np.allclose(found.json()["mean"], expected["mean"], atol=1e-5)


@pytest.mark.parametrize("form", ["png", "npy", "one png", "one npy"])
def test_masks_are_one_for_all_or_one_each(client: httpx.Client, images: Any, form: str) -> None:
    """Masks are pictures or arrays, one for all rows or one a row."""
    masks = np.ones((3, 8, 8))
    masks[:, :3] = 0
    if "one" not in form:
        masks[1] = masks[1].T
    expected = client.post("/v1/inpaint", json={"images": images.tolist(), "mask": masks.tolist()}).json()
    write = png if "png" in form else npy
    sent = [write(mask) for mask in (masks[:1] if "one" in form else masks)]
    files: Files = [("file", ("a", png(row))) for row in images] + [("mask", ("m", mask)) for mask in sent]
    found = client.post("/v1/inpaint", files=files, headers=JSON)
    assert found.status_code == 200, found.text
    assert np.allclose(found.json()["images"], expected["images"], atol=1e-5)


def test_what_browsers_send_for_empty_fields_counts_as_not_sent(client: httpx.Client, images: Any) -> None:
    """An empty optional file and blank text count as not sent."""
    file = part("file", png(images[0]), '; filename="a.png"')
    empty = part("mask", b"", '; filename=""') + part("level", b"") + part("seed", b"") + part("other", b"")
    answer = post(client, "denoise", empty, file)
    assert answer.status_code == 200, answer.text
    assert answer.json() == post(client, "denoise", file).json()


def test_a_file_is_known_by_the_name_of_its_field(client: httpx.Client, images: Any) -> None:
    """As `curl -F 'file=<digit.png'` sends it, without a name of its own."""
    answer = post(client, "encode", part("file", png(images[0])))
    assert answer.status_code == 200, answer.text


def test_options_of_what_takes_no_file_come_in_forms(client: httpx.Client) -> None:
    """`curl -F count=3 -F seed=7` and `curl -d 'count=3&seed=7'`."""
    expected = client.post("/v1/sample?count=3&seed=7").json()["images"]
    assert post(client, "sample", part("count", b"3"), part("seed", b"7")).json()["images"] == expected
    urlencoded = client.post("/v1/sample", data={"count": "3", "seed": "7", "temperature": ""})
    assert urlencoded.json()["images"] == expected


FILE = part("file", npy(np.zeros((8, 8))), '; filename="a"')
REFUSED: dict[str, tuple[tuple[bytes, ...], int, str, str]] = {
    "an unknown file": ((FILE, part("image", b"x", '; filename="b"')), 422, "invalid_option", '"image"'),
    "a file of another name alone": ((part("image", b"x", '; filename="b"'),), 400, "unreadable_body", '"image"'),
    "an unknown option": ((FILE, part("drawz", b"1")), 422, "invalid_option", '"drawz"'),
    "an option twice": ((FILE, part("draws", b"1"), part("draws", b"2")), 422, "invalid_option", '"draws" twice'),
    "an option that is not UTF-8": ((FILE, part("draws", b"\xff")), 400, "unreadable_body", '"draws"'),
    "an empty file": ((part("file", b"", '; filename=""'),), 400, "unreadable_body", "`file`"),
    "a broken picture": ((part("file", b"\x89PNG\r\n\x1a\n", '; filename="a"'),), 400, "unreadable_body", "`file`"),
    "a mask without axes": ((FILE, part("mask", npy(1.0))), 422, "invalid_shape", "mask"),
    "a mask of one axis": ((FILE, part("mask", npy(np.ones(8)))), 422, "invalid_shape", "mask"),
    "a mask of 64 numbers": ((FILE, part("mask", npy(np.ones(64)))), 422, "invalid_shape", "reshape"),
    "files of two sizes": ((FILE, part("file", npy(np.zeros((9, 9))))), 422, "invalid_shape", "one size"),
    "two masks for one image": (
        (FILE, part("mask", npy(np.ones((8, 8)))), part("mask", npy(np.ones((8, 8))))),
        422,
        "invalid_shape",
        "2 masks",
    ),
    "no name": ((b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n",), 400, "unreadable_body", "name="),
    "no header": ((b"--x\r\n\r\n1\r\n",), 400, "unreadable_body", "name="),
    "a name that is not UTF-8": (
        (b'--x\r\nContent-Disposition: form-data; name="\xff"\r\n\r\n1\r\n',),
        400,
        "unreadable_body",
        "UTF-8",
    ),
    "an extended name": (
        (b"--x\r\nContent-Disposition: form-data; name*=UTF-8''file\r\n\r\n1\r\n",),
        400,
        "unreadable_body",
        "name=",
    ),
    "an unknown coding": (
        (b'--x\r\nContent-Disposition: form-data; name="file"\r\nContent-Transfer-Encoding: rot13\r\n\r\n1\r\n',),
        400,
        "unreadable_body",
        "rot13",
    ),
    "a form within": (
        (b"--x\r\nContent-Type: multipart/mixed; boundary=y\r\n\r\n--y\r\n\r\n1\r\n--y--\r\n",),
        400,
        "unreadable_body",
        "name=",
    ),
    "many parameters": ((FILE, part("a", b"1", ";" * 100)), 400, "unreadable_body", "parameters"),
    "a long header": ((FILE, part("a" * 10_000, b"1")), 400, "unreadable_body", "header"),
    "many headers": (
        (FILE, b"--x\r\n" + b"A: b\r\n" * 100 + b"\r\n1\r\n"),
        400,
        "unreadable_body",
        "header",
    ),
    "200,000 fields": (tuple(part("a", b"") for _ in range(200_000)), 413, "too_large", "1024"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_with_a_form_is_named(client: httpx.Client, case: str) -> None:
    """The problem has its status, its code, and the field's name."""
    parts, status, code, word = REFUSED[case]
    answer = post(client, "denoise", *parts)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert word in answer.json()["detail"]


@pytest.mark.parametrize("end", [b"", b"--x", b"--x\r\n", b"--"])
def test_a_form_that_breaks_off_is_refused(client: httpx.Client, end: bytes) -> None:
    """A truncated form is refused, because it may lack an option."""
    answer = post(client, "encode", FILE, part("draws", b"2"), end=end)
    assert (answer.status_code, answer.json()["code"]) == (400, "unreadable_body")
    assert post(client, "encode", FILE, part("draws", b"2"), end=b"--x--").status_code == 200


@pytest.mark.parametrize(
    "boundary", ["", "; boundary=", '; boundary=""', "; boundary=" + "b" * 300, "; boundary=other"]
)
def test_a_boundary_that_is_none(client: httpx.Client, boundary: str) -> None:
    """A boundary that is missing, empty, too long or not the body's is refused."""
    headers = {"content-type": f"multipart/form-data{boundary}"}
    answer = client.post("/v1/encode", content=FILE + b"--x--\r\n", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (400, "unreadable_body")


def test_files_where_none_is_taken_and_urlencoded_where_one_is(client: httpx.Client) -> None:
    """Both are refused rather than read as something else."""
    answer = post(client, "sample", FILE)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_option")
    answer = client.post("/v1/encode", data={"draws": "1"})
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")


def test_base64_parts_are_decoded(client: httpx.Client, images: Any) -> None:
    """Parts in base64 are decoded, as some mail libraries write them."""
    head = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\nContent-Transfer-Encoding: base64\r\n\r\n'
    )
    answer = post(client, "encode", head + base64.encodebytes(png(images[0])) + b"\r\n")
    assert answer.status_code == 200, answer.text


PIECES = st.lists(
    st.one_of(
        st.sampled_from(
            [b"--x", b"--x--", b"\r\n", b"\r\n--x\r\n", b'form-data; name="file"', b"Content-Disposition: "]
        ),
        st.sampled_from(
            [FILE, part("draws", b"2"), b'; filename="\xff"', b"name=", b"\0", b"Content-Type: a;charset=b"]
        ),
        st.binary(max_size=6),
    ),
    max_size=12,
)


@given(
    PIECES, st.sampled_from(["x", "", '"x"', "x; charset=utf-16", "\xff"]), st.sampled_from(["images", "latents", ""])
)
def test_no_form_raises_what_is_not_promised(pieces: list[bytes], boundary: str, name: str) -> None:
    """A form of any bytes raises only documented errors."""
    shape = (8,) if name == "latents" else (1, 8, 8)
    with suppress(ServiceError):
        content_type = f"multipart/form-data; boundary={boundary}"
        found = multipart.read(b"".join(pieces), content_type, Intake(name, shape, Meter()))
        assert (found.array is None) == (name == "")
