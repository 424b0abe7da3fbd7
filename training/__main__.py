"""The trainer's command line: `python -m training`, also installed as `vae-train`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from types import FrameType

import torch

from training import pipeline
from training.config import load
from training.datasets.mnist import download
from training.errors import TrainingError
from training.experiments import FIGURES, restoration_report
from training.experiments.calibrate import Plan as Calibration
from training.experiments.calibrate import calibrate
from training.experiments.oracle import score
from training.experiments.restore import Plan, compare
from training.experiments.separate import Plan as Separation
from training.experiments.separate import separate
from training.processes import ALONE, Processes, joined

INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 when done, 1 with one line where it cannot be, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell's background jobs start with it ignored
        signal.signal(number, _interrupt)
    try:
        options.command(options)
    except TrainingError as error:
        print(f"vae-train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vae-train: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return INTERRUPTED
    return 0


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vae-train", description="Train variational auto-encoders and export them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    fit = _run_command(commands, "fit", "train, evaluate and export one run; an interrupted one is resumed", _fit)
    evaluate = _run_command(commands, "evaluate", "print what a trained run is worth, in nats per image", _evaluate)
    export = _run_command(commands, "export", "write a trained run as a model version", _export)
    for command in (fit, export):
        command.add_argument("--out", type=Path, default=Path("models"), help="model repository (%(default)s)")
        command.add_argument("--replace", action="store_true", help="overwrite the version if it exists")
    fit.add_argument("--epochs", type=int, help="instead of the TOML's; a finished run goes on where there are more")
    fit.add_argument("--restoration-epochs", type=int, help="the same for the recognition model of corrupted images")
    fit.add_argument("--fresh", action="store_true", help="discard the run's checkpoints first")
    for command in (fit, evaluate, export):
        command.add_argument("--draws", type=int, help="importance samples an image, instead of the TOML's")
        command.add_argument("--images", type=int, help="evaluate on a seeded random subset of the test images")
    figure = commands.add_parser("figure", help="repeat a figure of the paper; an interrupted one is resumed")
    figure.add_argument("number", choices=FIGURES, help="of the figure; F is of appendix F, which has none")
    figure.add_argument("--data", type=Path, default=Path("data"), help="where the data sets lie (%(default)s)")
    figure.add_argument("--runs", type=Path, default=Path("runs"), help="folder for checkpoints (%(default)s)")
    figure.add_argument("--out", type=Path, default=Path("docs/results"), help="for PNG and CSV (%(default)s)")
    figure.add_argument("--samples", type=lambda text: int(float(text)), default=10_000_000, help="seen by every curve")
    figure.add_argument("--only", default="*", help="pattern of the curves to train, such as mnist-20-*")
    figure.add_argument("--threads", type=int, help="CPU threads (as many as cores are free)")
    figure.set_defaults(command=_figure)
    oracle = commands.add_parser("oracle", help="score the weights that the paper's first author published")
    oracle.add_argument("--data", type=Path, default=Path("data"), help="where the data sets lie (%(default)s)")
    oracle.add_argument("--runs", type=Path, default=Path("runs"), help="folder for checkpoints (%(default)s)")
    oracle.add_argument("--out", type=Path, default=Path("docs/results"), help="for oracle.json (%(default)s)")
    oracle.add_argument("--draws", type=int, default=500, help="importance samples an image (%(default)s)")
    oracle.add_argument("--threads", type=int, help="CPU threads (as many as cores are free)")
    oracle.set_defaults(command=_oracle)
    restore = _asking_command(commands, "restore", "put a service's restored images beside those of other methods")
    restore.add_argument(
        "--unet-epochs", type=int, help="passes in which the rival U-Net is trained (the data set's own)"
    )
    restore.add_argument("--tasks", nargs="+", default=["*"], help="patterns of the tasks, such as 'Gaussian*'")
    restore.add_argument("--methods", nargs="+", default=["*"], help="patterns of the methods, such as 'ours*'")
    restore.set_defaults(command=_restore)
    widen = _asking_command(commands, "calibrate", "fit the deviations that a service tells to held-out images")
    widen.set_defaults(command=_calibrate)
    apart = _asking_command(commands, "separate", "measure how well a service's score tells images from other pictures")
    apart.add_argument("--draws", type=int, default=16, help="of the posterior, for each score (%(default)s)")
    apart.set_defaults(command=_separate)
    for command in (restore, widen, apart):
        command.add_argument("--model", default="*", help="pattern of the models' names (%(default)s)")
    for command in (restore, apart):
        command.add_argument("--out", type=Path, default=Path("docs/results"), help="for the page (%(default)s)")
    fetch = commands.add_parser("download", help="fetch a data set")
    fetch.add_argument("dataset", choices=["mnist"])
    fetch.add_argument("--data", type=Path, required=True, help="directory to fetch into")
    fetch.set_defaults(command=lambda options: download(options.data))
    return parser


def _run_command(commands, name: str, help: str, command) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]  # noqa: A002, ANN001
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="the run's TOML")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where the data set lies (%(default)s)")
    parser.add_argument("--run", type=Path, help="folder for checkpoints and log (runs/<name>)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads (as many as cores are free)")
    parser.set_defaults(command=command)
    return parser


def _asking_command(commands, name: str, help: str) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]  # noqa: A002, ANN001
    """A command that asks a service over HTTP."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help)
    parser.add_argument("--url", help="of the service to ask; without it one is started, and ended afterwards")
    parser.add_argument("--models", type=Path, default=Path("models"), help="what that one serves (%(default)s)")
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="where the data set lies, as for fit (%(default)s)"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for what is kept (%(default)s)")
    parser.add_argument("--images", type=int, default=200, help="images of each data set (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the images and of what is done to them (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    return parser


def _figure(options: argparse.Namespace) -> None:
    pipeline.threads(options.threads)
    folder = options.runs / f"figure{options.number}"
    FIGURES[options.number](options.data, folder, options.out, options.samples, options.only)
    print(f"wrote the numbers as CSV and the picture as PNG into {options.out}")


def _oracle(options: argparse.Namespace) -> None:
    pipeline.threads(options.threads)
    print(json.dumps(score(options.data, options.runs / "oracle", options.out, options.draws), indent=2))


def _restore(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    plan = Plan(
        options.data,
        options.runs / "restore",
        options.url,
        options.models,
        options.images,
        options.seed,
        options.unet_epochs,
        options.model,
        tuple(options.tasks),
        tuple(options.methods),
    )
    print(f"wrote {restoration_report.write(compare(plan), options.out)}")


def _calibrate(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    plan = Calibration(
        options.data,
        options.runs / "calibrate",
        options.url,
        options.models,
        options.images,
        options.seed,
        options.model,
    )
    for path in calibrate(plan):
        print(f"wrote {path}")


def _separate(options: argparse.Namespace) -> None:
    plan = Separation(
        options.data, options.url, options.models, options.model, options.images, options.seed, options.draws
    )
    print(f"wrote {separate(plan, options.out)}")


def _workshop(options: argparse.Namespace, processes: Processes = ALONE) -> pipeline.Workshop:
    pipeline.threads(options.threads)
    evaluation = {"draws": options.draws, "images": options.images}
    epochs = {"epochs": getattr(options, "epochs", None)}
    restoration_epochs = {"epochs": getattr(options, "restoration_epochs", None)}
    run = load(
        options.config,
        {"evaluation": evaluation, "train": epochs, "restoration": {"train": restoration_epochs}},
    )
    folder = options.run or Path("runs") / run.name
    return pipeline.Workshop.open(run, options.data, folder, pipeline.device(options.device), processes)


def _fit(options: argparse.Namespace) -> None:
    with joined(pipeline.device(options.device)) as processes:
        workshop = _workshop(options, processes)
        if options.fresh and processes.first:
            workshop.clear()
        processes.wait()
        written = workshop.fit(options.out, replace=options.replace)
        if processes.first:
            print(f"wrote {written}")


def _evaluate(options: argparse.Namespace) -> None:
    print(json.dumps(_workshop(options).evaluate(), indent=2))


def _export(options: argparse.Namespace) -> None:
    print(f"wrote {_workshop(options).export(options.out, replace=options.replace)}")


if __name__ == "__main__":
    sys.exit(main())
