"""Picture files before decoding: finds format, size and cost of decoding, and removes metadata.

Pillow limits metadata and spends time and memory on it. Only pixels, palette, transparency, EXIF and the colour profile
are needed here.
Sources: PNG 3rd edition, 5; ITU-T T.81, annex B; RFC 9649 (WebP); Microsoft, "Bitmap header types"; CompuServe, GIF89a;
ICC.1:2022, 7.2 and annex B.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from PIL import AvifImagePlugin, Image, features

from service.codecs.payload import Body
from service.contract.images import DECODER_ERRORS
from service.errors import TooLarge, Unreadable

AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # decoding takes place in one of the service's own threads

MAX_CHUNKS = 2**15
"""Most chunks of a PNG or a WebP, and most segments of a JPEG before its first scan."""
MAX_JUNK = 2**16
"""Most bytes between the segments of a JPEG."""
MAX_TAGS = 1024
ORIENTATION, SHORT = 0x0112, 3
"""The EXIF tag of the orientation, and its type."""
ICC_MARK = b"ICC_PROFILE\0"
"""Beginning of the JPEG segments that hold parts of a colour profile, each with its place. Source: ICC.1:2022, B.4."""
MAX_SCANS = 100
"""Most scans of a JPEG; cameras and converters write about ten."""
MAX_SCANNED = 2**30
"""Most pixels times scans of a JPEG: each scan visits every pixel, however little it holds."""
PNG = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
PNG_KEPT = (b"PLTE", b"tRNS")
PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Numbers a pixel by the type of colour."""
MAX_PROFILE = 2**21
"""Most bytes of a colour profile; larger ones are for printers."""
MARKER = re.compile(rb"\xff[^\x00\xff]")
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
ALONE = frozenset({0x01, *range(0xD0, 0xD9)})
"""Markers that have no length."""
COMMENTS = frozenset({*range(0xE0, 0xF0), 0xFE})
WEBP_KEPT = (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"EXIF", b"ICCP")
ANIMATED, ALPHA = 0x02, 0x10
BMP_RAW = (0, 3)
"""Values of the field compression: none, or none with bit masks for the colours."""

WEBP_BYTES = 16
"""Memory a pixel of libwebp's animation decoder, whatever the file holds."""
AVIF_BYTES, HEIC_BYTES, GIF_BYTES = 24, 24, 24
"""The same of libavif and libheif, and of Pillow, which keeps the frame before and lays one on the other."""
GIF_EXTENSION, GIF_IMAGE, GIF_END = 0x21, 0x2C, 0x3B
GIF_CONTROL, GIF_CONTROL_BYTES = 0xF9, 8
GIF_LOOP = b"\xff\x0bNETSCAPE2.0\x03\x01"
MAX_BLOCKS = 2**20
"""Most blocks of a GIF, of at most 255 bytes each."""

CONVERT = "convert it to PNG, for example with ImageMagick: magick picture.{} picture.png"
OTHERS: tuple[tuple[bytes, str, str], ...] = (
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
AVIF_BRANDS = (b"avif", b"avis")
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
"""Marks in the first box of ISO base media files."""
HEIC_EXTRA = "pip install 'vae-service[heic]'"
UNREAD_TYPES = {
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
        profile: Its colour profile (ICC); empty without.
        frames: Pictures in the file.
        durations: Milliseconds of each frame of a GIF.
        loop: How often a GIF is repeated, 0 for ever; None for once.
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
    profile: bytes = b""
    frames: int = 1
    durations: tuple[int, ...] = ()
    loop: int | None = 0

    def passing_bytes(self, channels: int, *, floats: bool) -> int:
        """Most bytes a pixel of decoding and converting one frame; tests/service/test_pictures.py measures them."""
        turned = 4 if self.orientation != 1 else 0
        levels = self.depth * channels if floats else 0
        return self.decoded + turned + levels + (8 if self.transparent else 4 if floats else 1)


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
    elif head.startswith((b"GIF87a", b"GIF89a")):
        found = _gif(body)
    elif head[4:8] == b"ftyp" and (form := _coded_in_boxes(bytes(body[8:64]))):
        found = _opened(body, form)
    else:
        raise Unreadable(_unread(bytes(body[:1024])))
    if found.width == 0 or found.height == 0:
        raise Unreadable(f"the {found.form} says that it is {found.width} x {found.height} pixels; send a picture")
    return found


def _unread(head: bytes) -> str:
    """The message for a format that is not read: its name, where known, and advice."""
    known = "PNG, JPEG, WebP, BMP, TIFF, GIF and AVIF are read"
    if head[4:8] == b"ftyp":
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
        elif kind in PNG_KEPT or kind in (b"eXIf", b"iCCP"):
            kept.setdefault(kind, chunk)
    length, check = sum(map(len, data)), zlib.crc32(b"IDAT")
    if not 0 < length < 2**31:
        raise _broken("PNG")
    for part in data:
        check = zlib.crc32(part, check)
    head: list[bytes | memoryview] = [bytes(body[:33]), *(kept[kind] for kind in PNG_KEPT if kind in kept)]
    ends = struct.pack(">I4s", length, b"IDAT"), struct.pack(">I", check) + PNG_END
    width, height, depth, colour = struct.unpack_from(">IIBB", body, 16)
    transparent = colour in (4, 6) or b"tRNS" in kept
    deep = 2 * (PNG_SAMPLES.get(colour, 4) + (b"tRNS" in kept))
    decoded = deep if depth == 16 else 1 if colour in (0, 3) else 4
    content = b"".join([*head, ends[0], *data, ends[1]])
    turn = _orientation(kept.get(b"eXIf", b"")[8:])
    grey = colour in (0, 4) or (colour == 3 and _is_grey(bytes(kept.get(b"PLTE", b"")[8:-4]), 3))
    bytes_a_level = 2 if depth == 16 else 1
    profile = _unpacked(bytes(kept.get(b"iCCP", b"")[8:-4]))
    return Picture("PNG", width, height, content, decoded, transparent, turn, grey, bytes_a_level, profile)


def _unpacked(content: bytes) -> bytes:
    """The profile in a chunk iCCP: a name, a zero, a zero for the method, and zlib's stream."""
    begin = content[:81].find(b"\0") + 2
    unpacking = zlib.decompressobj()
    try:
        return checked_profile(unpacking.decompress(content[begin:], MAX_PROFILE + 1)) if begin > 1 else b""
    except zlib.error:
        return b""


def checked_profile(profile: bytes) -> bytes:
    """A colour profile whose header has the length and mark of one; empty for any other."""
    whole = len(profile) == int.from_bytes(profile[:4], "big") <= MAX_PROFILE
    return profile if whole and profile[36:40] == b"acsp" else b""


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
    profile: dict[int, memoryview] = {}
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
        if kind == 0xE2 and bytes(segment[4:16]) == ICC_MARK and len(segment) >= 18:
            profile.setdefault(segment[16], segment[18:])
    if len(frames) != 1:
        raise _broken("JPEG")
    kind, height, width, components = frames[0]
    decoded = 1 if components == 1 else 4
    if kind in PROGRESSIVE or body[scans + 4] < components:
        _check_scans(body.count(b"\xff\xda", scans), width * height)
        decoded += 2 * components  # all coefficients are kept until the last scan
    content, grey = b"".join([*kept, memoryview(body)[scans:]]), components == 1
    joined = checked_profile(b"".join(profile[place] for place in sorted(profile)))
    return Picture("JPEG", width, height, content, decoded, orientation=turn or 1, grey=grey, profile=joined)


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
    turn, profile = _orientation(kept.get(b"EXIF", b"")), checked_profile(bytes(kept.get(b"ICCP", b"")))
    whole = _riff(b"RIFF", b"WEBP" + b"".join(chunks))
    return Picture("WEBP", width, height, whole, WEBP_BYTES, transparent, turn, profile=profile)


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


def _gif(body: Body) -> Picture:
    """Examine a GIF. Of its extensions those that time its frames and make them transparent are kept."""
    if len(body) < 13:
        raise _broken("GIF")
    width, height, flags = struct.unpack_from("<HHB", body, 6)
    place = 13 + _colours(flags)
    grey, transparent, loop = _is_grey(bytes(body[13:place]), 3), False, None
    kept: list[bytes | memoryview] = [memoryview(body)[:place]]
    durations, duration = list[int](), 0
    for kind, start, end in _gif_blocks(body, place):
        block = memoryview(body)[start:end]
        if kind == GIF_IMAGE:
            left, top, across, down, own = struct.unpack_from("<HHHHB", block, 1)
            if left + across > width or top + down > height:
                raise _broken("GIF")
            grey = grey and _is_grey(bytes(block[10 : 10 + _colours(own)]), 3)
            kept.append(block)
            durations.append(duration)
            duration = 0
        elif block[1] == GIF_CONTROL and len(block) == GIF_CONTROL_BYTES:
            transparent = transparent or bool(block[3] & 1)
            (hundredths,) = struct.unpack_from("<H", block, 4)
            duration = 10 * hundredths
            kept.append(block)
        elif bytes(block[1:16]) == GIF_LOOP:
            (loop,) = struct.unpack_from("<H", block, 16)
    if not durations:
        raise _broken("GIF")
    content, frames = b"".join([*kept, bytes([GIF_END])]), len(durations)
    transparent = transparent or frames > 1  # Pillow may give later frames an opacity
    return Picture(
        "GIF", width, height, content, GIF_BYTES, transparent,
        grey=grey, frames=frames, durations=tuple(durations), loop=loop,
    )  # fmt: skip


def _colours(flags: int) -> int:
    """Bytes of the table of colours that the flags of a GIF or of a frame announce."""
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _gif_blocks(body: Body, place: int) -> Iterator[tuple[int, int, int]]:
    """(kind, start, end) of extensions and frames; the end mark may be missing."""
    steps = 0
    while place < len(body) and body[place] != GIF_END:
        start, kind = place, body[place]
        if kind == GIF_IMAGE and place + 10 < len(body):
            place += 11 + _colours(body[place + 9])
        elif kind == GIF_EXTENSION:
            place += 2
        else:
            raise _broken("GIF")
        while place < len(body) and body[place]:
            place += 1 + body[place]
            steps += 1
            if steps > MAX_BLOCKS:
                raise _too_many("GIF")
        place += 1
        if place > len(body):
            raise _broken("GIF")
        yield kind, start, place


def _coded_in_boxes(brands: bytes) -> str:
    """The format of a still picture in an ISO base media file, by its marks; empty for any other."""
    if any(mark in brands for mark in AVIF_BRANDS):
        return "AVIF"
    return "HEIF" if any(mark in brands for mark in HEIC_BRANDS) else ""


def _opened(body: Body, form: str) -> Picture:
    """Examine an AVIF or a HEIC by its library, which reads no pixels for it.

    libheif turns pictures itself; libavif says how, as EXIF does.
    """
    decoded = AVIF_BYTES
    if form == "AVIF" and not features.check("avif"):
        raise Unreadable(f"the picture is an AVIF, which this build of Pillow does not read; {CONVERT.format('avif')}")
    if form == "HEIF":
        _open_heic()
        decoded = HEIC_BYTES
    content = bytes(body)
    try:
        with Image.open(io.BytesIO(content), formats=(form,)) as image:
            if form == "AVIF" and getattr(image, "n_frames", 1) > 1:
                raise Unreadable("the AVIF is animated, which is not read; send one of its pictures")
            profile = checked_profile(image.info.get("icc_profile") or b"")
            turn = _orientation(image.info.get("exif") or b"") if form == "AVIF" else 1
            transparent, grey = "A" in image.mode, image.mode.startswith("L")
            return Picture(form, *image.size, content, decoded, transparent, turn, grey, profile=profile)
    except (*DECODER_ERRORS, RuntimeError) as error:
        raise _broken(form) from error


def _open_heic() -> None:
    """Make Pillow open HEIC.

    Raises:
        Unreadable: The extra is not installed.
    """
    try:
        import pi_heif  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise Unreadable(
            f"the picture is a HEIC, which this service reads only after {HEIC_EXTRA}; {CONVERT.format('heic')}"
        ) from error
    pi_heif.register_heif_opener()
