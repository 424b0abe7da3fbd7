"""The command `vae-bulk`: an operation on many images, on this machine or on Ray."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from service.bulk import processes
from service.bulk.operator import operations
from service.bulk.run import Pool, Report, Request, run
from service.bulk.target import ERRORS
from service.errors import ServiceError, one_line
from service.settings import Settings, read_settings

REFUSED, SOME_FAILED, INTERRUPTED = 1, 3, 130
"""Exit statuses: the run cannot begin or go on; rows have no results; it was stopped, and can go on."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = parser().parse_args(arguments)
    try:
        request = Request(
            options.operation, options.source, options.target, _chosen(options), options.model, options.version,
            options.to, options.rows, options.column, options.source_options, options.target_options,
        )  # fmt: skip
        progress = False if options.no_progress else None
        with _stdout_kept():
            report = run(
                _settings(options), request, workers=options.workers, pool=_pool(options.ray), progress=progress
            )
    except (ServiceError, OSError) as error:
        print(f"vae-bulk: {one_line(error)}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("vae-bulk: stopped; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    print(_told(report, options.json))
    return SOME_FAILED if report.failed else 0


@contextmanager
def _stdout_kept() -> Iterator[None]:
    """Send what anything else writes to standard output, as Ray does, to standard error: the report is alone there."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def parser() -> argparse.ArgumentParser:
    """Parser of the command line; the options of an operation are those of the service."""
    whole = argparse.ArgumentParser(prog="vae-bulk", description=__doc__)
    commands = whole.add_subparsers(dest="operation", required=True, metavar="OPERATION")
    for name, operation in operations().items():
        command = commands.add_parser(name, help=operation.summary, description=operation.summary)
        command.add_argument("source", metavar="SOURCE", help="folder, glob in quotes, file, or URL of one of these")
        command.add_argument("target", metavar="TARGET", help="folder of the results, or its URL")
        _add_common(command)
        group = command.add_argument_group("options of the operation")
        for option, field in operation.options.model_fields.items():
            about = (field.description or "").replace("\n", " ").replace("%", "%%")
            flag: dict[str, Any] = {"nargs": "?", "const": "true"} if field.default is False else {}
            flag["metavar"] = option.upper()
            group.add_argument(f"--{option.replace('_', '-')}", dest=f"option_{option}", help=about, **flag)
    return whole


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--models", help="the model repository; by default VAE_MODELS, or models")
    command.add_argument("--model", default="", help="the model; by default the operation's")
    command.add_argument("--version", default="", help="its version; by default the latest")
    command.add_argument(
        "--to", choices=["parquet", "images"], help="by default images where the answer is images alone"
    )
    command.add_argument("--column", default="", help="column of the images in Parquet, where several may be it")
    command.add_argument("--rows", type=_positive, help="rows of a part; by default as many as go well into memory")
    command.add_argument("--workers", type=_positive, help="processes, or actors of Ray; by default one a core")
    command.add_argument(
        "--ray", metavar="ADDRESS|auto|local",
        help="run on Ray: a cluster by its address, the one that is running here, or one of this machine that ends "
        "with the run",
    )  # fmt: skip
    for side in ("source", "target"):
        command.add_argument(
            f"--{side}-options",
            type=_object,
            default={},
            metavar="JSON",
            help=f"options of fsspec for the {side}'s URL",
        )
    command.add_argument("--no-progress", action="store_true", help="show no progress bar")
    command.add_argument("--json", action="store_true", help="print the report as JSON")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return number


def _object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError('write an object, as in {"endpoint_url": "..."}')
    return found


def _settings(options: argparse.Namespace) -> Settings:
    settings = read_settings()
    models = settings.models if options.models is None else options.models
    if "://" not in str(models):
        models = Path(models).absolute()  # other processes may have other working directories
    return settings.model_copy(update={"models": models})


def _chosen(options: argparse.Namespace) -> dict[str, str]:
    """The options of the operation that were given, by name."""
    prefix = "option_"
    given = vars(options).items()
    return {name.removeprefix(prefix): value for name, value in given if name.startswith(prefix) and value is not None}


def _pool(address: str | None) -> Pool:
    """What runs the tasks.

    Raises:
        StartError: Ray is wanted and not installed.
    """
    if address is None:
        return processes.run
    from service.bulk.cluster import Cluster  # noqa: PLC0415  # Ray is an extra

    return Cluster(address)


def _told(report: Report, as_json: bool) -> str:
    if as_json:
        return json.dumps(asdict(report) | {"failed": len(report.failed)})
    rate = report.done / report.busy_s if report.busy_s else 0.0
    speed = f"{report.busy_s:.1f} s ({rate:,.0f}/s) after {report.start_s:.1f} s of start"
    lines = [f"{report.done} rows in {speed}: {report.target}"]
    if report.before:
        lines.append(f"{report.before} rows were done before")
    if report.ignored:
        lines.append(f"{report.ignored} files of other endings were left out")
    if report.failed:
        lines.append(f"{len(report.failed)} rows have no results; {report.target.rstrip('/')}/{ERRORS} says why")
    return "\n".join(lines)
