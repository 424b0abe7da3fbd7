"""The log of a run: one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training.loop.checkpoint import disk_error


class Log:
    """Lines appended to a file, unbuffered, so that closing it cannot fail."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = path.open("ab", buffering=0)
        except OSError as error:
            raise disk_error(path, error) from error

    def write(self, record: dict[str, Any]) -> None:
        """Append one line.

        Raises:
            DiskError: The disk is full.
        """
        try:
            self.file.write(json.dumps(record).encode() + b"\n")
        except OSError as error:
            raise disk_error(self.path, error) from error
