"""image/tiff: pages of 8, 16, 32 or 64 bits, read and written through tifffile.

A stack is read as rows and written as pages in the same order, so what names its axes, which is copied, stays true.

tifffile looks at far more of a file than its pixels: descriptions, vendors' tags, further files that they name. So it
gets a copy whose directories are new and hold only the tags that the pixels need, after their sizes have been checked.
Sources: TIFF 6.0; Adobe Photoshop TIFF technical notes; BigTIFF; OME-TIFF specification 6; ImageJ, TiffEncoder.
"""

from __future__ import annotations

import io
import logging
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.codecs.container import checked_profile
from service.codecs.payload import Answer, Body, images_only
from service.codecs.source import LEVELS, Tags
from service.contract.images import TURNS, Samples, to_pages, turned_array, white_of
from service.errors import InvalidShape, TooLarge, Unreadable

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it says of broken files the answer says

MEDIA_TYPE = "image/tiff"
BEGINNINGS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_PAGES = 2**12
MAX_TAGS = 2**16
"""Most tags of all pages together; a page has about fifteen."""
MAX_NUMBERS = 2**19
"""Most numbers in the tags of the pixels. A strip or a tile has two, and takes tifffile about 20 microseconds."""
MAX_COUNT = 2**16
"""Most numbers of a tag that is no list of strips or tiles."""
TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
INTEGERS = {1: "B", 3: "H", 4: "I", 16: "Q"}
SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, DESCRIPTION = 254, 256, 257, 258, 259, 262, 266, 270
STRIPS, ORIENTATION, SAMPLES, STRIP_ROWS, STRIP_BYTES, X_RESOLUTION, Y_RESOLUTION = 273, 274, 277, 278, 279, 282, 283
PLANAR, UNIT, PREDICTOR, PALETTE, TILE_WIDTH, TILE_HEIGHT, TILES, TILE_BYTES = 284, 296, 317, 320, 322, 323, 324, 325
EXTRA_SAMPLES, FORMAT, PROFILE, IMAGEJ_COUNTS, IMAGEJ = 338, 339, 34675, 50838, 50839
"""Numbers of the tags that are read."""
PIXELS = frozenset({
    WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, STRIPS, SAMPLES, STRIP_ROWS, STRIP_BYTES, PLANAR,
    PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILES, TILE_BYTES, EXTRA_SAMPLES, FORMAT,
})  # fmt: skip
"""Tags that tifffile gets."""
ALIKE = (WIDTH, HEIGHT, BITS, PHOTOMETRIC, SAMPLES, PLANAR, FORMAT, EXTRA_SAMPLES)
"""Tags that all pages must have in common."""
DEFAULTS = {
    SUBFILE: 0,
    BITS: 1,
    COMPRESSION: 1,
    ORIENTATION: 1,
    SAMPLES: 1,
    PLANAR: 1,
    UNIT: 2,
    PREDICTOR: 1,
    FORMAT: 1,
}
NOT_WHOLE = 1 | 4
"""Bits of SUBFILE: the page is a smaller copy of another, or its mask."""
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, INDEXED = 0, 1, 2, 3
ALPHAS = (1, 2)
"""Values of EXTRA_SAMPLES: opacity that the colours are multiplied by, and opacity that they are not multiplied by."""
READ = {1: "", 5: "LZW", 8: "Deflate", 32946: "Deflate", 32773: "PackBits", 34925: "LZMA", 50000: "Zstandard"}
"""Compressions that are read. Their decoders take a bound on the size of the output."""
WRITTEN = {5: "lzw", 8: "zlib", 32946: "zlib", 50000: "zstd"}
UNREAD = {2: "CCITT", 3: "fax", 4: "fax", 6: "JPEG", 7: "JPEG", 33003: "JPEG 2000", 34712: "JPEG 2000", 50001: "WebP"}
KINDS = {
    (1, 1): "?", (8, 1): "u1", (16, 1): "u2", (32, 1): "u4", (64, 1): "u8", (8, 2): "i1", (16, 2): "i2", (32, 2): "i4",
    (64, 2): "i8", (16, 3): "f2", (32, 3): "f4", (64, 3): "f8",
}  # fmt: skip
"""numpy's types by bits and sample format."""
ADVICE = "save it as RGB or grey of 8, 16 or 32 bits, uncompressed or with LZW or Deflate"
BROKEN = "the TIFF is broken or cut short; send the whole file"

Tag = tuple[int, int, int]
"""(type, count, place of the value in the file)."""
Page = Mapping[int, Tag]


class Layout(NamedTuple):
    """How the numbers of a file are written.

    Attributes:
        order: Byte order, `<` or `>`.
        head: Bytes of the header.
        number: Format of the number of tags in a directory.
        offset: Format of an offset, and of the number of values of a tag.
    """

    order: str
    head: int
    number: str
    offset: str


class Tiff(NamedTuple):
    """A TIFF that has not been decoded.

    Attributes:
        width: Pixels.
        height: Pixels.
        pages: Number of pages.
        samples: Numbers a pixel of a page.
        kind: Type of the numbers.
        planar: Whether the numbers of all pixels follow each other plane by plane.
        alpha: Whether the last number of a pixel is its opacity.
        white_is_zero: Whether levels are inverted.
        palette: Levels of a picture by its numbers, (colours, 3), uint8; None without a palette.
        orientation: How to turn it, as EXIF counts.
        segment: Most bytes of a strip or tile.
        tags: What its answer keeps.
        profile: Its colour profile; empty without.
        content: The copy for tifffile.
    """

    width: int
    height: int
    pages: int
    samples: int
    kind: np.dtype[Any]
    planar: bool
    alpha: bool
    white_is_zero: bool
    palette: NDArray[np.uint8] | None
    orientation: int
    segment: int
    tags: Tags
    profile: bytes
    content: bytes

    @property
    def row_kind(self) -> np.dtype[Any]:
        """Type of the numbers of its rows."""
        return LEVELS[0] if self.kind == np.bool_ else self.kind

    def passing_bytes(self, channels: int) -> int:
        """Most bytes of decoding and converting one page; tests/codecs/test_tiff.py measures them."""
        pixel_bytes = (self.samples + channels) * self.kind.itemsize + (0 if self.palette is None else 3) + 1
        return self.width * self.height * pixel_bytes + 3 * self.segment


def is_tiff(body: Body) -> bool:
    """Whether a file begins as a TIFF does."""
    return bytes(body[:4]) in BEGINNINGS


def examine(body: Body) -> Tiff:
    """Examine a TIFF.

    Raises:
        Unreadable: It is broken, or of a kind that is not read.
        InvalidShape: Its pages differ.
        TooLarge: It has more pages, tags, strips or tiles than is allowed.
    """
    try:
        layout = _layout(body)
        reader = _Reader(body, layout)
        every = list(reader.pages())
        pages = [page for page in every if not reader.number(page, SUBFILE) & NOT_WHOLE]
        if not pages:
            raise Unreadable("the TIFF has no page of full size; send the whole file")
        return _examined(reader, pages)
    except (struct.error, IndexError, OverflowError) as error:
        raise Unreadable(BROKEN) from error


def _layout(body: Body) -> Layout:
    order = "<" if bytes(body[:2]) == b"II" else ">"
    if body[2] == 43 or body[3] == 43:
        return Layout(order, 16, order + "Q", order + "Q")
    return Layout(order, 8, order + "H", order + "I")


class _Reader:
    """Reads directories and the values of tags, all of which must lie within the file."""

    def __init__(self, body: Body, layout: Layout) -> None:
        self.body, self.layout = body, layout
        self._offset_bytes = struct.calcsize(layout.offset)
        self._count_bytes = struct.calcsize(layout.number)

    def pages(self) -> Iterator[Page]:
        """The directories in the order of the file."""
        offset, body, seen, tags, numbers = self.layout.offset, self.body, set[int](), 0, 0
        (place,) = struct.unpack_from(offset, body, self.layout.head - self._offset_bytes)
        entry = 4 + 2 * self._offset_bytes
        while place:
            if place in seen:
                raise Unreadable("the pages of the TIFF go round in a circle; save it again")
            seen.add(place)
            (count,) = struct.unpack_from(self.layout.number, body, place)
            tags += count
            if len(seen) > MAX_PAGES or tags > MAX_TAGS:
                raise TooLarge(f"the TIFF has more than {MAX_PAGES} pages or {MAX_TAGS} tags; send it in parts")
            first = place + self._count_bytes
            page = dict(self._entry(first + k * entry) for k in range(count))
            numbers += sum(page[tag][1] for tag in PIXELS & page.keys())
            if numbers > MAX_NUMBERS:
                raise TooLarge("the TIFF has too many strips or tiles; save it with larger ones, or send it in parts")
            yield page
            (place,) = struct.unpack_from(offset, body, first + count * entry)

    def _entry(self, place: int) -> tuple[int, Tag]:
        number, kind = struct.unpack_from(self.layout.order + "HH", self.body, place)
        (count,) = struct.unpack_from(self.layout.offset, self.body, place + 4)
        value = place + 4 + self._offset_bytes
        size = TYPE_BYTES.get(kind, 0) * count
        if size > self._offset_bytes:
            (value,) = struct.unpack_from(self.layout.offset, self.body, value)
        if value + size > len(self.body):
            raise Unreadable(BROKEN)
        return number, (kind, count, value)

    def raw(self, page: Page, tag: int) -> bytes:
        """The bytes of a value; none where the tag is absent."""
        kind, count, place = page.get(tag, (1, 0, 0))
        return bytes(self.body[place : place + TYPE_BYTES.get(kind, 0) * count])

    def numbers(self, page: Page, tag: int) -> tuple[int, ...]:
        """The integers of a value."""
        kind, count, place = page.get(tag, (1, 0, 0))
        if kind not in INTEGERS or count > MAX_COUNT:
            raise Unreadable(BROKEN)
        return struct.unpack_from(f"{self.layout.order}{count}{INTEGERS[kind]}", self.body, place)

    def number(self, page: Page, tag: int) -> int:
        """The first integer of a value, or what its absence means."""
        kind, count, place = page.get(tag, (1, 0, 0))
        if not count:
            return DEFAULTS.get(tag, 0)
        return int(self.numbers({tag: (kind, 1, place)}, tag)[0])

    def fraction(self, page: Page, tag: int) -> tuple[int, int]:
        """The fraction of a resolution; 0 / 0 where it is absent."""
        kind, count, place = page.get(tag, (1, 0, 0))
        if (kind, count) != (5, 1):
            return 0, 0
        above, below = struct.unpack_from(self.layout.order + "II", self.body, place)
        return int(above), int(below)

    def copied(self, pages: list[Page]) -> bytes:
        """The file with new directories at its end, which hold the tags of the pixels alone."""
        body, offset = self.body, self.layout.offset
        head = bytes(body[: self.layout.head - self._offset_bytes])
        parts: list[bytes | memoryview] = [memoryview(body)[self.layout.head :]]
        place = len(body)
        first = place + (-place) % 8
        parts.append(b"\0" * (first - place))
        place = first
        for k, page in enumerate(pages):
            kept = sorted(number for number in page if number in PIXELS)
            size = self._count_bytes + len(kept) * (4 + 2 * self._offset_bytes) + self._offset_bytes
            directory, values = [struct.pack(self.layout.number, len(kept))], b""
            for number in kept:
                kind, count, _ = page[number]
                value = self.raw(page, number)
                if len(value) > self._offset_bytes:
                    value, values = struct.pack(offset, place + size + len(values)), values + value
                kinds = struct.pack(self.layout.order + "HH", number, kind) + struct.pack(offset, count)
                directory.append(kinds + value.ljust(self._offset_bytes, b"\0"))
            values += b"\0" * (-(size + len(values)) % 8)
            place += size + len(values)
            directory.append(struct.pack(offset, place if k + 1 < len(pages) else 0))
            parts += [*directory, values]
        return b"".join([head, struct.pack(offset, first), *parts])


def _examined(reader: _Reader, pages: list[Page]) -> Tiff:
    page = pages[0]
    if len({tuple(reader.raw(one, tag) for tag in ALIKE) for one in pages}) > 1:
        raise InvalidShape("the pages of the TIFF differ in size, colours or type; send them one by one")
    kind, samples = _kind(reader, page), reader.number(page, SAMPLES)
    width, height = reader.number(page, WIDTH), reader.number(page, HEIGHT)
    if not (width and height and 0 < samples < 2**16):
        raise Unreadable(f"the TIFF says that it is {width} x {height} pixels of {samples} numbers; send a picture")
    segment = max(_segment_bytes(reader, one, samples * kind.itemsize) for one in pages)
    photometric, colours, alpha, associated = _colours(reader, page, samples)
    planes = samples - alpha if colours == 1 else 1
    orientation = reader.number(page, ORIENTATION) if reader.number(page, ORIENTATION) in TURNS else 1
    palette = _palette(reader, page, kind) if photometric == INDEXED else None
    size = (width, height) if orientation > 4 else (height, width)
    levels = photometric == WHITE_IS_ZERO and kind in (*LEVELS, np.bool_)
    fixed = palette is None and kind != np.bool_ and orientation == 1
    tags = Tags(
        reader.layout.order,
        reader.number(page, COMPRESSION),
        reader.number(page, PREDICTOR),
        _resolution(reader, page, turned=orientation > 4),
        reader.number(page, UNIT),
        _description(reader, page, len(pages)) if fixed else b"",
        _imagej(reader, page) if fixed else (),
        planes * len(pages),
        planes,
        (*size, 3 if palette is not None else colours),
        associated,
    )
    planar = samples > 1 and reader.number(page, PLANAR) == 2
    return Tiff(
        width, height, len(pages), samples, kind, planar, alpha, levels, palette, orientation, segment, tags,
        checked_profile(reader.raw(page, PROFILE)), reader.copied(pages),
    )  # fmt: skip


def _kind(reader: _Reader, page: Page) -> np.dtype[Any]:
    """The type of the numbers."""
    bits, formats = set(reader.numbers(page, BITS)) or {1}, set(reader.numbers(page, FORMAT)) or {1}
    name = KINDS.get((max(bits), max(formats)))
    if len(bits) > 1 or len(formats) > 1 or name is None:
        what = " and ".join(map(str, sorted(bits)[:4]))
        raise Unreadable(f"the TIFF has numbers of {what} bits and format {max(formats)}, which are not read; {ADVICE}")
    return np.dtype(name)


def _segment_bytes(reader: _Reader, page: Page, pixel_bytes: int) -> int:
    """Bytes of the largest strip or tile of a page.

    Raises:
        Unreadable: It is compressed in a way that is not read, or does not say where its pixels are.
    """
    compression = reader.number(page, COMPRESSION)
    if compression not in READ:
        name = UNREAD.get(compression, f"method {compression}")
        raise Unreadable(f"the TIFF is compressed by {name}, which is not read; {ADVICE}")
    width, height = reader.number(page, WIDTH), reader.number(page, HEIGHT)
    if TILES in page:
        across, down = reader.number(page, TILE_WIDTH), reader.number(page, TILE_HEIGHT)
    else:
        across, down = width, min(reader.number(page, STRIP_ROWS) or height, height)
    if not (across and down):
        raise Unreadable(BROKEN)
    return across * down * pixel_bytes


def _colours(reader: _Reader, page: Page, samples: int) -> tuple[int, int, bool, bool]:
    """(photometric interpretation, colours of a row, whether an opacity follows, whether it is multiplied in)."""
    photometric = reader.number(page, PHOTOMETRIC) if PHOTOMETRIC in page else BLACK_IS_ZERO
    extra = reader.numbers(page, EXTRA_SAMPLES)
    if photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, INDEXED):
        raise Unreadable(f"the TIFF has colours of kind {photometric}, such as CMYK or YCbCr, not read; {ADVICE}")
    if photometric == RGB:
        if samples not in (3, 4):
            raise Unreadable(f"the TIFF has RGB of {samples} numbers a pixel, which is not read; {ADVICE}")
        return photometric, 3, samples == 4, samples == 4 and extra[:1] == (1,)
    if photometric == INDEXED and samples != 1:
        raise Unreadable(f"the TIFF has a palette and {samples} numbers a pixel, which is not read; {ADVICE}")
    alpha = samples == 2 and len(extra) == 1 and extra[0] in ALPHAS
    return photometric, 1, alpha, alpha and extra[0] == 1


def _palette(reader: _Reader, page: Page, kind: np.dtype[Any]) -> NDArray[np.uint8]:
    colours = reader.numbers(page, PALETTE)
    if kind != np.uint8 or len(colours) != 3 * 256:
        raise Unreadable(f"the TIFF has a palette of {len(colours) // 3} colours, which is not read; {ADVICE}")
    return np.array(colours, np.uint16).reshape(3, 256).T.__rshift__(8).astype(np.uint8)


def _resolution(reader: _Reader, page: Page, *, turned: bool) -> tuple[tuple[int, int], tuple[int, int]] | None:
    across, down = reader.fraction(page, X_RESOLUTION), reader.fraction(page, Y_RESOLUTION)
    if not (all(across) and all(down)):
        return None
    return (down, across) if turned else (across, down)


def _description(reader: _Reader, page: Page, pages: int) -> bytes:
    """The description, where it names axes.

    Raises:
        Unreadable: ImageJ's says that there are more images than pages, which other programs cannot read either.
    """
    text = reader.raw(page, DESCRIPTION).rstrip(b"\0")
    if text.startswith(b"ImageJ="):
        said = re.search(rb"^images=(\d{1,9})\s*$", text, re.MULTILINE)
        if said and int(said[1]) > pages:
            raise Unreadable(
                f"the TIFF has {pages} pages and, by ImageJ, {int(said[1])} images, which only ImageJ can read; save "
                "it as OME-TIFF, or in parts"
            )
        return text
    return text if b"<OME" in text[:4096] or text.startswith(b'{"shape"') else b""


def _imagej(reader: _Reader, page: Page) -> tuple[tuple[int, int, int, Any], ...]:
    """ImageJ's tables of colours, labels and regions, as they are."""
    if not (IMAGEJ in page and IMAGEJ_COUNTS in page):
        return ()
    counts, content = reader.numbers(page, IMAGEJ_COUNTS), reader.raw(page, IMAGEJ)
    return ((IMAGEJ_COUNTS, 4, len(counts), counts), (IMAGEJ, 1, len(content), content))


def rows(found: Tiff) -> Iterator[Samples]:
    """The rows of a TIFF, upright, one by one.

    Raises:
        Unreadable: It is broken.
    """
    import tifffile  # noqa: PLC0415  # takes a quarter of a second, which most services need not wait for

    errors = (tifffile.TiffFileError, RuntimeError, ValueError, TypeError, KeyError, IndexError, OSError, struct.error)
    try:
        with tifffile.TiffFile(io.BytesIO(found.content)) as file:
            for page in file.pages:
                yield from _rows_of(page.asarray(maxworkers=1), found)
    except errors as error:
        raise Unreadable(BROKEN) from error


def _rows_of(numbers: NDArray[Any], found: Tiff) -> Iterator[Samples]:
    """The rows of a page from its numbers, (h, w), (h, w, samples) or, where each is in a plane, (samples, h, w)."""
    together = np.moveaxis(numbers, 0, -1) if found.planar else np.atleast_3d(numbers)
    if found.kind == np.bool_:
        together = together.astype(np.uint8) * np.uint8(255)
    if found.palette is not None:
        together = found.palette[together[..., 0]]
    alpha = together[..., -1] if found.alpha else None
    colours = together[..., :-1] if found.alpha else together
    if found.white_is_zero:
        colours = colours.dtype.type(white_of(colours.dtype)) - colours
    for first in range(0, colours.shape[2], found.tags.page[2]):
        colour = turned_array(colours[..., first : first + found.tags.page[2]], found.orientation)
        yield Samples(colour, None if alpha is None else turned_array(alpha, found.orientation), found.tags.associated)


def write(answer: Answer) -> bytes | None:
    """The images as pages, of the type and scale of what was sent; None for an answer that holds anything else."""
    images = images_only(answer)
    if images is None:
        return None
    import tifffile  # noqa: PLC0415  # as above

    source, tags = answer.source, answer.source.tags
    alpha = source.opacity(images)
    pages = to_pages(source.numbers(images), alpha, source.kind)
    known: dict[str, Any] = {"photometric": "rgb" if images.shape[1] > 1 else "minisblack"}
    if pages.shape[3] > 1:
        known["planarconfig"] = "contig"
    else:
        pages = _planes_together(pages[..., 0], 1 if tags is None else tags.planes, known)
    if alpha is not None or images.shape[1] == 4:
        known["extrasamples"] = ["assocalpha" if tags and tags.associated else "unassalpha"]
    if profile := source.profile_of(images.shape[1]):
        known["iccprofile"] = profile
    if tags is not None:
        known |= _tags_again(tags, images.shape, pages)
    file = io.BytesIO()
    with tifffile.TiffWriter(file, byteorder=tags.order if tags else "<") as written:  # type: ignore[arg-type]
        written.write(pages, metadata=None, maxworkers=1, software="", **known)
    return file.getvalue()


def _planes_together(pages: NDArray[Any], planes: int, known: dict[str, Any]) -> NDArray[Any]:
    """Pages whose planes are rows, (n, planes, h, w), where that many rows were sent in each."""
    if planes == 1 or len(pages) % planes:
        return pages
    known |= {"planarconfig": "separate", "extrasamples": ["unspecified"] * (planes - 1)}
    return pages.reshape(-1, planes, *pages.shape[1:])


def _tags_again(tags: Tags, shape: tuple[int, ...], pages: NDArray[Any]) -> dict[str, Any]:
    """Compression, resolution and axes of what was sent, as far as they are right for images of that shape."""
    _, channels, height, width = shape
    found: dict[str, Any] = {"compression": WRITTEN.get(tags.compression)}
    if found["compression"] and tags.predictor > 1:
        found["predictor"] = 3 if pages.dtype.kind == "f" else 2
    down, across = height / tags.page[0], width / tags.page[1]
    if tags.resolution is not None:
        (right, right_unit), (below, below_unit) = tags.resolution
        found["resolution"] = (right / right_unit * across, below / below_unit * down)
        if (down, across) == (1.0, 1.0):
            found["resolution"] = tags.resolution
        found["resolutionunit"] = tags.unit
    if (height, width, channels) == tags.page and tags.rows == shape[0]:
        found |= {"description": tags.description or None, "extratags": [(*one, True) for one in tags.further]}
    return found
