"""Errors of the service, one class a problem `code`; `service/api/problems.py` maps them to HTTP statuses."""

from __future__ import annotations

MAX_QUOTED = 80
"""Characters of the client's text that a message repeats."""
MAX_LINE = 600
"""Characters of other text, such as a library's error, that a message repeats."""


def quoted(text: str) -> str:
    """Text from the client, safe to repeat in a message: one line, printable, bounded, in double quotes."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in text[:MAX_QUOTED])
    plain = plain.replace('"', "'")
    return f'"{plain}{"..." if len(text) > MAX_QUOTED else ""}"'


def one_line(message: object) -> str:
    """Text from a model's files or a library, safe to repeat in a message: one line, printable, bounded."""
    words = " ".join(str(message).split())[:MAX_LINE]
    return "".join(letter if letter.isprintable() else "?" for letter in words)


class ServiceError(Exception):
    """Base class. Its message goes to the client as `detail` and names the fix.

    Attributes:
        code: Stable name of the problem; clients may branch on it.
        outcome: Label in metrics and the access log; empty means `code`.
    """

    code = "error"
    outcome = ""


class StartError(ServiceError):
    """The service cannot start. The command line prints the message as one line."""

    code = "cannot_start"


class Malformed(ServiceError):
    """The request is not valid HTTP, or is ambiguous: two parsers could read it differently."""

    code = "malformed_request"


class Unauthenticated(ServiceError):
    """The request has no API key, or an unknown one."""

    code = "unauthenticated"


class Forbidden(ServiceError):
    """The API key lacks the right that the message names."""

    code = "forbidden"


class CrossSite(ServiceError):
    """A web page of another origin sent the request."""

    code = "cross_site"


class UnknownHost(ServiceError):
    """The Host header is not one of the service's names."""

    code = "unknown_host"


class SlowRequest(ServiceError):
    """The head or the body took too long to arrive."""

    code = "slow_request"


class UrlTooLong(ServiceError):
    """Path and query exceed `VAE_MAX_URL_BYTES`."""

    code = "url_too_long"


class HeadersTooLarge(ServiceError):
    """The headers exceed `VAE_MAX_HEADERS` or `VAE_MAX_HEADER_BYTES`."""

    code = "headers_too_large"


class TooManyConnections(ServiceError):
    """The limit of open connections is reached."""

    code = "too_many_connections"


class RateLimited(ServiceError):
    """The client exceeds its request rate or its number of concurrent requests.

    Attributes:
        retry_after_s: Seconds until it may try again.
    """

    code = "rate_limited"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unreadable(ServiceError):
    """The body does not match its media type."""

    code = "unreadable_body"


class ReaderFault(Unreadable):
    """A reader failed with an unexpected exception: a bug. Answered like any unreadable body, counted on its own."""

    outcome = "reader_fault"


class Deferred(ServiceError):
    """Internal: reading this body would block the event loop, so a thread reads it instead. Never sent to a client."""


class NotFound(ServiceError):
    """Nothing is served at this path."""

    code = "not_found"


class UnknownModel(ServiceError):
    """The service does not serve this model or version."""

    code = "unknown_model"


class WrongModel(ServiceError):
    """The fingerprint sent with the latents belongs to another model; the message names both."""

    code = "wrong_model"


class ControlOff(ServiceError):
    """Loading and unloading over HTTP is disabled; `VAE_MODEL_CONTROL` enables it."""

    code = "control_off"


class LoadRefused(ServiceError):
    """A version failed its checks. The versions served before stay in service."""

    code = "load_refused"


class UnsupportedMediaType(ServiceError):
    """No codec reads this body."""

    code = "unsupported_media_type"


class NotAcceptable(ServiceError):
    """No codec can write this answer in a form that Accept allows."""

    code = "not_acceptable"


class TooLarge(ServiceError):
    """The request exceeds a limit; the message names the setting that raises it."""

    code = "too_large"


class InvalidShape(ServiceError):
    """An array's shape does not match the model's."""

    code = "invalid_shape"


class InvalidValue(ServiceError):
    """A value is outside its range, or is not a number."""

    code = "invalid_value"


class InvalidOption(ServiceError):
    """An option is unknown, or its value is invalid."""

    code = "invalid_option"


class UnsupportedOperation(ServiceError):
    """The model lacks a graph that this operation needs."""

    code = "unsupported_operation"


class Overloaded(ServiceError):
    """The queue or the memory budget is full, or the deadline cannot be met.

    Attributes:
        retry_after_s: Seconds until the queue should have drained.
    """

    code = "overloaded"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotReady(ServiceError):
    """The service is stopping, its engine has failed, or no version of the model is ready."""

    code = "not_ready"


class NoRoom(ServiceError):
    """A file shared by the workers cannot be written, for example because the disk is full."""

    code = "no_room"


class DeadlinePassed(ServiceError):
    """The deadline passed before the answer was ready."""

    code = "deadline_passed"

    def __init__(self) -> None:
        super().__init__(
            "the deadline passed; raise X-Timeout-Ms, timeout on /v2, or VAE_TIMEOUT_S, or VAE_LONG_TIMEOUT_S if the "
            "answer streams its progress"
        )


class CallerGone(ServiceError):
    """The client disconnected while its request waited. Only the log and the metrics record it."""

    code = "caller_gone"


class InferenceFailed(ServiceError):
    """A batch failed. The cause is in the log, not in the answer."""

    code = "inference_failed"


def without_frames(error: Exception) -> Exception:
    """The same error without tracebacks, unless it is a bug, whose traceback the log needs.

    A traceback's frames hold the request's body and refer back to the error. This cycle would keep the body in memory
    until the garbage collector runs.

    Args:
        error: The error to answer; it and its causes are changed in place.
    """
    part: BaseException | None = error if isinstance(error, ServiceError | MemoryError) else None
    while part is not None:
        part.__traceback__ = None
        part = part.__cause__ or part.__context__
    return error
