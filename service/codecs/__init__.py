"""Wire formats, one a file; a new one is one file and one line here.

A reader turns a body into a `Payload`; a writer turns an answer's arrays into a body. Nobody here knows HTTP.
"""

from __future__ import annotations

from service.codecs import events, image, multipart, npy, raw, structured
from service.codecs.container import UNREAD_TYPES
from service.codecs.events import EventForm
from service.codecs.payload import Answer, Body, Header, Intake, Meter, Payload, Reader, Writer, binary, single_array

READERS: dict[str, Reader] = {
    "application/json": structured.read,
    "application/x-npy": npy.read,
    "application/octet-stream": raw.read,
    "image/png": image.read,
    "image/jpeg": image.read,
    "image/webp": image.read,
    "image/bmp": image.read,
    "multipart/form-data": multipart.read,
    "application/x-www-form-urlencoded": multipart.read_urlencoded,
}
"""By the media type of the request. The order is that of the documentation."""

OPTION_FORMS = ("application/json", "multipart/form-data", "application/x-www-form-urlencoded")
"""What operations that take no array read their options from."""

ARRAY_FORMS = tuple(READERS)[:-1]
"""What all others read: urlencoded forms hold no files."""

ALIASES = {
    "image/jpg": "image/jpeg",
    "image/pjpeg": "image/jpeg",
    "image/x-png": "image/png",
    "image/apng": "image/png",
    "image/x-webp": "image/webp",
    "image/x-ms-bmp": "image/bmp",
    "image/x-bmp": "image/bmp",
    "image/x-windows-bmp": "image/bmp",
    "application/npy": "application/x-npy",
    "application/x-numpy": "application/x-npy",
}
"""Other names of media types that are read."""

HEADERS: dict[str, Header] = {
    "application/x-npy": npy.header,
    "application/octet-stream": raw.header,
}
"""Of the binary forms, whose answers can be sent in parts."""

EVENTS: dict[str, EventForm] = {
    "text/event-stream": events.EVENT_STREAM,
    "application/x-ndjson": events.LINES,
}
"""Of the forms that tell how long work goes before they answer."""

WRITERS: dict[str, Writer] = {
    "application/json": structured.write,
    **{form: binary(header) for form, header in HEADERS.items()},
    "image/png": image.write,
    **{media_type: form.whole for media_type, form in EVENTS.items()},
}
"""By the media type of the answer, the first one being the one for callers without a wish."""

ANSWERS_IN = dict.fromkeys(("image/jpeg", "image/webp", "image/bmp", "multipart/form-data"), "image/png")
"""What answers a request in a form that no writer has."""

__all__ = [
    "ALIASES",
    "ANSWERS_IN",
    "ARRAY_FORMS",
    "EVENTS",
    "HEADERS",
    "OPTION_FORMS",
    "READERS",
    "UNREAD_TYPES",
    "WRITERS",
    "Answer",
    "Body",
    "EventForm",
    "Intake",
    "Meter",
    "Payload",
    "Reader",
    "Writer",
    "single_array",
]
