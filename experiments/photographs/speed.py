"""The sections of photographs.md about time and memory, made of the tables of `python -m benchmarks.photographs`."""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import median

from experiments.photographs.quoted import PSNR, SIGMAS
from experiments.photographs.tables import table

COST = "photographs-cost.csv"
"""Seconds and memory."""
SPEED = "photographs-speed.csv"
"""Seconds of every call, by part."""
SUMMARY = "photographs.csv"
TIMED = ("part", "what", "image", "side", "gflop", "eight_bits", "seconds", "processor_s", "load")
FIRST, NEXT = "## Seconds and memory", "## How"
"""Headings between which the sections stand."""
MEGA = 1e6
SIGMA = 25.0
SETS = {"grey": "BSD68", "colour": "CBSD68"}
PUBLISHED = {
    ("DnCNN, 17 layers", "grey"): "DnCNN-S",
    ("DnCNN, 20 layers", "grey"): "DnCNN-B, blind",
    ("DnCNN, 20 layers", "colour"): "CDnCNN",
    ("DRUNet", "grey"): "DRUNet",
    ("DRUNet", "colour"): "DRUNet",
}
"""Names of the networks' quoted figures."""
GRAPHS = """
onnxruntime alone with one thread on one core: the restoration graphs as they are shipped, the same without their
quantisation, and graphs of [DnCNN](https://arxiv.org/abs/1608.03981) and
[DRUNet](https://arxiv.org/abs/2008.13751), which `benchmarks/denoisers.py` builds from the papers. Their weights are
random, on which speed does not depend; their PSNR is that of the papers (BSD68, CBSD68), photo's is measured. One
image a call; medians of calls in alternating order, in seconds of the processor, because other work ran on the machine.
GFLOP count a multiplication with its addition as two operations, of convolutions alone. A megapixel is 10^6 pixels. In
int8 are the two lower levels of photo's trunk, at a quarter and an eighth of the image's height and width, as they were
trained; the upper level, at half of them, and the heads are in float32. `make bench-photographs` measures all tables
from here on.
"""
SERVICE = """
The whole service on one core, its client too: HTTP, reading and writing the format, checks, `fast`. The PNG has 8 bits
and no option, so the level is estimated. Images of more than 816 x 816 pixels are computed in overlapping tiles.
"""
TILES = """
Two tiles of 816 x 816 pixels, the largest that the service makes, on two cores, in the service's own sessions. Other
work took a part of both cores, so the least seconds tell more than the medians.
"""
LOAD = "Other work ran on the machine; the load average during these calls was"
Row = dict[str, str]


def sections(out: Path) -> list[str]:
    """Lines of the sections.

    Args:
        out: The folder of the page and the tables.
    """
    rows = read(out / SPEED)
    lines = [FIRST, "", *_cost(out / COST), "## Megapixels a second", ""]
    if not rows:
        return [*lines, *_missing()]
    loads = [float(row["load"]) for row in rows]
    beside = f"{LOAD} {min(loads):.1f} to {max(loads):.1f}."
    return [
        *lines,
        *[GRAPHS.strip(), "", *_graphs(rows, out)],
        *["### Over HTTP", "", SERVICE.strip(), "", *_service(rows)],
        *["### Tiles on two cores", "", TILES.strip(), "", *_tiles(rows)],
        *[beside, ""],
    ]


def renew(out: Path) -> None:
    """Replace the sections of the page by those of the present tables; without a page do nothing."""
    page = out / "photographs.md"
    if not page.exists():
        return
    head, found, rest = page.read_text().partition(f"{FIRST}\n")
    _, following, tail = rest.partition(f"{NEXT}\n")
    if not found or not following:
        raise ValueError(f"{page} has no headings '{FIRST}' and '{NEXT}'; make it anew with `experiments restore`")
    page.write_text(head + "\n".join(sections(out)) + "\n" + following + tail)
    print(f"wrote {page}")  # noqa: T201  # called by a command


def _cost(path: Path) -> list[str]:
    rows = read(path)
    if not rows:
        return _missing()
    return table([name.replace("what", "") for name in rows[0]], [list(row.values()) for row in rows])


def _graphs(rows: list[Row], out: Path) -> list[str]:
    """A row for each graph: how well, how much, how fast."""
    found = _grouped(rows, "graphs")
    sides = sorted({side for _, _, side in found})
    head = ["", "image", "PSNR at 25, dB", "GFLOP a megapixel", "of it in int8"]
    for side in sides:
        head += [f"{side} x {side}, s", "megapixels/s", "GFLOP/s"]
    lines = []
    for what, kind in dict.fromkeys((what, kind) for what, kind, _ in found):
        cells = [what, kind, _psnr(what, kind, out)]
        for place, side in enumerate(sides):
            calls = found.get((what, kind, side), [])
            if not calls:
                cells += ["", "", ""]
                continue
            gflop, pixels = float(calls[0]["gflop"]), side * side / MEGA
            seconds = _median(calls, "processor_s")
            if place == 0:
                cells += [f"{gflop / pixels:,.0f}", f"{float(calls[0]['eight_bits']):.0%}"]
            cells += [f"{seconds:.2f}", f"{pixels / seconds:.3f}", f"{gflop / seconds:.0f}"]
        lines.append(cells)
    return table(head, lines)


def _psnr(what: str, kind: str, out: Path) -> str:
    """PSNR at the level 25 on BSD68 or CBSD68: quoted, or for the version's own graphs measured."""
    name = PUBLISHED.get((what, kind))
    if name is not None:
        return f"{PSNR[SETS[kind]][name][SIGMAS.index(SIGMA)]:.2f}"
    place = {"set": SETS[kind], "case": f"Gaussian {SIGMA:g}", "method": f"ours {what}"}
    return next((f"{float(row['psnr_db']):.2f}" for row in read(out / SUMMARY) if place.items() <= row.items()), "")


def _service(rows: list[Row]) -> list[str]:
    """A row for each form and kind of image."""
    found = _grouped(rows, "service")
    sides = sorted({side for _, _, side in found})
    head = ["", "image"]
    for side in sides:
        head += [f"{side} x {side}, s", "megapixels/s", "processor, s"]
    lines = []
    for what, kind in dict.fromkeys((what, kind) for what, kind, _ in found):
        cells = [what, kind]
        for side in sides:
            calls = found.get((what, kind, side), [])
            seconds = _median(calls, "seconds") if calls else 0.0
            rate = f"{side * side / MEGA / seconds:.3f}" if calls else ""
            cells += [f"{seconds:.2f}", rate, f"{_median(calls, 'processor_s'):.2f}"] if calls else ["", "", ""]
        lines.append(cells)
    return table(head, lines)


def _tiles(rows: list[Row]) -> list[str]:
    """A row for each way and kind of image."""
    lines = []
    for (what, kind, _), calls in _grouped(rows, "tiles").items():
        least = min(float(row["seconds"]) for row in calls)
        seconds, processor = (_median(calls, field) for field in ("seconds", "processor_s"))
        lines.append([what, kind, f"{least:.2f}", f"{seconds:.2f}", f"{processor:.2f}"])
    return table(["", "image", "least, s", "median, s", "processor, s"], lines)


def _grouped(rows: list[Row], part: str) -> dict[tuple[str, str, int], list[Row]]:
    """Calls of a part by what was called, kind of image and side."""
    found: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        if row["part"] == part:
            found.setdefault((row["what"], row["image"], int(row["side"])), []).append(row)
    return found


def _median(calls: list[Row], field: str) -> float:
    return median(float(row[field]) for row in calls)


def _missing() -> list[str]:
    return ["Not measured yet: `python -m benchmarks.photographs`.", ""]


def read(path: Path) -> list[Row]:
    """Rows of a table; none if there is no table."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))
