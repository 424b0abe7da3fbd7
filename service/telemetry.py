"""Every metric, named once; and the Server-Timing header."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
    multiprocess,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

MEDIA_TYPE = CONTENT_TYPE_LATEST
SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Where prometheus_client keeps the metrics of several processes; set before it is imported."""
FLUSH_S = 0.1
"""How long a figure may be on its way to the metrics of another worker's answer."""
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Telemetry:
    """Metrics of one application. Label values are bounded: models and operations that are served, codes of ours."""

    def __init__(self, load: Callable[[], tuple[int, int]]) -> None:
        """load: rows that wait and batches that run, asked for at every flush."""
        disable_created_metrics()  # a second series for each, that nobody asks for
        forget_the_dead()
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
        if SHARED_FOLDER not in os.environ:
            ProcessCollector(registry=self.registry)  # memory, descriptors, processor time; of one process alone
        self._request_child = cache(self._requests.labels)
        self._rows_child = cache(self._rows.labels)
        self._batch_children = cache(
            lambda *values: [metric.labels(*values) for metric in (self._queue, self._inference, self._batch_rows)]
        )
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

    def flush(self) -> None:
        """Add up what was noted; callers' answers do not wait for it."""
        self._flushing = False
        noted, self._noted = self._noted, []
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
        if SHARED_FOLDER not in os.environ:
            return generate_latest(self.registry)
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        return generate_latest(registry)


def server_timing(queue_s: float, inference_s: float | None) -> str:
    """The Server-Timing header; durations in milliseconds, without what is not known yet."""
    inference = "" if inference_s is None else f", inference;dur={inference_s * 1e3:.3f}"
    return f"queue;dur={queue_s * 1e3:.3f}{inference}"


def forget_the_dead() -> None:
    """Drop the gauges of workers that no longer run."""
    folder = os.environ.get(SHARED_FOLDER)
    for path in Path(folder).glob("gauge_live*.db") if folder else ():
        found = re.search(r"_(\d+)\.db$", path.name)
        if found and not Path(f"/proc/{found.group(1)}").exists():
            multiprocess.mark_process_dead(int(found.group(1)))
