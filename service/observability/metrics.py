"""Every metric, named once; and the Server-Timing header."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from service.observability.shared_values import SharedValues

MEDIA_TYPE = CONTENT_TYPE_LATEST
RESTART_REASONS = ("killed", "exited", "stuck", "not_started")
"""Why a worker was replaced: by a signal, by itself, because its loop stood still, because it could not start."""
FLUSH_S = 0.1
"""How long a figure may be on its way to the metrics of another worker's answer."""
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Telemetry:
    """Metrics of one application. Label values are bounded: models and operations that are served, codes of ours."""

    def __init__(self, load: Callable[[], tuple[int, int]]) -> None:
        """load: rows that wait and batches that run, asked for at every flush."""
        disable_created_metrics()  # a second series for each, that nobody asks for
        self.registry = CollectorRegistry()
        labels = ("model", "operation")
        self._requests = Counter(
            "vae_requests",
            "Requests by outcome: ok or the problem's code",
            (*labels, "outcome"),
            registry=self.registry,
        )
        self._rows = Counter("vae_rows", "Rows by outcome", (*labels, "outcome"), registry=self.registry)
        self._refused = Counter(
            "vae_refused", "Calls turned away at the door, by the problem's code", ("code",), registry=self.registry
        )
        self._queue = Histogram(
            "vae_queue_seconds", "Wait before a batch, a part of a request each", labels, buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self._inference = Histogram(
            "vae_inference_seconds", "Time of a batch", labels, buckets=SECONDS, registry=self.registry
        )
        self._batch_rows = Histogram("vae_batch_rows", "Rows in a batch", labels, buckets=ROWS, registry=self.registry)
        # In several processes the gauges of those that live are added up, as all counters are.
        live = partial(Gauge, registry=self.registry, multiprocess_mode="livesum")
        self._queued = live("vae_queued_rows", "Rows that wait")
        self._running = live("vae_running_batches", "Batches that are being computed")
        # The fewest of all workers: one that lags behind shows.
        self._ready = Gauge(
            "vae_ready_versions", "Versions that are served", ("model",), registry=self.registry,
            multiprocess_mode="livemin",
        )  # fmt: skip
        self._tasks = live("vae_tasks", "Tasks of the event loop: a request has one or two")
        restarts_counter(self.registry)
        if _shared is None or not _several:
            ProcessCollector(registry=self.registry)  # memory, descriptors, processor time; of one process alone
        self._request_child = cache(self._requests.labels)
        self._rows_child = cache(self._rows.labels)
        self._batch_children = cache(
            lambda *values: [metric.labels(*values) for metric in (self._queue, self._inference, self._batch_rows)]
        )
        self.changes = 0  # with every flush that added something
        self._load = load
        self._noted: list[Callable[[], None]] = []
        self._counted: dict[tuple[str, str, str], list[int]] = {}
        self._flushing = False

    def request(self, model: str, operation: str, outcome: str, rows: int) -> None:
        """Count one request."""
        counted = self._counted.get((model, operation, outcome))
        if counted is None:
            self._counted[model, operation, outcome] = [1, rows]
            self._flush_soon()
        else:
            counted[0] += 1
            counted[1] += rows

    def refused(self, code: str) -> None:
        """Count one call turned away before it was anybody's operation."""
        self._note(self._refused.labels(code).inc)

    def batch(self, program: Any, rows: int, queue_s: list[float], inference_s: float) -> None:
        """Record one batch."""
        self._note(partial(self._add_batch, program.model, program.operation, rows, queue_s, inference_s))

    def ready(self, model: str, versions: int) -> None:
        """How many versions of a model are served."""
        self._ready.labels(model).set(versions)
        self.changes += 1

    def flush(self) -> None:
        """Add up what was noted; callers' answers do not wait for it."""
        self._flushing = False
        noted, self._noted = self._noted, []
        self.changes += bool(noted)
        for add in noted:
            add()
        counted, self._counted = self._counted, {}
        for labels, (requests, rows) in counted.items():
            self._request_child(*labels).inc(requests)
            if rows:
                self._rows_child(*labels).inc(rows)
        queued_rows, running = self._load()
        self._queued.set(queued_rows)
        self._running.set(running)
        self._tasks.set(len(asyncio.all_tasks()))

    def _note(self, add: Callable[[], None]) -> None:
        self._noted.append(add)
        self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_later(FLUSH_S, self.flush)

    def _add_batch(self, model: str, operation: str, rows: int, queue_s: list[float], inference_s: float) -> None:
        queue, inference, batch_rows = self._batch_children(model, operation)
        for seconds in queue_s:
            queue.observe(seconds)
        inference.observe(inference_s)
        batch_rows.observe(rows)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format, summed over the workers where there are several."""
        self.flush()
        if _shared is None:
            return generate_latest(self.registry)
        registry = CollectorRegistry()
        registry.register(_shared)
        if not _several:
            ProcessCollector(registry=registry)
        return generate_latest(registry)


def server_timing(queue_s: float, inference_s: float | None) -> str:
    """The Server-Timing header; durations in milliseconds, without what is not known yet."""
    inference = "" if inference_s is None else f", inference;dur={inference_s * 1e3:.3f}"
    return f"queue;dur={queue_s * 1e3:.3f}{inference}"


def restarts_counter(registry: CollectorRegistry) -> Counter:
    """Workers that were replaced. The supervisor counts; the workers show it."""
    restarts = Counter(
        "vae_worker_restarts", "Workers started again, by what ended the one before", ("reason",), registry=registry
    )
    for reason in RESTART_REASONS:
        restarts.labels(reason)  # at 0, so that a rate sees the first one
    return restarts


_shared: SharedValues | None = None
_several = False


def share(values: SharedValues, slot: int, *, several: bool) -> None:
    """Keep the metrics that this process makes in shared memory, as the supervisor and its workers do.

    several: whether there is more than one worker.
    """
    global _shared, _several  # as prometheus_client keeps it, for a whole process
    values.use(slot)
    _shared, _several = values, several
