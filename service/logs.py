"""How the log is written: lines for people, or one JSON object a line."""

from __future__ import annotations

import logging
from typing import Any, Literal

from pythonjsonlogger.core import RESERVED_ATTRS

from service.tracking import known

Format = Literal["text", "json"]
OF_MANY = "service.batcher"
"""A batch is of many requests, and the event loop works it off in the name of any of them."""


def log_config(form: Format) -> dict[str, Any]:
    """For logging.config.dictConfig, and for uvicorn, which applies it in every worker.

    Text goes to standard error. JSON goes to standard output, all of it: what the service, uvicorn and any library
    logs, with the id and the trace of the request that is being served.
    """
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"request": {"()": "service.logs.OfRequest"}},
        "formatters": {
            "text": {"()": "uvicorn.logging.DefaultFormatter", "fmt": "%(levelprefix)s %(message)s"},
            "json": {
                "()": "pythonjsonlogger.json.JsonFormatter",
                "fmt": ["levelname", "name", "message"],
                "rename_fields": {"levelname": "level", "name": "logger"},
                "timestamp": "time",
                "reserved_attrs": [*RESERVED_ATTRS, "color_message"],  # uvicorn's, for terminals
            },
        },
        "handlers": {
            "text": {"class": "logging.StreamHandler", "formatter": "text", "stream": "ext://sys.stderr"},
            "json": {
                "class": "logging.StreamHandler",
                "formatter": "json",
                "stream": "ext://sys.stdout",
                "filters": ["request"],
            },
        },
        "root": {"handlers": [form], "level": "WARNING"},
        "loggers": {"service": {"level": "INFO"}, "uvicorn": {"level": "INFO"}},
    }


class OfRequest(logging.Filter):
    """Adds to every record what is known of the request that is being served; drops none."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Always true."""
        if record.name != OF_MANY:
            record.__dict__.update(known())
        return True
