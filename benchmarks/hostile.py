"""Hostile requests: within every size limit, but costly to read, to compute or to answer.

Bodies are made when they are first asked for and kept, so that a file of them is nowhere in the repository.
"""

from __future__ import annotations

import base64
import io
import itertools
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from benchmarks.bodies import JSON, NPY, PNG, RAW, Body

FORM = "multipart/form-data; boundary=x"
JPEG, WEBP = "image/jpeg", "image/webp"
REFUSED = frozenset({400, 413, 415, 422})
"""Acceptable statuses for an invalid or too expensive body."""
BUSY = frozenset({429, 503})
FINE = frozenset({200})
SIDE = 5792
"""Side of the largest square picture that VAE_MAX_PIXELS allows by default."""
MIB = 2**20


class Hostile(NamedTuple):
    """One kind of hostile request.

    Args:
        name: Short, for tables and command lines.
        body: Makes the request, once.
        right: The statuses that answer it rightly.
        counted: Whether it is for an operation, so that the service counts it among its requests.
    """

    name: str
    body: Callable[[], Body]
    right: frozenset[int] = REFUSED | BUSY
    counted: bool = True


def json_keys(keys: int = 150_000) -> bytes:
    """A JSON object with many unknown keys."""
    return b"{" + b",".join(b'"k%d":0' % key for key in range(keys)) + b"}"


def json_option(size: int) -> bytes:
    """An unknown option, an array of `size` bytes whose every entry is an array."""
    return b'{"images":[[0]],"colour":[' + b",".join([b"[0]"] * (size // 4)) + b"]}"


def json_numbers(size: int) -> bytes:
    """Rows of 28 x 28 numbers, `size` bytes together."""
    row = b"[" + b",".join([b"[" + b",".join([b"0.5"] * 28) + b"]"] * 28) + b"]"
    return b'{"images":[' + b",".join([row] * (size // (len(row) + 1))) + b"]}"


def json_pictures(picture: bytes, count: int = 100_000) -> bytes:
    """Many base64 pictures."""
    return b'{"images":[' + b",".join([b'"' + base64.b64encode(picture) + b'"'] * count) + b"]}"


def json_nested(opening: bytes, closing: bytes, depth: int) -> bytes:
    """Deeply nested JSON."""
    return b'{"images":' + opening * depth + b"0" + closing * depth + b"}"


def json_ragged(rows: int) -> bytes:
    """Very many very short rows; the last one is longer."""
    return b'{"images":[' + b"[0]," * rows + b"[0,0]]}"


def jpeg_scans(scans: int, side: int = 4088) -> bytes:
    """A grey progressive JPEG with many scans that change nothing, each of which visits every block."""
    blocks = (side // 8) ** 2
    luminance = b"\x00" + bytes([1] * 64)
    frame = struct.pack(">BHHB", 8, side, side, 1) + b"\x01\x11\x00"
    # One code of one bit in each table: a DC difference of 0; and a run of 2**14 blocks and more that end at once.
    tables = b"\x00\x01" + bytes(15) + b"\x00" + b"\x10\x01" + bytes(15) + b"\xe0"
    dc = _segment(0xDA, b"\x01\x01\x00\x00\x00\x00") + _bits("0" * blocks)
    count = -(-blocks // (2**15 - 1))
    runs = [blocks // count + (number < blocks % count) for number in range(count)]
    assert min(runs) >= 2**14, "a shorter run has another code"
    ends = "".join(f"0{run - 2**14:014b}" for run in runs)
    ac = _segment(0xDA, b"\x01\x01\x00\x01\x3f\x00") + _bits(ends)
    head = _segment(0xDB, luminance) + _segment(0xC2, frame) + _segment(0xC4, tables)
    return b"\xff\xd8" + head + dc + ac * scans + b"\xff\xd9"


def jpeg_tall(width: int = 256, height: int = 65_500) -> bytes:
    """A colour JPEG of an odd shape, at the limit of pixels."""
    return picture("RGB", (width, height), "JPEG")


def png_text(size: int = 64 * MIB, chunks: int = 16) -> bytes:
    """A small PNG with compressed text that unpacks to `size` bytes."""
    text = b"a\x00\x00" + zlib.compress(bytes(size // chunks), 9)
    whole = picture("L", (28, 28), "PNG")
    return whole[:33] + _chunk(b"zTXt", text) * chunks + whole[33:]


def png_profile(size: int = 64 * MIB) -> bytes:
    """A small PNG with a colour profile that unpacks to `size` bytes."""
    whole = picture("L", (28, 28), "PNG")
    return whole[:33] + _chunk(b"iCCP", b"a\x00\x00" + zlib.compress(bytes(size), 9)) + whole[33:]


def png_chunks(count: int = 500_000) -> bytes:
    """A small PNG with many empty chunks of an unknown type."""
    whole = picture("L", (28, 28), "PNG")
    return whole[:33] + _chunk(b"juNk", b"") * count + whole[33:]


def png_frames(frames: int = 400, side: int = 1024) -> bytes:
    """An animated PNG."""
    return animated("PNG", frames, side)


def webp_frames(frames: int = 400, side: int = 1024) -> bytes:
    """An animated WebP."""
    return animated("WEBP", frames, side)


def animated(form: str, frames: int, side: int) -> bytes:
    """A picture of many frames, each of a different grey."""
    levels = [Image.new("L", (side, side), level % 256) for level in range(2)]
    file = io.BytesIO()
    rest = [levels[number % 2] for number in range(1, frames)]
    levels[0].save(file, form, save_all=True, append_images=rest, duration=10)
    return file.getvalue()


@cache
def picture(mode: str, size: tuple[int, int], form: str) -> bytes:
    """A file of one colour, half transparent where the mode has alpha; WebP is lossless."""
    file = io.BytesIO()
    more = {"lossless": True} if form == "WEBP" else {}
    colour = 100 if len(mode) == 1 else (100, 90, 80, 128)[: len(mode)]
    Image.new(mode, size, colour).save(file, form, **more)
    return file.getvalue()


def form_parts(count: int = 200_000) -> bytes:
    """A form of many empty fields."""
    return b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n' * count + b"--x--\r\n"


def form_names(count: int = 150_000) -> bytes:
    """A form of many fields with different names."""
    part = b'--x\r\nContent-Disposition: form-data; name="f%d"\r\n\r\n1\r\n'
    return b"".join(part % number for number in range(count)) + b"--x--\r\n"


def form_headers(count: int = 500_000) -> bytes:
    """A form with one part that has many headers."""
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n'
    return head + b"a: b\r\n" * count + b"\r\n\r\n--x--\r\n"


def form_near_boundaries(count: int = 5_000_000) -> bytes:
    """A form whose file consists of the boundary's first bytes."""
    return file_part(b"file", b"\r\n--" * (count // 4)) + b"--x--\r\n"


def form_files(picture: bytes, *names: bytes) -> bytes:
    """A form with the same picture in several fields."""
    return b"".join(file_part(name, picture) for name in names) + b"--x--\r\n"


def file_part(name: bytes, content: bytes) -> bytes:
    """One file part of a form."""
    return b'--x\r\nContent-Disposition: form-data; name="' + name + b'"; filename="a"\r\n\r\n' + content + b"\r\n"


def npy_header(text: str, data: bytes = b"") -> bytes:
    """An npy file of version 2.0 with this text as its header."""
    head = text.encode() + b"\n"
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(head)) + head + data


def npy_array(shape: str, data: bytes = b"") -> bytes:
    """An npy file whose header has this shape."""
    return npy_header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}", data)


def gzip_bomb(size: int) -> bytes:
    """`size` zeros, compressed."""
    return compressed(itertools.repeat(bytes(MIB), size // MIB), 31)


def gzip_twice(size: int) -> bytes:
    """`size` zeros, compressed twice."""
    return compressed([gzip_bomb(size)], 31)


def gzip_members(count: int = 500_000) -> bytes:
    """Many empty gzip files, one after the other."""
    return compressed([], 31) * count


def compressed(blocks: Iterator[bytes] | list[bytes], window: int) -> bytes:
    """Compress the blocks; a window of 31 makes gzip, of 15 HTTP's deflate."""
    packer = zlib.compressobj(9, zlib.DEFLATED, window)
    return b"".join([*map(packer.compress, blocks), packer.flush()])


@cache
def attacks() -> tuple[Hostile, ...]:
    """Every hostile request, for a default model of images of 28 x 28 pixels and one channel."""
    return (*_texts(), *_pictures(), *_forms(), *_arrays(), *_packed(), *_answers())


def _texts() -> Iterator[Hostile]:
    def text(name: str, content: Callable[[], bytes], right: frozenset[int] = REFUSED | BUSY) -> Hostile:
        return _sent(name, "/v1/reconstruct", JSON, content, right)

    dot = picture("L", (1, 1), "PNG"), picture("L", (1, 1), "WEBP")
    yield text("JSON, 150,000 keys", json_keys)
    yield text("JSON, unknown option, 7 MiB", lambda: json_option(7 * MIB))
    yield text("JSON, unknown option, 42 MiB", lambda: json_option(42 * MIB))
    yield text("JSON, rows of numbers, 7 MiB", lambda: json_numbers(7 * MIB), REFUSED | BUSY | FINE)
    yield text("JSON, rows of numbers, 42 MiB", lambda: json_numbers(42 * MIB), REFUSED | BUSY | FINE)
    yield text("JSON, 100,000 PNG of 1 x 1", lambda: json_pictures(dot[0]))
    yield text("JSON, 100,000 WebP of 1 x 1", lambda: json_pictures(dot[1]))
    yield text("JSON, one of 7 MiB of base64", lambda: json_pictures(bytes(5 * MIB), 1))
    yield text("JSON, 10,000 lists deep", lambda: json_nested(b"[", b"]", 10_000))
    yield text("JSON, 900 lists deep", lambda: json_nested(b"[", b"]", 900))
    yield text("JSON, 900 objects deep", lambda: json_nested(b'{"a":', b"}", 900))
    yield text("JSON, 1.5 million short rows", lambda: json_ragged(1_500_000))
    yield text("JSON, a number of 7 million digits", lambda: b'{"images":' + b"1" * 7_000_000 + b"}")
    yield text("JSON, a key of 7 MB", lambda: b'{"' + b"k" * 7_000_000 + b'":0}')
    yield text("JSON, an option of 7 MB of text", lambda: b'{"images":[[0]],"seed":"' + b"1" * 7_000_000 + b'"}')
    yield Hostile("query of 2,000 options", lambda: Body("/v1/sample?" + "a=1&" * 2000, {"accept": PNG}, b""))


def _pictures() -> Iterator[Hostile]:
    def picture_sent(
        name: str, form: str, content: Callable[[], bytes], right: frozenset[int] = REFUSED | BUSY
    ) -> Hostile:
        return _sent(name, "/v1/reconstruct?fit=resize", form, content, right)

    any_of = REFUSED | BUSY | FINE
    largest = SIDE, SIDE
    yield picture_sent("JPEG, 3,000 empty scans", JPEG, lambda: jpeg_scans(3_000))
    yield picture_sent("JPEG, 30,000 empty scans", JPEG, lambda: jpeg_scans(30_000))
    yield picture_sent("JPEG, 30,000 empty scans, 2048 x 2048", JPEG, lambda: jpeg_scans(30_000, 2048))
    yield picture_sent("JPEG, 256 x 65,500", JPEG, jpeg_tall, any_of)
    yield picture_sent(f"WebP, {SIDE} x {SIDE} RGBA", WEBP, lambda: picture("RGBA", largest, "WEBP"), any_of)
    yield picture_sent(f"PNG, {SIDE} x {SIDE} RGBA", PNG, lambda: picture("RGBA", largest, "PNG"), any_of)
    yield picture_sent("PNG, text of 64 MiB", PNG, png_text, any_of)
    yield picture_sent("PNG, profile of 64 MiB", PNG, png_profile, any_of)
    yield picture_sent("PNG, 500,000 chunks", PNG, png_chunks, any_of)
    yield picture_sent("PNG, 400 frames", PNG, png_frames, any_of)
    yield picture_sent("WebP, 400 frames", WEBP, webp_frames, any_of)


def _forms() -> Iterator[Hostile]:
    def form(name: str, content: Callable[[], bytes], path: str = "/v1/reconstruct") -> Hostile:
        return _sent(name, path, FORM, content, REFUSED | BUSY)

    huge = picture("RGBA", (SIDE, SIDE), "WEBP")
    yield form("form, 200,000 parts", form_parts)
    yield form("form, 150,000 names", form_names)
    yield form("form, 500,000 headers", form_headers)
    yield form("form, 5 MB of near boundaries", form_near_boundaries)
    yield form(
        f"form, {SIDE} x {SIDE} file and mask", lambda: form_files(huge, b"file", b"mask"), "/v1/inpaint?fit=resize"
    )
    yield form(
        f"form, 20 files of {SIDE} x {SIDE}", lambda: form_files(huge, *[b"file"] * 20), "/v1/reconstruct?fit=resize"
    )


def _arrays() -> Iterator[Hostile]:
    def array(name: str, content: Callable[[], bytes], right: frozenset[int] = REFUSED | BUSY) -> Hostile:
        return _sent(name, "/v1/reconstruct", NPY, content, right)

    yield array("npy, 3,000 parentheses", lambda: npy_header("(" * 3_000))
    yield array("npy, a header of 40 MB", lambda: npy_header(" " * 40_000_000))
    yield array("npy, 3,000 axes", lambda: npy_array(f"({'1,' * 1_500})"))
    yield array("npy, a size of 4,000 digits", lambda: npy_array(f"({'9' * 3_900},)"))
    yield array("npy, no rows of 2**60", lambda: npy_array("(0, 1152921504606846976)"))
    yield array("npy, 16 million rows of nothing", lambda: npy_array("(16000000, 0)"))
    rows = np.zeros((16_384, 1, 28, 28), "<f4")
    yield array("npy, 16,384 rows", lambda: npy_array(str(rows.shape), rows.tobytes()), REFUSED | BUSY | FINE)


def _packed() -> Iterator[Hostile]:
    def packed(name: str, form: str, coding: str, content: Callable[[], bytes]) -> Hostile:
        made = _sent(name, "/v1/reconstruct", form, content, REFUSED | BUSY)

        def body() -> Body:
            whole = made.body()
            return whole._replace(headers={**whole.headers, "content-encoding": coding})

        return made._replace(body=cache(body))

    yield packed("gzip, 1 GiB of zeros", RAW, "gzip", lambda: gzip_bomb(1024 * MIB))
    yield packed("gzip, 48 MiB of zeros", JSON, "gzip", lambda: gzip_bomb(48 * MIB))
    yield packed("gzip twice, 1 GiB", RAW, "gzip, gzip", lambda: gzip_twice(1024 * MIB))
    yield packed("gzip, 500,000 members", RAW, "gzip", gzip_members)
    yield packed("deflate, 1 GiB of zeros", RAW, "deflate", lambda: compressed(itertools.repeat(bytes(MIB), 1024), 15))


def _answers() -> Iterator[Hostile]:
    def answer(name: str, path: str, accept: str, more: frozenset[int] = frozenset()) -> Hostile:
        return Hostile(name, lambda: Body(path, {"accept": accept}, b""), FINE | BUSY | more)

    yield answer("answer, 4,096 rows, JSON", "/v1/sample?count=4096", JSON)
    yield answer("answer, 16,384 rows, JSON", "/v1/sample?count=16384", JSON, REFUSED)
    yield answer("answer, 16,384 rows, PNG", "/v1/sample?count=16384", PNG, REFUSED)
    yield answer("answer, 16,384 rows, npy", "/v1/sample?count=16384", NPY)
    yield answer("answer, 4,096 rows, events", "/v1/sample?count=4096", "text/event-stream")
    yield answer("answer, a sheet of 128 x 128", "/v1/traverse?axes=0,1&size=128", PNG, REFUSED)
    yield Hostile("GET /openapi.json", lambda: Body("/openapi.json", {}, b"", "GET"), FINE | BUSY, counted=False)
    yield Hostile("GET /metrics", lambda: Body("/metrics", {}, b"", "GET"), FINE | BUSY, counted=False)
    yield Hostile("GET /v1/models", lambda: Body("/v1/models", {}, b"", "GET"), FINE | BUSY, counted=False)


def _sent(name: str, path: str, form: str, content: Callable[[], bytes], right: frozenset[int]) -> Hostile:
    return Hostile(name, cache(lambda: Body(path, {"content-type": form}, content())), right)


def _bits(text: str) -> bytes:
    """Pack bits as a JPEG's entropy-coded data: padded with ones, each 0xFF followed by a zero byte."""
    padded = text + "1" * (-len(text) % 8)
    return int(padded, 2).to_bytes(len(padded) // 8, "big").replace(b"\xff", b"\xff\x00")


def _segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def _chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
