"""Writes docs/results/serving.md and its plot from a run's findings."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median

from benchmarks import pages
from benchmarks.claims import CLAIMS
from benchmarks.environments import HERE, version
from benchmarks.findings import ALONE, Findings
from benchmarks.roster import PEERS
from benchmarks.workloads import OPEN, WORKLOADS, Workload

DASH = "-"
RATES = "Median over the rounds, the least and the most, and the multiple of bare; alone is onnxruntime, no server."
OPEN_LOOPS = (
    "Requests arrive at random, at a multiple of what the same server did with 16 connections in the same round. Half "
    "load: p50 / p99 in ms, counted from when a request was due. Overload: right answers within a second of that, as "
    "a share of the capacity; the p99 of those; the share refused with 503, the p99 of refusals; the share that failed."
)


def write(found: Findings, raw: Path, out: Path) -> None:
    """Write the page at `out` and its plot beside it."""
    pages.write(page(found, out.with_suffix(".png").name), out, "serving", raw)


def page(found: Findings, plot: str) -> str:
    """Text of the page."""
    names = [name for name in PEERS if name in found.start_s]
    closed = [one for one in WORKLOADS if one.load not in OPEN and one.name in found.measures]
    opened = [one for one in WORKLOADS if one.load in OPEN and one.name in found.measures]
    parts = [
        "# The service beside its peers",
        setting(found),
        f"![Requests a second]({plot})",
        "## What was asked of it",
        "\n".join(["| | beside | asked | found |", "|---|---|--:|--:|", *(claim.row(found) for claim in CLAIMS)]),
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
    """Paragraph on the machine and the settings."""
    return (
        f"{pages.machine()}. Server and load generator share this machine. There were "
        f"{found.settings['rounds']} rounds of {found.settings['seconds']} s for each load; every round starts each "
        "server anew, one at a time, in a new order. Unless a row says otherwise, a server has one worker and one "
        "thread for onnxruntime. Connections are kept open and stay on loopback. wrk (one thread) makes the loads with "
        "a fixed number of connections. Every server runs the same two ONNX models: mlp has layers of "
        "784-500-20-500-784 units, conv is the residual network of `training/networks/conv.py`. A request has one "
        "28 x 28 image unless the row names a number of rows. A PNG is denoised at level 0.25, and the answer is a "
        "PNG. Every other request is a reconstruction, answered in the request's format. Before every round each "
        "server's answer is compared with onnxruntime's; servers that differ by more than 1e-3 are left out. "
        "`make bench` makes this page."
    )


def matrix(
    found: Findings, names: list[str], workloads: list[Workload], cell: Callable[[Findings, Workload, str], str]
) -> str:
    """Table with a row a workload and a column a server."""
    lines = ["| | " + " | ".join(PEERS[name].title for name in names) + " |", "|---|" + "--:|" * len(names)]
    for one in workloads:
        cells = [cell(found, one, name) if found.of(one.name, name) else DASH for name in names]
        lines.append(f"| {one.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rate_cell(found: Findings, workload: Workload, name: str) -> str:
    """Cell: median, range, multiple of bare."""
    measures = found.of(workload.name, name)
    rates = [one.rate for one in measures]
    failures = sum(one.failures for one in measures)
    lines = [f"**{number(median(rates))}**", f"{number(min(rates))}-{number(max(rates))}"]
    for other, title in (("bare", "x"), (ALONE, "x alone")):
        ratio = found.ratio(workload.name, name, other) if name != other else None
        lines += [f"{ratio:.2f} {title}"] if ratio else []
    return "<br>".join(lines + ([f"{failures} failed"] if failures else []))


def number(value: float) -> str:
    """Format with three or four significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def latency_cell(found: Findings, workload: Workload, name: str) -> str:
    """Cell: p50 / p99."""
    measures = found.of(workload.name, name)
    return " / ".join(
        f"{median(values):.2f}" for values in ([m.p50_ms for m in measures], [m.p99_ms for m in measures])
    )


def open_cell(found: Findings, workload: Workload, name: str) -> str:
    """Cell: latencies at half load; goodput, refusals and failures under overload."""
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
    """Table of the seconds to the first answer and of resident memory after the loads."""
    lines = ["| | version | first answer, s | memory, MiB |", "|---|---|--:|--:|"]
    for name in names:
        package = PEERS[name].package
        number_ = version(HERE / "peers" / f"{name}.txt", package) if package else metadata.version("onnxruntime")
        told = number_ if package else f"onnxruntime {number_}"
        cells = " | ".join(spread(values.get(name, [])) for values in (found.start_s, found.memory_mib))
        lines.append(f"| {PEERS[name].title} | {told} | {cells} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Format as median (minimum-maximum)."""
    if not values:
        return DASH
    digits = 0 if median(values) >= 20 else 1
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def notes(found: Findings, names: list[str]) -> list[str]:
    """Notes: why cells have dashes, and what failed."""
    told = [f"{PEERS[name].title}, {form}: {why}; a dash." for name in names for form, why in PEERS[name].lacks.items()]
    return [
        "Memory is resident memory of all of a server's processes, what they share counted once, after its loads.",
        *told,
        *dict.fromkeys(found.notes),
    ]
