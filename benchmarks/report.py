"""From findings to docs/results/serving.md and its plot."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median

from benchmarks.environments import HERE, InstallFailed, prepare, version
from benchmarks.measure import Measure
from benchmarks.roster import PEERS
from benchmarks.workloads import OPEN, WORKLOADS, Workload

ALONE = "alone"
DASH = "-"
CLAIMS = [
    ("JSON, 64 connections", "mlp-json-64", "triton", 2.5),
    ("JSON, 64 connections", "mlp-json-64", "mlserver", 5.5),
    ("JSON, 64 connections", "mlp-json-64", "bentoml", 13.0),
    ("JSON, 64 connections", "mlp-json-64", "litserve", 16.0),
    ("JSON, 64 connections", "mlp-json-64", "ray", 40.0),
    ("binary, 64 connections", "mlp-binary-64", "triton", 4.5),
    ("binary, 64 connections", "mlp-binary-64", "bare", 1.5),
    ("conv, binary, 64 connections", "conv-binary-64", "bare", 1.3),
    ("PNG, 64 connections", "mlp-png-64", "bentoml", 4.0),
    ("1,024 rows as npy", "mlp-npy1024-1", ALONE, 0.8),
]
"""What is asked of the service's rate, as a multiple of another's in the same run."""


RATES = "Median over the rounds, the least and the most, and the multiple of bare; alone is onnxruntime, no server."
OPEN_LOOPS = (
    "Requests arrive at random, at a multiple of what the same server did with 16 connections in the same round. Half "
    "load: p50 / p99 in ms, counted from when a request was due. Overload: right answers within a second of that, as "
    "a share of the capacity; the p99 of those; the share refused with 503, the p99 of refusals; the share that failed."
)


@dataclass
class Findings:
    """Everything one run found, a list entry a round; `measures` by workload, then by peer."""

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

    def note(self, text: str) -> None:
        """Why something is missing; said at once and in the report."""
        print(text, flush=True)
        self.notes.append(text)


def write(found: Findings, raw: Path, out: Path) -> None:
    """The page at `out`, and its plot beside it, made in an environment with matplotlib."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(found, out.with_suffix(".png").name))
    try:
        python = prepare("plot", HERE / "plot.txt")
        subprocess.run([python, str(HERE / "plot.py"), str(raw), str(out.with_suffix(".png"))], check=True)
    except (InstallFailed, subprocess.CalledProcessError) as error:
        print(f"no plot: {error}", file=sys.stderr)
    print(f"wrote {out}")


def page(found: Findings, plot: str) -> str:
    """The whole page."""
    names = [name for name in PEERS if name in found.start_s]
    closed = [one for one in WORKLOADS if one.load not in OPEN and one.name in found.measures]
    opened = [one for one in WORKLOADS if one.load in OPEN and one.name in found.measures]
    parts = [
        "# The service beside its peers",
        setting(found),
        f"![Requests a second]({plot})",
        "## What was asked of it",
        asked(found),
        "## Requests a second",
        RATES,
        matrix(found, names, closed, rate_cell),
        "## Latency, ms",
        "Half of all answers, and 99 of 100, came within these. Closed loop.",
        matrix(found, names, closed, latency_cell),
        "## Open loop",
        OPEN_LOOPS,
        matrix(found, names, opened, open_cell),
        "## Start and memory",
        start_and_memory(found, names),
        "## Notes",
        "\n".join(f"- {note}" for note in notes(found, names)),
    ]
    return "\n\n".join(parts) + "\n"


def setting(found: Findings) -> str:
    """Machine and settings."""
    return (
        f"{processor()}, {os.cpu_count()} CPUs shared by server and load; {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}. {found.settings['rounds']} rounds, {found.settings['seconds']} s a load; "
        "every round starts each server anew, one at a time, in another order. One worker a server, one thread for "
        "onnxruntime, connections kept alive, all on loopback. Closed loops come from wrk (one thread). Every server "
        "runs the same two ONNX models: mlp is 784-500-20-500-784, conv the residual network of "
        "`training/architectures/conv.py`; the request is one 28 x 28 image unless rows are named, the operation "
        "reconstruct. `make bench` makes this page."
    )


def processor() -> str:
    """What /proc/cpuinfo calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def asked(found: Findings) -> str:
    """The claims and what became of them."""
    lines = ["| | beside | asked | found |", "|---|---|--:|--:|"]
    for title, workload, other, least in CLAIMS:
        ratio = ratio_of(found, workload, "ours", other)
        name = "onnxruntime alone" if other == ALONE else PEERS[other].title
        lines.append(f"| {title} | {name} | ≥ {least:g} x | {f'{ratio:.2f} x' if ratio else DASH} |")
    mine, bare = (found.of("mlp-binary-1", name) for name in ("ours", "bare"))
    if mine and bare:
        ratio = median(one.p50_ms for one in mine) / median(one.p50_ms for one in bare)
        lines.append(f"| p50 of one connection, binary | {PEERS['bare'].title} | ≤ 1.25 x | {ratio:.2f} x |")
    return "\n".join(lines)


def ratio_of(found: Findings, workload: str, name: str, other: str) -> float | None:
    """One's rate over another's, medians of the same run."""
    mine, theirs = found.of(workload, name), found.of(workload, other)
    if not mine or not theirs:
        return None
    below = median(one.rate for one in theirs)
    return median(one.rate for one in mine) / below if below else None


def matrix(
    found: Findings, names: list[str], workloads: list[Workload], cell: Callable[[Findings, Workload, str], str]
) -> str:
    """Workloads down, servers across."""
    lines = ["| | " + " | ".join(PEERS[name].title for name in names) + " |", "|---|" + "--:|" * len(names)]
    for one in workloads:
        cells = [cell(found, one, name) if found.of(one.name, name) else DASH for name in names]
        lines.append(f"| {one.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rate_cell(found: Findings, workload: Workload, name: str) -> str:
    """Median, spread, multiple of bare."""
    measures = found.of(workload.name, name)
    rates = [one.rate for one in measures]
    failures = sum(one.failures for one in measures)
    lines = [f"**{number(median(rates))}**", f"{number(min(rates))}-{number(max(rates))}"]
    for other, title in (("bare", "x"), (ALONE, "x alone")):
        ratio = ratio_of(found, workload.name, name, other) if name != other else None
        lines += [f"{ratio:.2f} {title}"] if ratio else []
    return "<br>".join(lines + ([f"{failures} failed"] if failures else []))


def number(value: float) -> str:
    """Three or four digits that mean something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def latency_cell(found: Findings, workload: Workload, name: str) -> str:
    """p50 / p99."""
    measures = found.of(workload.name, name)
    return " / ".join(
        f"{median(values):.2f}" for values in ([m.p50_ms for m in measures], [m.p99_ms for m in measures])
    )


def open_cell(found: Findings, workload: Workload, name: str) -> str:
    """Of half load the latencies, of overload the goodput and what became of the others."""
    measures = found.of(workload.name, name)
    offered = median(one.offered for one in measures)
    seconds = found.settings["seconds"]
    failed = median(one.failures for one in measures) / max(1.0, offered * seconds)
    if workload.load == "half":
        return latency_cell(found, workload, name) + (f"<br>{failed:.1%} failed" if failed else "")
    capacity = offered / OPEN[workload.load]
    refused = median(one.refused for one in measures) / max(1.0, offered * seconds)
    lines = [f"**{median(one.rate for one in measures) / capacity:.2f}** of {number(capacity)}/s"]
    lines += [f"p99 {median(one.p99_ms for one in measures):.0f} ms"]
    if refused:
        lines += [f"{refused:.0%} refused in {median(one.refused_p99_ms for one in measures):.0f} ms"]
    return "<br>".join([*lines, f"{failed:.0%} failed"])


def start_and_memory(found: Findings, names: list[str]) -> str:
    """Seconds to the first answer; resident memory after the loads."""
    lines = ["| | version | first answer, s | memory, MiB |", "|---|---|--:|--:|"]
    for name in names:
        package = PEERS[name].package
        number_ = version(HERE / "peers" / f"{name}.txt", package) if package else metadata.version("onnxruntime")
        told = number_ if package else f"onnxruntime {number_}"
        cells = " | ".join(spread(values.get(name, [])) for values in (found.start_s, found.memory_mib))
        lines.append(f"| {PEERS[name].title} | {told} | {cells} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Median (least-most)."""
    if not values:
        return DASH
    digits = 0 if median(values) >= 20 else 1
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def notes(found: Findings, names: list[str]) -> list[str]:
    """Why there are dashes, and what went wrong."""
    told = [f"{PEERS[name].title}, {form}: {why}; a dash." for name in names for form, why in PEERS[name].lacks.items()]
    return [
        "Memory is resident memory of all of a server's processes, what they share counted once, after its loads.",
        *told,
        *dict.fromkeys(found.notes),
    ]
