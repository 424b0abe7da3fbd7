"""text/event-stream and application/x-ndjson: JSON objects one after the other, each with the name of its kind.

Source: HTML standard, 9.2.5 and 9.2.6 (server-sent events); ndjson specification 1.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from service.codecs import structured
from service.codecs.payload import Answer


class EventForm(NamedTuple):
    """How a stream of events is written."""

    frame: Callable[[str, bytes], bytes]
    """(kind of event, a JSON object with some field) -> what is sent."""
    keep_alive: bytes
    """What may be sent where nothing is new, which no reader takes for an event; empty where there is no such thing."""

    def event(self, kind: str, answer: Answer) -> bytes:
        """An answer, or what there is of it so far, with the fields that it has as JSON."""
        return self.frame(kind, structured.write(answer))

    def whole(self, answer: Answer) -> bytes:
        """The writer of an answer that comes at once: its only event."""
        return self.event("answer", answer)


def server_sent(kind: str, content: bytes) -> bytes:
    """An event of that name, whose data are the object; JSON as we write it has no line break in it."""
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), content)


def json_line(kind: str, content: bytes) -> bytes:
    """The object on a line of its own; its first field is `event`, the kind."""
    return b'{"event":"%s",%s\n' % (kind.encode(), content[1:])


EVENT_STREAM = EventForm(server_sent, b":\n\n")
LINES = EventForm(json_line, b"")
