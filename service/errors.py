"""What can go wrong, named after what the caller sees; no HTTP in here."""

from __future__ import annotations

MOST_QUOTED = 80
MOST_TOLD = 600


def quoted(text: str) -> str:
    """What a caller sent, as messages repeat it: on one line, in double quotes, of bounded length."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in text[:MOST_QUOTED])
    plain = plain.replace('"', "'")
    return f'"{plain}{"..." if len(text) > MOST_QUOTED else ""}"'


def one_line(message: object) -> str:
    """What a model's files or a library say, as messages repeat it: on one line, printable, of bounded length."""
    words = " ".join(str(message).split())[:MOST_TOLD]
    return "".join(letter if letter.isprintable() else "?" for letter in words)


class ServiceError(Exception):
    """The root. `code` is stable: clients may branch on it. The message names the fix.

    `outcome` is what metrics and the access log count it as; empty is the code.
    """

    code = "error"
    outcome = ""


class StartError(ServiceError):
    """The service cannot start; printed as one line."""

    code = "cannot_start"


class Malformed(ServiceError):
    """What came is not HTTP, or may be read in two ways."""

    code = "malformed_request"


class Unauthenticated(ServiceError):
    """No API key, or one that nobody knows."""

    code = "unauthenticated"


class Forbidden(ServiceError):
    """The API key lacks a right; the message names it."""

    code = "forbidden"


class CrossSite(ServiceError):
    """A web page of another origin sent the request."""

    code = "cross_site"


class UnknownHost(ServiceError):
    """The Host header names nothing that the service answers to."""

    code = "unknown_host"


class SlowRequest(ServiceError):
    """The request did not arrive in time."""

    code = "slow_request"


class UrlTooLong(ServiceError):
    """Path and query are above a limit."""

    code = "url_too_long"


class HeadersTooLarge(ServiceError):
    """The headers are too many or too long."""

    code = "headers_too_large"


class TooManyConnections(ServiceError):
    """As many connections are open as may be."""

    code = "too_many_connections"


class RateLimited(ServiceError):
    """The caller asks too often, or for too much at once. `retry_after_s` is when it may again."""

    code = "rate_limited"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unreadable(ServiceError):
    """The body is not what its media type says."""

    code = "unreadable_body"


class ReaderFault(Unreadable):
    """A reader raised what it should not: a bug that the body brought out, answered like any unreadable body."""

    outcome = "reader_fault"


class Deferred(ServiceError):
    """Reading this body takes too long for the event loop: it is read again in a thread. Never answered."""


class NotFound(ServiceError):
    """Nothing is served at this path."""

    code = "not_found"


class UnknownModel(ServiceError):
    """No such model or version is served."""

    code = "unknown_model"


class WrongModel(ServiceError):
    """The latents are said to be of another model than the one that is asked; the message names both."""

    code = "wrong_model"


class ControlOff(ServiceError):
    """Models are not loaded and unloaded over HTTP unless the operator says so."""

    code = "control_off"


class LoadRefused(ServiceError):
    """A version cannot be served; what was served before still is."""

    code = "load_refused"


class UnsupportedMediaType(ServiceError):
    """No codec reads this body."""

    code = "unsupported_media_type"


class NotAcceptable(ServiceError):
    """No codec writes this answer in a form the caller accepts."""

    code = "not_acceptable"


class TooLarge(ServiceError):
    """The request is above a limit; the message names the setting that raises it."""

    code = "too_large"


class InvalidShape(ServiceError):
    """An array of another shape than the model's."""

    code = "invalid_shape"


class InvalidValue(ServiceError):
    """A number outside the range, or not a number."""

    code = "invalid_value"


class InvalidOption(ServiceError):
    """An unknown option, or a value it does not take."""

    code = "invalid_option"


class UnsupportedOperation(ServiceError):
    """The model was exported without what this operation needs."""

    code = "unsupported_operation"


class Overloaded(ServiceError):
    """The queue is full. `retry_after_s` is how long it should take to drain."""

    code = "overloaded"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotReady(ServiceError):
    """The service is stopping, or its engine has failed."""

    code = "not_ready"


class NoRoom(ServiceError):
    """A file that the workers share cannot be written."""

    code = "no_room"


class DeadlinePassed(ServiceError):
    """The request's time ran out before its answer was there."""

    code = "deadline_passed"

    def __init__(self, message: str = "the request's time ran out: X-Timeout-Ms, or else VAE_TIMEOUT_S") -> None:
        super().__init__(message)


class CallerGone(ServiceError):
    """The caller hung up while its request waited; nobody reads this but the log and the metrics."""

    code = "caller_gone"


class InferenceFailed(ServiceError):
    """A batch failed. The cause is logged, not told."""

    code = "inference_failed"


def without_frames(error: Exception) -> Exception:
    """The error without tracebacks, unless it is a bug, whose traceback is logged.

    The frames of a traceback hold what was being read, and refer back to the error: a cycle that keeps a body in memory
    until the garbage collector runs.
    """
    part: BaseException | None = error if isinstance(error, ServiceError | MemoryError) else None
    while part is not None:
        part.__traceback__ = None
        part = part.__cause__ or part.__context__
    return error
