"""application/json: named arrays and options in one object."""

from __future__ import annotations

import base64
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import orjson
import simdjson
from numpy.typing import NDArray

from service.codecs import image
from service.codecs.codec import Codec
from service.codecs.payload import Answer, Body, Intake, Meter, Payload, check_pictures, of_one_type
from service.codecs.source import Source, joined
from service.errors import InvalidOption, InvalidShape, Unreadable, quoted

MOST_AXES = 8
LARGE = 2**20
"""Bytes of a body from which on its memory is reserved and its parser shared."""
NUMBER_BYTES = 48
"""Memory of one number in the parser and in the array."""
MOST_FIELDS = 64
"""Most fields of the object: more than any operation has options."""
SLICE_NUMBERS = 2**16
"""Numbers of an answer in one slice: at most 16 bytes of text each, so 1 MiB."""
NO_NUMBERS = (b"NaN", b"Infinity", b"nan", b"inf")
"""Numbers outside JSON that some writers produce."""
NO_NUMBER = re.compile(rb"(?<![\w\"])[-+]?(?:NaN|Infinity|nan|inf)\b")
MOST_PLACES = 16
"""Occurrences of each of these words that are checked for being a value rather than part of a string."""
TURN_S = 0.001
"""Pause between two large texts, in which the event loop may take the interpreter's lock."""
URL_SAFE = str.maketrans("-_", "+/")
Found = TypeVar("Found")
NUMBERS = "{} must be nested lists of numbers, without text, null, true or false"


class Parsers:
    """A lock under which large texts are parsed one at a time.

    A parser holds the interpreter's lock, so the event loop would wait for all that run at once. Touching new memory
    takes half of its time, so the next in the queue gets the parser with its memory.
    """

    def __init__(self) -> None:
        self._turn, self._count = threading.Lock(), threading.Lock()
        self._waiting = 0
        self._parser: simdjson.Parser | None = None

    @contextmanager
    def one(self) -> Iterator[simdjson.Parser]:
        """Wait for a parser. What it has parsed must be deleted before the block ends, unless the block raises."""
        with self._count:
            self._waiting += 1
        with self._turn:
            try:
                time.sleep(TURN_S)
                parser, self._parser = self._parser or simdjson.Parser(), None
                yield parser
                self._parser = parser
            finally:
                with self._count:
                    self._waiting -= 1
                    if not self._waiting:
                        self._parser = None


PARSERS = Parsers()


def read(body: Body, _content_type: str, intake: Intake) -> Payload:
    """An object: "images" or "latents" as nested numbers or base64 pictures, "mask", and any option by its name.

    Numbers go from the text to the array without becoming Python objects. Lists and objects that are no array of the
    operation are not converted.

    Raises:
        Unreadable: The body is not a JSON object, or a string is no picture in base64.
        InvalidShape: An array is not rectangular or not of numbers.
        InvalidOption: A field is there twice, or there are too many.
        TooLarge: It needs too much memory.
    """
    return with_object(body, intake.meter, '{"images": [...]}', lambda content: _read(content, intake))


def with_object(body: Body, meter: Meter, like: str, read: Callable[[simdjson.Object], Found]) -> Found:
    """What a function makes of the JSON object in a body, while its parser keeps the object.

    Args:
        body: The text; empty is an object without fields.
        meter: Limits on reading.
        like: An example of the object, for messages.
        read: Must not keep the object or parts of it.

    Raises:
        Unreadable: The body is not a JSON object.
        TooLarge: It needs too much memory.
        Overloaded: Other requests leave too little memory.
    """
    if len(body) <= LARGE:
        return read(_object(simdjson.Parser(), body, like))
    meter.reserve(2 * len(body) + body.count(b",") * NUMBER_BYTES)
    with PARSERS.one() as parser:
        return read(_object(parser, body, like))


def _object(parser: simdjson.Parser, body: Body, like: str) -> simdjson.Object:
    try:
        content = parser.parse(bytes(body) or b"{}")
    except (ValueError, RuntimeError) as error:
        raise Unreadable(_not_json(body, error)) from error
    if not isinstance(content, simdjson.Object):
        raise Unreadable(f"the body must be a JSON object such as {like}")
    return content


def _read(content: simdjson.Object, intake: Intake) -> Payload:
    named = fields_of(content)
    array, mask, source = _arrays(named.pop(intake.name), intake) if intake.name in named else (None, None, None)
    latents = intake.or_latents and array is None and "latents" in named
    if latents:
        array = numbers_of(named.pop("latents"), "latents")
    if "mask" in named:
        mask = numbers_of(named.pop("mask"), "mask")
    return Payload(array, mask, {name: plain(value) for name, value in named.items()}, latents, source)


def fields_of(content: simdjson.Object) -> dict[str, Any]:
    """The fields of an object, each once.

    Raises:
        InvalidOption: There are more than any operation has, or one is there twice.
    """
    if len(content) > MOST_FIELDS:
        raise InvalidOption(f"the JSON object has {len(content)} fields; an operation has at most a few options")
    named: dict[str, Any] = {}
    for name in content.keys():  # noqa: SIM118  # not a dict: its items would be converted to Python's
        if name in named:
            raise InvalidOption(f"{quoted(name)} is in the JSON object twice; send it once")
        named[name] = content[name] if name.isidentifier() else None  # no option has another name
    return named


def write(answer: Answer) -> Body:
    """An object: every output by its name, as nested numbers, then the fields that describe them."""
    parts = slices(answer)
    text: Body = next(parts)
    for further in parts:
        text = text if isinstance(text, bytearray) else bytearray(text)
        text += further  # in place: joining them would take twice the memory
    return text


def slices(answer: Answer) -> Iterator[bytes]:
    """The text of `write` in slices of about 1 MiB, between which other work may run."""
    arrays = {name: np.ascontiguousarray(array) for name, array in answer.outputs.items()}
    if sum(array.size for array in arrays.values()) <= SLICE_NUMBERS:
        yield orjson.dumps({**arrays, **answer.about}, option=orjson.OPT_SERIALIZE_NUMPY)
        return
    for k, (name, array) in enumerate(arrays.items()):
        yield b"%b%b:" % (b"," if k else b"{", orjson.dumps(name))
        yield from array_slices(array)
    about = orjson.dumps(dict(answer.about), option=orjson.OPT_SERIALIZE_NUMPY)
    yield b"," + about[1:] if answer.about else b"}"


def array_slices(array: NDArray[np.float32]) -> Iterator[bytes]:
    """Nested lists of the array's numbers, SLICE_NUMBERS at a time."""
    if array.size <= SLICE_NUMBERS:
        yield orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY)
        return
    rows = max(1, SLICE_NUMBERS * len(array) // array.size)
    for start in range(0, len(array), rows):
        yield b"," if start else b"["
        if array.ndim > 1 and array[0].size > SLICE_NUMBERS:
            yield from array_slices(array[start])
        else:
            yield orjson.dumps(array[start : start + rows], option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
    yield b"]"


def _not_json(body: Body, error: Exception) -> str:
    """What is wrong with the text, for the message."""
    for place in _places(body):
        found = NO_NUMBER.match(body, place)
        if found:
            return f"the body is not JSON: it holds {found[0].decode()}, and every number must be finite"
    return f"the body is not JSON: {str(error)[:120]}"


def _places(body: Body) -> Iterator[int]:
    """Offsets at which one of `NO_NUMBERS` may begin. `find` takes a hundredth of a pattern's time."""
    for word in NO_NUMBERS:
        place = body.find(word)
        for _ in range(MOST_PLACES):
            if place < 0:
                break
            yield place - (body[place - 1 : place] in (b"-", b"+"))
            place = body.find(word, place + 1)


def _arrays(value: Any, intake: Intake) -> tuple[NDArray[Any], NDArray[Any] | None, Source | None]:
    """(rows, mask, what an answer keeps of pictures): the mask is there where every picture has one."""
    texts = [value] if isinstance(value, str) else value
    if not (isinstance(texts, list | simdjson.Array) and len(texts) and isinstance(texts[0], str)):
        return numbers_of(value, intake.name), None, None
    check_pictures(len(texts), intake.meter)
    found = [image.read(_base64(text), "", intake) for text in texts]
    pictures = [one.array for one in found if one.array is not None]
    if len({picture.shape[1:] for picture in pictures}) > 1:
        raise InvalidShape(
            "the pictures of one request must be of one size, all grey or all colour; send them one by one"
        )
    source = joined(pictures, [one.source for one in found if one.source is not None])
    masks = [one.mask for one in found if one.mask is not None]
    mask = np.concatenate(masks) if len(masks) == len(found) else None
    return np.concatenate(of_one_type(pictures, intake.meter)), mask, source


def _base64(text: Any) -> bytes:
    """Decode base64: alone or in a data URL, with line breaks, in either alphabet, with or without padding."""
    if not isinstance(text, str):
        raise InvalidShape("images must be all numbers or all base64 strings")
    kind, comma, payload = text.partition(",")
    if not (comma and kind[:5].lower() == "data:"):
        payload = text
    elif not kind.rstrip().lower().endswith(";base64"):
        raise Unreadable("a data URL in images is not in base64; begin it as data:image/png;base64,")
    try:
        return base64.b64decode(payload, validate=True)
    except ValueError:
        plain = "".join(payload.split()).translate(URL_SAFE).rstrip("=")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except ValueError as error:
        raise Unreadable("a string in images is not base64; encode the bytes of a picture file as base64") from error


def numbers_of(value: Any, name: str) -> NDArray[np.float64]:
    """Rectangular nested lists of numbers as an array.

    Raises:
        InvalidShape: They are not rectangular, or hold anything else.
    """
    shape: tuple[int, ...] = ()  # the lengths of the list, of its first entry, of that one's first entry, and so on
    first = value
    while isinstance(first, simdjson.Array) and len(shape) < MOST_AXES:
        shape = (*shape, len(first))
        first = first[0] if shape[-1] else None
    if not shape:
        raise InvalidShape(NUMBERS.format(name))
    if not _is_rectangular(value, shape):
        raise InvalidShape(f"{name} must be a rectangular array of numbers; its rows differ in length")
    try:
        numbers = np.frombuffer(value.as_buffer(of_type="d"))
    except TypeError as error:
        raise InvalidShape(NUMBERS.format(name)) from error
    if numbers.size != math.prod(shape):
        raise InvalidShape(NUMBERS.format(name))
    return numbers.reshape(shape)


def _is_rectangular(value: Any, shape: tuple[int, ...]) -> bool:
    """Whether all lists of a level are as long as the first one. The innermost entries are not looked at."""
    if not isinstance(value, simdjson.Array) or len(value) != shape[0]:
        return False
    if len(shape) == 1:
        return True
    if len(shape) == 2:  # most lists are of the last level, where a call each costs most
        width = shape[1]
        return all(isinstance(row, simdjson.Array) and len(row) == width for row in value)
    return all(_is_rectangular(entry, shape[1:]) for entry in value)


def plain(value: Any) -> Any:
    """One value as a Python object; a list or an object, which no option takes, as an empty one."""
    if isinstance(value, simdjson.Object):
        return {}
    return [] if isinstance(value, simdjson.Array) else value


JSON = Codec("application/json", read=read, write=write, options=True, text=True, schema=None)
