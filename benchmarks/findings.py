"""Measurements of one run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Self

from benchmarks.measure import Measure

ALONE = "alone"
"""Name of onnxruntime without a server among the peers."""


@dataclass
class Findings:
    """Measurements, one list entry a round; `measures` is by workload, then by peer."""

    settings: dict[str, int]
    measures: dict[str, dict[str, list[Measure]]] = field(default_factory=dict)
    start_s: dict[str, list[float]] = field(default_factory=dict)
    memory_mib: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `write` has written."""
        known = json.loads(path.read_text())
        known["measures"] = {
            workload: {name: [Measure(**one) for one in rounds] for name, rounds in named.items()}
            for workload, named in known["measures"].items()
        }
        return cls(**known)

    def write(self, path: Path) -> None:
        """Write everything as JSON."""
        path.write_text(json.dumps(asdict(self)))

    def add(self, workload: str, name: str, measure: Measure) -> None:
        """Add one round of a load."""
        self.measures.setdefault(workload, {}).setdefault(name, []).append(measure)

    def of(self, workload: str, name: str) -> list[Measure]:
        """Rounds of a load; empty if the peer does not support it."""
        return self.measures.get(workload, {}).get(name, [])

    def middle(self, workload: str, name: str, figure: Callable[[Measure], float]) -> float | None:
        """Median of a figure over the rounds; None without rounds."""
        measures = self.of(workload, name)
        return median(map(figure, measures)) if measures else None

    def ratio(
        self, workload: str, name: str, other: str, figure: Callable[[Measure], float] = lambda one: one.rate
    ) -> float | None:
        """Ratio of two medians of the same run; None if either is missing or 0."""
        mine, theirs = (self.middle(workload, one, figure) for one in (name, other))
        return mine / theirs if mine is not None and theirs else None

    def note(self, text: str) -> None:
        """Print why a measurement is missing, and keep it for the report."""
        print(text, flush=True)
        self.notes.append(text)
