"""Workloads and trainers of `make bench-training`, a run's findings, and its page docs/results/training-speed.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import pages
from benchmarks.environments import HERE, version

IMAGES = 40_000
OURS = "fit"


@dataclass(frozen=True)
class Trainer:
    """One program of benchmarks/trainers/, and its number of epochs, chosen so that all take equally long."""

    name: str
    title: str
    program: str
    epochs: int = 1
    workers: int = 0


@dataclass(frozen=True)
class Workload:
    """One workload: a run's TOML or its tables, and the trainers that take part."""

    name: str
    title: str
    trainers: tuple[str, ...]
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    config: str | None = None
    dropped: tuple[str, ...] = ()
    batch_size: int = 100
    images: int = IMAGES


@dataclass(frozen=True)
class Speed:
    """Images a second of wall-clock time and of CPU time, child processes included."""

    rate: float
    processor_rate: float


@dataclass
class Speeds:
    """Measurements, one list entry a round, by workload, then by trainer."""

    settings: dict[str, int]
    data: str
    measures: dict[str, dict[str, list[Speed]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, workload: str, trainer: str, speed: Speed) -> None:
        """Add one round."""
        self.measures.setdefault(workload, {}).setdefault(trainer, []).append(speed)

    def note(self, text: str) -> None:
        """Print why a measurement is missing, and keep it for the page."""
        print(text, flush=True)
        self.notes.append(text)

    def ratios(self, workload: str, trainer: str, figure: Callable[[Speed], float]) -> list[float]:
        """Ratios of this project's figure to another's, round by round."""
        found = self.measures.get(workload, {})
        return [figure(a) / figure(b) for a, b in zip(found.get(OURS, []), found.get(trainer, []), strict=False)]

    def best_loader(self, workload: str) -> str:
        """Name of the DataLoader with the fastest number of workers."""
        found = self.measures.get(workload, {})
        return max(LOADERS, key=lambda name: median(one.rate for one in found[name]) if name in found else 0.0)


LOADERS = ("loader0", "loader1", "loader2")
TRAINERS = [
    Trainer(OURS, "this project's fit", "fit", epochs=2),
    Trainer("bare", "bare PyTorch loop", "bare", epochs=2),
    Trainer("pythae", "pythae", "pythae"),
    *(
        Trainer(name, f"DataLoader, {workers} workers", "loader", workers=workers)
        for workers, name in enumerate(LOADERS)
    ),
]
TITLES = {trainer.name: trainer.title for trainer in TRAINERS}
EVERYONE = tuple(TITLES)


def mlp(hidden: list[int], latent_dim: int, batch_size: int, precision: str = "float32") -> Workload:
    """Tables of a run with the paper's tanh network; only this project and the bare loop support lower precision."""
    widths = "-".join(map(str, [784, *hidden, latent_dim]))
    network = {"architecture": "mlp", "hidden": hidden}
    changes: dict[str, dict[str, Any]] = {
        "model": {"latent_dim": latent_dim, "network": network},
        "train": {"precision": precision},
    }
    name, title = f"mlp-{hidden[0]}-{batch_size}-{precision}", f"{widths}, batch {batch_size}, {precision}"
    return Workload(name, title, EVERYONE, changes, batch_size=batch_size)


FLOW = "training/configs/mnist.toml"
PLAIN: dict[str, dict[str, Any]] = {"train": {"optimiser": "adam", "precision": "float32"}}
"""Settings for trainers without Muon and learned priors."""
WORKLOADS = [
    mlp([500], 20, 100),
    mlp([500], 20, 100, "bfloat16"),
    mlp([200, 200], 50, 500),
    mlp([200, 200], 50, 500, "bfloat16"),
    Workload("conv-100", "conv, Adam, batch 100", (OURS, "bare"), PLAIN, FLOW, dropped=("prior",), images=1_000),
    Workload("flow-100", "conv, as its TOML says, batch 100", (OURS, "bare"), config=FLOW, images=1_000),
]
ASKED = {"bare": 0.9, "pythae": 3.0, "loader": 3.0}


RATIOS = (
    "This project's images a second over the other's, round by round: the median, the least, the most; by the clock, "
    "and by processor time, which depends less on who else uses the machine."
)
FIT = (
    "fit is the whole of `training.loop.trainer.train`: keyed noise, a moving average of the weights, clipping, the "
    "check for what is no number, log, progress, and the checkpoint at its end, which these short trainings pay more "
    "often than once a minute."
)
BARE = (
    "The bare loop has the same uint8 tensor, binarisation, layers, layout of memory, precision and (fused) optimiser, "
    "and nothing of the rest."
)
LOWER = (
    "bfloat16 is a setting of this project's runs (`precision`) and of the bare loop here; pythae and the DataLoader's "
    "example train in float32, as they come."
)
PYTHAE = (
    "pythae is its VAE and BaseTrainer around the same layers, on grey levels made float32 beforehand: it does not "
    "binarise, which spares it a draw a pixel."
)
LOADER = (
    "The DataLoader is the usual PyTorch example: torchvision's way of an image (Pillow, `ToTensor`), grey levels, "
    "Adam as it comes. Of 0, 1 and 2 workers the fastest counts; its processor time is that of the workers too."
)
BOUND = (
    "Why not 3 x: profiled on one Zen 4 core, matrix products take half of fit's time at these sizes, at 75 GFLOP/s in "
    "float32 and 160 in bfloat16, which is near what the core can do, and pythae spends as much on them. bfloat16 is "
    "the one way found past that; torch.compile was slower than eager mode."
)


def write(found: Speeds, raw: Path, out: Path) -> None:
    """Write the page at `out` and its plot beside it."""
    pages.write(page(found, out.with_suffix(".png").name), out, "training", raw)


def page(found: Speeds, plot: str) -> str:
    """Text of the page."""
    parts = [
        "# The trainer beside its peers",
        setting(found),
        f"![Images a second]({plot})",
        "## What was asked of it",
        RATIOS,
        claims(found),
        "## Images a second",
        "Median of the rounds, the least and the most.",
        rates(found),
        "## Notes",
        "\n".join(f"- {note}" for note in [FIT, BARE, LOWER, PYTHAE, LOADER, BOUND, *dict.fromkeys(found.notes)]),
    ]
    return "\n\n".join(parts) + "\n"


def setting(found: Speeds) -> str:
    """Paragraph on the machine and the settings."""
    torch, pythae = metadata.version("torch"), version(HERE / "trainers" / "pythae.txt", "pythae")
    return (
        f"{pages.machine()}; torch {torch}, {found.settings['threads']} of its threads; pythae {pythae}. Each of "
        f"{found.settings['rounds']} rounds trains every network anew by each trainer in turn, in another order, on "
        f"{found.data}, {IMAGES:,} of 28 x 28 for the MLPs and {WORKLOADS[-1].images:,} for the others; one training "
        "of each goes before and does not count. conv is the network of `training/configs/mnist.toml`, trained "
        "by Adam in float32 under N(0, I), and as that file says (Muon, bfloat16 where the processor has it, RealNVP "
        "prior). `make bench-training` makes this page."
    )


def claims(found: Speeds) -> str:
    """Table of the ratios, one row for each workload and peer."""
    lines = ["| | beside | asked | found | processor time |", "|---|---|--:|--:|--:|"]
    for workload in WORKLOADS:
        measured = found.measures.get(workload.name, {})
        for peer, least in ASKED.items():
            name = found.best_loader(workload.name) if peer == "loader" else peer
            if name not in measured or OURS not in measured:
                continue
            clock, processor = (
                spread(found.ratios(workload.name, name, figure))
                for figure in (lambda one: one.rate, lambda one: one.processor_rate)
            )
            lines.append(f"| {workload.title} | {TITLES[name]} | ≥ {least:g} x | {clock} | {processor} |")
    return "\n".join(lines)


def spread(ratios: list[float]) -> str:
    """Format as median (minimum-maximum)."""
    return f"**{median(ratios):.2f} x** ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else "-"


def rates(found: Speeds) -> str:
    """Table with a row a workload and a column a trainer."""
    lines = ["| | " + " | ".join(TITLES.values()) + " |", "|---|" + "--:|" * len(TITLES)]
    for workload in WORKLOADS:
        measured = found.measures.get(workload.name, {})
        if measured:
            cells = " | ".join(rate_cell([one.rate for one in measured.get(name, [])]) for name in TITLES)
            lines.append(f"| {workload.title} | {cells} |")
    return "\n".join(lines)


def rate_cell(rates: list[float]) -> str:
    """Cell: median, minimum and maximum."""
    return f"**{median(rates):,.0f}**<br>{min(rates):,.0f}-{max(rates):,.0f}" if rates else "-"
