"""text/event-stream and application/x-ndjson: a stream of JSON objects, each with the name of its kind.

Source: HTML standard, 9.2.5 and 9.2.6 (server-sent events); ndjson specification 1.0.
"""

from __future__ import annotations

from service.codecs.codec import Codec, EventForm
from service.codecs.structured import slices

SCHEMA = {
    "type": "string",
    "description": "Events, each a JSON object: `progress` during iterative work, then `answer` with the fields of the "
    "JSON answer, or `error` with those of a problem if something fails after the first event.",
}


def _codec(media_type: str, form: EventForm) -> Codec:
    return Codec(media_type, write=form.whole, text=True, events=form, schema=SCHEMA)


EVENT_STREAM = _codec(
    "text/event-stream", EventForm(lambda kind: b"event: %s\ndata: {" % kind.encode(), b"\n\n", b":\n\n", slices)
)
LINES = _codec("application/x-ndjson", EventForm(lambda kind: b'{"event":"%s",' % kind.encode(), b"\n", b"", slices))
"""The first field of each line is `event`, the kind."""
