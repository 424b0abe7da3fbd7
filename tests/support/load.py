"""Clients that send one request after the other, and how each request ended."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Self

import httpx

HEADERS = {"content-type": "application/octet-stream", "accept": "application/octet-stream"}


class Failure(NamedTuple):
    """A request that was not answered with 200."""

    caller: int
    sent: float
    """By time.monotonic."""
    ended: float
    said: str
    again: str
    """How the same request ended when it was sent again at once."""


class Load:
    """Clients that send one request after the other on kept connections, for a `with` block.

    Args:
        url: Address of the service.
        requests: Paths and bodies, in turn.
        callers: Number of clients.
        pause_s: How long a client waits between two requests.
    """

    def __init__(self, url: str, requests: Sequence[tuple[str, bytes]], callers: int = 4, pause_s: float = 0.0) -> None:
        self.outcomes: Counter[str] = Counter()
        self.failures: list[Failure] = []
        self._url, self._requests, self._pause_s = url, requests, pause_s
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(number,)) for number in range(callers)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()

    def _call(self, caller: int) -> None:
        number = caller
        with httpx.Client(base_url=self._url, headers=HEADERS, timeout=60) as client:
            while not self._done.wait(self._pause_s):
                path, content = self._requests[number % len(self._requests)]
                sent = time.monotonic()
                said = outcome(client, path, content)
                self.outcomes[said] += 1
                if said != "ok":
                    ended = time.monotonic()
                    self.failures.append(Failure(caller, sent, ended, said, outcome(client, path, content)))
                number += 1


def outcome(client: httpx.Client, path: str, content: bytes) -> str:
    """How one request ended."""
    try:
        answer = client.post(path, content=content)
    except httpx.HTTPError as error:
        return repr(error)
    return "ok" if answer.status_code == httpx.codes.OK else f"{answer.status_code} {answer.text[:200]}"


def check_failures(load: Load, killed: float, within_s: float = 5.0) -> str:
    """Check that a kill cost only the requests under way, and those not for long.

    Each has failed with 503 or a closed connection and succeeded when it was sent again.

    Args:
        load: Clients that have ended.
        killed: When something was killed, by time.monotonic.
        within_s: Seconds within which its requests must fail.

    Returns:
        A line for the summary.
    """
    assert load.failures, "nothing was under way: the test shows nothing"
    for failure in load.failures:
        assert failure.sent < killed + 1.0, failure
        assert failure.ended < killed + within_s, failure
        assert failure.said.startswith(("503 ", "RemoteProtocolError", "ReadError")), failure
        assert failure.again == "ok", failure
    callers = [failure.caller for failure in load.failures]
    assert len(callers) == len(set(callers)), load.failures
    worst = max(failure.ended for failure in load.failures) - killed
    return f"{len(load.failures)} of {load.outcomes.total()} requests failed, within {worst:.1f} s"
