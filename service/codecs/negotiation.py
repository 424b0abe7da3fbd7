"""Content negotiation: which codec reads a request, and which writes its answer.

Everything here follows from `CODECS`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import islice

from werkzeug.datastructures import MIMEAccept
from werkzeug.http import parse_accept_header

from service.codecs import CODECS, JSON
from service.codecs.codec import Codec
from service.codecs.container import UNREAD_TYPES
from service.codecs.payload import Answer, Body, Written
from service.errors import NotAcceptable, Unreadable, UnsupportedMediaType, quoted

READ = {name: codec for codec in CODECS if codec.read for name in (codec.media_type, *codec.aliases)}
"""Codecs that read, by every name of their media type."""
WRITTEN = {codec.media_type: codec for codec in CODECS if codec.write}
"""Codecs that write, by media type."""
ANYTHING = "*/*"
SHORT = 1024
"""Longer Accept headers are not cached, but for the last few."""
MAX_RANGES = 100
"""Most media ranges of one Accept header that match a format; browsers send fewer than ten."""
MAX_RANGE = 128
"""Characters of one media range; no format has parameters that take more."""
JAVA = "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2"
"""Default Accept header of Java's HttpURLConnection. Its image/gif is no wish for a GIF, and is ignored."""
RANGES = {ANYTHING, *WRITTEN, *(f"{media_type.partition('/')[0]}/*" for media_type in WRITTEN)}
"""Media ranges that match any format."""

_entries = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.?)*+"?)++', re.DOTALL).findall
_short_quality = re.compile(r"(;\s*q\s*=\s*)(?=\.\d)", re.IGNORECASE)


class Ranges(MIMEAccept):
    """The media ranges of an Accept header, with the place of each in it."""

    def __init__(self, values: Iterable[tuple[str, float]] | None = ()) -> None:
        """values: (media range, quality) in the order of the header."""
        values = list(values or ())
        self.places = {wish: place for place, (wish, _) in reversed([*enumerate(values)])}
        super().__init__(values)

    def rank(self, codec: Codec) -> tuple[float, int]:
        """(quality, place) of the most specific range that matches a format; quality 0 where none does."""
        media_type = codec.media_type
        names = (f"{media_type};charset=utf-8", media_type) if codec.text else (media_type,)
        found = (self.find(name) for name in names)
        matches = [self[index] for index in found if index >= 0]
        if not matches:
            return 0.0, 0
        wish, quality = max(matches, key=lambda match: self._specificity(match[0]))
        return quality, self.places[wish]


def named(content_type: str) -> Codec | None:
    """The codec that a Content-Type header names; None where no codec reads that."""
    return READ.get(content_type) or READ.get(_media_type(content_type))


def _media_type(content_type: str) -> str:
    return content_type.split(";", 1)[0].strip().lower()


def reader(codec: Codec | None, content_type: str, body: Body, operation: str, takes: str | None) -> Codec | None:
    """The codec that reads the body of a request.

    Args:
        codec: As `named` finds it.
        content_type: The header Content-Type, for messages.
        body: Only looked at for being empty.
        operation: Name of the operation, for messages.
        takes: Name of the array that the operation takes; None where it takes options alone.

    Returns:
        The codec; None where there is no body and the operation needs none.

    Raises:
        Unreadable: The operation needs a body and it is empty.
        UnsupportedMediaType: No codec reads it, or none that carries what the operation takes.
    """
    if not body:
        if takes:
            raise Unreadable(f"the body is empty; {operation} takes {takes}")
        return None
    if codec is not None and (codec.arrays if takes else codec.options):
        return codec
    media_type = _media_type(content_type)
    forms = [one.media_type for one in CODECS if one.read and (one.arrays if takes else one.options)]
    advice = f"{operation} takes {takes or 'options alone'}; send one of {', '.join(forms)}"
    if media_type in UNREAD_TYPES:
        advice = f"convert {UNREAD_TYPES[media_type]} to PNG and send image/png"
    name = codec.media_type if codec else media_type
    said = f"Content-Type {quoted(name)} is not read" if name else "Content-Type is missing"
    raise UnsupportedMediaType(f"{said}; {advice}")


def acceptable(accept: str, request: Codec | None) -> tuple[Codec, ...]:
    """The codecs of the formats that a caller accepts, best first, by RFC 9110, section 12.5.1.

    The most specific range that matches a format gives its quality; quality 0 excludes it. Of formats of equal
    quality, the one named first in the header comes first, then the one of the request.

    Args:
        accept: The header Accept.
        request: The codec of the request's body; None where it has none.

    Returns:
        At least one.

    Raises:
        NotAcceptable: No format that it accepts is written, or it has more than MAX_RANGES relevant ranges.
    """
    return _remembered(accept, request) if len(accept) <= SHORT else _remembered_long(accept, request)


def _acceptable(accept: str, request: Codec | None) -> tuple[Codec, ...]:
    like = request or JSON
    like_request = WRITTEN.get(like.answered_in or like.media_type)
    ranges = parse_accept_header(_relevant(accept), Ranges)
    order = dict.fromkeys((*([like_request] if like_request else []), *WRITTEN.values()))
    ranked = [(one, *ranges.rank(one)) for one in order]
    wanted = sorted((one for one in ranked if one[1] > 0.0), key=lambda one: (-one[1], one[2]))
    if not wanted:
        raise NotAcceptable(f"no answer is written as {accept[:100]}; accept one of {', '.join(WRITTEN)}")
    return tuple(one for one, *_ in wanted)


_remembered = lru_cache(1024)(_acceptable)
_remembered_long = lru_cache(4)(_acceptable)


def _relevant(accept: str) -> str:
    """The ranges that can match a format, as the library reads them; an empty header accepts everything.

    A header may hold thousands of others, and the library takes 10 microseconds for each.
    """
    entries = dict.fromkeys(entry.strip() for entry in _entries(accept))
    entries.pop("", None)
    if not entries or accept.strip() == JAVA:
        return ANYTHING
    relevant = (normal for entry in entries if len(entry) <= MAX_RANGE and (normal := _normal(entry)))
    kept = [*islice(relevant, MAX_RANGES + 1)]
    if len(kept) > MAX_RANGES:
        raise NotAcceptable(f"Accept names more than {MAX_RANGES} ranges of {', '.join(WRITTEN)}; name fewer")
    return ", ".join(kept)


def _normal(entry: str) -> str:
    """A media range with its parameters; empty where it matches no format.

    Java's HttpURLConnection sends `*; q=.2`, where the grammar wants `*/*;q=0.2`.
    """
    wish, separator, parameters = entry.partition(";")
    wish = wish.strip().lower()
    if wish == "*":
        wish = ANYTHING
    return wish + _short_quality.sub(r"\g<1>0", separator + parameters) if wish in RANGES else ""


def write(answer: Answer, accepted: tuple[Codec, ...], accept: str) -> tuple[Codec, Written]:
    """The answer in the first accepted format that can hold it.

    Args:
        answer: What is to be sent.
        accepted: As `acceptable` found them.
        accept: The header Accept, for the message.

    Returns:
        (codec, body).

    Raises:
        NotAcceptable: No accepted format can hold the answer.
    """
    for codec in accepted:
        assert codec.write is not None
        content = codec.write(answer)
        if content is not None:
            return codec, content
    raise NotAcceptable(
        f"the outputs {', '.join(answer.outputs)} cannot be sent as {accept[:100]}; "
        f"accept one of {', '.join(WRITTEN)} (pictures hold images alone, npy and raw arrays of one shape)"
    )
