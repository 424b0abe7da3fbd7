"""Every metric, named once; and the Server-Timing header."""

from __future__ import annotations

from functools import cache
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from service.batcher import Batcher

MEDIA_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Telemetry:
    """Metrics of one application. Label values are bounded: models and operations that are served, codes of ours."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("model", "operation")
        self._requests = Counter(
            "vae_requests",
            "Requests by outcome: ok or the problem's code",
            (*labels, "outcome"),
            registry=self.registry,
        )
        self._rows = Counter("vae_rows", "Rows answered", labels, registry=self.registry)
        self._queue = Histogram(
            "vae_queue_seconds", "Wait before a batch, a part of a request each", labels, buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self._inference = Histogram(
            "vae_inference_seconds", "Time of a batch", labels, buckets=SECONDS, registry=self.registry
        )
        self._batch_rows = Histogram("vae_batch_rows", "Rows in a batch", labels, buckets=ROWS, registry=self.registry)
        self._request_child = cache(self._requests.labels)
        self._rows_child = cache(self._rows.labels)
        self._batch_children = cache(
            lambda *values: [metric.labels(*values) for metric in (self._queue, self._inference, self._batch_rows)]
        )

    def watch(self, batcher: Batcher) -> None:
        """Publish the batcher's state as gauges."""
        queued = Gauge("vae_queued_rows", "Rows that wait", registry=self.registry)
        queued.set_function(lambda: batcher.queued_rows)

    def request(self, model: str, operation: str, outcome: str, rows: int) -> None:
        """Count one request."""
        self._request_child(model, operation, outcome).inc()
        if rows:
            self._rows_child(model, operation).inc(rows)

    def batch(self, program: Any, rows: int, queue_s: list[float], inference_s: float) -> None:
        """Record one batch; the batcher's observer."""
        queue, inference, batch_rows = self._batch_children(program.model, program.operation)
        for seconds in queue_s:
            queue.observe(seconds)
        inference.observe(inference_s)
        batch_rows.observe(rows)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


def server_timing(queue_s: float, inference_s: float) -> str:
    """The Server-Timing header; durations in milliseconds."""
    return f"queue;dur={queue_s * 1e3:.3f}, inference;dur={inference_s * 1e3:.3f}"
