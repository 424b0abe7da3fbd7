"""Which codec reads a body, and which writes the answer."""

from __future__ import annotations

from functools import lru_cache

from service.codecs import ALIASES, ANSWERS_IN, ARRAY_FORMS, OPTION_FORMS, UNREAD_TYPES, WRITERS, Answer, Body
from service.errors import NotAcceptable, Unreadable, UnsupportedMediaType, quoted
from service.operation import Operation

JSON = "application/json"
REMEMBERED = 64
"""Longer Content-Type headers, as forms with a boundary have them, are not remembered."""


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


def write(answer: Answer, accept: str, form: str | None) -> tuple[str, bytes]:
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


@lru_cache(1024)
def acceptable(accept: str, form: str | None) -> tuple[str, ...]:
    """The forms that a caller accepts, best first; where it does not care, that of its request comes first."""
    like_request = ANSWERS_IN.get(form or JSON, form or JSON)
    wishes = _wishes(accept)
    refused = {wish for wish, quality in wishes if quality <= 0.0}
    found: list[str] = []
    for wish, quality in sorted(wishes, key=lambda entry: -entry[1]):
        if quality > 0.0:
            found += [one for one in (like_request, *WRITERS) if one in WRITERS and _matches(wish, one)]
    return tuple(dict.fromkeys(one for one in found if one not in refused))


def _wishes(accept: str) -> list[tuple[str, float]]:
    """(media range, quality) in the order of the header; nothing said is everything accepted."""
    wishes = []
    for entry in accept.split(","):
        wish, *parameters = (part.strip().lower() for part in entry.split(";"))
        quality = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        if wish:
            wishes.append((wish, _number(quality)))
    return wishes or [("*/*", 1.0)]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _matches(wish: str, candidate: str) -> bool:
    return wish in ("*/*", candidate) or (wish.endswith("/*") and candidate.startswith(wish[:-1]))
