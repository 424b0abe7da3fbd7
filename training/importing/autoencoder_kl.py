"""Import of an AutoencoderKL, the VAE of latent diffusion models, from a folder that diffusers has written.

Source: Rombach et al. (2022), "High-resolution image synthesis with latent diffusion models", appendix G.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from training.errors import ModelFileError
from training.export.export import GOLDEN_ROWS, golden_size, version_folder
from training.export.pair import export_vae
from training.extras import installed, needed
from training.loop.randomness import keyed_generator

CONFIG = "config.json"
CLASS = "AutoencoderKL"
VALUE_RANGE = (-1.0, 1.0)
"""Of pixels, as diffusers' VaeImageProcessor gives them."""
MOST_TOLD = 300
"""Characters of an error of diffusers that a message repeats."""


class Autoencoder(NamedTuple):
    """An AutoencoderKL.

    Attributes:
        encoder: x (n, c, h, w) -> the posterior's mean and log_var, joined along axis 1.
        decoder: z -> x_mean (n, c, h, w).
        config: Its settings.
        weights: Types of the weights in the folder, as safetensors names them.
    """

    encoder: nn.Module
    decoder: nn.Module
    config: dict[str, Any]
    weights: list[str]

    @property
    def multiple_of(self) -> int:
        """What heights and widths are multiples of: each block of the encoder but the last halves them."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    @property
    def tile(self) -> int:
        """Height and width of the tiles of a large image, as diffusers' `enable_tiling` has them."""
        size = self.config["sample_size"]
        least = min(size) if isinstance(size, (list, tuple)) else int(size)
        return max(2, least // self.multiple_of) * self.multiple_of

    def told(self, *, float16: bool = False) -> dict[str, Any]:
        """What the manifest says of it, besides shapes.

        Args:
            float16: Whether weights are stored as float16.
        """
        return {
            "scaling_factor": self.config["scaling_factor"] or 1.0,
            "shift_factor": self.config["shift_factor"] or 0.0,
            "tiles": {"side": self.tile, "margin": 0, "exact": False},
            "training": {
                "imported": CLASS,
                "diffusers": installed("diffusers"),
                "weights": self.weights,
                "stored": "float16" if float16 else "float32",
                "config": self.config,
            },
        }


def read_autoencoder_kl(folder: Path) -> Autoencoder:
    """Read the folder of an AutoencoderKL into float32. Nothing is fetched from a network, and no pickle is opened.

    Args:
        folder: Holds config.json and weights in safetensors files.

    Raises:
        ModelFileError: The folder holds something else, or its weights do not fit its config.json.
        DependencyError: diffusers is not installed.
    """
    _check_class(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelFileError(f"{folder} has no weights in safetensors; save them so, since other files may run code")
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported
    diffusers, safetensors = (needed(package, "diffusers") for package in ("diffusers", "safetensors"))
    diffusers.utils.logging.set_verbosity_error()
    try:
        vae, found = diffusers.AutoencoderKL.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, low_cpu_mem_usage=False,
            variant="fp16" if all(".fp16." in file.name for file in files) else None,
        )  # fmt: skip
        weights = {kind for file in files for kind in _types(safetensors, file)}
    except Exception as error:
        told = " ".join(str(error).split())[:MOST_TOLD]
        raise ModelFileError(f"diffusers cannot read {folder}: {told}") from error
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found[fault]:
            raise ModelFileError(f"the weights in {folder} do not fit its {CONFIG}: {fault} {list(found[fault])[:3]}")
    config = {key: value for key, value in json.loads(vae.to_json_string()).items() if key != "_name_or_path"}
    if config["in_channels"] != config["out_channels"]:
        raise ModelFileError(
            f"{folder} takes images of {config['in_channels']} channels and makes images of {config['out_channels']}; "
            "the service needs the same number"
        )
    parts = (vae.encoder, vae.quant_conv, vae.post_quant_conv, vae.decoder)
    one, two, three, four = (nn.Identity() if part is None else part for part in parts)
    return Autoencoder(nn.Sequential(one, two), nn.Sequential(three, four), config, sorted(weights))


def _check_class(folder: Path) -> None:
    path = folder / CONFIG
    if not path.is_file():
        inner = folder / "vae"
        advice = f"pass {inner}" if (inner / CONFIG).is_file() else f"name the folder of an {CLASS}"
        raise ModelFileError(f"{folder} has no {CONFIG}; {advice}")
    try:
        found = json.loads(path.read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError(f"{path} is not the settings of an {CLASS} ({type(error).__name__}: {error})") from error
    if found != CLASS:
        raise ModelFileError(f"{folder} holds a model of the class {found}; only {CLASS} is imported")


def _types(safetensors: Any, file: Path) -> Iterator[str]:
    with safetensors.safe_open(file, "pt") as tensors:
        yield from (tensors.get_slice(key).get_dtype() for key in tensors.keys())  # noqa: SIM118  # no mapping


def import_diffusers(
    folder: Path, models: Path, name: str, version: str = "1", *, float16: bool = False, replace: bool = False
) -> Path:
    """Write models/<name>/<version>/ from the folder of an AutoencoderKL, for images of any size.

    Args:
        folder: Holds config.json and weights in safetensors files. Weights in float16 or bfloat16 become float32.
        models: The model repository.
        name: Name of the model.
        version: Its version.
        float16: Whether weights are rounded to float16 and stored so; computations are in float32 all the same.
        replace: Whether an existing version is replaced.

    Returns:
        The folder of the version.

    Raises:
        ModelFileError: The folder cannot be used.
        DependencyError: diffusers is not installed.
        ExportError: As `export_vae`.
        DiskError: The folder of the version cannot be written.
    """
    version_folder(models, name, version, replace=replace)
    found = read_autoencoder_kl(folder)
    shape = (GOLDEN_ROWS, found.config["in_channels"], *golden_size(found.multiple_of))
    x = 2.0 * torch.rand(shape, generator=keyed_generator(torch.device("cpu"), 0)) - 1.0
    return export_vae(
        found.encoder, found.decoder, x, models, name, version, value_range=VALUE_RANGE,
        multiple_of=found.multiple_of, float16=float16, told=found.told(float16=float16), replace=replace,
    )  # fmt: skip
