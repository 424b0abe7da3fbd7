"""What one load found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """Right answers a second; their latencies in milliseconds; answers that were wrong or never came.

    Of an open loop also: requests offered a second, those refused with 503, and the 99th percentile of the refusals.
    """

    rate: float
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    failures: int = 0
    offered: float = 0.0
    refused: int = 0
    refused_p99_ms: float = 0.0
