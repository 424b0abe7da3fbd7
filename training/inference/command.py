"""`python -m training advi`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

import torch

from training.inference.advi import Family
from training.inference.posterior import infer


def advi_command(commands: Any) -> None:
    """Add the command; `commands` is argparse's action for subcommands."""
    text = "fit a statistical model, given as a Python file, to a CSV by variational inference (ADVI)"
    parser: argparse.ArgumentParser = commands.add_parser("advi", help=text, description=text)
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="Python file with `parameters` and `log_joint`; it is run as your code",
    )
    parser.add_argument("csv", type=Path, metavar="CSV", help="the data: a line of column names, then numbers")
    parser.add_argument("--out", type=Path, help="folder for what is written (runs/<name of MODEL>)")
    parser.add_argument("--replace", action="store_true", help="overwrite an earlier posterior in that folder")
    parser.add_argument(
        "--family", choices=get_args(Family), default="meanfield",
        help="Gaussian without or with correlations between parameters (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--check", choices=["hmc"], help="run HMC too, and set its means and deviations beside")
    parser.add_argument(
        "--steps", type=_positive, default=10_000, help="at most; fewer once the ELBO settles (%(default)s)"
    )
    parser.add_argument("--draws", type=_several, default=10_000, help="of the posterior, to write (%(default)s)")
    parser.add_argument("--gradient-draws", type=_positive, default=16, help="for each step's gradient (%(default)s)")
    parser.add_argument(
        "--tolerance",
        type=_above_zero,
        default=1e-5,
        help="relative change of the ELBO that counts as settled (%(default)s)",
    )
    parser.add_argument("--learning-rate", type=_above_zero, help="instead of the best of 0.01, 0.1, 1, 10 and 100")
    parser.add_argument("--seed", type=int, default=0, help="of all noise (%(default)s)")
    parser.add_argument("--threads", type=_positive, default=1, help="CPU threads (%(default)s)")
    parser.set_defaults(command=_advi)


def _advi(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    out = options.out or Path("runs") / options.model.stem
    try:
        text = infer(
            options.model,
            options.csv,
            out,
            family=options.family,
            max_steps=options.steps,
            draws=options.draws,
            gradient_draws=options.gradient_draws,
            tolerance=options.tolerance,
            learning_rate=options.learning_rate,
            seed=options.seed,
            check=options.check == "hmc",
            replace=options.replace,
        )
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(str(interrupt) or "nothing was written; run the same command again") from interrupt
    print(f"{text}\n\nwrote posterior.csv, draws.npz, marginals.png and elbo.png into {out}")


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def _several(text: str) -> int:
    if (number := int(text)) < 2:
        raise argparse.ArgumentTypeError(f"{text} is below 2")
    return number


def _above_zero(text: str) -> float:
    if not 0 < (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number
