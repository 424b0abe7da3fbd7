"""Picture files: formats, metadata, and refusals before a costly decode."""

from __future__ import annotations

import base64
import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from service.codecs import image
from service.codecs.container import MAX_CHUNKS, picture
from service.codecs.payload import Intake, Meter
from service.contract.images import to_array
from service.errors import ServiceError, TooLarge, Unreadable

JSON = {"accept": "application/json"}
LEVELS = np.random.default_rng(5).integers(0, 256, (8, 8), np.uint8)


def saved(found: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    found.save(file, form, **options)
    return file.getvalue()


def grey(form: str, **options: Any) -> bytes:
    return saved(Image.fromarray(LEVELS), form, **options)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(*chunks: bytes) -> bytes:
    """A PNG with extra chunks before its data."""
    body = grey("PNG")
    return body[:33] + b"".join(chunks) + body[33:]


def text_bomb() -> PngInfo:
    info = PngInfo()
    info.add_text("comment", "x" * 2 * 2**20, zip=True)
    return info


def animated_png() -> bytes:
    frames = [Image.fromarray(LEVELS), Image.fromarray(255 - LEVELS)]
    return saved(frames[0], "PNG", save_all=True, append_images=frames[1:])


def with_exif(form: str) -> bytes:
    """A picture stored rotated by a quarter turn, as cameras do."""
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif.tobytes(), **({"lossless": True} if form == "WEBP" else {})}
    return saved(Image.fromarray(np.rot90(LEVELS)), form, **options)


PROFILE = np.random.default_rng(0).bytes(1_200_000)
READ: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: grey("PNG"),
    "BMP": lambda: grey("BMP"),
    "lossless WebP": lambda: grey("WEBP", lossless=True),
    "a PNG with a large colour profile": lambda: grey("PNG", icc_profile=PROFILE),
    "a PNG with two megabytes of text": lambda: grey("PNG", pnginfo=text_bomb()),
    "a WebP with a large colour profile": lambda: grey("WEBP", lossless=True, icc_profile=PROFILE),
    "a PNG with a broken text": lambda: png_with(chunk(b"zTXt", b"x\0\0nonsense"), chunk(b"iTXt", b"\xff")),
    "a PNG with an EXIF of many broken tags": lambda: png_with(chunk(b"eXIf", broken_exif())),
    "a PNG with a broken EXIF": lambda: png_with(chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff" + b"\1" * 100)),
    "a PNG in many small chunks": lambda: split_png(1),
    "an animated PNG": animated_png,
    "a PNG that EXIF turns": lambda: with_exif("PNG"),
    "a WebP that EXIF turns": lambda: with_exif("WEBP"),
}


def broken_exif() -> bytes:
    """EXIF whose every tag points outside."""
    tags = b"".join(struct.pack(">HHII", 0x9000 + k, 5, 2**28, 8) for k in range(5000))
    return b"MM\0*\0\0\0\x08" + struct.pack(">H", 5000) + tags + bytes(4)


def split_png(size: int) -> bytes:
    """A PNG with its data in chunks of a given size."""
    body = grey("PNG")
    length = int.from_bytes(body[33:37], "big")
    data = body[41 : 41 + length]
    parts = [chunk(b"IDAT", data[k : k + size]) for k in range(0, length, size)]
    return body[:33] + b"".join(parts) + chunk(b"IEND", b"")


@pytest.mark.parametrize("case", READ)
def test_every_picture_is_the_same_image(client: httpx.Client, case: str) -> None:
    """The image is the same in a body, a form and base64, whatever its metadata."""
    body, path = READ[case](), "/v1/encode"
    expected = client.post(path, json={"images": (LEVELS / 255).tolist()}).json()
    media_type = {b"BM": "image/bmp", b"RI": "image/webp"}.get(body[:2], "image/png")
    for request in (
        {"content": body, "headers": {"content-type": media_type, **JSON}},
        {"files": {"file": ("a", body)}, "headers": JSON},
        {"json": {"images": [base64.b64encode(body).decode()]}},
    ):
        answer = client.post(path, **request)  # type: ignore[arg-type]
        assert answer.status_code == 200, answer.text
        assert np.allclose(answer.json()["mean"], expected["mean"], atol=1e-5)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_pictures_are_turned_as_pillow_does(form: str, orientation: int) -> None:
    """Every orientation, valid or not, is applied as Pillow does."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    levels = np.kron(LEVELS[:6], np.ones((2, 2), np.uint8))
    options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {"quality": 95} if form == "JPEG" else {}
    body = saved(Image.fromarray(levels).convert("RGB"), form, exif=exif.tobytes(), **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(body))).convert("L")) / 255  # type: ignore[union-attr]
    if form == "TIFF":
        found = to_array(Image.open(io.BytesIO(body)), 1)
        assert np.allclose(found[0], expected, atol=1e-6)
    found = image.read(body, "", Intake("images", (1, 8, 8), Meter())).array[0]
    assert np.allclose(found[0], expected, atol=1e-6)


@pytest.mark.parametrize("name", ["image/jpg", "image/pjpeg", "image/x-png", "image/x-ms-bmp", "image/bmp"])
def test_other_names_of_media_types(client: httpx.Client, name: str) -> None:
    """Media types under the names of browsers and old programs are read."""
    form = "BMP" if "bmp" in name else "PNG" if "png" in name else "JPEG"
    answer = client.post("/v1/encode", content=grey(form), headers={"content-type": name, **JSON})
    assert answer.status_code == 200, answer.text


def isom(brand: bytes) -> bytes:
    return struct.pack(">I", 24) + b"ftyp" + brand + bytes(4) + brand + b"miaf"


UNREAD = {
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(50),
    "JPEG XL": b"\xff\x0a" + bytes(50),
    "Photoshop": b"8BPS" + bytes(50),
    "SVG": b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
    "PDF": b"%PDF-1.7\n" + bytes(50),
    "npy": b"\x93NUMPY\x01\x00" + bytes(50),
    "web page": b"<!DOCTYPE html><html></html>",
    "video": isom(b"mp42"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_read_is_refused_by_name(client: httpx.Client, name: str) -> None:
    """Other formats are refused with their name and the fix, in a body, a form and base64."""
    requests: list[dict[str, Any]] = [
        {"content": UNREAD[name], "headers": {"content-type": "image/png"}},
        {"files": {"file": ("a.png", np.zeros(0).tobytes() + UNREAD[name])}},
        {"json": {"images": [base64.b64encode(UNREAD[name]).decode()]}},
    ]
    for request in requests[:1] if name == "npy" else requests:
        answer = client.post("/v1/encode", **request)
        assert (answer.status_code, answer.json()["code"]) == (400, "unreadable_body")
        assert name in answer.json()["detail"]
        assert "PNG" in answer.json()["detail"] or "application/x-npy" in answer.json()["detail"]


@pytest.mark.parametrize("name", ["jp2", "jxl", "svg+xml", "vnd.adobe.photoshop"])
def test_media_types_that_are_not_read(client: httpx.Client, name: str) -> None:
    """An unsupported media type is refused with the format to convert to."""
    answer = client.post("/v1/encode", content=b"x", headers={"content-type": f"image/{name}"})
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")
    assert "PNG" in answer.json()["detail"]


def test_an_animated_webp_and_a_compressed_bmp_are_refused_by_name(client: httpx.Client) -> None:
    """Neither is decoded in part."""
    frames = [Image.fromarray(LEVELS).convert("RGB"), Image.fromarray(255 - LEVELS).convert("RGB")]
    moving = saved(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    runs = bytearray(grey("BMP"))
    runs[30] = 1
    for body, word in ((moving, "animated"), (bytes(runs), "compressed")):
        answer = client.post("/v1/encode", content=body, headers={"content-type": "image/png"})
        assert (answer.status_code, answer.json()["code"]) == (400, "unreadable_body")
        assert word in answer.json()["detail"]


def scans(count: int, side: int = 64) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    body = saved(Image.fromarray(np.zeros((side, side), np.uint8)), "JPEG", progressive=True)
    last = body.rindex(b"\xff\xda")
    return body[:last] + body[last:-2] * count + body[-2:]


def resized(body: bytes, width: int, height: int) -> bytes:
    """A JPEG or PNG whose header announces another size."""
    if body.startswith(b"\x89PNG"):
        head = struct.pack(">II", width, height) + body[24:29]
        return body[:8] + chunk(b"IHDR", head) + body[33:]
    place = next(body.index(bytes([0xFF, kind])) for kind in (0xC2, 0xC0) if bytes([0xFF, kind]) in body)
    return body[: place + 5] + struct.pack(">HH", height, width) + body[place + 9 :]


COSTLY: dict[str, tuple[Callable[[], bytes], str]] = {
    "a JPEG of 3,000 scans": (lambda: scans(3000), "scans"),
    "a JPEG of 30,000 scans": (lambda: scans(30000), "scans"),
    "a JPEG of fewer scans of many pixels": (lambda: resized(scans(90), 4000, 4000), "scans"),
    "a PNG of many chunks": (lambda: png_with(chunk(b"tEXt", b"a\0b") * (MAX_CHUNKS + 1)), "parts"),
    "a JPEG of many segments": (
        lambda: b"\xff\xd8" + b"\xff\xfe\0\2" * (MAX_CHUNKS + 1) + grey("JPEG")[2:],
        "parts",
    ),
    "a WebP of many chunks": (
        lambda: grey("WEBP")[:12] + b"abcd\0\0\0\0" * (MAX_CHUNKS + 1) + grey("WEBP")[12:],
        "parts",
    ),
    "a PNG of 10^10 pixels": (lambda: resized(grey("PNG"), 10**5, 10**5), "VAE_MAX_PIXELS"),
    "a JPEG of 4 x 10^9 pixels": (lambda: resized(grey("JPEG"), 65000, 65000), "VAE_MAX_PIXELS"),
    "a lossless WebP of 2 x 10^8 pixels": (
        lambda: b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f\xff\xff\xff\x0f" + bytes(9),
        "VAE_MAX_PIXELS",
    ),
    "a BMP of 10^10 pixels": (
        lambda: grey("BMP")[:18] + struct.pack("<II", 10**5, 10**5) + grey("BMP")[26:],
        "VAE_MAX_PIXELS",
    ),
}


@pytest.mark.parametrize("case", COSTLY)
def test_what_would_cost_too_much_is_refused_by_its_header(client: httpx.Client, case: str) -> None:
    """A costly picture is refused before it is decoded."""
    make, word = COSTLY[case]
    answer = client.post("/v1/encode", content=make(), headers={"content-type": "image/png"})
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large"), answer.text
    assert word in answer.json()["detail"]


def test_ordinary_progressive_jpegs_are_read(client: httpx.Client) -> None:
    """Progressive JPEGs are read, whatever fill bytes, comments and application data precede the first scan."""
    plain = saved(Image.fromarray(LEVELS), "JPEG", progressive=True, quality=95)
    stuffed = plain[:2] + b"\xff\xfe\0\4ab" + b"\xff\xed\xff\xff" + bytes(65533) + b"\xff" * 9 + plain[2:]
    codes = [
        client.post("/v1/encode", content=body, headers={"content-type": "image/jpeg", **JSON}).json()["mean"]
        for body in (plain, stuffed, plain + b"trailing \xff\xd8\xff\xda bytes")
    ]
    assert codes[0] == codes[1] == codes[2]


def charged(body: bytes, channels: int, float_pixels: int | None) -> int:
    """Memory that reading a picture with its mask reserves."""
    taken: list[int] = []
    meter = Meter(reserve=taken.append)
    image.read(body, "", Intake("images", (channels, 8, 8), meter, masked=True, float_pixels=float_pixels))
    return sum(taken)


MEASURE = """
import sys
from service.codecs import image
from service.codecs.payload import Intake, Meter
def said(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
above = None if sys.argv[4] == "None" else int(sys.argv[4])
intake = Intake("images", (int(sys.argv[2]), 8, 8), Meter(), True, float_pixels=above)
image.read(open(sys.argv[3], "rb").read(), "", intake)
body = open(sys.argv[1], "rb").read()
open("/proc/self/clear_refs", "w").write("5")
before = said("VmRSS")
kept = image.read(body, "", intake)
print(said("VmHWM") - before)
"""


def measured(tmp_path: Any, mode: str, form: str, channels: int, float_pixels: int | None) -> tuple[int, int]:
    """Memory that reading a picture takes, and what is charged for it, in bytes a pixel of 2048 x 2048.

    It is read in a process of its own, whose peak is that of this picture.
    """
    options: dict[str, Any] = {"lossless": True, "method": 0} if form == "WEBP" else {}
    options |= {"progressive": True} if mode == "CMYK" else {}
    for side, name in ((2048, "large"), (64, "small")):
        (tmp_path / name).write_bytes(saved(Image.new(mode, (side, side)), form, **options))
    arguments = [str(channels), tmp_path / "small", str(float_pixels)]
    command = [sys.executable, "-c", MEASURE, tmp_path / "large", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    allowed = charged((tmp_path / "large").read_bytes(), channels, float_pixels)
    return int(done.stdout) // 2048**2, allowed // 2048**2


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("case", ["RGBA WEBP", "LA PNG", "RGB WEBP", "CMYK JPEG"])
def test_no_picture_takes_more_memory_than_is_charged(tmp_path: Any, case: str, channels: int) -> None:
    """As floats: fewer than 50 bytes a pixel."""
    mode, form = case.split()
    taken, allowed = measured(tmp_path, mode, form, channels, None)
    assert 0 < taken <= allowed < 50


@pytest.mark.parametrize(("case", "most"), [("RGB JPEG", 9), ("RGBA PNG", 21), ("CMYK JPEG", 17), ("I;16 PNG", 6)])
def test_no_picture_takes_more_memory_as_levels(tmp_path: Any, case: str, most: int) -> None:
    """Pixels that stay integers take a third of that."""
    mode, form = case.split()
    taken, allowed = measured(tmp_path, mode, form, 1 if mode == "I;16" else 3, 1000)
    assert 0 < taken <= allowed <= most


def test_a_small_webp_of_many_pixels_is_charged_for_them() -> None:
    """A file and its mask together, before either is decoded."""
    body = saved(Image.new("RGBA", (4096, 4096)), "WEBP", lossless=True, method=0)
    assert len(body) < 1000
    meter = Meter(max_pixels=2**24, reserve=refuse)
    intake = Intake("images", (1, 8, 8), meter, masked=True)
    with pytest.raises(TooLarge, match="bytes"):
        image.read(body, "", intake)
    with pytest.raises(TooLarge, match="other pictures"):
        image.parse_mask(body, intake)


def refuse(size: int) -> None:
    if size > 100 * 2**20:
        raise TooLarge(f"{size} bytes")


def holes(mode: str) -> bytes:
    """A mask with its left half missing, as a PNG of that mode."""
    half = np.repeat([[0, 0, 0, 0, 255, 255, 255, 255]], 8, axis=0).astype(np.uint8)
    mask = Image.fromarray(half)
    if mode == "tRNS":
        return saved(mask, "PNG", transparency=0)
    if mode == "opaque RGBA":
        return saved(Image.merge("RGBA", (mask, mask, mask, Image.new("L", (8, 8), 255))), "PNG")
    if mode in ("RGBA", "LA"):
        white = Image.new(mode, (8, 8), (255,) * len(mode))
        white.putalpha(mask)
        return saved(white, "PNG")
    return saved(mask.convert(mode), "PNG")


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "RGBA", "LA", "tRNS", "opaque RGBA", "P"])
def test_a_mask_is_black_or_transparent_where_a_pixel_is_missing(client: httpx.Client, mode: str) -> None:
    """Its transparency where it has any, else its luminance."""
    mask = np.repeat([[0, 0, 0, 0, 1, 1, 1, 1]], 8, axis=0)
    expected = client.post("/v1/inpaint", json={"images": (LEVELS / 255).tolist(), "mask": mask.tolist()}).json()
    files = {"file": ("a.png", grey("PNG")), "mask": ("m.png", holes(mode))}
    found = client.post("/v1/inpaint", files=files, headers=JSON)
    assert found.status_code == 200, found.text
    assert np.allclose(found.json()["images"], expected["images"], atol=1e-5)


def test_16_bit_grey_with_a_transparent_level(client: httpx.Client) -> None:
    """Its transparency is a mask too, and its white is 65,535."""
    deep = LEVELS.astype(np.uint16) * 257
    body = saved(Image.fromarray(deep), "PNG")
    transparent = body[:33] + chunk(b"tRNS", struct.pack(">H", int(deep[0, 0]))) + body[33:]
    expected = {"images": (LEVELS / 255).tolist(), "mask": (deep != deep[0, 0]).astype(int).tolist()}
    known = client.post("/v1/inpaint", json=expected).json()
    found = client.post("/v1/inpaint", content=transparent, headers={"content-type": "image/png", **JSON})
    assert np.allclose(found.json()["images"], known["images"], atol=1e-5)


SEEDS = [
    grey("PNG"), grey("JPEG"), scans(3), grey("WEBP", lossless=True), grey("BMP"), animated_png(), with_exif("JPEG"),
    saved(Image.new("RGBA", (8, 8)), "WEBP", exif=Image.Exif().tobytes() or b"x"),
]  # fmt: skip


@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6), st.booleans())
def test_a_spoilt_picture_is_refused_or_read(body: bytes, spoilt: list[tuple[int, int]], masked: bool) -> None:
    """Whatever bytes change, a reader raises only documented errors, and repeats no address."""
    changed = bytearray(body)
    for place, value in spoilt:
        changed[place % len(changed)] = value
    try:
        payload = image.read(bytes(changed), "", Intake("images", (3, 8, 8), Meter(2**16), masked))
        message, channels = "", payload.array.shape[1]
    except ServiceError as error:
        message, channels = str(error), 3
    assert channels == 3
    assert "0x" not in message
    assert "b'" not in message


@given(st.sampled_from(SEEDS), st.integers(0, 200))
def test_a_picture_that_is_cut_short_is_refused_or_read(body: bytes, length: int) -> None:
    """The same for the beginning of a file."""
    try:
        found = picture(body[:length])
    except (Unreadable, TooLarge):
        return
    assert (found.width, found.height) == (8, 8) or found.width == 64


def test_without_its_metadata_a_picture_is_the_same_array() -> None:
    """Removing the metadata changes no bit of the array."""
    body = grey("PNG", icc_profile=PROFILE)
    pixels = image.read(body, "", Intake("images", (1, 8, 8), Meter())).array
    assert np.array_equal(pixels[0, 0], LEVELS.astype(np.float32) / np.float32(255))
