"""multipart/form-data: pictures or .npy in fields `file`, masks in fields `mask`, options in fields of their names.

Also application/x-www-form-urlencoded, options alone. Sources: RFC 7578; HTML standard, 4.10.21.
"""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Iterable
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from service.codecs import image, npy
from service.codecs.codec import Codec
from service.codecs.payload import (
    Body,
    Intake,
    Meter,
    Payload,
    as_images,
    as_rows,
    channels_of,
    check_pictures,
    of_one_type,
)
from service.codecs.source import LEVELS, joined
from service.errors import InvalidOption, InvalidShape, InvalidValue, TooLarge, Unreadable, quoted

logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # its warnings repeat what the answer says

MAX_URLENCODED_BYTES = 2**16
MAX_PARTS = 1024
MAX_PARAMETERS = 16
FILES = ("file", "mask")
UNCODED = ("", "binary", "8bit", "7bit")
TOO_MANY = f"the form has more than {MAX_PARTS} fields; send fewer files, or many rows as one .npy"

Array = NDArray[Any]


class Part(NamedTuple):
    """One field of a form."""

    name: str
    content: bytes
    is_file: bool


def read(body: Body, content_type: str, intake: Intake) -> Payload:
    """The files of a form as arrays, its other fields as options; empty fields are ignored.

    Raises:
        Unreadable: The form is malformed or has no file.
        InvalidOption: A file is in an unknown field, or an option is named twice.
        InvalidShape: Its files are of several sizes, or not of the operation's shape.
        TooLarge: It has too many parts, or needs too much memory.
    """
    parts = [part for part in _parse(body, content_type, intake) if part.content]
    options = _options((part.name, _text(part)) for part in parts if not part.is_file)
    files = {name: [part.content for part in parts if part.is_file and part.name == name] for name in FILES}
    unknown = [part.name for part in parts if part.is_file and part.name not in FILES]
    if not intake.name:
        if any(part.is_file for part in parts):
            raise InvalidOption("the form has a file, and this operation takes none; send options alone")
        return Payload(None, None, options)
    if not files["file"]:
        instead = f", only in {quoted(unknown[0])}" if unknown else ""
        raise Unreadable(
            f"the form has no file in the field `file`, or an empty one{instead}; with curl: -F file=@picture.png"
        )
    if unknown:
        raise InvalidOption(f"the form has a file in the field {quoted(unknown[0])}; files go in `file` and `mask`")
    found = _rows(files["file"], intake)
    if files["mask"]:
        found = found._replace(mask=_masks(files["mask"], intake))
    return found._replace(options=options)


def read_urlencoded(body: Body, _content_type: str, _intake: Intake) -> Payload:
    """Options; the form is limited, because decoding takes thirty times the memory of the text.

    Raises:
        Unreadable: The form is not UTF-8.
        InvalidOption: An option is named twice.
        TooLarge: It is too long or has too many fields.
    """
    if len(body) > MAX_URLENCODED_BYTES:
        raise TooLarge(f"the form of options is above {MAX_URLENCODED_BYTES} bytes; send files as multipart/form-data")
    try:
        pairs = parse_qsl(bytes(body).decode(), keep_blank_values=True, max_num_fields=MAX_PARTS, errors="strict")
    except UnicodeDecodeError as error:
        raise Unreadable("the form is not UTF-8 text; encode it as UTF-8") from error
    except ValueError as error:  # as documented for max_num_fields
        raise TooLarge(TOO_MANY) from error
    return Payload(None, None, _options((name, value) for name, value in pairs if value))


def _options(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    options: dict[str, str] = {}
    for name, value in pairs:
        if name in options:
            raise InvalidOption(f"the form names the option {quoted(name)} twice; send it once")
        options[name] = value
    return options


def _text(part: Part) -> str:
    try:
        return part.content.decode()
    except UnicodeDecodeError as error:
        raise Unreadable(f"the form's field {quoted(part.name)} is not UTF-8 text; send a file as a file") from error


def _rows(files: list[bytes], intake: Intake) -> Payload:
    """The rows of all files, with a mask where every picture has one."""
    check_pictures(len(files), intake.meter)
    found = [_read(content, "file", intake) for content in files]
    if len(found) == 1:
        return found[0]
    sources = [one.source for one in found if one.source is not None]
    source = None
    if len(sources) == len(found):
        source = joined([one.array for one in found if one.array is not None], sources)
    elif any(one.kind not in LEVELS for one in sources):
        raise InvalidShape(
            "the form has pictures of numbers without a known white beside arrays; send one or the other"
        )
    arrays = [one.array for one in found if one.array is not None]
    if source is None or source.kind in LEVELS:  # others are scaled later
        arrays = [_as_rows(array, intake) for array in arrays]
    array = _joined(arrays, "file", intake.meter)
    masks = [one.mask for one in found if one.mask is not None]
    return Payload(array, np.concatenate(masks) if len(masks) == len(found) else None, source=source)


def _as_rows(array: Array, intake: Intake) -> Array:
    """The rows of one of several files."""
    if intake.name == "latents":
        return as_rows(array, intake.shape, intake.name)
    channels = channels_of(array, intake.variants) if intake.variants else intake.shape[0]
    return as_images(array, (channels, *intake.shape[1:]), intake.name, intake.float_pixels)


def _masks(files: list[bytes], intake: Intake) -> Array:
    check_pictures(len(files), intake.meter)
    found = [one.array for content in files if (one := _read(content, "mask", intake)).array is not None]
    if len(found) == 1:
        return found[0]
    return _joined([as_images(array, (1, *intake.shape[1:]), "mask") for array in found], "mask", intake.meter)


def _joined(arrays: list[Array], name: str, meter: Meter) -> Array:
    if len({array.shape[1:] for array in arrays}) > 1:
        raise InvalidShape(
            f"the files in the fields `{name}` must be of one size, and all grey or all colour; send them one by one"
        )
    return np.concatenate(of_one_type(arrays, meter))


def _read(content: bytes, field: str, intake: Intake) -> Payload:
    """The rows of a file; their mask is the picture's opacity where the operation wants one."""
    try:
        if content.startswith(npy.MAGIC):
            return Payload(npy.parse(content, intake._replace(float_pixels=None) if field == "mask" else intake))
        return Payload(image.parse_mask(content, intake)) if field == "mask" else image.read(content, "", intake)
    except (InvalidShape, InvalidValue, Unreadable) as error:
        raise type(error)(f"in the form's field `{field}`: {error}") from error


def _parse(body: Body, content_type: str, intake: Intake) -> list[Part]:
    """The parts in the order of the form.

    Raises:
        Unreadable: The form does not follow RFC 7578, or ends before its closing boundary.
        TooLarge: It has too many parts, or too little memory is left.
    """
    _, parameters = parse_options_header(content_type if content_type.count(";") <= MAX_PARAMETERS else "")
    boundary = parameters.get(b"boundary")
    if not boundary:
        raise Unreadable("Content-Type names no boundary; let your HTTP client set it, or add boundary=...")
    if body.count(b"--" + boundary) > MAX_PARTS + 1:
        raise TooLarge(TOO_MANY)
    intake.meter.reserve(2 * len(body))
    found = _Parts()
    try:
        MultipartParser(boundary, found.callbacks()).write(bytes(body))
    except (FormParserError, ValueError) as error:
        raise Unreadable(f"the form cannot be read: {error}; let your HTTP client write it") from error
    if not found.ended:
        raise Unreadable("the form ends before its closing boundary; send the whole body")
    return found.parts


class _Parts:
    """Collects the parts of one form from the parser's callbacks."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.ended = False
        self._names: dict[bytes, bytes] = {}
        self._name, self._value = b"", b""
        self._pieces: list[bytes] = []

    def callbacks(self) -> Any:
        """The callbacks by the parser's names."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._field,
            "on_header_value": self._content_of_header,
            "on_header_end": self._end_of_header,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        self._names, self._pieces = {}, []

    def _field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _content_of_header(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_of_header(self) -> None:
        self._names[self._name.lower()] = self._value.strip(b" \t")
        self._name, self._value = b"", b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._pieces.append(data[start:end])

    def _end(self) -> None:
        disposition = self._names.get(b"content-disposition", b"")
        if disposition.count(b";") > MAX_PARAMETERS:  # reading them takes the square of their number
            raise Unreadable("a Content-Disposition of the form has too many parameters; send name and filename")
        kind, said = parse_options_header(disposition)
        if kind != b"form-data" or b"name" not in said:
            raise Unreadable('each part of a form needs Content-Disposition: form-data; name="..."')
        try:
            name = said[b"name"].decode()
        except UnicodeDecodeError as error:
            raise Unreadable("the name of a field is not UTF-8 text; rename it") from error
        content = b"".join(self._pieces)
        coding = self._names.get(b"content-transfer-encoding", b"").decode("latin-1").lower()
        if coding == "base64":
            try:
                content = base64.b64decode(content)
            except binascii.Error as error:
                raise Unreadable(f"the form's field {quoted(name)} is not base64") from error
        elif coding not in UNCODED:
            raise Unreadable(f"the form's field {quoted(name)} is {quoted(coding)} encoded; send it as it is")
        self.parts.append(Part(name, content, b"filename" in said or name in FILES))

    def _finish(self) -> None:
        self.ended = True


FORM = Codec("multipart/form-data", read=read, options=True, answered_in=image.PNG.media_type, schema=None)
URLENCODED = Codec("application/x-www-form-urlencoded", read=read_urlencoded, arrays=False, options=True, schema=None)
