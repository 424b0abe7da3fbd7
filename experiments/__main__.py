"""The experiments' command line: `python -m experiments`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from experiments.comparisons import restoration_report
from experiments.comparisons.restore import RestoreOptions, compare
from experiments.comparisons.separate import SeparateOptions, separate
from experiments.comparisons.unclean import UncleanOptions, noisy_copies, unclean
from experiments.paper import FIGURES
from experiments.paper.oracle import score
from experiments.photographs import report
from experiments.photographs.cases import measurements
from experiments.photographs.measure import PhotographOptions, measure
from experiments.photographs.sets import SETS
from training import pipeline
from training.cli import asking_command, run


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The command and its options; None reads sys.argv.

    Returns:
        The exit status.
    """
    return run(_parser(), arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vae-experiments", description="Repeat the paper's figures, compare with other methods."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    figure = commands.add_parser("figure", help="repeat a figure of the paper; an interrupted one is resumed")
    figure.add_argument("number", choices=FIGURES, help="number of the figure; F is our experiment for appendix F")
    figure.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets (%(default)s)")
    figure.add_argument("--runs", type=Path, default=Path("runs"), help="folder for checkpoints (%(default)s)")
    figure.add_argument("--out", type=Path, default=Path("docs/results"), help="folder for PNG and CSV (%(default)s)")
    figure.add_argument("--samples", type=lambda text: int(float(text)), default=10_000_000, help="samples a curve")
    figure.add_argument("--only", default="*", help="pattern of the curves to train, such as mnist-20-*")
    figure.add_argument("--threads", type=int, help="CPU threads (the number of idle cores)")
    figure.set_defaults(command=_figure)
    oracle = commands.add_parser("oracle", help="score the weights that the paper's first author published")
    oracle.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets (%(default)s)")
    oracle.add_argument("--runs", type=Path, default=Path("runs"), help="folder for checkpoints (%(default)s)")
    oracle.add_argument("--out", type=Path, default=Path("docs/results"), help="folder for oracle.json (%(default)s)")
    oracle.add_argument("--draws", type=int, default=500, help="importance samples an image (%(default)s)")
    oracle.add_argument("--threads", type=int, help="CPU threads (the number of idle cores)")
    oracle.set_defaults(command=_oracle)
    restore = asking_command(commands, "restore", "compare a service's restored images with those of other methods")
    restore.add_argument("--unet-epochs", type=int, help="epochs of the compared U-Net (the data set's own number)")
    restore.add_argument("--tasks", nargs="+", default=["*"], help="patterns of the tasks, such as 'Gaussian*'")
    restore.add_argument("--methods", nargs="+", default=["*"], help="patterns of the methods, such as 'ours*'")
    restore.add_argument("--set", nargs="+", choices=SETS, dest="sets", help="test sets of photographs and micrographs")
    restore.add_argument(
        "--sigma", nargs="+", type=float, dest="sigmas", default=(), help="with --set: noise in 255ths"
    )
    measured = tuple(measurements())
    restore.add_argument(
        "--measure", nargs="+", choices=measured, dest="asked", default=measured, help="with --set: parts of the page"
    )
    restore.add_argument("--limit", type=int, help="with --set: maximum number of images of each set")
    restore.set_defaults(command=_restore, data=Path(os.environ.get("VAE_DATA") or "data"))
    apart = asking_command(commands, "separate", "measure how well a service's score separates images from others")
    apart.add_argument("--draws", type=int, default=16, help="posterior draws for each score (%(default)s)")
    apart.set_defaults(command=_separate)
    copies = commands.add_parser("noisy-copies", help="write grey copies of photographs with one draw of noise each")
    copies.add_argument("--data", type=Path, required=True, help="folder of clean photographs")
    copies.add_argument("--out", type=Path, required=True, help="folder for the noisy ones, TIFF in floating point")
    copies.add_argument("--sigma", type=float, default=25.0, help="standard deviation; white is 255 (%(default)s)")
    copies.set_defaults(command=_noisy_copies)
    noisy = commands.add_parser("unclean", help="measure a model of images that were never clean, in torch")
    noisy.add_argument("config", type=Path, metavar="CONFIG", help="TOML of the trained run")
    noisy.add_argument("--data", type=Path, required=True, help="its noisy images, as for fit")
    noisy.add_argument("--clean", type=Path, required=True, help="micrographs/ of W2S, or grey photographs")
    noisy.add_argument("--run", type=Path, help="folder of its checkpoints (runs/<name>)")
    noisy.add_argument("--sigma", type=float, help="noise added to photographs; without it the frames of W2S are taken")
    noisy.add_argument("--every", type=int, default=1, help="take every so many images (%(default)s)")
    noisy.add_argument("--noise2void-epochs", type=int, help="also train Noise2Void on --data for so many epochs")
    noisy.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    noisy.set_defaults(command=_unclean)
    for command in (restore, apart):
        command.add_argument("--out", type=Path, default=Path("docs/results"), help="folder for the page (%(default)s)")
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
    if options.sets:
        _restore_photographs(options)
        return
    runs, tasks, methods = options.runs / "restore", tuple(options.tasks), tuple(options.methods)
    plan = RestoreOptions.of(options, runs=runs, tasks=tasks, methods=methods)
    print(f"wrote {restoration_report.write(compare(plan), options.out)}")


def _restore_photographs(options: argparse.Namespace) -> None:
    lists = {name: tuple(getattr(options, name)) for name in ("sets", "sigmas", "asked", "methods")}
    plan = PhotographOptions.of(options, **lists)
    measure(plan)
    for path in report.write(plan, options.out):
        print(f"wrote {path}")


def _separate(options: argparse.Namespace) -> None:
    print(f"wrote {separate(SeparateOptions.of(options), options.out)}")


def _noisy_copies(options: argparse.Namespace) -> None:
    print(f"wrote {noisy_copies(options.data, options.out, options.sigma)} noisy photographs into {options.out}")


def _unclean(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    print(json.dumps(unclean(UncleanOptions.of(options)), indent=2))


if __name__ == "__main__":
    sys.exit(main())
