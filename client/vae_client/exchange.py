"""What happens between a call and its answer: attempts, pauses and when to give up. Without I/O, for both clients."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import httpx

from vae_client.call import Call
from vae_client.errors import ClientError, InvalidRequest, TimedOut, Unreachable, problem_of

LONGEST_S = 999_999_999.0
"""Longest deadline, in seconds: X-Timeout-Ms has at most 12 digits."""
AGAIN = {429, 503}
"""Statuses after which a call is made again. Operations change nothing, so that repeating one is safe."""


@dataclass(frozen=True)
class Retries:
    """When a call that failed is made again: after 429, 503, and where the connection failed or broke off.

    Pauses grow and are random, so that clients that were refused together do not return together. Where the answer has
    Retry-After, the pause is that and a part more. A pause never outlasts the deadline: the call fails at once instead.

    Attributes:
        most: Most repetitions of a call; 0 for none.
        first_s: Longest first pause, in seconds; each further one may be twice as long.
        longest_s: Longest pause that no Retry-After asks for, in seconds.
    """

    most: int = 4
    first_s: float = 0.25
    longest_s: float = 8.0

    def pause_s(self, made: int, asked_s: float | None, chance: Callable[[], float] = random.random) -> float:
        """Seconds before the next attempt.

        Args:
            made: Repetitions so far.
            asked_s: Seconds that Retry-After names.
            chance: A random number in [0, 1).
        """
        return (asked_s or 0.0) + chance() * min(self.longest_s, self.first_s * 2**made)


class Attempt(NamedTuple):
    """To be done by a driver: send the call once.

    Attributes:
        call: The call.
        deadline: When the answer must be there, by time.monotonic().
        left_s: Seconds until then.
    """

    call: Call
    deadline: float
    left_s: float

    def arguments(self) -> dict[str, Any]:
        """Arguments of `build_request` of httpx."""
        call = self.call
        timeout = {"x-timeout-ms": str(max(1, math.ceil(self.left_s * 1000)))}
        sent = {"files": list(call.files)} if call.files else {"content": call.content}
        return {
            "method": call.method,
            "url": call.path.lstrip("/"),
            "params": dict(call.query) or None,
            "headers": {**call.headers, **timeout},
            "timeout": self.left_s,
            **sent,
        }

    def check_time(self) -> None:
        """Refuse to go on after the deadline.

        Raises:
            TimedOut: It has passed.
        """
        if time.monotonic() > self.deadline:
            raise TimedOut("the deadline passed while the answer was read; raise timeout_s")


class Pause(NamedTuple):
    """To be done by a driver: wait."""

    seconds: float


class Received(NamedTuple):
    """What an attempt brought.

    Attributes:
        status: HTTP status.
        headers: By names in lower case.
        content: The body; empty where it is still open.
    """

    status: int
    headers: Mapping[str, str]
    content: bytes = b""


Outcome: TypeAlias = "Received | httpx.HTTPError | TimedOut | None"
"""What a driver gives back: for an attempt what it brought or how it failed, for a pause nothing."""
FAILURES = (httpx.HTTPError, TimedOut)
"""How an attempt fails."""
Steps: TypeAlias = Generator[Attempt | Pause, Outcome, Received]


def exchange(call: Call, retries: Retries, timeout_s: float, url: str) -> Steps:
    """Make a call until it is answered or there is no sense in it any more.

    Args:
        call: The call.
        retries: When it is made again.
        timeout_s: Seconds for all attempts and pauses, where the call names none.
        url: Address of the service, for messages.

    Yields:
        What is to be done next.

    Returns:
        The answer.

    Raises:
        Problem: The service refused.
        Unreachable: There is no connection.
        TimedOut: The deadline passed.
        InvalidRequest: The deadline is not in the future, or too far in it.
    """
    timeout_s = timeout_s if call.timeout_s is None else call.timeout_s
    if not 0 < timeout_s <= LONGEST_S:
        raise InvalidRequest(f"timeout_s is {timeout_s}; name seconds above 0, and at most {LONGEST_S:.0f}")
    deadline, made = time.monotonic() + timeout_s, 0
    left_s = timeout_s
    while True:
        outcome = yield Attempt(call, deadline, left_s)
        if isinstance(outcome, Received) and outcome.status < httpx.codes.MULTIPLE_CHOICES:
            return outcome
        error, again, asked_s = _failure(outcome, timeout_s, url)
        pause_s, left_s = retries.pause_s(made, asked_s), deadline - time.monotonic()
        if not again or made == retries.most or pause_s >= left_s:
            raise error from (outcome if isinstance(outcome, Exception) else None)
        made += 1
        yield Pause(pause_s)
        left_s = max(deadline - time.monotonic(), 0.001)


def broken_off(error: httpx.HTTPError) -> ClientError:
    """The error of a stream whose connection failed after its first event."""
    if isinstance(error, httpx.TimeoutException):
        return TimedOut("the deadline passed before the answer of the stream; raise timeout_s")
    return Unreachable("the stream broke off before its answer; ask again with the same seed for the same answer")


def _failure(outcome: Outcome, timeout_s: float, url: str) -> tuple[ClientError, bool, float | None]:
    """(error, whether to try again, seconds to wait)."""
    if isinstance(outcome, Received):
        problem = problem_of(outcome.status, outcome.headers, outcome.content)
        return problem, outcome.status in AGAIN, problem.retry_after_s
    if isinstance(outcome, TimedOut | httpx.TimeoutException):
        return TimedOut(f"no answer within {timeout_s:g} seconds; raise timeout_s, or send less"), False, None
    why = " ".join(str(outcome).split()) or type(outcome).__name__
    if "CERTIFICATE_VERIFY_FAILED" in why:
        return Unreachable(f"{url} is not trusted: {why}; name a certificate of your own in SSL_CERT_FILE"), False, None
    if isinstance(outcome, httpx.NetworkError | httpx.RemoteProtocolError):
        return Unreachable(f"no connection to {url}: {why}"), True, None
    return Unreachable(f"{url} cannot be asked: {why}; check the address"), False, None
