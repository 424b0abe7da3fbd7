"""`Codec`: one wire format, with everything that the service knows about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from service.codecs.payload import Answer, Body, Intake, Payload, Written, single_array

BINARY = {"type": "string", "format": "binary"}
"""Bytes, as OpenAPI describes them."""


class EventForm(NamedTuple):
    """How a stream of events is written; each event is a JSON object."""

    head: Callable[[str], bytes]
    """Kind of event -> what precedes the fields of its object, the opening brace included."""
    end: bytes
    """What follows the object. The JSON that the service writes has no line breaks."""
    keep_alive: bytes
    """What is sent while nothing is new. Readers skip it; empty where the format has no such thing."""
    slices: Callable[[Answer], Iterator[bytes]]
    """Answer -> the text of its JSON object, in slices of about 1 MiB."""

    def frame(self, kind: str, content: bytes) -> bytes:
        """An event from a JSON object that has at least one field."""
        return self.head(kind) + content[1:] + self.end

    def event(self, kind: str, answer: Answer) -> Iterator[bytes]:
        """An answer, whole or so far, as an event in slices of about 1 MiB."""
        texts = self.slices(answer)
        piece = self.head(kind) + next(texts)[1:]
        for text in texts:
            yield piece
            piece = text
        yield piece + self.end

    def whole(self, answer: Answer) -> bytes:
        """A stream of one event: a finished answer."""
        return b"".join(self.event("answer", answer))


@dataclass(frozen=True, eq=False)
class Codec:
    """A wire format: its media types, its reader and its writer.

    A codec knows no HTTP beyond its media type, and no operation: `Intake` says what to read.
    """

    media_type: str
    aliases: tuple[str, ...] = ()
    """Further media types of requests that mean the same."""
    read: Callable[[Body, str, Intake], Payload] | None = None
    """(body, whole Content-Type, intake) -> payload. Raises Unreadable, InvalidShape, InvalidValue, InvalidOption,
    TooLarge, Overloaded, DeadlinePassed and Deferred. None: the format is not read."""
    write: Callable[[Answer], Written | None] | None = None
    """Answer -> body, or None where the format cannot hold the answer. None: the format is not written."""
    arrays: bool = True
    """Whether a request in this format can carry arrays."""
    options: bool = False
    """Whether it can carry options."""
    answered_in: str = ""
    """Media type of the answer to a request in this format, where Accept leaves the choice; empty is its own."""
    text: bool = False
    """Whether it is text in UTF-8, so that Accept may name that charset."""
    header: Callable[[tuple[int, ...]], bytes] | None = None
    """Of a binary format: shape -> what precedes the float32 numbers. Such an answer can be sent in parts."""
    events: EventForm | None = None
    """Of a format that reports progress before the answer."""
    schema: dict[str, Any] | None = field(default_factory=BINARY.copy)
    """OpenAPI's schema of a body; None where it depends on the operation."""


def binary(
    media_type: str,
    read: Callable[[Body, str, Intake], Payload],
    header: Callable[[tuple[int, ...]], bytes],
    aliases: tuple[str, ...] = (),
) -> Codec:
    """A format that is a header and then the numbers of one array."""

    def write(answer: Answer) -> Written | None:
        array = single_array(answer.outputs)
        if array is None:
            return None
        head, numbers = header(array.shape), array.reshape(-1).data.cast("B")
        return b"".join((head, numbers)) if head else numbers

    return Codec(media_type, aliases, read, write, header=header)
