"""Protocol of the trainers: each line of standard input starts one training, each output line has its seconds."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

SHAPE = (1, 28, 28)


@dataclass(frozen=True)
class Job:
    """Job of a trainer: a run's TOML as a dictionary, images (uint8, saved by torch), threads, workers, a folder."""

    run: dict[str, Any]
    images: str
    threads: int
    workers: int
    folder: str

    @property
    def batch_size(self) -> int:
        """Images in a minibatch, M."""
        return self.run["train"]["batch_size"]

    @property
    def epochs(self) -> int:
        """Number of epochs of one training."""
        return self.run["train"]["epochs"]

    @property
    def learning_rate(self) -> float:
        """Learning rate of Adam."""
        return self.run["train"]["learning_rate"]

    @property
    def latent_dim(self) -> int:
        """Dimension of z."""
        return self.run["model"]["latent_dim"]

    @property
    def network(self) -> dict[str, Any]:
        """Settings of the network, of `training.networks`."""
        return self.run["model"]["network"]

    def load(self) -> Tensor:
        """Load the images, (n, 1, 28, 28)."""
        return torch.load(self.images)

    def write(self, path: Path) -> None:
        """Write the job as JSON."""
        path.write_text(json.dumps(asdict(self)))


def answer(prepare: Callable[[Job, Tensor], Callable[[], None]]) -> None:
    """Prepare (not timed) and train (timed) for each line of standard input."""
    said = claim_stdout()
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(job.threads)
    images = job.load()
    for _ in sys.stdin:
        torch.manual_seed(0)
        train = prepare(job, images)
        wall, processor = time.perf_counter(), processor_s()
        train()
        print(time.perf_counter() - wall, processor_s() - processor, file=said, flush=True)


def claim_stdout() -> TextIO:
    """Reserve standard output for the results: redirect what trainers print to standard error."""
    said = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return said


def processor_s() -> float:
    """CPU time of this process and its children, ended ones included."""
    times = os.times()
    ended = times.user + times.system + times.children_user + times.children_system
    return ended + sum(child_s(child.pid) for child in multiprocessing.active_children() if child.pid)


def child_s(pid: int) -> float:
    """CPU time of a running child."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system = map(int, fields[11:13])  # proc(5) counts from the field after the name, which may hold anything
    return (user + system) / os.sysconf("SC_CLK_TCK")
