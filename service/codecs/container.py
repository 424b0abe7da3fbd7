"""Picture files before decoding: finds format, size and cost of decoding, and removes metadata.

Pillow limits metadata and spends time and memory on it. Only pixels, palette, transparency and EXIF are needed here.
Sources: PNG 3rd edition, 5; ITU-T T.81, annex B; RFC 9649 (WebP); Microsoft, "Bitmap header types".
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from service.codecs.payload import Body
from service.errors import TooLarge, Unreadable

MAX_CHUNKS = 2**15
"""Most chunks of a PNG or a WebP, and most segments of a JPEG before its first scan."""
MAX_JUNK = 2**16
"""Most bytes between the segments of a JPEG."""
MAX_TAGS = 1024
ORIENTATION, SHORT = 0x0112, 3
"""The EXIF tag of the orientation, and its type."""
MAX_SCANS = 100
"""Most scans of a JPEG; cameras and converters write about ten."""
MAX_SCANNED = 2**30
"""Most pixels times scans of a JPEG: each scan visits every pixel, however little it holds."""
PNG = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
PNG_KEPT = (b"PLTE", b"tRNS")
MARKER = re.compile(rb"\xff[^\x00\xff]")
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
ALONE = frozenset({0x01, *range(0xD0, 0xD9)})
"""Markers that have no length."""
COMMENTS = frozenset({*range(0xE0, 0xF0), 0xFE})
WEBP_KEPT = (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"EXIF")
ANIMATED, ALPHA = 0x02, 0x10
BMP_RAW = (0, 3)
"""Values of the field compression: none, or none with bit masks for the colours."""

WEBP_BYTES = 16
"""Memory a pixel of libwebp's animation decoder, whatever the file holds."""

CONVERT = "convert it to PNG, for example with ImageMagick: magick picture.{} picture.png"
OTHERS: tuple[tuple[bytes, str, str], ...] = (
    (b"GIF8", "a GIF", CONVERT.format("gif")),
    (b"II*\0", "a TIFF", CONVERT.format("tiff")),
    (b"MM\0*", "a TIFF", CONVERT.format("tiff")),
    (b"II+\0", "a TIFF", CONVERT.format("tiff")),
    (b"MM\0+", "a TIFF", CONVERT.format("tiff")),
    (b"\0\0\0\x0cjP  \r\n", "a JPEG 2000 file", CONVERT.format("jp2")),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 file", CONVERT.format("j2k")),
    (b"\0\0\0\x0cJXL \r\n", "a JPEG XL file", CONVERT.format("jxl")),
    (b"\xff\x0a", "a JPEG XL file", CONVERT.format("jxl")),
    (b"8BPS", "a Photoshop file", CONVERT.format("psd[0]")),
    (b"\0\0\1\0", "an icon", CONVERT.format("ico")),
    (b"qoif", "a QOI file", CONVERT.format("qoi")),
    (b"v/1\x01", "an OpenEXR file", "send its values as .npy"),
    (b"SIMPLE  =", "a FITS file", "send its values as .npy"),
    (b"%PDF-", "a PDF", "render its page to PNG, for example with pdftoppm -png"),
    (b"\x93NUMPY", "an .npy file", "send it with Content-Type: application/x-npy"),
    (b"PK\x03\x04", "a ZIP archive or .npz", "send one picture or one .npy at a time"),
    (b"\x1f\x8b", "gzip", "send it uncompressed"),
    *((b"P%d%c" % (kind, space), "a PNM file", CONVERT.format("pnm")) for kind in range(1, 8) for space in b"\n\r\t "),
)
"""(first bytes, name of the format, advice)."""
BRANDS = {
    "an AVIF": (CONVERT.format("avif"), (b"avif", b"avis")),
    "a HEIC": (CONVERT.format("heic"), (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")),
}
"""Formats in ISO base media files: name -> (advice, brands)."""
UNREAD_TYPES = {
    "image/gif": "GIF",
    "image/tiff": "TIFF",
    "image/tif": "TIFF",
    "image/x-tiff": "TIFF",
    "image/avif": "AVIF",
    "image/heic": "HEIC",
    "image/heif": "HEIC",
    "image/jp2": "JPEG 2000",
    "image/jpx": "JPEG 2000",
    "image/j2k": "JPEG 2000",
    "image/jxl": "JPEG XL",
    "image/vnd.adobe.photoshop": "Photoshop",
    "image/svg+xml": "SVG",
    "application/pdf": "PDF",
}
"""Media types that are recognised but not read, with the name of the format."""


class Picture(NamedTuple):
    """A picture file that has not been decoded.

    Attributes:
        form: Format as Pillow names it.
        width: Pixels.
        height: Pixels.
        content: The file without metadata.
        decoded: Bytes a pixel that the decoder takes.
        transparent: Whether it may have pixels that are not opaque.
        orientation: How to turn it, as EXIF counts; 1 is not at all.
        grey: Whether all its pixels are grey, by its header or its palette.
        depth: Bytes of one level.
    """

    form: str
    width: int
    height: int
    content: bytes
    decoded: int
    transparent: bool = False
    orientation: int = 1
    grey: bool = False
    depth: int = 1

    def pixel_bytes(self, channels: int) -> int:
        """Most bytes a pixel of decoding, converting and stacking; tests/service/test_pictures.py measures them."""
        return self.decoded + 6 * channels + (14 if self.transparent else 8)

    def level_bytes(self, channels: int, *, masked: bool) -> int:
        """The same where pixels stay levels, and where its opacity is a mask too."""
        turned = 4 if self.orientation != 1 else 0
        return self.decoded + turned + self.depth * channels + 1 + (12 if masked and self.transparent else 0)


def picture(body: Body) -> Picture:
    """Examine a picture file.

    Raises:
        Unreadable: Its format is not read, which the message names, or its structure is broken.
        TooLarge: It has more chunks or scans than any picture needs.
    """
    head = bytes(body[:16])
    if head.startswith(PNG):
        found = _png(body)
    elif head.startswith(b"\xff\xd8\xff"):
        found = _jpeg(body)
    elif head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        found = _webp(body)
    elif head.startswith(b"BM"):
        found = _bmp(body)
    else:
        raise Unreadable(_unread(bytes(body[:1024])))
    if found.width == 0 or found.height == 0:
        raise Unreadable(f"the {found.form} says that it is {found.width} x {found.height} pixels; send a picture")
    return found


def _unread(head: bytes) -> str:
    """The message for a format that is not read: its name, where known, and advice."""
    known = "PNG, JPEG, WebP and BMP are read"
    if head[4:8] == b"ftyp":
        brands = head[8:64]
        for name, (advice, marks) in BRANDS.items():
            if any(mark in brands for mark in marks):
                return f"the picture is {name}, which is not read; {advice}"
        return f"the file is a video; send a picture: {known}"
    for beginning, name, advice in OTHERS:
        if head.startswith(beginning):
            return f"the picture is {name}, which is not read; {advice}"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<") and b"<svg" in text:
        return "the picture is an SVG, which is not read; render it to PNG, for example with rsvg-convert"
    if text.startswith((b"<!doctype html", b"<html")):
        return f"the file is a web page, not a picture; {known}"
    return f"the file is no picture of a known format; {known}"


def _broken(form: str) -> Unreadable:
    return Unreadable(f"the {form} is broken or cut short; send the whole file")


def _too_many(form: str) -> TooLarge:
    return TooLarge(f"the {form} has more than {MAX_CHUNKS} parts; save it again without metadata")


def _orientation(exif: bytes | memoryview) -> int:
    """EXIF's orientation; 1 where it cannot be read.

    Pillow would read every tag and warn of each that is broken.

    Source:
        TIFF 6.0, 2.
    """
    content = bytes(exif[: 2**16]).removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(content[:4])
    if order is None or len(content) < 8:
        return 1
    (place,) = struct.unpack_from(f"{order}I", content, 4)
    tags = content[place + 2 : place + 2 + 12 * MAX_TAGS]
    count = int.from_bytes(content[place : place + 2], "big" if order == ">" else "little")
    for k in range(min(count, len(tags) // 12)):
        tag, kind, _, value = struct.unpack_from(f"{order}HHIH", tags, 12 * k)
        if (tag, kind) == (ORIENTATION, SHORT):
            return int(value) if 1 <= value <= 8 else 1
    return 1


def _png(body: Body) -> Picture:
    """Examine a PNG. All image data becomes one chunk; of the others, those that affect pixels are kept."""
    if len(body) < 33 or bytes(body[12:16]) != b"IHDR":
        raise _broken("PNG")
    kept: dict[bytes, memoryview] = {}
    data: list[memoryview] = []
    for kind, chunk in _png_chunks(body):
        if kind == b"IDAT":
            data.append(chunk[8:-4])
        elif kind in PNG_KEPT or kind == b"eXIf":
            kept.setdefault(kind, chunk)
    length, check = sum(map(len, data)), zlib.crc32(b"IDAT")
    if not 0 < length < 2**31:
        raise _broken("PNG")
    for part in data:
        check = zlib.crc32(part, check)
    head: list[bytes | memoryview] = [bytes(body[:33]), *(kept[kind] for kind in PNG_KEPT if kind in kept)]
    ends = struct.pack(">I4s", length, b"IDAT"), struct.pack(">I", check) + PNG_END
    width, height, depth, colour = struct.unpack_from(">IIBB", body, 16)
    decoded = depth // 8 or 1 if colour in (0, 3) else 4
    transparent = colour in (4, 6) or b"tRNS" in kept
    content = b"".join([*head, ends[0], *data, ends[1]])
    turn = _orientation(kept.get(b"eXIf", b"")[8:])
    grey = colour in (0, 4) or (colour == 3 and _is_grey(bytes(kept.get(b"PLTE", b"")[8:-4]), 3))
    bytes_a_level = 2 if (depth, colour) == (16, 0) else 1
    return Picture("PNG", width, height, content, decoded, transparent, turn, grey, bytes_a_level)


def _png_chunks(body: Body) -> Iterator[tuple[bytes, memoryview]]:
    """(type, whole chunk) from the header to the end chunk, which may be missing."""
    view, place = memoryview(body), 33
    for _ in range(MAX_CHUNKS):
        if place + 8 > len(body):
            return
        length, kind = struct.unpack_from(">I4s", body, place)
        end = place + 12 + length
        if kind == b"IEND":
            return
        if end > len(body):
            raise _broken("PNG")
        yield kind, view[place:end]
        place = end
    raise _too_many("PNG")


def _jpeg(body: Body) -> Picture:
    """Examine a JPEG. Tables, frame and scans are kept, and of the application's segments JFIF and Adobe's (colours).

    Scans are counted where the decoder would decode each of them.
    """
    kept: list[bytes | memoryview] = [b"\xff\xd8"]
    frames: list[tuple[int, int, int, int]] = []
    scans, turn = 0, 0
    for kind, start, segment in _jpeg_segments(body):
        if kind == START_OF_SCAN and len(segment) > 4:
            scans = start
            break
        if kind in FRAMES and len(segment) >= 10:
            frames.append((kind, *struct.unpack_from(">HHB", segment, 5)))
        if kind not in COMMENTS or kind in (0xE0, 0xEE):
            kept.append(segment)
        if kind == 0xE1 and bytes(segment[4:10]) == b"Exif\0\0":
            turn = turn or _orientation(segment[10:])
    if len(frames) != 1:
        raise _broken("JPEG")
    kind, height, width, components = frames[0]
    decoded = 1 if components == 1 else 4
    if kind in PROGRESSIVE or body[scans + 4] < components:
        _check_scans(body.count(b"\xff\xda", scans), width * height)
        decoded += 2 * components  # all coefficients are kept until the last scan
    content, grey = b"".join([*kept, memoryview(body)[scans:]]), components == 1
    return Picture("JPEG", width, height, content, decoded, orientation=turn or 1, grey=grey)


def _jpeg_segments(body: Body) -> Iterator[tuple[int, int, memoryview]]:
    """(marker, offset, whole segment) of the segments that have a length; bytes between them are skipped."""
    view, place, junk = memoryview(body), 2, 0
    for _ in range(MAX_CHUNKS):
        found = MARKER.search(body, place, place + MAX_JUNK - junk)
        if found is None:
            raise _broken("JPEG")
        junk += found.start() - place
        start, kind, place = found.start(), body[found.end() - 1], found.end()
        if kind in ALONE:
            continue
        end = place + int.from_bytes(body[place : place + 2], "big")
        if kind == END_OF_IMAGE or end < place + 2 or end > len(body):
            raise _broken("JPEG")
        yield kind, start, view[start:end]
        place = end
    raise _too_many("JPEG")


def _check_scans(scans: int, pixels: int) -> None:
    if scans > MAX_SCANS or scans * pixels > MAX_SCANNED:
        raise TooLarge(
            f"the JPEG of {pixels} pixels is written in {scans} scans; at most {MAX_SCANS} are read, and {MAX_SCANNED} "
            "pixels in all of them: save it as a baseline JPEG"
        )


def _webp(body: Body) -> Picture:
    """Examine a WebP of one picture; transparency and orientation are kept."""
    kept: dict[bytes, memoryview] = {}
    for kind, content in _webp_chunks(body):
        if kind in WEBP_KEPT:
            kept.setdefault(kind, content)
    canvas = _webp_canvas(kept[b"VP8X"]) if b"VP8X" in kept else None
    data = [kind for kind in (b"VP8 ", b"VP8L") if kind in kept]
    if len(data) != 1:
        raise _broken("WebP")
    width, height = size = _webp_size(data[0], kept[data[0]])
    if canvas not in (None, size):
        raise _broken("WebP")
    transparent = b"ALPH" in kept or data[0] == b"VP8L"
    chunks = [_riff(data[0], kept[data[0]])]
    if canvas is not None:
        sides = b"".join((side - 1).to_bytes(3, "little") for side in canvas)
        alpha = [_riff(b"ALPH", kept[b"ALPH"])] if b"ALPH" in kept else []
        chunks = [_riff(b"VP8X", bytes([ALPHA if transparent else 0, 0, 0, 0]) + sides), *alpha, *chunks]
    turn = _orientation(kept.get(b"EXIF", b""))
    return Picture("WEBP", width, height, _riff(b"RIFF", b"WEBP" + b"".join(chunks)), WEBP_BYTES, transparent, turn)


def _webp_chunks(body: Body) -> Iterator[tuple[bytes, memoryview]]:
    """(type, content)."""
    view, place = memoryview(body), 12
    for _ in range(MAX_CHUNKS):
        if place + 8 > len(body):
            return
        kind, length = struct.unpack_from("<4sI", body, place)
        end = place + 8 + length
        if end > len(body):
            raise _broken("WebP")
        yield kind, view[place + 8 : end]
        place = end + length % 2
    raise _too_many("WebP")


def _riff(kind: bytes, content: bytes | memoryview) -> bytes:
    return b"".join((kind, struct.pack("<I", len(content)), content, b"\0" * (len(content) % 2)))


def _webp_canvas(content: memoryview) -> tuple[int, int]:
    if len(content) < 10:
        raise _broken("WebP")
    if content[0] & ANIMATED:
        raise Unreadable("the WebP is animated, which is not read; send one of its pictures")
    return 1 + int.from_bytes(content[4:7], "little"), 1 + int.from_bytes(content[7:10], "little")


def _webp_size(kind: bytes, content: memoryview) -> tuple[int, int]:
    if kind == b"VP8L" and len(content) >= 5 and content[0] == 0x2F:
        bits = int.from_bytes(content[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and len(content) >= 10 and bytes(content[3:6]) == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", content, 6)
        return width & 0x3FFF, height & 0x3FFF
    raise _broken("WebP")


def _bmp(body: Body) -> Picture:
    """Examine a BMP. One compressed by runs is refused, because Pillow decodes it byte by byte in Python."""
    if len(body) < 26:
        raise _broken("BMP")
    (header,) = struct.unpack_from("<I", body, 14)
    if header == 12:
        width, height = struct.unpack_from("<HH", body, 18)
        return Picture("BMP", width, height, bytes(body), 4)
    if len(body) < 54:
        raise _broken("BMP")
    width, height, _, bits, compression = struct.unpack_from("<IIHHI", body, 18)
    if compression not in BMP_RAW:
        raise Unreadable("the BMP is compressed, which is not read; save it uncompressed, or as PNG")
    if height >> 24 == 0xFF:  # rows from the top are announced by a negative height
        height = 2**32 - height
    palette = bytes(body[14 + header : int.from_bytes(body[10:14], "little")]) if bits <= 8 else b""
    grey = bits <= 8 and _is_grey(palette, 4)
    return Picture("BMP", width, height, bytes(body), 1 if bits <= 8 else 4, bits == 32, grey=grey)


def _is_grey(palette: bytes, step: int) -> bool:
    """Whether all colours of a palette, one every `step` bytes, are grey."""
    return palette[0::step] == palette[1::step] == palette[2::step]
