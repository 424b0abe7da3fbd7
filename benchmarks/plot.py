"""A plot of the findings; runs in an environment of its own, which has matplotlib and nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

PANELS = {"mlp-json-64": "JSON, 64 connections", "mlp-binary-64": "Binary, 64 connections",
          "mlp-png-64": "PNG, 64 connections", "conv-binary-64": "conv, binary, 64 connections"}  # fmt: skip


def main(raw: str, out: str) -> None:
    """One panel a workload, one bar a server, with the least and the most of the rounds."""
    measures = json.loads(Path(raw).read_text())["measures"]
    panels = [name for name in PANELS if measures.get(name)]
    figure, axes = plt.subplots(1, max(1, len(panels)), figsize=(3.6 * max(1, len(panels)), 3.4), squeeze=False)
    for axis, name in zip(axes[0], panels, strict=False):
        rates = {peer: [one["rate"] for one in found] for peer, found in measures[name].items() if found}
        order = sorted(rates, key=lambda peer: median(rates[peer]))
        middle = [median(rates[peer]) for peer in order]
        errors = [[m - min(rates[peer]) for peer, m in zip(order, middle, strict=True)],
                  [max(rates[peer]) - m for peer, m in zip(order, middle, strict=True)]]  # fmt: skip
        colours = ["#c0392b" if peer == "ours" else "#7f8c8d" for peer in order]
        axis.barh(order, middle, xerr=errors, color=colours, capsize=2)
        axis.set_title(PANELS[name], fontsize=10)
        axis.set_xlabel("requests/s")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
