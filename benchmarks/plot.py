"""Plots of the findings; runs in an environment with matplotlib alone."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

OURS, OTHERS = "#c0392b", "#7f8c8d"
PANELS = {"mlp-json-64": "JSON, 64 connections", "mlp-binary-64": "Binary, 64 connections",
          "mlp-png-64": "PNG, denoised, 64 connections", "conv-binary-64": "conv, binary, 64 connections"}  # fmt: skip


def serving(found: dict[str, Any]) -> Any:
    """Plot rates: one panel a workload, one bar a server, with the minimum and maximum over the rounds."""
    measures = found["measures"]
    panels = [name for name in PANELS if measures.get(name)]
    figure, axes = plt.subplots(1, max(1, len(panels)), figsize=(3.6 * max(1, len(panels)), 3.4), squeeze=False)
    for axis, name in zip(axes[0], panels, strict=False):
        rates = {peer: [one["rate"] for one in found] for peer, found in measures[name].items() if found}
        order = sorted(rates, key=lambda peer: median(rates[peer]))
        middle = [median(rates[peer]) for peer in order]
        errors = [[m - min(rates[peer]) for peer, m in zip(order, middle, strict=True)],
                  [max(rates[peer]) - m for peer, m in zip(order, middle, strict=True)]]  # fmt: skip
        colours = [OURS if peer.startswith("ours") else OTHERS for peer in order]
        axis.barh(order, middle, xerr=errors, color=colours, capsize=2)
        axis.set_title(PANELS[name], fontsize=10)
        axis.set_xlabel("requests/s")
    return figure


def soak(found: dict[str, Any]) -> Any:
    """Plot resident memory over time; the axis starts at zero."""
    figure, axis = plt.subplots(figsize=(7.2, 3.2))
    minutes, memory = [moment / 60.0 for moment, _ in found["memory"]], [mib for _, mib in found["memory"]]
    axis.plot(minutes, memory, color=OURS)
    for rest in ("before", "after"):
        axis.axhline(found[rest]["memory_mib"], color=OTHERS, linestyle=":")
    axis.set_ylim(0.0, 1.2 * max(memory))
    axis.set_xlabel("minutes under load")
    axis.set_ylabel("resident memory, MiB")
    return figure


def training(found: dict[str, Any]) -> Any:
    """Plot speeds: one panel a workload, one bar a trainer, with the minimum and maximum over the rounds."""
    panels = found["measures"]
    columns = min(4, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, 2.4 * rows), squeeze=False)
    for axis, (name, measures) in zip(axes.flat, panels.items(), strict=False):
        rates = {trainer: [one["rate"] for one in rounds] for trainer, rounds in reversed(measures.items())}
        middle = [median(found) for found in rates.values()]
        errors = [[m - min(found) for found, m in zip(rates.values(), middle, strict=True)],
                  [max(found) - m for found, m in zip(rates.values(), middle, strict=True)]]  # fmt: skip
        colours = [OURS if trainer == "fit" else OTHERS for trainer in rates]
        axis.barh(list(rates), middle, xerr=errors, color=colours, capsize=2)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("images/s")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    return figure


def capacity(found: dict[str, Any]) -> Any:
    """Plot latency over the rate: measured as points, predicted as lines; one panel a model and number of replicas."""
    points = [one for one in found["points"] if one["rate"]]
    names = list(dict.fromkeys(one["model"] for one in points))
    numbers = sorted({one["replicas"] for one in points})
    size = (3.4 * len(numbers), 2.8 * len(names))
    figure, axes = plt.subplots(len(names), len(numbers), figsize=size, squeeze=False)
    for axis, (name, number) in zip(axes.flat, itertools.product(names, numbers), strict=True):
        mine = [one for one in points if (one["model"], one["replicas"]) == (name, number)]
        rates = [one["rate"] for one in mine]
        for percent, colour in (("p50", OURS), ("p99", OTHERS)):
            axis.plot(
                rates, [one[f"predicted_{percent}_ms"] for one in mine], color=colour, label=f"{percent}, predicted"
            )
            measured = [one["measured"][f"served_{percent}_ms"] for one in mine]
            axis.plot(rates, measured, "o", color=colour, label=f"{percent}, measured")
        axis.set_title(f"{name}, {number} replica{'s' if number > 1 else ''}", fontsize=10)
        axis.set_yscale("log")
        axis.set_xlim(left=0.0)
    axes[0, 0].legend(fontsize=7, frameon=False)
    for axis in axes[-1]:
        axis.set_xlabel("requests/s")
    for axis in axes[:, 0]:
        axis.set_ylabel("ms")
    return figure


def roofline(found: dict[str, Any]) -> Any:
    """Plot operations a second over operations a byte, below the roofs that the core's peaks make."""
    figure, axis = plt.subplots(figsize=(8.4, 5.0))
    points, roofs = found["points"], found["roofs"]
    ends = [0.5 * min(one["intensity"] for one in points), 8.0 * max(one["intensity"] for one in points)]
    for kind, peak in roofs.items():
        axis.plot(ends, [peak / 1e9] * 2, color="black", linewidth=1.0)
        axis.annotate(f"{kind}, {peak / 1e9:.0f} GFLOP/s", (ends[1], peak / 1e9), (0, 3), ha="right", fontsize=8,
                      textcoords="offset points")  # fmt: skip
    most = max(roofs.values())
    for (place, bandwidth), style in zip(found["bandwidth"].items(), (":", "--", "-"), strict=False):
        corner = most / bandwidth
        label = f"{place}, {bandwidth / 1e9:.0f} GB/s"
        axis.plot([ends[0], corner], [bandwidth * ends[0] / 1e9, most / 1e9], style, color="black", linewidth=1.0,
                  label=label)  # fmt: skip
    markers = dict(zip(dict.fromkeys(one["name"] for one in points), "osD^v", strict=False))
    sizes = dict(zip(sorted({one["rows"] for one in points}), (5, 8, 11), strict=False))
    for one in points:
        for key, colour in (("alone", OTHERS), ("ours", OURS)):
            axis.plot(one["intensity"], one[key] / 1e9, markers[one["name"]], color=colour, linestyle="none",
                      markersize=sizes[one["rows"]], markeredgecolor="white")  # fmt: skip
    for name, marker in markers.items():
        axis.plot([], [], marker, color="black", markerfacecolor="none", linestyle="none", label=name)
    axis.plot([], [], "s", color=OTHERS, label="onnxruntime alone")
    axis.plot([], [], "s", color=OURS, label="this service, over HTTP")
    axis.plot([], [], " ", label=f"small to large: {', '.join(f'{rows:,}' for rows in sizes)} rows a call")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(*ends)
    axis.set_xlabel("FLOP/byte")
    axis.set_ylabel("GFLOP/s")
    axis.legend(fontsize=8, loc="lower right", frameon=False)
    return figure


def main(kind: str, raw: str, out: str) -> None:
    """Draw one kind of plot from the raw findings."""
    plots = {"capacity": capacity, "roofline": roofline, "serving": serving, "soak": soak, "training": training}
    figure = plots[kind](json.loads(Path(raw).read_text()))
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:])
