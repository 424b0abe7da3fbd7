"""Targets of the service, each compared with a run's findings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.findings import ALONE, Findings
from benchmarks.measure import Measure
from benchmarks.roster import PEERS
from benchmarks.workloads import OPEN


@dataclass(frozen=True)
class Claim:
    """One row of the table: a figure, what it is compared with, and its target (empty if it has none)."""

    title: str
    beside: str
    asked: str
    figure: Callable[[Findings], float | None]
    unit: str = "x"

    def row(self, found: Findings) -> str:
        """Row of the table; a dash if the run did not measure it."""
        figure = self.figure(found)
        digits = 2 if self.unit == "x" else 0
        told = "-" if figure is None else f"{figure:.{digits}f} {self.unit}"
        return f"| {self.title} | {self.beside} | {self.asked and f'{self.asked} {self.unit}'} | {told} |"


def faster(title: str, workload: str, other: str, least: float, mine: str = "ours") -> Claim:
    """Target for the ratio of two servers' rates."""
    beside = "onnxruntime alone" if other == ALONE else PEERS[other].title
    return Claim(title, beside, f"≥ {least:g}", lambda found: found.ratio(workload, mine, other))


def overload(load: str) -> list[Claim]:
    """Targets under overload: the service keeps its rate and refuses the rest at once."""
    workload, title = f"conv-rows32-{load}", f"conv, 32 rows, {load[:-1]} x overload"

    def ours(figure: Callable[[Measure], float]) -> Callable[[Findings], float | None]:
        return lambda found: found.middle(workload, "ours", figure) or None  # nothing refused has no percentile

    return [
        Claim(f"{title}, in time", "its own capacity", "≥ 0.9", ours(lambda one: one.rate / one.offered * OPEN[load])),
        Claim(f"{title}, p99 of the refused", "", "≤ 50", ours(lambda one: one.refused_p99_ms), "ms"),
        Claim(f"{title}, p99 of the accepted", "", "", ours(lambda one: one.p99_ms), "ms"),
    ]


CLAIMS = [
    faster("JSON, 64 connections", "mlp-json-64", "triton", 2.5),
    faster("JSON, 64 connections", "mlp-json-64", "mlserver", 5.5),
    faster("JSON, 64 connections", "mlp-json-64", "bentoml", 13.0),
    faster("JSON, 64 connections", "mlp-json-64", "litserve", 16.0),
    faster("JSON, 64 connections", "mlp-json-64", "ray", 40.0),
    faster("binary, 64 connections", "mlp-binary-64", "triton", 4.5),
    faster("Open Inference Protocol, binary, 64 connections", "mlp-binary-64", "triton", 2.5, mine="oip"),
    faster("binary, 64 connections", "mlp-binary-64", "bare", 1.5),
    faster("binary, 64 connections, two workers", "mlp-binary-64", "ours", 1.4, mine="ours2"),
    faster("conv, binary, 64 connections", "conv-binary-64", "bare", 1.3),
    faster("PNG, 64 connections", "mlp-png-64", "bentoml", 4.0),
    faster("1,024 rows as npy", "mlp-npy1024-1", ALONE, 0.8),
    Claim(
        "p50 of one connection, binary",
        PEERS["bare"].title,
        "≤ 1.25",
        lambda found: found.ratio("mlp-binary-1", "ours", "bare", lambda one: one.p50_ms),
    ),
    *overload("4x"),
]
