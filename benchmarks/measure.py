"""Result of one load."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """Correct answers a second, their latencies in milliseconds, and the number of wrong or missing answers.

    Of an open loop also: requests offered a second, those refused with 503, the 99th percentile of the refusals, and
    the latencies without the client: from when a request was sent to when the kernel received its answer.
    """

    rate: float
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    failures: int = 0
    offered: float = 0.0
    refused: int = 0
    refused_p99_ms: float = 0.0
    served_p50_ms: float = 0.0
    served_p99_ms: float = 0.0
