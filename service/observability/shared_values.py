"""Metric values of several processes, in memory inherited from their common parent.

prometheus_client itself maps a file for each process: on a full disk, writing to it kills the process with SIGBUS, a
damaged file breaks every exposition, and each restart leaves files behind. This memory needs no file. Its values
outlive the process that wrote them, and the next process in the same slot continues from them.
"""

from __future__ import annotations

import json
import logging
import math
import mmap
import threading
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from prometheus_client import values as prometheus_values
from prometheus_client.core import Metric

VALUES = 2**14
"""Capacity of one process; the system provides memory only for the values in use."""
KEY_BYTES = 256 * VALUES
HEAD_BYTES = 64
LENGTH_BYTES = 4
SLOT_BYTES = HEAD_BYTES + 8 * VALUES + KEY_BYTES
COUNT, LIVE = 0, 1
"""Fields of a slot's head: the number of its values, and whether its process runs."""

log = logging.getLogger(__name__)


class Key(NamedTuple):
    """Identifies a value. `mode` is how the values of a gauge are combined: livesum or livemin."""

    kind: str
    mode: str
    family: str
    documentation: str
    sample: str
    labels: tuple[tuple[str, str], ...]


class Slot:
    """The values of one process. Values are appended, never removed.

    Args:
        memory: SLOT_BYTES of shared memory: zeros, or as an earlier process left them.
    """

    def __init__(self, memory: memoryview) -> None:
        end = HEAD_BYTES + 8 * VALUES
        self.head, self.cells, self._keys = (
            memory[:HEAD_BYTES].cast("Q"),
            memory[HEAD_BYTES:end].cast("d"),
            memory[end:],
        )
        self._places: dict[Key, int] = {}
        self._end = 0
        self._full = False

    def places(self) -> Mapping[Key, int]:
        """Return the index of every value in `cells`, including values that another process has added since."""
        while len(self._places) < min(self.head[COUNT], VALUES):
            start = self._end + LENGTH_BYTES
            end = start + int.from_bytes(self._keys[self._end : start], "little")
            kind, mode, family, documentation, sample, labels = json.loads(bytes(self._keys[start:end]))
            key = Key(kind, mode, family, documentation, sample, tuple((name, value) for name, value in labels))
            self._places[key] = len(self._places)
            self._end = end
        return self._places

    def place(self, key: Key) -> int | None:
        """Return the index of a value in `cells`, appending it if it is new; None if there is no room."""
        places = self.places()
        if key in places:
            return places[key]
        content, place = json.dumps(key).encode(), len(places)
        start = self._end + LENGTH_BYTES
        if place == VALUES or start + len(content) > KEY_BYTES:
            if not self._full:
                log.warning("no room for more metrics; %s%s is not counted", key.sample, dict(key.labels))
            self._full = True
            return None
        self._keys[self._end : start] = len(content).to_bytes(LENGTH_BYTES, "little")
        self._keys[start : start + len(content)] = content
        self.cells[place] = 0.0
        self.head[COUNT] = place + 1  # last, so that no other process reads half a key
        return self.places()[key]


class SharedValues:
    """A slot for each process, and a collector that combines them. Make it before the processes are forked."""

    def __init__(self, slots: int) -> None:
        memory = memoryview(mmap.mmap(-1, slots * SLOT_BYTES))
        self.slots = [Slot(memory[k * SLOT_BYTES : (k + 1) * SLOT_BYTES]) for k in range(slots)]

    def use(self, slot: int) -> None:
        """Keep the values of all metrics that this process makes from now on in a slot."""
        own = self.slots[slot]
        for key, place in own.places().items():
            if key.kind == "gauge":
                own.cells[place] = math.nan  # a value of the previous process
        own.head[LIVE] = 1
        prometheus_values.ValueClass = _value_class(own)

    def died(self, slot: int) -> None:
        """Leave out the gauges of an ended process; its counters stay."""
        self.slots[slot].head[LIVE] = 0

    def collect(self) -> Iterator[Metric]:
        """Yield every metric: counters and histograms summed over all processes, gauges combined over running ones."""
        families: dict[str, Metric] = {}
        totals: dict[Key, float] = {}
        for slot in self.slots:
            for key, place in slot.places().items():
                value = slot.cells[place]
                families.setdefault(key.family, Metric(key.family, key.documentation, key.kind))
                if key.kind == "gauge" and (math.isnan(value) or not slot.head[LIVE]):
                    continue
                if key not in totals:
                    totals[key] = value
                else:
                    totals[key] = min(totals[key], value) if key.mode == "livemin" else totals[key] + value
        below: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        for key, value in sorted(totals.items(), key=_by_bucket):
            family = families[key.family]
            if not key.sample.endswith("_bucket"):
                family.add_sample(key.sample, dict(key.labels), value)
                continue
            one = key.labels[:-1]  # without `le`
            below[key.family, one] = below.get((key.family, one), 0.0) + value
            family.add_sample(key.sample, dict(key.labels), below[key.family, one])
        for (name, labels), count in below.items():
            families[name].add_sample(f"{name}_count", dict(labels), count)
        yield from families.values()


def _by_bucket(item: tuple[Key, float]) -> tuple[str, str, tuple[tuple[str, str], ...], float]:
    """Sort key that puts the buckets of a histogram next to each other, the smallest first."""
    key = item[0]
    if key.sample.endswith("_bucket"):
        return key.family, key.sample, key.labels[:-1], float(key.labels[-1][1])
    return key.family, key.sample, key.labels, 0.0


def _value_class(slot: Slot) -> type:
    """Return the class of which prometheus_client makes its values: each is a cell of the slot."""
    lock = threading.Lock()

    class SharedValue:
        _multiprocess = True

        def __init__(
            self,
            typ: str,
            metric_name: str,
            name: str,
            labelnames: Sequence[str],
            labelvalues: Sequence[str],
            help_text: str,
            multiprocess_mode: str = "",
            **_: Any,
        ) -> None:
            labels = tuple(zip(labelnames, labelvalues, strict=True))
            with lock:
                place = slot.place(Key(typ, multiprocess_mode, metric_name, help_text, name, labels))
            self._cells: Any = array("d", [0.0]) if place is None else slot.cells
            self._place = place or 0
            if typ == "gauge":
                self.set(0.0)

        def inc(self, amount: float) -> None:
            with lock:
                self._cells[self._place] += amount

        def set(self, value: float, timestamp: float | None = None) -> None:  # noqa: ARG002  # the library's signature
            self._cells[self._place] = value

        def get(self) -> float:
            return float(self._cells[self._place])

        def set_exemplar(self, exemplar: Any) -> None:
            """Do nothing: exemplars are not shared."""

        def get_exemplar(self) -> None:
            """Return None: exemplars are not shared."""

    return SharedValue
