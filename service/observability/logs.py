"""How the log is written: lines for people, or one JSON object a line."""

from __future__ import annotations

import fcntl
import logging
import logging.config
import os
import select
import stat
import sys
from collections import deque
from typing import Any, Literal

from pythonjsonlogger.core import RESERVED_ATTRS

from service import process
from service.observability.request_ids import log_fields

Format = Literal["text", "json"]
OF_MANY = "service.runtime.batcher"
"""A batch is of many requests, and the event loop works it off in the name of any of them."""
KEPT_BYTES = 2**20
"""Of the log, while whoever reads it is behind; what comes then is dropped and counted."""
FLUSH_S = 1.0
"""How long the end of a process may wait for a reader of the log."""
STANDARD = (1, 2)
"""Descriptors of standard output and standard error."""


def configure(form: Format) -> None:
    """Set up logging of this process and of the workers that it forks."""
    logging.config.dictConfig(log_config(form))
    process.omit_log_origin()


def log_config(form: Format) -> dict[str, Any]:
    """For logging.config.dictConfig; workers inherit it.

    Text goes to standard error. JSON goes to standard output, all of it: what the service, uvicorn and any library
    logs, with the id and the trace of the request that is being served.
    """
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"request": {"()": "service.observability.logs.OfRequest"}},
        "formatters": {
            "text": {"format": "%(levelname)-8s %(message)s"},
            "json": {
                "()": "pythonjsonlogger.json.JsonFormatter",
                "fmt": ["levelname", "name", "message"],
                "rename_fields": {"levelname": "level", "name": "logger"},
                "timestamp": "time",
                "reserved_attrs": [*RESERVED_ATTRS, "color_message"],  # uvicorn's, for terminals
            },
        },
        "handlers": {
            "text": {"()": "service.observability.logs.Output", "formatter": "text", "descriptor": 2},
            "json": {
                "()": "service.observability.logs.Output",
                "formatter": "json",
                "descriptor": 1,
                "filters": ["request"],
            },
        },
        "root": {"handlers": [form], "level": "WARNING"},
        "loggers": {"service": {"level": "INFO"}, "uvicorn": {"level": "INFO"}},
    }


class Output(logging.Handler):
    """Writes records to a descriptor and waits for nobody.

    What the reader has no room for is kept, up to KEPT_BYTES, and written with a later record or by `flush`. What does
    not fit, or cannot be written at all (no space on the device, no reader), is dropped; the log says how many.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._kept: deque[bytes] = deque()
        self._bytes = 0
        self._dropped = 0
        os.register_at_fork(after_in_child=self._forget)
        self.failure: OSError | None = None
        """Why the last record could not be written; None where it was, or is kept."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write it, or keep it."""
        try:
            if self._dropped and not self._kept:
                self._keep(self._line(self._told_dropped()))
            self._keep(self._line(record))
            self._write()
        except Exception:  # noqa: BLE001  # as every handler of the standard library
            self.handleError(record)

    def flush(self) -> None:
        """Write what is kept, as far as there is room."""
        self.acquire()
        try:
            self._write()
        finally:
            self.release()

    def flush_within(self, seconds: float) -> None:
        """Write what is kept, and wait so long for a reader."""
        self.flush()
        writable = select.poll()
        writable.register(self._descriptor, select.POLLOUT)
        while self._kept and writable.poll(seconds * 1000):
            self.flush()

    def _line(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode(errors="backslashreplace")

    def _told_dropped(self) -> logging.LogRecord:
        said, self._dropped = f"{self._dropped} log records were dropped: they could not be written", 0
        return logging.LogRecord(__name__, logging.WARNING, __file__, 0, said, None, None)

    def _keep(self, line: bytes) -> None:
        if self._bytes + len(line) > KEPT_BYTES:
            self._dropped += 1
        else:
            self._kept.append(line)
            self._bytes += len(line)

    def _write(self) -> None:
        self.failure = None
        while self._kept:
            try:
                written = os.write(self._descriptor, self._kept[0])
            except BlockingIOError:
                return
            except OSError as error:
                self.failure = error
                self._dropped += len(self._kept)
                self._forget()
                return
            self._bytes -= written
            if written < len(self._kept[0]):
                self._kept[0] = self._kept[0][written:]
            else:
                self._kept.popleft()

    def _forget(self) -> None:
        """Of a forked process too: its parent writes what it has kept."""
        self._kept.clear()
        self._bytes = 0


def outputs() -> list[Output]:
    """Those that the root logger has."""
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, Output)]


def prepare_standard_streams() -> None:
    """Let standard output and error be open, and writing to them never wait.

    Where one is closed, the next socket would get its number, and a caller the log. A pipe, a socket or a terminal is
    set so that a write for which the reader has no room fails at once, also one from a library in C. Pipes and
    terminals are opened anew for that, since the setting is shared by all programs that have the same one open.
    """
    for descriptor in (0, *STANDARD):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            os.set_inheritable(descriptor, True)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for descriptor in STANDARD:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISSOCK(mode):
            os.set_blocking(descriptor, False)
        elif stat.S_ISFIFO(mode) or os.isatty(descriptor):
            _reopen_without_waiting(descriptor)


def _reopen_without_waiting(descriptor: int) -> None:
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_APPEND)
    try:
        own = os.open(f"/proc/self/fd/{descriptor}", flags | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:  # another user's, or no /proc
        os.set_blocking(descriptor, False)
        return
    os.dup2(own, descriptor)
    os.close(own)


class OfRequest(logging.Filter):
    """Adds to every record what is known of the request that is being served; drops none."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Always true."""
        if record.name != OF_MANY:
            record.__dict__.update(log_fields())
        return True
