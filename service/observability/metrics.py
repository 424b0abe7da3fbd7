"""Prometheus metrics, and the Server-Timing header."""

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
"""Why a worker was replaced: killed by a signal, exited, event loop blocked, or unable to start."""
FLUSH_S = 0.1
"""Longest delay until a count is visible in the metrics of every worker."""
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Telemetry:
    """Metrics of one application. Label values are bounded: served models, operations, and the codes of our errors.

    Args:
        load: Returns the rows in the queue and the running batches; called at every flush.
    """

    def __init__(self, load: Callable[[], tuple[int, int]]) -> None:
        disable_created_metrics()  # a second series for each metric, of no use here
        self.registry = CollectorRegistry()
        labels = ("model", "operation")
        self._requests = Counter(
            "vae_requests",
            "Requests by outcome: ok or the problem's code",
            (*labels, "outcome"),
            registry=self.registry,
        )
        self._rows = Counter("vae_rows", "Rows by outcome", (*labels, "outcome"), registry=self.registry)
        self._waited, self._computed = (
            Counter(
                f"vae_request_{what}_seconds", f"Seconds of answered requests {where}", labels, registry=self.registry
            )
            for what, where in (("queue", "in the queue"), ("inference", "in the model"))
        )
        self._refused = Counter(
            "vae_refused", "Calls refused by access control, by the problem's code", ("code",), registry=self.registry
        )
        self._queue = Histogram(
            "vae_queue_seconds", "Time in the queue, once for each part of a request", labels, buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self._inference = Histogram(
            "vae_inference_seconds", "Time of a batch", labels, buckets=SECONDS, registry=self.registry
        )
        self._batch_rows = Histogram("vae_batch_rows", "Rows in a batch", labels, buckets=ROWS, registry=self.registry)
        # Over several workers the gauges of the running ones are added up, as are all counters.
        live = partial(Gauge, registry=self.registry, multiprocess_mode="livesum")
        self._queued = live("vae_queued_rows", "Rows in the queue")
        self._running = live("vae_running_batches", "Running batches")
        # The minimum over all workers, so that one that lags behind shows.
        self._ready = Gauge(
            "vae_ready_versions", "Served versions", ("model",), registry=self.registry,
            multiprocess_mode="livemin",
        )  # fmt: skip
        self._tasks = live("vae_tasks", "Tasks of the event loop; a request has one or two")
        restarts_counter(self.registry)
        if _shared is None or not _several:
            ProcessCollector(registry=self.registry)  # memory, descriptors, processor time
        self._request_child = cache(self._requests.labels)
        self._rows_child = cache(self._rows.labels)
        self._seconds_children = cache(lambda *values: (self._waited.labels(*values), self._computed.labels(*values)))
        self._batch_children = cache(
            lambda *values: [metric.labels(*values) for metric in (self._queue, self._inference, self._batch_rows)]
        )
        self.changes = 0  # counts the flushes that changed a metric
        self._load = load
        self._noted: list[Callable[[], None]] = []
        self._counted: dict[tuple[str, str, str], list[float]] = {}
        self._flushing = False

    def request(
        self, model: str, operation: str, outcome: str, rows: int, queue_s: float = 0.0, inference_s: float = 0.0
    ) -> None:
        """Count one request, and the time that it spent in the queue and in the model."""
        counted = self._counted.get((model, operation, outcome))
        if counted is None:
            self._counted[model, operation, outcome] = [1, rows, queue_s, inference_s]
            self._flush_soon()
        else:
            counted[0] += 1
            counted[1] += rows
            counted[2] += queue_s
            counted[3] += inference_s

    def refused(self, code: str) -> None:
        """Count one call that access control refused."""
        self._note(self._refused.labels(code).inc)

    def batch(self, program: Any, rows: int, queue_s: list[float], inference_s: float) -> None:
        """Record one batch."""
        self._note(partial(self._add_batch, program.model, program.operation, rows, queue_s, inference_s))

    def ready(self, model: str, versions: int) -> None:
        """Set the number of served versions of a model."""
        self._ready.labels(model).set(versions)
        self.changes += 1

    def flush(self) -> None:
        """Apply the recorded changes, outside of any request."""
        self._flushing = False
        noted, self._noted = self._noted, []
        self.changes += bool(noted)
        for add in noted:
            add()
        counted, self._counted = self._counted, {}
        for labels, (requests, rows, queue_s, inference_s) in counted.items():
            self._request_child(*labels).inc(requests)
            if rows:
                self._rows_child(*labels).inc(rows)
            if inference_s:
                for child, seconds in zip(self._seconds_children(*labels[:2]), (queue_s, inference_s), strict=True):
                    child.inc(seconds)
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
        """Return all metrics in Prometheus' text format, summed over the workers."""
        return generate_latest(self._whole())

    def totals(self) -> dict[tuple[str, str, str, str], float]:
        """Return the value of each metric of operations, summed over the workers.

        Returns:
            Values by name of the sample, model, operation and outcome; the last is empty where it has none.
        """
        return {
            (sample.name, sample.labels["model"], sample.labels["operation"], sample.labels.get("outcome", "")):
                sample.value
            for metric in self._whole().collect()
            for sample in metric.samples
            if "operation" in sample.labels and "le" not in sample.labels
        }  # fmt: skip

    def _whole(self) -> CollectorRegistry:
        """The metrics of all workers, up to date."""
        self.flush()
        if _shared is None:
            return self.registry
        registry = CollectorRegistry()
        registry.register(_shared)
        if not _several:
            ProcessCollector(registry=registry)
        return registry


def server_timing(queue_s: float, inference_s: float | None) -> str:
    """Return the Server-Timing header, in milliseconds. inference_s is None while it is unknown."""
    inference = "" if inference_s is None else f", inference;dur={inference_s * 1e3:.3f}"
    return f"queue;dur={queue_s * 1e3:.3f}{inference}"


def restarts_counter(registry: CollectorRegistry) -> Counter:
    """Make the counter of replaced workers. The supervisor increments it; the workers expose it."""
    restarts = Counter(
        "vae_worker_restarts", "Restarted workers, by why the previous one ended", ("reason",), registry=registry
    )
    for reason in RESTART_REASONS:
        restarts.labels(reason)  # at 0, so that a rate includes the first restart
    return restarts


_shared: SharedValues | None = None
_several = False


def share(values: SharedValues, slot: int, *, several: bool) -> None:
    """Keep the metrics of this process in shared memory.

    Args:
        values: The shared memory.
        slot: The slot of this process.
        several: Whether there is more than one worker.
    """
    global _shared, _several  # prometheus_client keeps its value class for a whole process
    values.use(slot)
    _shared, _several = values, several
