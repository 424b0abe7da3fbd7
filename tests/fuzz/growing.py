"""Large inputs from small ones: a part is repeated, so that a fuzzer can change the whole."""

from __future__ import annotations

import base64

from benchmarks import hostile

GROWN = 2**19
"""Bytes of an input that was grown."""
NUMBER = b"#"
"""In a part that is repeated, the number of the repetition takes its place."""


def grown(data: bytes) -> bytes:
    """A large body of a small input.

    Args:
        data: Where the repeated part begins and how long it is, two bytes each, and the body. NUMBER within the part
            stands for the number of the repetition.
    """
    begin, length, body = int.from_bytes(data[:2], "big"), int.from_bytes(data[2:4], "big"), data[4:]
    begin = min(begin, len(body))
    part = body[begin : begin + length]
    if not part:
        return body
    if NUMBER in part:
        longest = len(part.replace(NUMBER, b"%d" % GROWN))
        repeated = b"".join(part.replace(NUMBER, b"%d" % number) for number in range(GROWN // longest))
    else:
        repeated = part * max(1, (GROWN - len(body)) // len(part))
    return body[:begin] + repeated + body[begin + len(part) :]


def growing(head: bytes, part: bytes, tail: bytes = b"") -> bytes:
    """The input of which `grown` makes head, part, part, ..., tail."""
    return len(head).to_bytes(2, "big") + len(part).to_bytes(2, "big") + head + part + tail


_DOTS = [base64.b64encode(hostile.picture("L", (1, 1), form)) for form in ("PNG", "WEBP")]
_PNG, _JPEG = (hostile.picture("L", (8, 8), form) for form in ("PNG", "JPEG"))
_TEXT = hostile.png_text(2**20, 1)[33 : -len(hostile.picture("L", (28, 28), "PNG")[33:])]
"""A chunk that unpacks to a MiB."""
_SCANS, _ONE_MORE = hostile.jpeg_scans(1, 1024), hostile.jpeg_scans(2, 1024)
_NPY = b"\x93NUMPY\x02\0\xff\x0f\0\0"
"""The begin of a file whose header is as long as may be."""
_FLOATS = _NPY + b"{'descr': '<f4', 'fortran_order': False, 'shape': ("
_FIELD = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n1\r\n'
_FILE = b'--x\r\nContent-Disposition: form-data; name="file"'

_WHOLE = b"\xff\xff"
_TENSOR = b'{"inputs":[{"name":"x","shape":[1],"datatype":"%b","data":['

GROWING = {
    "inference": [
        growing(_WHOLE + _TENSOR % b"FP32", b"0,", b"0]}]}"),
        growing(_WHOLE + _TENSOR % b"BOOL", b"true,", b"1]}]}"),
        growing(_WHOLE + _TENSOR % b"BOOL", b"[0],", b"1]}]}"),
        growing(_WHOLE + _TENSOR % b"BOOL", b"["),
        growing(_WHOLE + b'{"inputs":[', b"{},", b"{}]}"),
        growing(_WHOLE + b'{"outputs":[', b'{"name":"k#"},', b"{}]}"),
        growing(_WHOLE + b'{"parameters":{', b'"k#":0,', b'"z":0}}'),
        growing(_WHOLE + b'{"inputs":[{"name":"x","shape":[', b"1,", b"1]}]}"),
    ],
    "json": [
        growing(b"{", b'"k#":0,', b'"z":0}'),
        growing(b"{", b'"k":0,', b'"z":0}'),
        growing(b'{"images":[[0]],"colour":[', b"[0],", b"0]}"),
        growing(b'{"images":[[0]],"colour":[', b'{"k#":0},', b"0]}"),
        growing(b'{"images":[[0]],"colour":{', b'"k#":0,', b'"z":0}}'),
        growing(b'{"images":[[0]],"seed":"', b"1", b'"}'),
        growing(b'{"images":', b"1", b"}"),
        growing(b'{"images":', b"["),
        growing(b'{"images":[', b"[0],", b"[0,0]]}"),
        growing(b'{"images":[', b"0.5,", b"0]}"),
        growing(b'{"', b"k", b'":0}'),
        growing(b'{"images":["', b"\\n", b'"]}'),
        growing(b'{"images":["', b"iVBORw0K", b'"]}'),
        *(growing(b'{"images":[', b'"%s",' % dot, b'"%s"]}' % dot) for dot in _DOTS),
    ],
    "npy": [
        growing(_NPY + b"{'shape':", b"("),
        growing(_FLOATS, b"1,", b")}"),
        growing(_FLOATS, b"9", b",)}"),
    ],
    "raw": [growing(b"", b"\0\0\0\0")],
    "image": [
        growing(_SCANS[:-2], _ONE_MORE[len(_SCANS) - 2 : -2], b"\xff\xd9"),
        growing(_JPEG[:2], b"\xff\xfe\0\x04ab", _JPEG[2:]),
        growing(_PNG[:33], hostile.png_chunks(1)[33:45], _PNG[33:]),
        growing(_PNG[:33], _TEXT, _PNG[33:]),
        growing(hostile.animated("PNG", 3, 64), b"\0"),
    ],
    "multipart": [
        growing(b"", _FIELD % b"a", b"--x--\r\n"),
        growing(b"", _FIELD % b"f#", b"--x--\r\n"),
        growing(_FILE + b"\r\n", b"a: b\r\n", b"\r\n1\r\n--x--\r\n"),
        growing(_FILE, b"; a=b", b"\r\n\r\n1\r\n--x--\r\n"),
        growing(_FILE + b"\r\n\r\n", b"\r\n--", b"\r\n--x--\r\n"),
        growing(b"", _FILE + b"\r\n\r\n" + hostile.picture("L", (1, 1), "WEBP") + b"\r\n", b"--x--\r\n"),
    ],
    "urlencoded": [growing(b"", b"a#=1&", b"b=2"), growing(b"a=", b"%31", b"")],
}
"""By target, inputs of many parts, each of which is cheap to send."""
