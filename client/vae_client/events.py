"""Streams of events: progress of long work, then its answer. Source: HTML standard, 9.2.6."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vae_client.answer import Answer, json_answer
from vae_client.call import EVENTS, Call
from vae_client.errors import Unreachable, event_problem


@dataclass(frozen=True)
class Progress:
    """A report on work that goes on. What a kind of work does not report is None.

    Attributes:
        step: Steps done.
        steps: Most steps.
        active: Rows that have not converged.
        elbo: Bound on log p of every row so far, in nats.
        tile: Tiles done in this pass over a large image.
        tiles: Tiles of this pass.
        images: Images so far, with `preview=True`.
    """

    step: int | None = None
    steps: int | None = None
    active: int | None = None
    elbo: NDArray[np.float32] | None = None
    tile: int | None = None
    tiles: int | None = None
    images: NDArray[np.float32] | None = None


Event: TypeAlias = Progress | Answer
"""A report or, at last, the answer."""


def streaming(call: Call) -> Call:
    """The same call, answered as a stream of events."""
    return replace(call, headers={**call.headers, "accept": EVENTS})


class Reader:
    """Reads the lines of a stream."""

    def __init__(self) -> None:
        self._kind, self._data = "", list[str]()
        self.ended = False

    def read(self, line: str) -> Event | None:
        """Take a line.

        Args:
            line: Without its end.

        Returns:
            The event that the line ends; None for any other line.

        Raises:
            Problem: The event is an error.
        """
        name, _, value = line.partition(":")
        if line:
            if name == "event":
                self._kind = value.removeprefix(" ")
            elif name == "data":
                self._data.append(value.removeprefix(" "))
            return None
        kind, data = self._kind, "\n".join(self._data)
        self._kind, self._data = "", []
        return self._event(kind, json.loads(data)) if data else None

    def _event(self, kind: str, told: dict[str, Any]) -> Event | None:
        if kind == "error":
            raise event_problem(told)
        if kind == "answer":
            self.ended = True
            return json_answer(told, media_type=EVENTS)
        known: dict[str, Any] = {name: told.get(name) for name in ("step", "steps", "active", "tile", "tiles")}
        known |= {name: np.array(told[name], np.float32) for name in ("elbo", "images") if name in told}
        return Progress(**known)

    def finish(self) -> None:
        """Check that the answer has come.

        Raises:
            Unreachable: It has not.
        """
        if not self.ended:
            raise Unreachable("the stream ended before its answer; ask again with the same seed for the same answer")
