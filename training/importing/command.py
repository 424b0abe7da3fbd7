"""`python -m training import`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from training.importing.autoencoder_kl import import_diffusers
from training.importing.onnx_pair import KNOWN, import_onnx


def import_command(commands: Any) -> None:
    """Add the command; `commands` is argparse's action for subcommands."""
    text = "write a VAE that others have trained as a model version"
    kinds = commands.add_parser("import", help=text, description=text).add_subparsers(required=True, metavar="KIND")
    folder = _kind(kinds, "diffusers", "the folder of an AutoencoderKL, as diffusers saves it", _import_diffusers)
    folder.add_argument("path", type=Path, metavar="PATH", help="folder with config.json and *.safetensors")
    folder.add_argument("--float16", action="store_true", help="round weights to float16, and store them so")
    pair = _kind(kinds, "onnx", "an encoder and a decoder in ONNX", _import_onnx)
    pair.add_argument("--encoder", type=Path, required=True, help="graph of x -> mean and log variance, or the like")
    pair.add_argument("--decoder", type=Path, required=True, help="graph of z -> images")
    pair.add_argument(
        "--encoder-outputs", nargs="+", type=_named, metavar="ROLE=NAME",
        help=f"outputs of the encoder by what they are: {', '.join(KNOWN)} (by their names)",
    )  # fmt: skip
    pair.add_argument(
        "--value-range", nargs=2, type=float, metavar=("LOW", "HIGH"),
        help="values of black and white pixels: 0 1 or -1 1 (by the images that the decoder makes)",
    )  # fmt: skip
    pair.add_argument(
        "--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="the one size of images (what the encoder takes)"
    )
    pair.add_argument(
        "--prior", choices=["standard_normal"], help="p(z), without which there is no sampling (not known)"
    )


def _kind(kinds: Any, name: str, text: str, command: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(name, help=text, description=text)
    parser.add_argument("--name", required=True, help="name of the model")
    parser.add_argument("--version", default="1", help="version of the model (%(default)s)")
    parser.add_argument("--models", type=Path, default=Path("models"), help="model repository (%(default)s)")
    parser.add_argument("--replace", action="store_true", help="overwrite the version if it exists")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    parser.set_defaults(command=command)
    return parser


def _named(text: str) -> tuple[str, str]:
    role, _, name = text.partition("=")
    if role not in KNOWN or not name:
        raise argparse.ArgumentTypeError(f"{text} is not ROLE=NAME, where ROLE is one of {', '.join(KNOWN)}")
    return role, name


def _import_diffusers(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    _tell(
        lambda: import_diffusers(
            options.path,
            options.models,
            options.name,
            options.version,
            float16=options.float16,
            replace=options.replace,
        )
    )


def _import_onnx(options: argparse.Namespace) -> None:
    _tell(
        lambda: import_onnx(
            options.encoder,
            options.decoder,
            options.models,
            options.name,
            options.version,
            encoder_outputs=dict(options.encoder_outputs) if options.encoder_outputs else None,
            value_range=tuple(options.value_range) if options.value_range else None,
            size=tuple(options.size) if options.size else None,
            prior=options.prior,
            replace=options.replace,
        )
    )


def _tell(written: Callable[[], Path]) -> None:
    """Import, and print where the version lies."""
    try:
        print(f"wrote {written()}")
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt("nothing was written; run the same command again") from interrupt
