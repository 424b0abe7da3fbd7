"""Picture files: PNG, JPEG, WebP, BMP, TIFF, GIF, AVIF and HEIC are read; PNG, TIFF and GIF are written.

The first bytes of the file decide its format, not Content-Type. Pages and frames are rows.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.codecs import tiff
from service.codecs.codec import Codec
from service.codecs.container import Picture, picture
from service.codecs.heat_map import heat_map
from service.codecs.payload import Answer, Body, Intake, Meter, Payload, check_pictures, images_only
from service.codecs.source import DEFAULT, LEVELS, Source
from service.contract.images import (
    DECODER_ERRORS,
    Pixels,
    Samples,
    draw,
    draw_seen,
    opacity,
    to_floats,
    to_image,
    to_sheet,
    turned,
    turned_array,
    white_of,
)
from service.errors import Unreadable

Image.MAX_IMAGE_PIXELS = None  # VAE_MAX_PIXELS is checked by the Meter; Pillow would warn, and remember each warning

FRAME_MS = 100
"""Duration of each frame of a GIF that is not an answer to one."""
PNG_HEAD = 33
"""Bytes of the signature and of the header chunk."""


class Coded(NamedTuple):
    """A picture file that has been examined and not decoded.

    Attributes:
        form: Its format, for messages.
        size: Height and width, upright.
        rows: Pictures in it.
        grey: Whether they are grey.
        transparent: Whether they may have pixels that are not opaque.
        source: What an answer keeps of it, without the opacity.
        held: Bytes of the copy that is decoded.
        passing_bytes: (channels, whether floats are made) -> most bytes of decoding and converting one picture.
        frames: Decodes one picture after the other, upright. Raises DECODER_ERRORS, RuntimeError and Unreadable.
    """

    form: str
    size: tuple[int, int]
    rows: int
    grey: bool
    transparent: bool
    source: Source
    held: int
    passing_bytes: Callable[[int, bool], int]
    frames: Callable[[], Iterator[Image.Image | Samples]]


def read(body: Body, _content_type: str, intake: Intake) -> Payload:
    """Decode a picture file.

    Returns:
        Pixels (n, c, h, w) in [0, 1], or as numbers of the file: levels of more than `intake.float_pixels` pixels, and
        numbers whose white is unknown. The opacity (n, 1, h, w) is the mask where the operation wants one and the
        picture has transparency.

    Raises:
        Unreadable: The file is no picture or a broken one, or the operation takes none.
        TooLarge: It has too many pixels or needs too much memory; raised before it is decoded.
        Overloaded: Other requests leave too little memory.
        DeadlinePassed: The request's time is up.
        Deferred: Decoding takes too long for the event loop.
    """
    if not intake.is_images:
        raise Unreadable(f"this operation takes {intake.name or 'options'}, not pictures")
    found = _coded(body, intake.meter)
    channels, (height, width) = _channels(found, intake.channels), found.size
    large = intake.float_pixels is not None and height * width > intake.float_pixels
    floats = found.source.kind in LEVELS and not large
    keeps = intake.keeps_alpha and channels != 4
    pixels, alpha = _decoded(
        found,
        (channels, height, width),
        intake.meter,
        partial(draw, on_black=not keeps),
        floats=floats,
        opaque=keeps or intake.masked,
    )
    if alpha is None:
        return Payload(pixels, source=found.source)
    if intake.masked:
        intake.meter.reserve(4 * alpha.size)
    mask = to_floats(alpha) if intake.masked else None
    return Payload(pixels, mask, source=found.source._replace(alpha=alpha if keeps else None))


def parse_mask(body: Body, intake: Intake) -> Pixels:
    """Decode masks drawn as a picture: transparent or black where a pixel is missing. Raises as `read` does.

    Returns:
        (n, 1, h, w) in [0, 1].
    """
    found = _coded(body, intake.meter)
    if found.source.kind not in LEVELS:
        raise Unreadable(f"the mask holds numbers of type {found.source.kind.name}; draw it with 8 or 16 bits")
    return _decoded(found, (1, *found.size), intake.meter, draw_seen, floats=True)[0]


def _channels(found: Coded, known: tuple[int, ...]) -> int:
    """The number of channels, among those of the model, in which a picture is read: 1 if it is grey, else 3.

    Raises:
        Unreadable: No picture has one of these numbers.
    """
    best = (1, 3, 4) if found.grey else (4, 3, 1) if found.transparent else (3, 4, 1)
    channels = next((count for count in best if count in known), None)
    if channels is None:
        counts = " or ".join(map(str, known))
        raise Unreadable(f"the model's images have {counts} channels, which no picture has; send an array")
    return channels


def _decoded(
    found: Coded,
    shape: tuple[int, int, int],
    meter: Meter,
    convert: Callable[[Image.Image | Samples, NDArray[Any]], None],
    *,
    floats: bool,
    opaque: bool = False,
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Decode the pictures of a file.

    Args:
        found: The file.
        shape: Of a row (c, h, w).
        meter: Limits; asked before anything is decoded.
        convert: (picture, array of that shape): writes the one into the other.
        floats: Whether levels become floats.
        opaque: Whether the opacity is wanted too.

    Returns:
        (rows (n, c, h, w), opacity (n, 1, h, w) of the file's type). The latter is None where all is opaque.
    """
    (channels, height, width), kind = shape, found.source.kind
    opaque = opaque and found.transparent
    row_bytes = (4 if floats else kind.itemsize) * channels + kind.itemsize * opaque
    check_pictures(found.rows, meter)
    meter.picture(width, height, row_bytes, found.rows)
    meter.reserve(found.passing_bytes(channels, floats) + found.held)
    rows = np.empty((found.rows, *shape), np.float32 if floats else kind)
    alpha, transparent, count = np.empty((found.rows * opaque, 1, height, width), kind), False, 0
    try:
        for frame in found.frames():
            meter.check_time()
            convert(frame, rows[count])
            if opaque:
                opacities = opacity(frame)
                transparent |= opacities is not None
                alpha[count] = white_of(kind) if opacities is None else opacities
            count += 1
    except (*DECODER_ERRORS, RuntimeError) as error:
        raise Unreadable(_broken(found.form)) from error
    if count < found.rows:
        raise Unreadable(_broken(found.form))
    return rows, alpha if transparent else None


def _broken(form: str) -> str:
    return f"the {form} is broken, cut short or of a rare kind; send it as plain PNG"


def _coded(body: Body, meter: Meter) -> Coded:
    """Examine a picture file. Raises as `read` does."""
    return _coded_tiff(body, meter) if tiff.is_tiff(body) else _coded_picture(picture(body))


def _coded_tiff(body: Body, meter: Meter) -> Coded:
    meter.slow()
    found = tiff.examine(body)
    height, width, colours = found.tags.page
    source = Source(tiff.MEDIA_TYPE, found.row_kind, profile=found.profile, tags=found.tags)
    rows, passing, frames = found.tags.rows, lambda channels, _: found.passing_bytes(channels), lambda: tiff.rows(found)
    grey, held = colours == 1, len(found.content)
    return Coded("TIFF", (height, width), rows, grey, found.alpha, source, held, passing, frames)


def _coded_picture(found: Picture) -> Coded:
    size = (found.width, found.height) if found.orientation > 4 else (found.height, found.width)
    kind, form = LEVELS[found.depth - 1], found.form
    source = Source(GIF.media_type if form == "GIF" else DEFAULT, kind, profile=found.profile, loop=found.loop)
    if form == "GIF":
        source = source._replace(durations=found.durations)

    def passing(channels: int, floats: bool) -> int:
        return found.width * found.height * found.passing_bytes(channels, floats=floats)

    def frames() -> Iterator[Image.Image | Samples]:
        return _deep(found) if kind == LEVELS[1] else _frames(found)

    held = len(found.content)
    return Coded(form, size, found.frames, found.grey, found.transparent, source, held, passing, frames)


def _frames(found: Picture) -> Iterator[Image.Image]:
    """The pictures of a file that Pillow reads."""
    with Image.open(io.BytesIO(found.content), formats=(found.form,)) as image:
        for place in range(found.frames):
            if place:
                image.seek(place)
            yield turned(image, found.orientation)


def _deep(found: Picture) -> Iterator[Samples]:
    """A PNG of 16 bits, of whose colours Pillow would read 8."""
    levels = np.atleast_3d(imagecodecs.png_decode(found.content))
    if levels.dtype != np.uint16 or levels.shape[:2] != (found.height, found.width):
        raise ValueError("it is not as its header says")
    colours = 3 if levels.shape[2] > 2 else 1
    colour = turned_array(levels[..., :colours], found.orientation)
    alpha = turned_array(levels[..., -1], found.orientation) if levels.shape[2] > colours else None
    yield Samples(colour, alpha)


def shown(answer: Answer) -> Pixels | NDArray[np.uint8] | None:
    """What a picture shows of an answer: its images, or the heat map of `std`; None for an answer with more."""
    if "std_scale" in answer.about:
        return heat_map(answer.outputs["std"], answer.about["std_scale"])
    return images_only(answer)


def write(answer: Answer) -> Body | None:
    """The images or their heat map as a PNG, several as one sheet; None for an answer that no picture shows.

    It has 16 bits where what was sent has more than 8.
    """
    images = shown(answer)
    if images is None:
        return None
    source = Source() if "std_scale" in answer.about else answer.source
    alpha, profile = source.opacity(images), source.profile_of(images.shape[1])
    if source.kind in LEVELS:
        images = source.numbers(images)
    if source.kind == np.uint8:
        file = io.BytesIO()
        to_image(images, alpha).save(file, "PNG", compress_level=1, icc_profile=profile or None)
        return file.getvalue()
    known = imagecodecs.PNG
    sheet = to_sheet(images, alpha)
    coded = imagecodecs.png_encode(sheet, level=1, strategy=known.STRATEGY.RLE, filter=known.FILTER.SUB)
    if not profile:
        return coded
    content = b"ICC\0\0" + zlib.compress(profile, 1)
    check = zlib.crc32(b"iCCP" + content)
    chunk = struct.pack(">I4s", len(content), b"iCCP") + content + struct.pack(">I", check)
    return b"".join([coded[:PNG_HEAD], chunk, memoryview(coded)[PNG_HEAD:]])


def write_gif(answer: Answer) -> bytes | None:
    """The images as the frames of a GIF, of 256 colours each; None for an answer that holds anything else."""
    images = images_only(answer)
    if images is None:
        return None
    source = answer.source
    alpha, values = source.opacity(images), source.numbers(images) if source.kind in LEVELS else images
    frames = [to_image(values[k : k + 1], None if alpha is None else alpha[k : k + 1]) for k in range(len(images))]
    durations = source.durations if len(source.durations) == len(frames) else (FRAME_MS,) * len(frames)
    known: dict[str, Any] = {"duration": list(durations) if len(frames) > 1 else durations[0]}
    if source.loop is not None:
        known["loop"] = source.loop
    if alpha is not None:
        known["disposal"] = 2  # so that what a frame leaves out is not that of the one before
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], **known)
    return file.getvalue()


PNG = Codec(DEFAULT, ("image/x-png", "image/apng"), read, write)
JPEG = Codec("image/jpeg", ("image/jpg", "image/pjpeg"), read, answered_in=DEFAULT)
WEBP = Codec("image/webp", ("image/x-webp",), read, answered_in=DEFAULT)
BMP = Codec("image/bmp", ("image/x-ms-bmp", "image/x-bmp", "image/x-windows-bmp"), read, answered_in=DEFAULT)
TIFF = Codec(tiff.MEDIA_TYPE, ("image/tif", "image/x-tiff"), read, tiff.write)
GIF = Codec("image/gif", (), read, write_gif)
AVIF = Codec("image/avif", (), read, answered_in=DEFAULT)
HEIC = Codec("image/heic", ("image/heif",), read, answered_in=DEFAULT)
