"""Compares the trainer with others (`make bench-training`). In each round all train the same network in turn."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from contextlib import ExitStack, suppress
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from benchmarks import speeds
from benchmarks.environments import HERE, InstallFailed, ignored_home, prepare
from benchmarks.servers import end_when_asked
from benchmarks.speeds import TRAINERS, WORKLOADS, Speed, Speeds, Trainer, Workload
from benchmarks.trainers.job import SHAPE, Job
from training.config import load
from training.data import Mnist


class Lost(Exception):
    """A trainer ended; the message is its last line."""


class Asked:
    """Process of a trainer, which trains once for each request."""

    def __init__(self, python: str, trainer: Trainer, job: Job, home: Path) -> None:
        told, self.log = home / f"{trainer.name}.json", home / f"{trainer.name}.log"
        job.write(told)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, "-m", f"benchmarks.trainers.{trainer.program}", str(told)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": str(job.threads)},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def train(self, images: int) -> Speed:
        """Train once; `images` is the number of images it processes.

        Raises: Lost.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):  # why it ended is in its log
            print(file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline().split()
        if not answer:
            raise Lost((self.log.read_text().strip().splitlines() or ["it said nothing"])[-1][:200])
        wall_s, processor_s = map(float, answer)
        return Speed(images / wall_s, images / processor_s)


def main() -> None:
    """Install, measure, write docs/results/training-speed.md and .png."""
    options = parse()
    end_when_asked()
    home = ignored_home() / "training"
    home.mkdir(exist_ok=True)
    torch.save(mnist(options.data) if options.data else synthetic(), home / "images.pt")
    found = Speeds(
        {"rounds": options.rounds, "threads": options.threads}, "MNIST" if options.data else "synthetic images"
    )
    pythons = environments(found)
    for workload in WORKLOADS:
        if any(fnmatch(workload.name, pattern) for pattern in options.workloads):
            measure(workload, pythons, options, home, found)
    raw = home / "speeds.json"
    raw.write_text(json.dumps(asdict(found)))
    speeds.write(found, raw, options.out)


def parse() -> argparse.Namespace:
    """Parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with MNIST; without it, synthetic images of its shape")
    parser.add_argument("--workloads", type=lambda text: text.split(","), default=["*"], help="patterns such as mlp-*")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch, in every trainer")
    parser.add_argument("--out", type=Path, default=Path("docs/results/training-speed.md"))
    return parser.parse_args()


def mnist(root: Path) -> Tensor:
    """The first training images."""
    return Mnist(dataset="mnist").load(root).train[: speeds.IMAGES].clone()


def synthetic() -> Tensor:
    """Random blurred discs in uint8, mostly black like digits."""
    generator = torch.Generator().manual_seed(0)
    _, height, width = SHAPE
    centres = 4.0 + 20.0 * torch.rand(speeds.IMAGES, 2, 1, 1, generator=generator)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None, :]
    distances = (rows - centres[:, 0]).square() + (columns - centres[:, 1]).square()
    return (255.0 * torch.exp(-distances / 20.0)).to(torch.uint8).unsqueeze(1)


def environments(found: Speeds) -> dict[str, str]:
    """Python executable of every trainer that can be installed; a note on the others."""
    pythons = {}
    for trainer in TRAINERS:
        requirements = HERE / "trainers" / f"{trainer.program}.txt"
        try:
            pythons[trainer.name] = prepare(trainer.program, requirements) if requirements.exists() else sys.executable
        except InstallFailed as error:
            found.note(f"{trainer.title}: not installed ({error})")
    return pythons


def measure(
    workload: Workload, pythons: dict[str, str], options: argparse.Namespace, home: Path, found: Speeds
) -> None:
    """Warm every trainer up, then run all in turn, in a new order each round."""
    images = home / "images.pt"
    if workload.images < speeds.IMAGES:
        torch.save(torch.load(images)[: workload.images].clone(), images := home / "fewer.pt")
    with ExitStack() as stack:
        running: dict[str, Asked] = {}
        trainers = [one for one in TRAINERS if one.name in pythons and one.name in workload.trainers]
        for trainer in trainers:
            job = Job(settings(workload, trainer), str(images), options.threads, trainer.workers, str(home / "run"))
            running[trainer.name] = stack.enter_context(Asked(pythons[trainer.name], trainer, job, home))
            ask(trainer, workload, running, found)
        for turn in range(options.rounds):
            start = turn % len(trainers)
            for trainer in [*trainers[start:], *trainers[:start]]:
                if (speed := ask(trainer, workload, running, found)) is not None:
                    found.add(workload.name, trainer.name, speed)
                    print(f"{workload.title:44} {trainer.title:32} {speed.rate:9,.0f} images/s", flush=True)


def ask(trainer: Trainer, workload: Workload, running: dict[str, Asked], found: Speeds) -> Speed | None:
    """Run one training; a trainer that ended becomes a note, once."""
    if trainer.name not in running:
        return None
    try:
        return running[trainer.name].train(workload.images * trainer.epochs)
    except Lost as error:
        found.note(f"{trainer.title}, {workload.title}: broke off ({error})")
        del running[trainer.name]
        return None


def settings(workload: Workload, trainer: Trainer) -> dict[str, Any]:
    """The run's TOML with the number of epochs that is timed."""
    run = load(HERE.parent / workload.config).model_dump(mode="json", exclude_unset=True) if workload.config else {}
    for table, changes in workload.changes.items():
        run[table] = {**run.get(table, {}), **changes}
    for table in workload.dropped:
        run["model"].pop(table, None)
    run.pop("restoration", None)
    run["train"] = {"learning_rate": 1e-3, "batch_size": workload.batch_size, **run["train"], "epochs": trainer.epochs}
    return {"name": "speed", "data": {"dataset": "mnist"}, **run}


if __name__ == "__main__":
    main()
