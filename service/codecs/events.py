"""text/event-stream and application/x-ndjson: JSON objects one after the other, each with the name of its kind.

Source: HTML standard, 9.2.5 and 9.2.6 (server-sent events); ndjson specification 1.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from service.codecs import structured
from service.codecs.payload import Answer


class EventForm(NamedTuple):
    """How a stream of events is written."""

    head: Callable[[str], bytes]
    """Kind of event -> what comes before the fields of its JSON object, the opening brace included."""
    end: bytes
    """What comes after the object; JSON as we write it has no line break in it."""
    keep_alive: bytes
    """What may be sent where nothing is new, which no reader takes for an event; empty where there is no such thing."""

    def frame(self, kind: str, content: bytes) -> bytes:
        """An event whose data are a JSON object with some field."""
        return self.head(kind) + content[1:] + self.end

    def event(self, kind: str, answer: Answer) -> Iterator[bytes]:
        """An answer, or what there is of it so far, in slices of about 1 MiB."""
        texts = structured.slices(answer)
        piece = self.head(kind) + next(texts)[1:]
        for text in texts:
            yield piece
            piece = text
        yield piece + self.end

    def whole(self, answer: Answer) -> bytes:
        """The writer of an answer that comes at once: its only event."""
        return b"".join(self.event("answer", answer))


EVENT_STREAM = EventForm(lambda kind: b"event: %s\ndata: {" % kind.encode(), b"\n\n", b":\n\n")
LINES = EventForm(lambda kind: b'{"event":"%s",' % kind.encode(), b"\n", b"")
"""Its first field is `event`, the kind."""
