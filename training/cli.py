"""Parts of a command line that `training` and `experiments` share."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from training.errors import TrainingError

INTERRUPTED = 130


def run(parser: argparse.ArgumentParser, arguments: list[str] | None) -> int:
    """Run the command that the arguments name.

    Args:
        parser: A parser whose namespace holds the function `command`.
        arguments: The arguments; None reads sys.argv.

    Returns:
        The exit status: 0, 1 after one line with the error, 130 when interrupted.
    """
    options = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell's background jobs start with it ignored
        signal.signal(number, _interrupt)
    try:
        options.command(options)
    except TrainingError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        what_next = str(interrupt) or "the same command goes on from the last checkpoint"
        print(f"{parser.prog}: interrupted; {what_next}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def asking_command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    """Add a command that uses a service over HTTP.

    Args:
        commands: Result of argparse's `add_subparsers`.
        name: Name of the command.
        text: Its help text.

    Returns:
        The parser of the command.
    """
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("--url", help="URL of a running service; without it one runs for the duration of the command")
    parser.add_argument("--models", type=Path, default=Path("models"), help="model repository served (%(default)s)")
    parser.add_argument(
        "--model", dest="names", metavar="MODEL", default="*", help="pattern of the models' names (%(default)s)"
    )
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="folder of the data sets, as for fit (%(default)s)"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for cached results (%(default)s)")
    parser.add_argument("--images", type=int, default=200, help="images of each data set (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of images and corruptions (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    return parser
