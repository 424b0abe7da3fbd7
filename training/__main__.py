"""The trainer's command line: `python -m training`, also installed as `vae-train`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from training import pipeline
from training.cli import asking_command, run
from training.conditional import ConditionalWorkshop
from training.config import ConditionalRun, NoisyRun, RestoringRun, kind_of, load_as
from training.data.mnist import download
from training.errors import ConfigError
from training.evaluation.calibrate import CalibrateOptions, calibrate
from training.evaluation.evaluate import ALL, Share
from training.export.card_sheet import describe_again
from training.export.quantise import QuantiseOptions, quantise
from training.importing.command import import_command
from training.importing.restore import restore_only
from training.inference.command import advi_command
from training.inference.photon_transfer import fitted, frames_of, scenes_of, write_noise
from training.loop.processes import ALONE, Processes, joined
from training.noisy import NoisyWorkshop
from training.pipeline import Workshop
from training.signing import private_key, sign

MODELS = Path("models")
"""Default of --out."""


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
    export = _run_command(commands, "export", "write a trained run, or a version in int8, as a model version", _export)
    export.add_argument(
        "--quantise", type=Path, metavar="FOLDER", help="write the version in this folder anew in int8, without CONFIG"
    )
    export.add_argument("--version", help="name of the version in int8 (that of the other with -int8)")
    for command in (fit, export):
        command.add_argument("--replace", action="store_true", help="overwrite the version if it exists")
        _key_option(command)
    fit.add_argument("--out", type=Path, default=MODELS, help="model repository (%(default)s)")
    export.add_argument("--out", type=Path, help=f"model repository ({MODELS}; with --quantise, that of the version)")
    fit.add_argument("--epochs", type=int, help="epochs, instead of the TOML's; with more, a finished run continues")
    fit.add_argument("--restoration-epochs", type=int, help="the same for the recognition model of corrupted images")
    fit.add_argument(
        "--restore-only", action="store_true", help="train restoration for an imported VAE, which the TOML names"
    )
    fit.add_argument(
        "--from",
        dest="start",
        type=Path,
        metavar="FOLDER",
        help="version of a conditional model to begin with",
    )
    fit.add_argument("--fresh", action="store_true", help="discard the run's checkpoints first")
    fit.add_argument(
        "--tensorboard", action="store_true", help="also write the log and the sheet into runs/<name>/tensorboard"
    )
    for command in (fit, evaluate, export):
        command.add_argument("--draws", type=int, help="importance samples an image, instead of the TOML's")
        command.add_argument("--images", type=int, help="evaluate on a seeded random subset of the test images")
    evaluate.add_argument(
        "--share", type=_share, default=ALL, metavar="1/2", help="evaluate this part of the images alone"
    )
    widen = asking_command(commands, "calibrate", "calibrate the `std` of restored images on held-out images")
    _key_option(widen)
    widen.set_defaults(command=_calibrate)
    import_command(commands)
    card = commands.add_parser("card", help="write the model card of an existing version anew")
    card.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the version, models/<name>/<version>")
    card.add_argument("--config", type=Path, help="TOML whose table [card] has the card's words")
    _key_option(card)
    card.set_defaults(command=_card)
    signed = commands.add_parser("sign", help="sign versions, so that a service knows who made them")
    signed.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="folder of a version")
    _key_option(signed, required=True)
    signed.set_defaults(command=_sign)
    advi_command(commands)
    _noise_model_command(commands)
    fetch = commands.add_parser("download", help="fetch a data set")
    fetch.add_argument("dataset", choices=["mnist"])
    fetch.add_argument("--data", type=Path, required=True, help="directory to fetch into")
    fetch.set_defaults(command=lambda options: download(options.data))
    return parser


def _noise_model_command(commands: Any) -> None:
    camera = commands.add_parser("noise-model", help="measure the noise of a camera from frames of static scenes")
    camera.add_argument(
        "calibration",
        type=Path,
        metavar="CALIBRATION",
        help="frames of one static scene, a folder or a stack; or a folder of such folders (dark, flat)",
    )
    camera.add_argument("--out", type=Path, default=Path("noise.toml"), help="file to write (%(default)s)")
    camera.add_argument("--bits", type=int, default=16, help="16-bit levels are divided by 2^BITS - 1 (%(default)s)")
    camera.set_defaults(command=_noise_model)


def _key_option(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    text = "PEM file of the Ed25519 private key that signs what is written"
    parser.add_argument("--key", type=Path, metavar="PRIVATE.pem", required=required, help=text)


def _run_command(commands, name: str, help: str, command) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]  # noqa: A002, ANN001
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help)
    of_none = "?" if name == "export" else None  # --quantise needs no run
    parser.add_argument("config", type=Path, metavar="CONFIG", nargs=of_none, help="the run's TOML")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets (%(default)s)")
    parser.add_argument("--run", type=Path, help="folder for checkpoints and log (runs/<name>)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads (the number of idle cores)")
    parser.set_defaults(command=command)
    return parser


def _share(text: str) -> Share:
    """Read `2/3`: the second of three shares."""
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text} is no share; with 3 there are 1/3, 2/3 and 3/3")
    return Share(int(number), int(of))


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


def _card(options: argparse.Namespace) -> None:
    notes = None if options.config is None else load_as(kind_of(options.config), options.config).card
    print(f"wrote {describe_again(options.folder, notes, private_key(options.key))}")


def _noise_model(options: argparse.Namespace) -> None:
    found = fitted([frames_of(scene, options.bits) for scene in scenes_of(options.calibration)])
    write_noise(found, options.out)
    print(
        f"wrote {options.out}: variance = {found.gain:.4g} x signal + {found.offset:.4g}, of {found.frames} frames of "
        f"{found.scenes} scenes"
    )


def _workshop(
    options: argparse.Namespace, processes: Processes = ALONE
) -> Workshop | ConditionalWorkshop | NoisyWorkshop:
    pipeline.threads(options.threads)
    kind = kind_of(options.config)
    changes = {ConditionalRun: _conditional_changes, NoisyRun: _noisy_changes}.get(kind, _changes)
    settings = load_as(kind, options.config, changes(options))
    folder = options.run or Path("runs") / settings.name
    device, board = pipeline.device(options.device), getattr(options, "tensorboard", False)
    if isinstance(settings, ConditionalRun):
        return ConditionalWorkshop.open(settings, options.data, folder, device, processes, tensorboard=board)
    if isinstance(settings, NoisyRun):
        return NoisyWorkshop.open(settings, options.data, folder, device, processes, tensorboard=board)
    return Workshop.open(settings, options.data, folder, device, processes, tensorboard=board)


def _length(options: argparse.Namespace, name: str) -> dict[str, int | None]:
    """Epochs of the command line, which replace the TOML's `epochs` and set its `least_steps` to 0."""
    epochs = getattr(options, name, None)
    return {"epochs": epochs, "least_steps": None if epochs is None else 0}


def _changes(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line changes in the TOML of a VAE."""
    if getattr(options, "start", None) is not None:
        raise ConfigError("--from is for conditional models, whose TOML has [trunk]")
    return {
        "evaluation": {"draws": options.draws, "images": options.images},
        "train": _length(options, "epochs"),
        "restoration": {"train": _length(options, "restoration_epochs")},
    }


def _conditional_changes(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line changes in the TOML of a conditional model."""
    if (options.draws, getattr(options, "restoration_epochs", None)) != (None, None):
        raise ConfigError("a conditional model has neither --draws nor --restoration-epochs")
    start, epochs = getattr(options, "start", None), {"trunk": {"train": _length(options, "epochs")}}
    own = None if start is None else str(start)
    return {"test_images": options.images, "from": own, **epochs, "colour": epochs}


def _noisy_changes(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line changes in the TOML of a model of noisy images."""
    given = (options.draws, options.images, *(getattr(options, name, None) for name in ("restoration_epochs", "start")))
    if any(value is not None for value in given):
        raise ConfigError("a model of noisy images has none of --draws, --images, --restoration-epochs and --from")
    return {"train": _length(options, "epochs")}


def _fit(options: argparse.Namespace) -> None:
    key = private_key(options.key)
    if options.restore_only:
        _restore_only(options, key)
        return
    with joined(pipeline.device(options.device)) as processes:
        workshop = _workshop(options, processes)
        if options.fresh and processes.first:
            workshop.clear()
        processes.wait()
        written = workshop.fit(options.out, replace=options.replace, key=key)
        if processes.first:
            print(f"wrote {written}")


def _restore_only(options: argparse.Namespace, key: Ed25519PrivateKey | None) -> None:
    if (options.epochs, options.draws, options.images) != (None, None, None):
        raise ConfigError("--restore-only trains no VAE: of these it takes --restoration-epochs alone")
    pipeline.threads(options.threads)
    epochs = {"restoration": {"train": _length(options, "restoration_epochs")}}
    run = load_as(RestoringRun, options.config, epochs)
    folder = options.run or Path("runs") / run.name
    with pipeline.locked(folder):
        if options.fresh:
            pipeline.clear(folder)
        written = restore_only(
            run,
            options.data,
            folder,
            options.out,
            pipeline.device(options.device),
            replace=options.replace,
            key=key,
        )
    print(f"wrote {written}")


def _evaluate(options: argparse.Namespace) -> None:
    print(json.dumps(_workshop(options).evaluate(options.share), indent=2))


def _export(options: argparse.Namespace) -> None:
    key = private_key(options.key)
    if (options.quantise is None) == (options.config is None):
        raise ConfigError("export takes the TOML of a run, or --quantise and the folder of a version")
    if options.quantise is not None:
        pipeline.threads(options.threads)
        plan = QuantiseOptions(options.quantise, options.data, options.version, options.out, replace=options.replace)
        images = plan.images if options.images is None else options.images
        print(f"wrote {quantise(replace(plan, images=images), key=key)}")
        return
    print(f"wrote {_workshop(options).export(options.out or MODELS, replace=options.replace, key=key)}")


if __name__ == "__main__":
    sys.exit(main())
