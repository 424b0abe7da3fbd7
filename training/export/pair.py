"""Export of any pair of torch modules, an encoder and a decoder, as a version that the service runs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor, nn

from service.contract.graphs import GRAPHS
from training.errors import ExportError
from training.export.export import Exportable, export, golden_images, version_folder
from training.export.tiling import tiles
from training.progress import tell

LOG_VAR_RANGE = (-30.0, 20.0)
"""Bounds of a log variance that stands beside the mean in one tensor, as diffusers' DiagonalGaussianDistribution has
them."""
MODULE_PARITY = 1e-4
"""Maximum difference between torch and onnxruntime, as in `PARITY`. In deep networks roundings add up."""
RANGES = ((0, 1), (-1, 1))
"""Values of black and white that the service knows."""
MAX_SIZE = 8192
"""Largest height and width of images of free size."""


class Encode(nn.Module):
    """q(z|x) of any encoder: x -> mean, log_var."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x (n, c, h, w) to mean and log_var, (n, *latent_shape) each."""
        found = self.encoder(x)
        if not isinstance(found, Tensor):
            mean, log_var = found
            return mean, log_var
        mean, log_var = found.chunk(2, 1)
        return mean, log_var.clamp(*LOG_VAR_RANGE)


class Decode(nn.Module):
    """E[x|z] of any decoder: z -> x_mean, clamped to the value range."""

    def __init__(self, decoder: nn.Module, value_range: Sequence[float]) -> None:
        super().__init__()
        self.decoder = decoder
        self.low, self.high = map(float, value_range)

    def forward(self, z: Tensor) -> Tensor:
        """Map z (n, *latent_shape) to mean images (n, c, h, w)."""
        found: Tensor = self.decoder(z)
        return found.clamp(self.low, self.high)


def export_vae(
    encoder: nn.Module,
    decoder: nn.Module,
    x: Tensor,
    models: Path | str,
    name: str,
    version: str = "1",
    *,
    value_range: tuple[float, float] = (0.0, 1.0),
    multiple_of: int | None = None,
    prior: Literal["standard_normal"] | None = None,
    float16: bool = False,
    told: Mapping[str, Any] | None = None,
    further: Mapping[str, Exportable] | None = None,
    replace: bool = False,
    key: Ed25519PrivateKey | None = None,
) -> Path:
    """Write models/<name>/<version>/ from an encoder and a decoder of torch, which are left as they are.

    Args:
        encoder: Maps x (n, c, h, w) to mean and log_var, (n, *latent_shape) each, or to one tensor with both, joined
            along axis 1. log_var is log sigma squared.
        decoder: Maps z (n, *latent_shape) to mean images (n, c, h, w), which are clamped to `value_range`.
        x: Example images (n, c, h, w), of which at most four become golden rows.
        models: The model repository.
        name: Name of the model.
        version: Its version.
        value_range: Lowest and highest value of a pixel, [0, 1] or [-1, 1].
        multiple_of: What heights and widths are multiples of; None if the model takes the size of `x` alone.
        prior: "standard_normal" if z ~ N(0, I) under the model, so that it can be sampled; None if that is not known.
        float16: Whether weights are rounded to float16 and stored so. Computations are in float32 all the same.
        told: Further keys of the manifest, such as `scaling_factor` or `dataset`.
        further: Further graphs by name, such as those that restore.
        replace: Whether an existing version is replaced.
        key: Signs the version; None leaves it unsigned.

    Returns:
        The folder of the version.

    Raises:
        ExportError: The modules do not fit together or are not what is said here; torch cannot export them; or as
            `export` says.
        DiskError: The folder cannot be written.
    """
    version_folder(Path(models), name, version, replace=replace)
    rows = _rows(x, value_range, multiple_of)
    encode, decode = (_prepared(module, float16) for module in (Encode(encoder), Decode(decoder, value_range)))
    mean = _latent(encode, decode, rows)
    about = {
        **shapes_told(rows.shape, mean.shape, multiple_of),
        "value_range": [float(end) for end in value_range],
        "prior": prior,
        **(told or {}),
    }
    if multiple_of is not None and "tiles" not in (told or {}):
        try:
            about["tiles"] = tiles(encode, decode, None, rows.shape[1], multiple_of)
        except RuntimeError as error:
            raise ExportError(
                f"the modules do not take images of every size ({error}); leave out multiple_of"
            ) from error
    pair = {
        graph: Exportable(module, (inputs,), GRAPHS[graph], parity=MODULE_PARITY, float16=float16)
        for graph, module, inputs in (("encoder", encode, rows), ("decoder", decode, mean))
    }
    tell("exporting; tracing the graphs and comparing them with torch takes seconds, of large models minutes")
    return export({**pair, **(further or {})}, Path(models), name, version, about, replace=replace, key=key)


def _rows(x: Tensor, value_range: Sequence[float], multiple_of: int | None) -> Tensor:
    """The golden rows, float32.

    Raises:
        ExportError: x holds no images of this range.
    """
    if tuple(value_range) not in RANGES:
        raise ExportError(f"value_range must be (0, 1) or (-1, 1), not {tuple(value_range)}; wrap the modules")
    if x.ndim != 4 or not len(x):
        raise ExportError(f"x must be example images (n, channels, height, width), not of shape {list(x.shape)}")
    rows = x.detach().cpu().float()
    low, high = value_range
    if not bool(((rows >= low) & (rows <= high)).all()):
        raise ExportError(
            f"x has pixels from {rows.min():.3g} to {rows.max():.3g}, outside value_range [{low:g}, {high:g}]; scale "
            "the images as the model wants them, or name its range"
        )
    return golden_images(rows, multiple_of)


def _prepared(module: nn.Module, float16: bool) -> nn.Module:
    """A copy in evaluation mode, in float32 on the CPU, with weights that float16 holds if wanted.

    Raises:
        ExportError: A weight is too large for float16.
    """
    own = copy.deepcopy(module).eval().cpu().float().requires_grad_(False)
    for key, weight in own.state_dict().items() if float16 else ():
        if weight.is_floating_point():
            rounded = weight.half().float()
            if not bool(rounded.isfinite().all()):
                raise ExportError(f"{key} has values beyond those of float16; store the weights in float32")
            weight.copy_(rounded)
    return own


@torch.no_grad()
def _latent(encode: nn.Module, decode: nn.Module, rows: Tensor) -> Tensor:
    """The posterior's means of the rows, (n, *latent_shape).

    Raises:
        ExportError: The modules do not fit together.
    """
    try:
        mean, log_var = encode(rows)
    except (TypeError, ValueError, AttributeError) as error:
        raise ExportError(
            "the encoder must return mean and log_var, or one tensor with both joined along axis 1; wrap it in a "
            f"module that does ({error})"
        ) from error
    if mean.shape != log_var.shape or len(mean) != len(rows):
        raise ExportError(
            f"the encoder makes a mean of shape {list(mean.shape)} and a log_var of shape {list(log_var.shape)} of "
            f"{len(rows)} images; both must be (n, *latent_shape)"
        )
    try:
        images = decode(mean)
    except (AttributeError, TypeError) as error:
        raise ExportError(
            f"the decoder must return images, one tensor; wrap it in a module that does ({error})"
        ) from error
    if images.shape != rows.shape:
        raise ExportError(
            f"the decoder makes {list(images.shape)} of the latents of images of {list(rows.shape)}; it must make "
            "images like these"
        )
    return mean


def shapes_told(images: Sequence[int], latents: Sequence[int], multiple_of: int | None) -> dict[str, Any]:
    """What the manifest says of sizes.

    Args:
        images: Shape of example images, (n, c, h, w).
        latents: Shape of their latents, (n, *latent_shape).
        multiple_of: What heights and widths are multiples of; None if the model takes this size alone.

    Returns:
        `input_shape`, `latent_shape`, and, where sizes are free, `size` and `tiles`.

    Raises:
        ExportError: Sizes that are free do not fit together.
    """
    channels, height, width = images[1:]
    if multiple_of is None:
        return {"input_shape": [channels, height, width], "latent_shape": list(latents[1:])}
    grid = latents[2:]
    factor = height // grid[0] if len(grid) == 2 and grid[0] else 0
    if not factor or (factor * grid[0], factor * grid[1]) != (height, width) or multiple_of % factor:
        raise ExportError(
            f"latents of {height} x {width} images are of shape {list(latents[1:])}; where sizes are free they must be "
            f"(channels, height/f, width/f), f a divisor of {multiple_of}; export for images of one size"
        )
    divided = [axis if factor == 1 else f"{axis}/{factor}" for axis in ("height", "width")]
    return {
        "input_shape": [channels, "height", "width"],
        "latent_shape": [latents[1], *divided],
        "size": {"multiple_of": multiple_of, "min": 2 * multiple_of, "max": MAX_SIZE // multiple_of * multiple_of},
        "tiles": {"margin": 0, "exact": False},
    }
