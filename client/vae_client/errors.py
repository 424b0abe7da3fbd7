"""Errors of the client: one exception type a problem `code` of the service, and a few of the client's own."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar

MOST_QUOTED = 200
"""Characters of an answer that is no problem of the service, such as a proxy's page, that a message repeats."""


class ClientError(Exception):
    """Base class of every error that this package raises of its own."""


class NoAddress(ClientError):
    """Nothing says which service to ask."""


class InvalidRequest(ClientError, ValueError):
    """The arguments make no request; nothing was sent."""


class MissingExtra(ClientError, ImportError):
    """A package of an extra is not installed; the message names the command that installs it."""


class Unreachable(ClientError, ConnectionError):
    """The service cannot be reached, or the connection broke off before the answer was complete."""


class TimedOut(ClientError, TimeoutError):
    """The client's own deadline passed. The service answers `DeadlinePassed` where it notices first."""


class StartFailed(ClientError):
    """A service on this machine did not start."""


class UnreadableFile(ClientError):
    """A file of this machine is empty, broken or of another kind; the message names it."""


class OtherRun(ClientError):
    """The results that are there are of a run with other options, items or another model."""


class Problem(ClientError):
    """An error that the service answered, as RFC 9457 describes it.

    Attributes:
        code: Stable name of the problem.
        status: HTTP status.
        detail: What is wrong, and the fix.
        request_id: Id of the request in the service's log; empty if the answer has none.
        retry_after_s: Seconds to wait, where the service named them.
    """

    code: ClassVar[str] = ""

    def __init__(self, detail: str, status: int, request_id: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(detail)
        self.detail, self.status = detail, status
        self.request_id, self.retry_after_s = request_id, retry_after_s


class Malformed(Problem):
    """The request is not valid HTTP, or is ambiguous."""

    code = "malformed_request"


class Unreadable(Problem):
    """The body does not match its media type: a broken picture, say."""

    code = "unreadable_body"


class Unauthenticated(Problem):
    """The request has no API key, or an unknown one."""

    code = "unauthenticated"


class Forbidden(Problem):
    """The API key lacks the right that the message names."""

    code = "forbidden"


class ControlOff(Problem):
    """Loading and unloading over HTTP is disabled."""

    code = "control_off"


class CrossSite(Problem):
    """A web page of another origin sent the request."""

    code = "cross_site"


class NotFound(Problem):
    """Nothing is served at this path."""

    code = "not_found"


class UnknownModel(Problem):
    """The service does not serve this model or version."""

    code = "unknown_model"


class MethodNotAllowed(Problem):
    """The path takes other methods."""

    code = "method_not_allowed"


class NotAcceptable(Problem):
    """The answer cannot be written in the format that was asked for."""

    code = "not_acceptable"


class SlowRequest(Problem):
    """The head or the body took too long to arrive."""

    code = "slow_request"


class LoadRefused(Problem):
    """A version failed its checks; the versions served before stay."""

    code = "load_refused"


class WrongModel(Problem):
    """The fingerprint that was sent belongs to another model."""

    code = "wrong_model"


class TooLarge(Problem):
    """The request exceeds a limit; the message names the setting that raises it."""

    code = "too_large"


class UrlTooLong(Problem):
    """Path and query are too long."""

    code = "url_too_long"


class UnsupportedMediaType(Problem):
    """The service does not read this format."""

    code = "unsupported_media_type"


class UnknownHost(Problem):
    """The address is not one of the service's names."""

    code = "unknown_host"


class InvalidShape(Problem):
    """The shape of an array or picture does not match the model's."""

    code = "invalid_shape"


class InvalidValue(Problem):
    """A value is outside its range, or is not a number."""

    code = "invalid_value"


class InvalidOption(Problem):
    """An option is unknown, or its value is invalid."""

    code = "invalid_option"


class UnsupportedOperation(Problem):
    """The model lacks a graph that this operation needs."""

    code = "unsupported_operation"


class RateLimited(Problem):
    """The caller exceeds its request rate or its number of concurrent requests."""

    code = "rate_limited"


class HeadersTooLarge(Problem):
    """The headers are too large."""

    code = "headers_too_large"


class InferenceFailed(Problem):
    """A batch failed. The service's log has the cause."""

    code = "inference_failed"


class InternalError(Problem):
    """A bug of the service. Its log has the cause under `request_id`."""

    code = "internal_error"


class Overloaded(Problem):
    """The queue or the memory of the service is full, or the deadline cannot be met."""

    code = "overloaded"


class NotReady(Problem):
    """The service is starting or stopping, or serves no version of the model."""

    code = "not_ready"


class NoRoom(Problem):
    """A file shared by the service's workers cannot be written."""

    code = "no_room"


class TooManyConnections(Problem):
    """The service has as many connections as it takes."""

    code = "too_many_connections"


class DeadlinePassed(Problem):
    """The deadline passed before the answer was ready."""

    code = "deadline_passed"


class OtherProblem(Problem):
    """An error whose code this package does not know, or the error page of a proxy."""

    code = "http_error"


BY_CODE: dict[str, type[Problem]] = {kind.code: kind for kind in Problem.__subclasses__()}
"""Exception types by the code of the problem."""


def problem_of(status: int, headers: Mapping[str, str], content: bytes) -> Problem:
    """Make the exception of an answer that is an error.

    Args:
        status: Its HTTP status.
        headers: Its headers, by names in lower case.
        content: Its body.
    """
    told: Any = {}
    if "json" in headers.get("content-type", ""):
        try:
            told = json.loads(content)
        except ValueError:
            told = {}
    told = told if isinstance(told, dict) else {}
    detail = str(told.get("detail") or f"HTTP status {status}: {content[:MOST_QUOTED].decode(errors='replace')}")
    kind = BY_CODE.get(str(told.get("code")), OtherProblem)
    return kind(detail, status, headers.get("x-request-id", ""), seconds_of(headers.get("retry-after")))


def event_problem(told: Mapping[str, Any]) -> Problem:
    """Make the exception of the event `error` of a stream."""
    kind = BY_CODE.get(str(told.get("code")), OtherProblem)
    return kind(str(told.get("detail", "the service failed")), int(told.get("status", 500)))


def seconds_of(retry_after: str | None) -> float | None:
    """Seconds that a header Retry-After names, as a number or as a date; None without one."""
    told = (retry_after or "").strip()
    if told.isdecimal():
        return float(told)
    try:
        return max(0.0, parsedate_to_datetime(told).timestamp() - time.time())
    except ValueError:
        return None


def missing(extra: str, package: str, purpose: str) -> MissingExtra:
    """Make the error of a missing package.

    Args:
        extra: The extra that brings it.
        package: Its name.
        purpose: What needs it.
    """
    return MissingExtra(f"{purpose} needs {package}; pip install 'vae-client[{extra}]'")
