"""Content negotiation: which codec reads a body, and which writes the answer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import islice

from werkzeug.datastructures import MIMEAccept
from werkzeug.http import parse_accept_header

from service.codecs import ALIASES, ANSWERS_IN, ARRAY_FORMS, OPTION_FORMS, UNREAD_TYPES, WRITERS, Answer, Body
from service.errors import Malformed, NotAcceptable, Unreadable, UnsupportedMediaType, quoted
from service.operations.operation import Operation

JSON = "application/json"
REMEMBERED = 64
"""Longer Content-Type headers, as forms with a boundary have them, are not remembered."""
ANYTHING = "*/*"
SHORT = 1024
"""Longer Accept headers are not worth remembering."""
MAX_RANGES = 100
"""Media ranges of one Accept header that concern what is served; browsers send fewer than ten."""
MAX_RANGE = 128
"""Characters of one of them; no form has parameters that take more."""
IN_UTF8 = {form for form in WRITERS if form == JSON or form.startswith("text/") or form.endswith("ndjson")}
"""Forms that are text, always in UTF-8: a caller may ask for that charset by name."""
RANGES = {ANYTHING, *WRITERS, *(f"{form.partition('/')[0]}/*" for form in WRITERS)}
"""Media ranges that any of the forms can match."""
SINGLE = {b"content-type", b"content-encoding", b"x-timeout-ms", b"x-fingerprint"}
"""Header fields that cannot be sent twice: each reader might take another one."""

_entries = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.?)*+"?)++', re.DOTALL).findall
_short_quality = re.compile(r"(;\s*q\s*=\s*)(?=\.\d)", re.IGNORECASE)


class Ranges(MIMEAccept):
    """The media ranges of an Accept header, and the place of each in it."""

    def __init__(self, values: Iterable[tuple[str, float]] | None = ()) -> None:
        """values: (media range, quality) in the order of the header."""
        values = list(values or ())
        self.places = {wish: place for place, (wish, _) in reversed([*enumerate(values)])}
        super().__init__(values)

    def rank(self, form: str) -> tuple[float, int]:
        """(quality, place) of the most specific range that matches; quality 0 where none does."""
        names = (f"{form};charset=utf-8", form) if form in IN_UTF8 else (form,)
        found = (self.find(name) for name in names)
        matches = [self[index] for index in found if index >= 0]
        if not matches:
            return 0.0, 0
        wish, quality = max(matches, key=lambda match: self._specificity(match[0]))
        return quality, self.places[wish]


def fields(headers: list[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Header fields by name; Accept, a list, may come in several lines.

    Raises: Malformed for another one that came twice and may be read in two ways.
    """
    found = dict(headers)
    if len(found) == len(headers):
        return found
    for name in found.keys() & SINGLE:
        if sum(sent == name for sent, _ in headers) > 1:
            raise Malformed(f"the header {name.decode().title()} is there twice; send it once")
    if b"accept" in found:
        found[b"accept"] = b", ".join(value for name, value in headers if name == b"accept")
    return found


def form_of(content_type: str, body: Body, operation: Operation) -> str | None:
    """The media type of a body; None where there is no body and none is needed.

    Raises: UnsupportedMediaType, Unreadable.
    """
    form = _named(content_type) if len(content_type) <= REMEMBERED else _named.__wrapped__(content_type)
    if not body:
        if operation.takes:
            raise Unreadable(f"the body is empty; {operation.name} takes {operation.takes}")
        return None
    forms = ARRAY_FORMS if operation.takes else OPTION_FORMS
    if form in forms:
        return form
    advice = f"{operation.name} takes {operation.takes or 'options alone'}; send one of {', '.join(forms)}"
    if form in UNREAD_TYPES:
        advice = f"convert {UNREAD_TYPES[form]} to PNG and send image/png"
    said = f"Content-Type {quoted(form)} is not read" if form else "Content-Type is missing"
    raise UnsupportedMediaType(f"{said}; {advice}")


@lru_cache(1024)
def _named(content_type: str) -> str:
    """The media type in a Content-Type header, by the one name that codecs know it by."""
    form = content_type.split(";", 1)[0].strip().lower()
    return ALIASES.get(form, form)


def write(answer: Answer, accept: str, form: str | None) -> tuple[str, Body]:
    """(media type, body) in the first acceptable form that can hold the answer; `form` is that of the request.

    Raises: NotAcceptable.
    """
    for candidate in acceptable(accept, form):
        content = WRITERS[candidate](answer)
        if content is not None:
            return candidate, content
    raise NotAcceptable(
        f"the outputs {', '.join(answer.outputs)} cannot be sent as {accept[:100]}; "
        f"accept one of {', '.join(WRITERS)} (PNG holds images alone, npy and raw arrays of one shape)"
    )


def acceptable(accept: str, form: str | None) -> tuple[str, ...]:
    """The forms that a caller accepts, best first, by RFC 9110.

    The most specific range that matches a form gives its quality, and quality 0 excludes it. Of forms that a caller
    likes equally, the one it names first comes first, then the one of its request.
    Raises: NotAcceptable for a header of more ranges than anybody needs.
    """
    return _remembered(accept, form) if len(accept) <= SHORT else _remembered_long(accept, form)


def _acceptable(accept: str, form: str | None) -> tuple[str, ...]:
    like_request = ANSWERS_IN.get(form or JSON, form or JSON)
    ranges = parse_accept_header(_relevant(accept), Ranges)
    order = dict.fromkeys(one for one in (like_request, *WRITERS) if one in WRITERS)
    ranked = [(one, *ranges.rank(one)) for one in order]
    wanted = sorted((one for one in ranked if one[1] > 0.0), key=lambda one: (-one[1], one[2]))
    return tuple(one for one, *_ in wanted)


_remembered = lru_cache(1024)(_acceptable)
_remembered_long = lru_cache(4)(_acceptable)  # one request asks twice


def _relevant(accept: str) -> str:
    """The ranges that can match a form, as the library reads them; nothing said is everything accepted.

    Picks them first because a header holds thousands of others and the library takes 10 microseconds for each.
    """
    entries = dict.fromkeys(entry.strip() for entry in _entries(accept))
    entries.pop("", None)
    if not entries:
        return ANYTHING
    relevant = (normal for entry in entries if len(entry) <= MAX_RANGE and (normal := _normal(entry)))
    kept = [*islice(relevant, MAX_RANGES + 1)]
    if len(kept) > MAX_RANGES:
        raise NotAcceptable(f"Accept names more than {MAX_RANGES} ranges of {', '.join(WRITERS)}; name fewer")
    return ", ".join(kept)


def _normal(entry: str) -> str:
    """A media range with its parameters; empty where it matches no form.

    Java's HttpURLConnection sends `*; q=.2`, where the grammar wants `*/*;q=0.2`.
    """
    wish, separator, parameters = entry.partition(";")
    wish = wish.strip().lower()
    if wish == "*":
        wish = ANYTHING
    return wish + _short_quality.sub(r"\g<1>0", separator + parameters) if wish in RANGES else ""
