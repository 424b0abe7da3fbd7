"""The trainer's command line: `python -m training`, also installed as `vae-train`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from training import pipeline
from training.cli import asking_command, run
from training.config import RestoringRun, load, load_as
from training.data.mnist import download
from training.errors import ConfigError
from training.evaluation.calibrate import CalibrateOptions, calibrate
from training.importing.command import import_command
from training.importing.restore import restore_only
from training.inference.command import advi_command
from training.loop.processes import ALONE, Processes, joined
from training.signing import private_key, sign


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The command and its options; None reads sys.argv.

    Returns:
        The exit status.
    """
    return run(_parser(), arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vae-train", description="Train variational auto-encoders and export them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    fit = _run_command(commands, "fit", "train, evaluate and export one run; an interrupted one is resumed", _fit)
    evaluate = _run_command(commands, "evaluate", "evaluate a trained run on test images and print JSON", _evaluate)
    export = _run_command(commands, "export", "write a trained run as a model version", _export)
    for command in (fit, export):
        command.add_argument("--out", type=Path, default=Path("models"), help="model repository (%(default)s)")
        command.add_argument("--replace", action="store_true", help="overwrite the version if it exists")
        _key_option(command)
    fit.add_argument("--epochs", type=int, help="epochs, instead of the TOML's; with more, a finished run continues")
    fit.add_argument("--restoration-epochs", type=int, help="the same for the recognition model of corrupted images")
    fit.add_argument(
        "--restore-only", action="store_true", help="train restoration for an imported VAE, which the TOML names"
    )
    fit.add_argument("--fresh", action="store_true", help="discard the run's checkpoints first")
    for command in (fit, evaluate, export):
        command.add_argument("--draws", type=int, help="importance samples an image, instead of the TOML's")
        command.add_argument("--images", type=int, help="evaluate on a seeded random subset of the test images")
    widen = asking_command(commands, "calibrate", "calibrate the `std` of restored images on held-out images")
    _key_option(widen)
    widen.set_defaults(command=_calibrate)
    import_command(commands)
    signed = commands.add_parser("sign", help="sign versions, so that a service knows who made them")
    signed.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="folder of a version")
    _key_option(signed, required=True)
    signed.set_defaults(command=_sign)
    advi_command(commands)
    fetch = commands.add_parser("download", help="fetch a data set")
    fetch.add_argument("dataset", choices=["mnist"])
    fetch.add_argument("--data", type=Path, required=True, help="directory to fetch into")
    fetch.set_defaults(command=lambda options: download(options.data))
    return parser


def _key_option(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    text = "PEM file of the Ed25519 private key that signs what is written"
    parser.add_argument("--key", type=Path, metavar="PRIVATE.pem", required=required, help=text)


def _run_command(commands, name: str, help: str, command) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]  # noqa: A002, ANN001
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="the run's TOML")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets (%(default)s)")
    parser.add_argument("--run", type=Path, help="folder for checkpoints and log (runs/<name>)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads (the number of idle cores)")
    parser.set_defaults(command=command)
    return parser


def _sign(options: argparse.Namespace) -> None:
    key = private_key(options.key)
    assert key is not None
    for folder in options.folders:
        print(f"wrote {sign(folder, key)}")


def _calibrate(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    plan = CalibrateOptions.of(options, runs=options.runs / "calibrate", key=private_key(options.key))
    for path in calibrate(plan):
        print(f"wrote {path}")


def _workshop(options: argparse.Namespace, processes: Processes = ALONE) -> pipeline.Workshop:
    pipeline.threads(options.threads)
    evaluation = {"draws": options.draws, "images": options.images}
    epochs = {"epochs": getattr(options, "epochs", None)}
    restoration_epochs = {"epochs": getattr(options, "restoration_epochs", None)}
    settings = load(
        options.config,
        {"evaluation": evaluation, "train": epochs, "restoration": {"train": restoration_epochs}},
    )
    folder = options.run or Path("runs") / settings.name
    return pipeline.Workshop.open(settings, options.data, folder, pipeline.device(options.device), processes)


def _fit(options: argparse.Namespace) -> None:
    if options.restore_only:
        _restore_only(options)
        return
    key = private_key(options.key)
    with joined(pipeline.device(options.device)) as processes:
        workshop = _workshop(options, processes)
        if options.fresh and processes.first:
            workshop.clear()
        processes.wait()
        written = workshop.fit(options.out, replace=options.replace, key=key)
        if processes.first:
            print(f"wrote {written}")


def _restore_only(options: argparse.Namespace) -> None:
    if (options.epochs, options.draws, options.images) != (None, None, None):
        raise ConfigError("--restore-only trains no VAE: of these it takes --restoration-epochs alone")
    pipeline.threads(options.threads)
    epochs = {"restoration": {"train": {"epochs": options.restoration_epochs}}}
    run = load_as(RestoringRun, options.config, epochs)
    folder, key = options.run or Path("runs") / run.name, private_key(options.key)
    with pipeline.locked(folder):
        if options.fresh:
            pipeline.clear(folder)
        written = restore_only(
            run, options.data, folder, options.out, pipeline.device(options.device), replace=options.replace, key=key
        )
    print(f"wrote {written}")


def _evaluate(options: argparse.Namespace) -> None:
    print(json.dumps(_workshop(options).evaluate(), indent=2))


def _export(options: argparse.Namespace) -> None:
    key = private_key(options.key)
    print(f"wrote {_workshop(options).export(options.out, replace=options.replace, key=key)}")


if __name__ == "__main__":
    sys.exit(main())
