"""What goes wrong between client and service: refusals, lost connections, slowness. A real server misbehaves."""

from __future__ import annotations

import json
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api import problems
from tests.client.conftest import KINDS, answer, answering, ask, drop, events_of
from vae_client import Answer, Client, Retries, errors
from vae_client.call import Call
from vae_client.events import Reader
from vae_client.exchange import Attempt, Pause, Received, exchange

FINE = answer(200, b'{"live": true}')
QUICK = Retries(first_s=0.01)
SSE = "text/event-stream"


def refusal(status: int, code: str, **headers: str) -> Any:
    """A behaviour: a problem of the service."""
    return answer(status, problems.problem(status, code, "why")[0], problems.MEDIA_TYPE, **headers)


def drip(handler: BaseHTTPRequestHandler) -> None:
    """A behaviour: an answer of which a byte comes every 50 ms."""
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    for _ in range(1000):
        try:
            handler.wfile.write(b" ")
            handler.wfile.flush()
        except OSError:
            return
        time.sleep(0.05)


def hang(_handler: BaseHTTPRequestHandler) -> None:
    """A behaviour: no answer for longer than any caller waits."""
    time.sleep(3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("status", "code"), [(429, "rate_limited"), (503, "overloaded"), (503, "not_ready")])
def test_retry_after_is_waited_for(kind: str, status: int, code: str) -> None:
    """And then the call succeeds, of which the caller learns nothing."""
    with answering([refusal(status, code, retry_after="1"), FINE]) as server:
        assert ask(kind, server.url, lambda client: client.live(), retries=QUICK) == {"live": True}
    (first, *_), (second, *_) = server.seen
    assert 1.0 <= second - first < 2.0


def test_retry_after_may_be_a_date() -> None:
    """As proxies in front of a service send it; a date that has passed asks for no wait."""
    for seconds, least, most in ((3, 1.5, 3.0), (-100, 0.0, 0.0)):
        told = errors.seconds_of(formatdate(time.time() + seconds, usegmt=True))
        assert told is not None
        assert least <= told <= most
    assert errors.seconds_of("soon") is None
    assert errors.seconds_of("²") is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lost", [drop, answer(200, b'{"live"', length=100)], ids=["before", "within"])
def test_a_connection_that_is_lost_is_made_again(kind: str, lost: Any) -> None:
    """Before the answer, and within it."""
    with answering([lost, lost, FINE]) as server:
        assert ask(kind, server.url, lambda client: client.live(), retries=QUICK) == {"live": True}
    assert len(server.seen) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_repetitions_have_an_end(kind: str) -> None:
    """The last refusal is raised."""
    with answering([refusal(503, "overloaded")]) as server, pytest.raises(errors.Overloaded, match="why"):
        ask(kind, server.url, lambda client: client.live(), retries=Retries(most=2, first_s=0.01))
    assert len(server.seen) == 3
    with answering([drop]) as server, pytest.raises(errors.Unreachable, match=server.url):
        ask(kind, server.url, lambda client: client.live(), retries=Retries(most=1, first_s=0.01))
    assert len(server.seen) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_other_refusals_are_not_repeated(kind: str) -> None:
    """They would be refused again."""
    for status, code, error in (
        (422, "invalid_value", errors.InvalidValue),
        (500, "inference_failed", errors.InferenceFailed),
    ):
        with answering([refusal(status, code), FINE]) as server, pytest.raises(error):
            ask(kind, server.url, lambda client: client.sample())
        assert len(server.seen) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_pause_never_outlasts_the_deadline(kind: str) -> None:
    """The refusal is raised at once, rather than after a wait that is in vain."""
    begin = time.monotonic()
    with (
        answering([refusal(429, "rate_limited", retry_after="30")]) as server,
        pytest.raises(errors.RateLimited) as caught,
    ):
        ask(kind, server.url, lambda client: client.live(), timeout_s=5)
    assert time.monotonic() - begin < 3
    assert caught.value.retry_after_s == 30
    assert len(server.seen) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slow", [hang, drip])
def test_a_slow_answer_ends_at_the_deadline(kind: str, slow: Any) -> None:
    """One that does not come, and one that comes byte by byte."""
    with answering([slow]) as server:
        begin = time.monotonic()
        with pytest.raises(errors.TimedOut, match="timeout_s"):
            ask(kind, server.url, lambda client: client.live(), timeout_s=0.5)
        assert 0.5 <= time.monotonic() - begin < 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_service_is_told_how_long_the_caller_waits(kind: str) -> None:
    """X-Timeout-Ms is what is left, at each attempt."""
    with answering([refusal(503, "overloaded", retry_after="1"), FINE]) as server:
        ask(kind, server.url, lambda client: client.live(), timeout_s=5)
    first, second = (int(headers["x-timeout-ms"]) for _, _, headers in server.seen)
    assert first == 5000
    assert 3000 < second <= 4000


@pytest.mark.parametrize("kind", KINDS)
def test_no_service_is_an_error_of_connections(kind: str) -> None:
    """Which names the address, and is Python's own kind too."""
    with answering([FINE]) as server:
        pass
    with pytest.raises(ConnectionError, match=server.url):
        ask(kind, server.url, lambda client: client.live(), retries=QUICK)


@pytest.mark.parametrize(
    ("page", "says"),
    [(answer(200, b"<html>", "text/html"), "check the address"), (answer(302, b"", location="/"), "302")],
)
def test_a_page_that_is_no_answer_is_refused(page: Any, says: str) -> None:
    """A web server that answers 200 to everything, and one that redirects."""
    for method in (Client.sample, Client.models):
        with answering([page]) as server, Client(server.url) as client, pytest.raises(errors.ClientError, match=says):
            method(client)


@given(st.integers(0, 20), st.none() | st.floats(0, 60), st.floats(0, 1, exclude_max=True))
def test_pauses_are_random_and_bounded(made: int, asked_s: float | None, chance: float) -> None:
    """At least what was asked for, and at most a doubling time more."""
    retries = Retries()
    pause_s = retries.pause_s(made, asked_s, lambda: chance)
    least = asked_s or 0.0
    assert least <= pause_s <= least + min(retries.longest_s, retries.first_s * 2**made)
    assert retries.pause_s(made, asked_s, lambda: 0.0) == least


def test_an_exchange_needs_no_connection() -> None:
    """Its steps are plain values: attempts with what is left of the time, and pauses."""
    steps = exchange(Call(method="GET", path="/health/live"), Retries(), 5.0, "http://nowhere")
    first = next(steps)
    assert isinstance(first, Attempt)
    assert first.left_s == 5.0
    pause = steps.send(Received(503, {"retry-after": "2"}, b""))
    assert isinstance(pause, Pause)
    assert 2 <= pause.seconds <= 2 + Retries().first_s
    assert isinstance(steps.send(None), Attempt)
    with pytest.raises(StopIteration) as done:
        steps.send(Received(200, {}, b"x"))
    assert done.value.value.content == b"x"


def streamed(*events: tuple[str, dict[str, Any]], length: int | None = None) -> Any:
    """A behaviour: a stream of events, with comments between."""
    text = "".join(f": waiting\n\nevent: {kind}\ndata: {json.dumps(told)}\n\n" for kind, told in events)
    return answer(200, text.encode(), SSE, length)


PROGRESS = ("progress", {"step": 10, "steps": 100, "active": 1, "elbo": [1.5]})
ANSWER = ("answer", {"images": [[[[0.5]]]], "model": "m", "version": "1", "fingerprint": "f", "seed": 3})


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_survives_refusals_before_its_first_event(kind: str) -> None:
    """It is asked for again, as any call."""
    with answering([refusal(503, "overloaded"), drop, streamed(PROGRESS, ANSWER)]) as server:
        progress, found = events_of(kind, server.url, lambda stream: stream.sample(), retries=QUICK)
    assert (progress.step, progress.elbo.tolist()) == (10, [1.5])
    assert isinstance(found, Answer)
    np.testing.assert_array_equal(found.images, [[[[0.5]]]])
    assert server.seen[-1][2]["accept"] == SSE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (
            streamed(PROGRESS, ("error", {"status": 500, "code": "inference_failed", "detail": "why"})),
            errors.InferenceFailed,
        ),
        (streamed(PROGRESS), errors.Unreachable),
        (streamed(PROGRESS, length=10**6), errors.Unreachable),
    ],
    ids=["error", "ended", "broken off"],
)
def test_a_stream_that_fails_late_raises(kind: str, stream: Any, error: type[Exception]) -> None:
    """After the events that it had; it is not asked for again."""
    found = []

    def keep(stream: Any) -> Any:
        found.append("asked")
        return stream.sample()

    with answering([stream]) as server, pytest.raises(error, match=r"why|same seed"):
        events_of(kind, server.url, keep)
    assert len(server.seen) == 1


def test_events_are_read_as_the_standard_says() -> None:
    """Several lines of data are one, a space after the colon is left out, what has no data is no event."""
    reader = Reader()
    lines = ["event:progress", 'data: {"step":', "data:1}", "id: 3", "", "event: answer", "", ":", ""]
    found = [event for line in lines if (event := reader.read(line)) is not None]
    assert [event.step for event in found] == [1]
    with pytest.raises(errors.Unreachable):
        reader.finish()
