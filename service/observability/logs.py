"""Logging: text, or one JSON object a line, written without blocking."""

from __future__ import annotations

import logging
import logging.config
import os
import select
from collections import deque
from typing import Any, Literal

from pythonjsonlogger.core import RESERVED_ATTRS

from service import process
from service.observability.request_ids import log_fields

Format = Literal["text", "json"]
BATCH_LOGGER = "service.runtime.batcher"
"""Its records belong to a batch of many requests, so they get no request id."""
KEPT_BYTES = 2**20
"""Bytes of the log that are buffered while its reader is slow; further records are dropped and counted."""
FLUSH_S = 1.0
"""How long an ending process waits for the reader of its log."""


def configure(form: Format) -> None:
    """Set up logging of this process and of the workers that it forks."""
    logging.config.dictConfig(log_config(form))
    process.omit_log_origin()


def log_config(form: Format) -> dict[str, Any]:
    """Return the configuration for logging.config.dictConfig.

    Text goes to standard error. JSON goes to standard output, with the id and the trace of the current request; it
    includes the records of uvicorn and of all libraries.
    """
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"request": {"()": "service.observability.logs.RequestFields"}},
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
    """Log handler that writes to a file descriptor and never blocks.

    Records that the reader has no room for are buffered, up to KEPT_BYTES, and written with a later record or by
    `flush`. Records that do not fit, or cannot be written (full disk, closed pipe), are dropped; the log says how many.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._kept: deque[bytes] = deque()
        self._bytes = 0
        self._dropped = 0
        os.register_at_fork(after_in_child=self._forget)
        self.failure: OSError | None = None
        """Why the last record could not be written; None if it was written or buffered."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, or buffer it."""
        try:
            if self._dropped and not self._kept:
                self._keep(self._line(self._dropped_record()))
            self._keep(self._line(record))
            self._write()
        except Exception:  # noqa: BLE001  # as all handlers of the standard library do
            self.handleError(record)

    def flush(self) -> None:
        """Write buffered records, as far as the reader has room."""
        self.acquire()
        try:
            self._write()
        finally:
            self.release()

    def flush_within(self, seconds: float) -> None:
        """Write buffered records, and wait this long for the reader."""
        self.flush()
        writable = select.poll()
        writable.register(self._descriptor, select.POLLOUT)
        while self._kept and writable.poll(seconds * 1000):
            self.flush()

    def _line(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode(errors="backslashreplace")

    def _dropped_record(self) -> logging.LogRecord:
        message, self._dropped = f"{self._dropped} log records were dropped: they could not be written", 0
        return logging.LogRecord(__name__, logging.WARNING, __file__, 0, message, None, None)

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
        """Empty the buffer. A forked process does so too, since its parent writes the records."""
        self._kept.clear()
        self._bytes = 0


def outputs() -> list[Output]:
    """Return the handlers of this kind on the root logger."""
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, Output)]


class RequestFields(logging.Filter):
    """Log filter that adds the id and trace of the current request to every record, and drops none."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the fields; always true."""
        if record.name != BATCH_LOGGER:
            record.__dict__.update(log_fields())
        return True
