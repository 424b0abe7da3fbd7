"""Workloads: model, request format and load."""

from __future__ import annotations

from typing import NamedTuple

CLOSED = ("1", "16", "64")
OPEN = {"half": 0.5, "2x": 2.0, "4x": 4.0}
"""Offered rate as a multiple of what the same server did with CAPACITY connections in the same round."""
CAPACITY = "16"
ROWS = {"json": 1, "binary": 1, "png": 1, "rows32": 32, "rows256": 256, "npy1024": 1024}


class Workload(NamedTuple):
    """One workload; `load` is a number of connections, or a key of OPEN."""

    model: str
    body: str
    load: str

    @property
    def name(self) -> str:
        """Name that --workloads matches."""
        return f"{self.model}-{self.body}-{self.load}"

    @property
    def title(self) -> str:
        """Title in the tables."""
        rows = ROWS[self.body]
        body = {"binary": "binary", "json": "JSON", "png": "PNG"}.get(self.body, f"{rows:,} rows")
        body = body + ", npy" if self.body == "npy1024" else body
        load = {"half": "half load", "2x": "2 x overload", "4x": "4 x overload"}.get(self.load, f"{self.load} conn.")
        return f"{self.model}, {body}, {load}"


def _all() -> list[Workload]:
    found = []
    for model in ("mlp", "conv"):
        found += [Workload(model, body, load) for body in ("json", "binary", "png") for load in CLOSED]
        found += [Workload(model, "rows256", "1"), Workload(model, "rows256", "16"), Workload(model, "npy1024", "1")]
        found += [Workload(model, body, "half") for body in ("json", "binary")]
        if model == "conv":  # where one machine can send four times what the server can compute
            found += [Workload(model, "rows32", load) for load in (CAPACITY, "2x", "4x")]
    return found


WORKLOADS = _all()
