"""TIFF files that are hostile, broken or of rare kinds, and the memory that reading takes."""

from __future__ import annotations

import io
import logging
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.codecs import image
from service.codecs.payload import Intake, Meter, Payload
from service.errors import Deferred, InvalidShape, ServiceError, TooLarge, Unreadable

LEVELS = np.random.default_rng(5).integers(0, 256, (8, 8), np.uint8)


def tiff(array: NDArray[Any], **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def read(body: bytes, meter: Meter | None = None, channels: int = 1) -> Payload:
    return image.read(body, "", Intake("images", (channels, 8, 8), meter or Meter()))


def written(tags: dict[int, tuple[int, tuple[int, ...]]], data: bytes = b"", following: int = 0) -> bytes:
    """A TIFF of one directory at 8, whose tags are (type, values); the data are at its end."""
    entries, extra = b"", b""
    place = 8 + 2 + 12 * len(tags) + 4
    for tag, (kind, values) in sorted(tags.items()):
        content = struct.pack(f"<{len(values)}{'BHI'[(1, 3, 4).index(kind)]}", *values)
        if len(content) > 4:
            content, extra = struct.pack("<I", place + len(extra)), extra + content
        entries += struct.pack("<HHI", tag, kind, len(values)) + content.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", following) + extra + data


PLAIN: dict[int, tuple[int, tuple[int, ...]]] = {
    256: (4, (8,)), 257: (4, (8,)), 258: (3, (8,)), 259: (3, (1,)), 262: (3, (1,)), 273: (4, (8,)), 277: (3, (1,)),
    278: (4, (8,)), 279: (4, (64,)),
}  # fmt: skip


def plain(**changes: tuple[int, tuple[int, ...]]) -> bytes:
    """A TIFF of 8 x 8 pixels with other tags, named as in t259."""
    return written({**PLAIN, **{int(name[1:]): value for name, value in changes.items()}}, bytes(64))


def many(count: int) -> bytes:
    """Pages of 1 x 1, each of one directory of nine tags and the same byte."""
    tags = {**PLAIN, 256: (4, (1,)), 257: (4, (1,)), 278: (4, (1,)), 279: (4, (1,))}
    one = written(tags)[8:-4]
    return (
        b"II*\0"
        + struct.pack("<I", 8)
        + b"".join(one + struct.pack("<I", 8 + (k + 1) * (len(one) + 4) if k + 1 < count else 0) for k in range(count))
    )


def test_a_plain_file_of_these_tags_is_read() -> None:
    """So that what the others lack is what they are refused for."""
    assert read(plain()).array is not None
    found = read(many(40)).array
    assert found is not None
    assert found.shape == (40, 1, 1, 1)


REFUSED: dict[str, tuple[Callable[[], bytes], type[ServiceError], str]] = {
    "pages in a circle": (lambda: written(PLAIN, bytes(64), following=8), Unreadable, "circle"),
    "many pages": (lambda: many(5000), TooLarge, "pages"),
    "more pages than rows": (lambda: many(101), TooLarge, "VAE_MAX_REQUEST_ROWS"),
    "many strips": (
        lambda: written({**PLAIN, 273: (4, (8,) * 300000), 279: (4, (1,) * 300000)}), TooLarge, "strips",
    ),
    "10^9 pixels": (lambda: plain(t256=(4, (10**5,)), t257=(4, (10**4,))), TooLarge, "VAE_MAX_PIXELS"),
    "10^19 pixels": (lambda: plain(t256=(4, (2**32 - 1,)), t257=(4, (2**32 - 1,))), TooLarge, "VAE_MAX_PIXELS"),
    "a tile of 10^9 pixels": (
        lambda: plain(t322=(4, (2**15,)), t323=(4, (2**15,)), t324=(4, (8,)), t325=(4, (64,))), TooLarge, "bytes",
    ),
    "65,535 numbers a pixel": (
        lambda: plain(t256=(4, (2000,)), t257=(4, (2000,)), t277=(3, (65535,)), t258=(3, (8,))),
        TooLarge,
        "pictures in one request|bytes|PIXELS",
    ),
    "no pixels": (lambda: plain(t256=(4, (0,))), Unreadable, "0 x 8"),
    "12 bits": (lambda: plain(t258=(3, (12,))), Unreadable, "12 bits"),
    "complex numbers": (lambda: plain(t258=(3, (64,)), t339=(3, (6,))), Unreadable, "format 6"),
    "JPEG in TIFF": (lambda: plain(t259=(3, (7,))), Unreadable, "JPEG"),
    "an unknown compression": (lambda: plain(t259=(3, (12345,))), Unreadable, "12345"),
    "CMYK": (lambda: plain(t262=(3, (5,)), t277=(3, (4,))), Unreadable, "CMYK"),
    "RGB of five numbers": (lambda: plain(t262=(3, (2,)), t277=(3, (5,))), Unreadable, "RGB of 5"),
    "pages of two sizes": (lambda: sizes((8, 8), (8, 9)), InvalidShape, "differ"),
    "one page and thousand images": (
        lambda: tiff(LEVELS, description=b"ImageJ=1.54\nimages=1000\n", metadata=None), Unreadable, "1000 images",
    ),
    "an offset outside": (lambda: b"II*\0" + struct.pack("<I", 10**6) + bytes(60), Unreadable, "broken"),
    "a value outside": (
        lambda: plain(t258=(3, (8, 8, 8))).replace(struct.pack("<HHI", 258, 3, 3), struct.pack("<HHI", 258, 3, 10**9)),
        Unreadable,
        "broken",
    ),
    "pixels outside": (lambda: plain(t273=(4, (10**6,))), Unreadable, "broken"),
    "too little in a strip": (lambda: tiff(LEVELS, compression="zlib")[:-20], Unreadable, "broken"),
    "a number that is a text": (
        lambda: plain().replace(struct.pack("<HHI", 277, 3, 1), struct.pack("<HHI", 277, 2, 1)), Unreadable, "broken",
    ),
    "a head alone": (lambda: b"II*\0", Unreadable, "broken"),
}  # fmt: skip


def sizes(*shapes: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as out:
        for shape in shapes:
            out.write(np.zeros(shape, np.uint8), metadata=None)
    return file.getvalue()


def refuse(size: int) -> None:
    if size > 100 * 2**20:
        raise TooLarge(f"{size} bytes")


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_hostile_or_rare_is_refused_by_name(case: str) -> None:
    """Before it is decoded, at once, and with the fix."""
    make, error, words = REFUSED[case]
    body, begin = make(), time.perf_counter()
    with pytest.raises(error, match=words):
        read(body, Meter(max_rows=100, reserve=refuse))
    assert time.perf_counter() - begin < 3.0


@pytest.mark.parametrize("name", ["zlib", "lzw", "zstd", "lzma", "packbits"])
def test_a_strip_that_unpacks_to_more_than_it_says_takes_no_memory(name: str) -> None:
    """A bomb of a hundred megabytes in a file of 8 x 8 pixels: decoders are told the size."""
    coded = {"packbits": b"\x81\0" * 2**16}.get(name) or strip(
        tiff(np.zeros((2**12, 2**12), np.uint8), compression=name, rowsperstrip=2**12)
    )
    codes = {"zlib": 8, "lzw": 5, "zstd": 50000, "lzma": 34925, "packbits": 32773}
    tags = {**PLAIN, 259: (3, (codes[name],)), 279: (4, (len(coded),))}
    tags[273] = (4, (len(written(tags)),))
    body, taken = written(tags, coded), list[int]()
    try:
        found = read(body, Meter(reserve=taken.append)).array
        assert found is not None
        assert not found.any()
    except Unreadable:
        pass
    assert sum(taken) < 2**16 + len(body)


def strip(body: bytes) -> bytes:
    """The first strip of a file."""
    with tifffile.TiffFile(io.BytesIO(body)) as file:
        page = file.pages.first
        return body[page.dataoffsets[0] : page.dataoffsets[0] + page.databytecounts[0]]


def test_other_files_are_not_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OME-XML that names a further file is copied, not followed; nothing is logged."""
    tifffile.imwrite(tmp_path / "other.ome.tif", LEVELS)
    monkeypatch.chdir(tmp_path)
    text = (
        '<OME><Image><Pixels DimensionOrder="XYCZT" SizeC="2" SizeT="1" SizeX="8" SizeY="8" SizeZ="1" Type="uint8">'
        '<TiffData FirstC="1" IFD="0"><UUID FileName="other.ome.tif">urn:uuid:1</UUID></TiffData></Pixels></Image>'
        "</OME>"
    )
    found = read(tiff(LEVELS, description=text.encode(), metadata=None))
    assert found.array is not None
    assert np.array_equal(found.array[0, 0], LEVELS / np.float32(255))
    assert not logging.getLogger("tifffile").isEnabledFor(logging.ERROR)


def test_the_event_loop_decodes_no_tiff() -> None:
    """Even a small one goes to a thread: tifffile is Python, and has to be imported."""
    with pytest.raises(Deferred):
        read(tiff(LEVELS), Meter(in_loop=True))


def test_a_smaller_copy_of_a_page_is_no_page() -> None:
    """A thumbnail beside the picture is left out."""
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as out:
        out.write(LEVELS, metadata=None)
        out.write(LEVELS[::2, ::2], subfiletype=1, metadata=None)
    found = read(file.getvalue()).array
    assert found is not None
    assert found.shape == (1, 1, 8, 8)


COLOURS: dict[str, dict[str, Any]] = {
    "white is zero": {"photometric": "miniswhite"},
    "a palette": {"photometric": "palette", "colormap": (np.stack([np.arange(256)] * 3) * 257).astype(np.uint16)},
    "two bytes, big end first": {"byteorder": ">"},
    "strips of one row": {"rowsperstrip": 1, "compression": "packbits"},
    "LZMA": {"compression": "lzma"},
    "a black-and-white picture": {"photometric": "minisblack"},
}


@pytest.mark.parametrize("case", COLOURS)
def test_rare_kinds_of_pixels_are_the_same_image(case: str) -> None:
    """As the plain file has it."""
    expected, sent = LEVELS / 255, LEVELS
    if case == "white is zero":
        sent = 255 - LEVELS
    if case.startswith("two bytes"):
        sent = (LEVELS * np.uint16(257)).astype(np.uint16)
    if case.startswith("a black"):
        sent = LEVELS > 100
        expected = sent
    found = read(tiff(sent, **COLOURS[case])).array
    assert found is not None
    assert np.allclose(found[0, 0], expected, atol=1e-6)


MEASURE = """
import sys
from service.codecs import image
from service.codecs.payload import Intake, Meter
def said(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
intake = Intake("images", (3, 8, 8), Meter(2**26), keeps_alpha=True, variants=(1, 3))
image.read(open(sys.argv[2], "rb").read(), "", intake)
body = open(sys.argv[1], "rb").read()
open("/proc/self/clear_refs", "w").write("5")
before = said("VmRSS")
kept = image.read(body, "", intake)
print(said("VmHWM") - before)
"""
LARGE: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "one strip": (
        (2048, 2048, 4),
        {"rowsperstrip": 2048, "compression": "zlib", "predictor": True, "photometric": "rgb"},
    ),
    "one strip, as it is": ((2048, 2048, 3), {"rowsperstrip": 2048, "photometric": "rgb"}),
    "planes": ((3, 2048, 2048), {"planarconfig": "separate", "photometric": "rgb", "compression": "lzw"}),
    "pages in tiles": ((16, 512, 512), {"tile": (256, 256), "compression": "zstd", "photometric": "minisblack"}),
}


@pytest.mark.parametrize("case", LARGE)
def test_no_tiff_takes_more_memory_than_is_charged(tmp_path: Path, case: str) -> None:
    """Of 16 bits, read in a process of its own, whose peak is that of this picture."""
    shape, options = LARGE[case]
    array = np.tile(np.arange(2**16, dtype=np.uint16), int(np.prod(shape)) // 2**16).reshape(shape)
    (tmp_path / "large").write_bytes(tiff(array, **options))
    (tmp_path / "small").write_bytes(tiff(array[:3, :16, :16] if options.get("planarconfig") else array[:16, :16], **{
        key: value for key, value in options.items() if key not in ("rowsperstrip", "tile")
    }))  # fmt: skip
    command = [sys.executable, "-c", MEASURE, tmp_path / "large", tmp_path / "small"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    taken = list[int]()
    intake = Intake("images", (3, 8, 8), Meter(2**26, reserve=taken.append), keeps_alpha=True, variants=(1, 3))
    image.read((tmp_path / "large").read_bytes(), "", intake)
    assert 0 < int(done.stdout) <= sum(taken) + 2**20


SEEDS = [
    tiff(LEVELS), tiff(LEVELS, compression="lzw", predictor=True), tiff(LEVELS, tile=(16, 16), compression="zlib"),
    tiff(LEVELS.astype(np.float32), bigtiff=True), tiff(np.stack([LEVELS] * 3), imagej=True), plain(), many(3),
    tiff(np.stack([LEVELS] * 4, -1), photometric="rgb", byteorder=">"),
]  # fmt: skip


@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), max_size=6))
def test_a_spoilt_tiff_is_refused_or_read(body: bytes, spoilt: list[tuple[int, int]]) -> None:
    """Whatever bytes change, a reader raises only documented errors."""
    changed = bytearray(body)
    for place, value in spoilt:
        changed[place % len(changed)] = value
    with suppress(ServiceError):
        found = read(bytes(changed), Meter(2**16, reserve=refuse), channels=3)
        assert found.array is not None
        assert found.array.shape[1] == 3
