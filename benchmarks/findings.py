"""Everything one run found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from benchmarks.measure import Measure

ALONE = "alone"
"""The place of onnxruntime without a server among the peers."""


@dataclass
class Findings:
    """A list entry a round; `measures` by workload, then by peer."""

    settings: dict[str, int]
    measures: dict[str, dict[str, list[Measure]]] = field(default_factory=dict)
    start_s: dict[str, list[float]] = field(default_factory=dict)
    memory_mib: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, workload: str, name: str, measure: Measure) -> None:
        """One more round of a load."""
        self.measures.setdefault(workload, {}).setdefault(name, []).append(measure)

    def of(self, workload: str, name: str) -> list[Measure]:
        """Its rounds; empty where the peer cannot do it."""
        return self.measures.get(workload, {}).get(name, [])

    def middle(self, workload: str, name: str, figure: Callable[[Measure], float]) -> float | None:
        """The median of a figure over the rounds; None where there are none."""
        measures = self.of(workload, name)
        return median(map(figure, measures)) if measures else None

    def ratio(
        self, workload: str, name: str, other: str, figure: Callable[[Measure], float] = lambda one: one.rate
    ) -> float | None:
        """One's figure over another's, medians of the same run; None where either is missing or nothing."""
        mine, theirs = (self.middle(workload, one, figure) for one in (name, other))
        return mine / theirs if mine is not None and theirs else None

    def note(self, text: str) -> None:
        """Why something is missing; said at once and in the report."""
        print(text, flush=True)
        self.notes.append(text)
