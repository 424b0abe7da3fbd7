"""Export of a trained model as a version in the model repository: ONNX graphs, golden rows and manifest."""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor, nn
from torch.nn import functional

from service.contract.golden import deviation
from service.contract.graphs import GRAPHS, Axis, Signature, at_size, fraction_of, free_axes, shape_of
from service.contract.manifest import (
    DEFAULT_FILE,
    SCHEMA_VERSION,
    ManifestError,
    digest,
    is_plain_name,
    manifest_of,
)
from training.distributions.gaussian import DiagonalGaussian
from training.distributions.interface import Prior
from training.distributions.priors.standard_normal import StandardNormal
from training.errors import DiskError, ExportError
from training.evaluation.scoring import ElboGradient, LogJoint
from training.export.card_sheet import described
from training.export.external import write_graph
from training.export.session import opened
from training.export.weights import differences, store_as_float16, tensors_of
from training.inference.refinement import Refinement, differentiated
from training.models.restoration import Corrupted, Recognition
from training.models.vae import VAE
from training.progress import tell
from training.signing import write_manifest

PARITY = 1e-5
"""Maximum difference between torch and onnxruntime, on the machine that exports."""
GOLDEN_TOLERANCE = 1e-3
"""Tolerance of golden rows on any execution provider; TF32 keeps about three digits."""
GOLDEN_ROWS = 4
GOLDEN_FILE = "golden.npz"
OWN_DOMAINS = {"", "ai.onnx", "ai.onnx.ml"}
"""Domains of ONNX's own operators; the service runs no others."""
RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
MAX_STEPS = 2**16
"""Largest free size, in multiples of the model's."""

Rows = tuple[Tensor, ...]
Shapes = dict[str, list[Axis]]
"""Shapes after the batch axis by tensor, as the manifest writes them."""


@dataclass(frozen=True)
class Exportable:
    """One graph to export.

    Attributes:
        module: Maps tensors to tensors, both in the order of the signature.
        rows: Golden rows, one tensor (n, ...) for each input.
        signature: Names and axes of its inputs and outputs.
        gradients: Whether the module computes gradients.
        parity: Maximum difference between torch and onnxruntime.
        exact: The module before its weights were rounded to float16, in which they are stored then; None where they
            stay in float32.
        chosen: Shapes after the batch axis of tensors whose axes the model chooses, by name.
        tolerance: How far another machine's answers may be from the golden rows.
    """

    module: nn.Module
    rows: tuple[Tensor, ...]
    signature: Signature
    gradients: bool = False
    parity: float = PARITY
    exact: nn.Module | None = None
    chosen: Mapping[str, list[Axis]] = field(default_factory=dict)
    tolerance: float = GOLDEN_TOLERANCE


@dataclass(frozen=True)
class Converted:
    """One graph that is ONNX already, with golden rows.

    Attributes:
        model: The graph with its weights.
        inputs: Golden inputs (n, ...) by name, in the order of the signature.
        outputs: What the graph makes of them, likewise.
        signature: Names and axes of its inputs and outputs.
        rounding: Largest difference of each output that weights in float16 make, on the golden rows.
        chosen: Shapes of tensors whose axes the model chooses, by name.
        tolerance: How far another machine's answers may be from the golden rows.
    """

    model: onnx.ModelProto
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    signature: Signature
    rounding: dict[str, float] = field(default_factory=dict)
    chosen: Mapping[str, list[Axis]] = field(default_factory=dict)
    tolerance: float = GOLDEN_TOLERANCE


@dataclass(frozen=True)
class OtherVariant:
    """A further variant of a version, for images of another number of channels.

    Attributes:
        graphs: Its graphs by name.
        about: Its keys of the manifest besides graphs and golden rows.
    """

    graphs: Mapping[str, Exportable | Converted]
    about: dict[str, Any]


class Decode(nn.Module):
    """Decoder and likelihood: z -> E[x|z]."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.decoder, self.likelihood = vae.decoder, vae.likelihood

    def forward(self, z: Tensor) -> Tensor:
        """Map z (n, d) to mean images (n, c, h, w)."""
        return self.likelihood.mean(self.decoder(z))


class Infer(nn.Module):
    """A hierarchical posterior as a function of noise: x, eps -> z, mean, log_var, log q(z|x)."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Map x (n, c, h, w) and eps (n, d) to z, mean and log_var (n, d) and log q in nats (n,).

        Log q is computed in double, as `LogJoint` computes its terms.
        """
        z, q, _ = self.vae.infer(self.vae.posterior(x), eps[None])
        mean, log_var = (part[0] for part in q)
        log_q = DiagonalGaussian(mean.double(), log_var.double()).log_prob(z[0].double())
        return z[0], mean, log_var, log_q.float()


class Draw(nn.Module):
    """The prior as a function of noise: eps ~ N(0, I) -> z ~ p(z)."""

    def __init__(self, prior: Prior) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, eps: Tensor) -> Tensor:
        """Map eps (n, *noise_shape) to z (n, d)."""
        return self.prior.draw(eps)


class Recognise(nn.Module):
    """The recognition model of corrupted images: y, mask, level -> mean, log_var of q(z | y, mask, level)."""

    def __init__(self, recognition: Recognition) -> None:
        super().__init__()
        self.recognition = recognition

    def forward(self, y: Tensor, mask: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Map y and mask (n, c, h, w) and level (n, F) to mean and log_var, (n, *latent_shape) each."""
        mean, log_var = self.recognition.posterior(Corrupted(y, mask, level))
        return mean, log_var


class EstimateLevel(nn.Module):
    """Estimator of noise levels: y, mask -> for each family, the level if the noise is of that family."""

    def __init__(self, recognition: Recognition) -> None:
        super().__init__()
        self.recognition = recognition

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        """Map y and mask (n, c, h, w) to levels (n, F)."""
        return self.recognition.log_level(y, mask).mean.exp()


@torch.no_grad()
def exportables(vae: VAE, recognition: Recognition | None, x: Tensor, seen: Corrupted) -> dict[str, Exportable]:
    """Collect the graphs of a model, with golden rows.

    Args:
        vae: The trained model.
        recognition: The recognition model of corrupted images; None if the run has none.
        x: Clean images (n, c, h, w).
        seen: The same images after corruption.

    Returns:
        Graphs by name.
    """
    eps = _normal((len(x), *vae.noise_shapes.posterior))
    parts: dict[str, tuple[nn.Module, Rows]]
    if vae.group_shapes:
        z = Infer(vae)(x, eps)[0]
        parts = {"posterior": (Infer(vae), (x, eps))}
    else:
        z, log_var = vae.posterior(x)
        parts = {"encoder": (vae.encoder, (x,))}
        if z.ndim == 2:
            parts["elbo_gradient"] = ElboGradient(vae), (z, log_var, eps, x)
    parts |= {"decoder": (Decode(vae), (z,)), "log_joint": (LogJoint(vae), (x, z))}
    prior = vae.prior.frozen()
    if not isinstance(prior, StandardNormal):  # draws of N(0, I) are the noise itself
        parts["prior"] = (Draw(prior), (_normal((len(x), *prior.noise_shape)),))
    if recognition is not None:
        parts |= restoring_parts(vae, recognition, seen)
        if z.ndim == 2:
            rows = _refinement_rows(recognition.posterior(seen), seen)
            parts["refinement"] = Refinement(vae, recognition.fusion), rows
    return {
        name: Exportable(module, rows, GRAPHS[name], gradients=isinstance(module, (ElboGradient, Refinement)))
        for name, (module, rows) in parts.items()
    }


@torch.no_grad()
def restoring_parts(vae: VAE, recognition: Recognition, seen: Corrupted) -> dict[str, tuple[nn.Module, Rows]]:
    """Modules of the graphs that restore, by name, each with golden rows."""
    x_mean, fusion = vae.x_mean(recognition.posterior(seen).mean), recognition.fusion
    return {
        "recognition": (Recognise(recognition), tuple(seen)),
        "noise_level": (EstimateLevel(recognition), (seen.y, seen.mask)),
        "fusion": (fusion, (x_mean, *seen)),
        "correction": (recognition.correction, (*fusion(x_mean, *seen), *seen)),
    }


def packed(shapes: Sequence[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """The manifest's `groups`: where groups (c, b, b) lie in a vector, packed by space-to-depth in blocks of b x b."""
    ends = list(accumulate(math.prod(shape) for shape in shapes))
    return [
        {"name": f"z{number}", "shape": list(shape), "channels": [end - math.prod(shape), end], "block": shape[1]}
        for number, (shape, end) in enumerate(zip(shapes, ends, strict=True), 1)
    ]


def packed_grids(groups: Iterable[tuple[int, int]], by: int) -> list[dict[str, Any]]:
    """The manifest's `groups` of a ladder for images of any size, the coarsest first.

    Args:
        groups: Channels of each group, and its block.
        by: Height and width in pixels of a place of the coarsest grid.
    """
    found: list[dict[str, Any]] = []
    end = 0
    for number, (channels, block) in enumerate(groups, 1):
        first, end = end, end + channels * block**2
        shape = [channels, *(f"{side}/{by // block}" for side in ("height", "width"))]
        found.append({"name": f"z{number}", "shape": shape, "channels": [first, end], "block": block})
    return found


def _refinement_rows(start: DiagonalGaussian, seen: Corrupted) -> tuple[Tensor, ...]:
    """Golden rows of the refinement: all levels unknown, identity matrices as operators."""
    of_level = torch.zeros_like(seen.level)
    mean, log_var = (torch.cat([part, of_level], 1) for part in start)
    operators = (torch.eye(size).repeat(len(seen.y), 1, 1) for size in seen.y.shape[2:])
    return (mean, log_var, _normal(mean.shape), *seen, torch.ones_like(of_level), *operators)


def _normal(shape: Sequence[int]) -> Tensor:
    """Standard normal noise of a shape, from a fixed seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def export(
    graphs: Mapping[str, Exportable | Converted],
    models: Path,
    name: str,
    version: str,
    about: dict[str, Any],
    *,
    variants: Sequence[OtherVariant] = (),
    replace: bool = False,
    key: Ed25519PrivateKey | None = None,
) -> Path:
    """Write models/<name>/<version>/ atomically: a failed export leaves no version behind.

    Each graph of torch is reloaded with onnxruntime and compared with torch: with one row and with all, and at three
    sizes where `about` says that height and width are free. The model card is written last, from the rest.

    Args:
        graphs: The graphs by name, of torch or of ONNX.
        models: The model repository.
        name: Name of the model.
        version: Its version.
        about: Further keys of the manifest. `input_shape` and `latent_shape` say which sizes are free.
        variants: Further variants.
        replace: Whether an existing version is replaced.
        key: Signs the version; None leaves it unsigned.

    Returns:
        The folder of the version.

    Raises:
        ExportError: A graph differs from torch by more than 1e-5 (relative above 1; a gradient relative to its
            largest value) or contains a random operator; the manifest is invalid; or the version
            exists.
        DiskError: The folder cannot be written.
    """
    target = version_folder(models, name, version, replace=replace)
    try:
        with staged(target) as folder:
            first, rounding = _write_variant(graphs, about, folder)
            others, further = _write_others(variants, about, folder)
            manifest = manifest_of(
                {
                    "schema_version": SCHEMA_VERSION,
                    "name": name,
                    "version": version,
                    **first,
                    **about,
                    **({"variants": others} if others else {}),
                    **_rounding_told(rounding | further, about),
                }
            )
            write_manifest(folder, described(manifest, folder), key)
    except ManifestError as error:
        raise ExportError(f"{target} cannot be exported: {error}") from error
    except OSError as error:
        raise DiskError(f"cannot write {target} ({error}); make room and export again") from error
    return target


def _write_others(
    variants: Sequence[OtherVariant], about: Mapping[str, Any], folder: Path
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Write the further variants: their manifest entries, and what rounding changed, as `_write_variant` gives it."""
    shared = {"noise_families": about.get("noise_families", []), **({"size": about["size"]} if "size" in about else {})}
    others: list[dict[str, Any]] = []
    rounding: dict[str, float] = {}
    for one in variants:
        suffix = f"-{one.about['input_shape'][0]}"
        found, further = _write_variant(one.graphs, {**one.about, **shared}, folder, suffix)
        others.append({**one.about, **found})
        rounding |= {f"{key}{suffix}": loss for key, loss in further.items()}
    return others, rounding


def _write_variant(
    graphs: Mapping[str, Exportable | Converted], about: Mapping[str, Any], folder: Path, suffix: str = ""
) -> tuple[dict[str, Any], dict[str, float]]:
    """Write the graphs and golden rows of a variant.

    Args:
        graphs: By name.
        about: What the manifest says of the variant.
        folder: Of the version.
        suffix: Added to the names of the files.

    Returns:
        `graphs` and `golden` of the manifest; and what weights in float16 cost, by graph and output.
    """
    golden: dict[str, np.ndarray] = {}
    written = {
        graph: one if isinstance(one, Converted) else convert(graph, one, about) for graph, one in graphs.items()
    }
    entries = {graph: _write_graph(graph, one, about, folder, golden, suffix) for graph, one in written.items()}
    rounding = {f"{name}/{key}": loss for name, graph in written.items() for key, loss in graph.rounding.items()}
    tolerance = max(graph.tolerance for graph in written.values())
    entry = {**_write_golden(folder, golden, about, suffix), "tolerance": tolerance}
    return {"graphs": entries, "golden": entry}, rounding


def _rounding_told(found: Mapping[str, float], about: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's `training` with what weights in float16 cost, which is also told in a line."""
    if not found:
        return {}
    worst = max(found, key=lambda key: found[key])
    tell(f"weights are stored in float16, which changes outputs by at most {found[worst]:.2g} ({worst})")
    told = {key: float(f"{loss:.3g}") for key, loss in found.items()}
    return {"training": {**about.get("training", {}), "stored": "float16", "largest_rounding_error": told}}


def version_folder(models: Path, name: str, version: str, *, replace: bool) -> Path:
    """Check that a version can be written, and return its folder.

    Args:
        models: The model repository.
        name: Name of the model.
        version: Its version.
        replace: Whether an existing version may be replaced.

    Returns:
        The folder, which is not created yet.

    Raises:
        ExportError: A name is not plain, or the version exists and may not be replaced.
        DiskError: The repository is not writable.
    """
    for part in (name, version):
        if not is_plain_name(part):
            raise ExportError(f"{part!r} is not a plain name: lower-case letters, digits, '.', '_' and '-' only")
    if name == DEFAULT_FILE:
        raise ExportError(f"{name} is the file that names the default model; choose another name in the TOML")
    target = models / name / version
    if target.exists() and not replace:
        raise ExportError(f"{target} exists; choose another version or pass --replace")
    nearest = next(folder for folder in target.absolute().parents if folder.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise DiskError(f"cannot write into {nearest}; choose another --out")
    return target


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Make a hidden folder beside `target`. It replaces `target` if the block succeeds, and is removed otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            aside = target.rename(old / target.name)
            try:
                folder.rename(target)
            except BaseException:
                aside.rename(target)
                raise
            finally:
                shutil.rmtree(old)
        else:
            folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_graph(
    name: str, written: Converted, about: Mapping[str, Any], folder: Path, golden: dict[str, np.ndarray], suffix: str
) -> dict[str, Any]:
    """Write the graph, add its rows to `golden`, and return its entry in the manifest."""
    golden |= {f"{name}/{key}": row for key, row in (*written.inputs.items(), *written.outputs.items())}
    entry = write_graph(written.model, folder, name + suffix)
    inputs = shapes_of(written.signature.inputs, written.inputs, about, written.chosen)
    outputs = shapes_of(written.signature.outputs, written.outputs, about, written.chosen)
    return {**entry, "inputs": inputs, "outputs": outputs}


def shapes_of(
    tensors: Mapping[str, str],
    rows: Mapping[str, Any],
    about: Mapping[str, Any],
    chosen: Mapping[str, list[Axis]] | None = None,
) -> Shapes:
    """Shapes of tensors as the manifest writes them.

    Args:
        tensors: Axes by tensor, as a `Signature` has them.
        rows: Golden rows (n, ...) by tensor; they tell the sizes that nothing else tells.
        about: The manifest's `input_shape` and `latent_shape`.
        chosen: Shapes that the model chooses, by tensor.
    """
    found: Shapes = {}
    for key, axes in tensors.items():
        known = (chosen or {}).get(key)
        if known is None and _free(about["input_shape"]):
            families = len(about.get("noise_families", []))
            known = shape_of(axes, about["input_shape"], about["latent_shape"], families)
        found[key] = list(rows[key].shape[1:]) if known is None else list(known)
    return found


def convert(name: str, graph: Exportable, about: Mapping[str, Any]) -> Converted:
    """Convert a graph of torch to ONNX, and compare the two.

    Args:
        name: Its name, for messages.
        graph: The graph.
        about: The manifest's `input_shape`, `latent_shape` and `size`.

    Raises:
        ExportError: torch cannot export it; the two differ by more than the graph's `parity`; or the graph holds what
            the service refuses.
    """
    module = graph.module.eval().cpu()
    rows = tuple(row.detach().cpu().contiguous() for row in graph.rows)
    keys = list(graph.signature.inputs)
    shapes = shapes_of(graph.signature.inputs, dict(zip(keys, rows, strict=True)), about, graph.chosen)
    multiple_of = about.get("size", {}).get("multiple_of", 1)
    try:
        model = _traced(module, rows, graph, shapes, multiple_of)
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"torch cannot export {name}: {_first_line(error.__cause__ or error)}") from error
    check_graph(name, model)
    session = opened(model.SerializeToString())
    sizes = further_sizes(multiple_of) if any(map(_free, shapes.values())) else []
    for checked in (*(_resized(rows, list(shapes.values()), size) for size in sizes), rows):
        try:
            with torch.no_grad():
                answers = tensors_of(module(*checked))
        except RuntimeError as error:
            size = " and ".join(str(list(row.shape[1:])) for row in checked)
            raise ExportError(f"{name} does not run on {size} in torch: {_first_line(error)}") from error
        inputs = {key: row.numpy() for key, row in zip(keys, checked, strict=True)}
        outputs = {key: row.numpy() for key, row in zip(graph.signature.outputs, answers, strict=True)}
        _check_parity(name, session, inputs, outputs, graph.parity)
    rounding = (
        {} if graph.exact is None else differences(module, graph.exact.eval().cpu(), rows, graph.signature.outputs)
    )
    # The inputs and outputs are those of the golden rows, which came last.
    return Converted(model, inputs, outputs, graph.signature, rounding, graph.chosen, graph.tolerance)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def golden_size(multiple_of: int) -> tuple[int, int]:
    """Height and width of golden images of a model of free sizes: small, and different."""
    height = max(3, -(-48 // multiple_of)) * multiple_of
    return height, height - multiple_of


def golden_images(x: Tensor, multiple_of: int | None) -> Tensor:
    """Golden images of example images.

    Args:
        x: The images (n, c, h, w).
        multiple_of: What divides height and width where they are free; then parts of the images are repeated or cut to
            the golden size.

    Returns:
        `GOLDEN_ROWS` images.
    """
    height, width = x.shape[2:] if multiple_of is None else golden_size(multiple_of)
    times, down, right = (
        -(-wanted // length)
        for wanted, length in zip((GOLDEN_ROWS, height, width), (len(x), *x.shape[2:]), strict=True)
    )
    return x[:GOLDEN_ROWS].repeat(times, 1, down, right)[:GOLDEN_ROWS, :, :height, :width].contiguous()


def further_sizes(multiple_of: int) -> list[tuple[int, int]]:
    """Sizes at which a graph is compared with torch besides that of its golden rows, with which it was traced."""
    return [(2 * multiple_of, 3 * multiple_of), (5 * multiple_of, 2 * multiple_of)]


def _free(shape: Sequence[Axis]) -> bool:
    return any(isinstance(size, str) for size in shape)


def _resized(rows: tuple[Tensor, ...], shapes: list[list[Axis]], size: tuple[int, int]) -> tuple[Tensor, ...]:
    """The rows at another height and width; each pixel is repeated or left out, so that masks stay masks."""
    return tuple(
        functional.interpolate(row, at_size(shape, *size)[-2:]) if _free(shape) else row
        for row, shape in zip(rows, shapes, strict=True)
    )


def to_onnx(module: nn.Module, rows: Rows, graph: Exportable) -> bytes:
    """Convert a module to one self-contained ONNX graph.

    Args:
        module: The module, in evaluation mode.
        rows: Example inputs, one tensor (n, ...) each.
        graph: The graph's signature. Its free axes and the batch axis `n` stay variable.

    Returns:
        The graph as bytes of a .onnx file.
    """
    return _traced(module, rows, graph, {}, 1).SerializeToString()


def _traced(module: nn.Module, rows: Rows, graph: Exportable, shapes: Shapes, multiple_of: int) -> onnx.ModelProto:
    """The ONNX graph of a module; axes that `shapes` names stay variable too."""
    free = free_axes(graph.signature.inputs)
    named = {key: dict(enumerate(shape, 1)) for key, shape in shapes.items()}
    axes = tuple(
        {0: "n", **free.get(key, {}), **{k: name for k, name in named.get(key, {}).items() if isinstance(name, str)}}
        for key in graph.signature.inputs
    )
    if graph.gradients:
        rows = _apart(rows, axes)
        module = differentiated(module, rows)
    from training.export.onnx_library import compile_once  # noqa: PLC0415  # slow to import, and most commands export nothing

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    compile_once()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own deprecations
        program = torch.onnx.export(
            module,
            rows,
            dynamo=True,
            input_names=list(graph.signature.inputs),
            output_names=list(graph.signature.outputs),
            dynamic_shapes=_dynamic(axes, multiple_of),
            external_data=False,
            verbose=False,
            custom_translation_table={torch.ops.aten.log_sigmoid.default: _log_sigmoid},
        )
    assert program is not None
    model = program.model_proto
    for node in _nodes(model.graph.node):
        del node.metadata_props[:]  # they hold paths of source files on this machine
    if graph.exact is not None:
        store_as_float16(model)
    return model


def _dynamic(axes: tuple[dict[int, str], ...], multiple_of: int) -> tuple[dict[int, Any], ...]:
    """Variable axes as torch.export takes them.

    Example sizes must be 2 or more, because torch.export treats a size of 1 as a constant. `height` is `multiple_of`
    times a free number, so that `height/8` is a whole number too.
    """
    dims: dict[str, Any] = {}

    def dim(axis: str) -> Any:
        side, divisor = fraction_of(axis) or (axis, 0)
        if divisor and multiple_of > 1:
            steps = dims.setdefault(side, torch.export.Dim(f"{side}_{multiple_of}", min=1, max=MAX_STEPS))
            factor = multiple_of // divisor
            return steps if factor == 1 else factor * steps
        return dims.setdefault(side, torch.export.Dim(side, min=1, max=2**20))

    return tuple({axis: dim(name) for axis, name in named.items()} for named in axes)


def _log_sigmoid(x: Any) -> Any:
    """log sigmoid(x), finite for every x. The exporter's own log(sigmoid(x)) is -inf below -37, even in double."""
    from onnxscript import opset18  # noqa: PLC0415  # slow to import, and most commands export nothing

    op: Any = opset18
    zero, one = (op.CastLike(op.Constant(value_float=value), x) for value in (0.0, 1.0))
    return op.Sub(op.Min(x, zero), op.Log(op.Add(one, op.Exp(op.Neg(op.Abs(x))))))


def _apart(rows: tuple[Tensor, ...], axes: tuple[dict[int, str], ...]) -> tuple[Tensor, ...]:
    """Random rows whose free axes have lengths that no other axis has, so that traced sizes stay distinguishable."""
    fixed = {size for row, named in zip(rows, axes, strict=True) for k, size in enumerate(row.shape) if k not in named}
    names = dict.fromkeys(name for named in axes for name in named.values())
    lengths = dict(zip(names, (size for size in count(2) if size not in fixed), strict=False))
    shapes = [[lengths.get(named.get(k, ""), size) for k, size in enumerate(row.shape)]
              for row, named in zip(rows, axes, strict=True)]  # fmt: skip
    return tuple(torch.rand(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes)


def check_graph(name: str, model: onnx.ModelProto) -> None:
    """Refuse a graph that the service would refuse: one that draws random numbers, or is not plain ONNX.

    Raises:
        ExportError: The message names the node.
    """
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{name} is no valid ONNX graph: {error}") from error
    own = {(function.domain, function.name) for function in model.functions}
    for node in _nodes([*model.graph.node, *(node for function in model.functions for node in function.node)]):
        where = f"{name}: node {node.name!r} ({node.op_type})"
        if node.op_type in RANDOM or (node.op_type == "Dropout" and any(node.input[2:])):
            raise ExportError(f"{where} draws random numbers inside the graph; feed noise as an input")
        if node.domain not in OWN_DOMAINS and (node.domain, node.op_type) not in own:
            raise ExportError(f"{where} is of the domain {node.domain}, not of ONNX; export the model as plain ONNX")
    if any(tensor.external_data for tensor in model.graph.initializer):
        raise ExportError(f"{name} keeps weights outside its file")


def _nodes(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """These nodes and those of their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _nodes(graph.node)


def _check_parity(
    name: str,
    session: Any,
    inputs: dict[str, np.ndarray],
    outputs: dict[str, np.ndarray],
    parity: float = PARITY,
) -> None:
    """Compare the graph's outputs with known ones, by name, for one row and for all rows."""
    for size in (1, len(next(iter(inputs.values())))):
        found = session.run(list(outputs), {key: row[:size] for key, row in inputs.items()})
        for (key, known), answer in zip(outputs.items(), found, strict=True):
            difference = deviation(key, answer, known[:size])
            if not difference <= parity:
                raise ExportError(f"{name}.{key} differs from torch by {difference:.2g} (at most {parity:g})")


def _write_golden(folder: Path, arrays: dict[str, np.ndarray], about: Mapping[str, Any], suffix: str) -> dict[str, Any]:
    """Write the golden rows, and return their entry in the manifest."""
    path = (folder / GOLDEN_FILE).with_stem(f"golden{suffix}")
    np.savez_compressed(path, **{key: array[:GOLDEN_ROWS] for key, array in arrays.items()})  # type: ignore[arg-type]
    found = digest(path.read_bytes())
    entry = {"file": path.name, "sha256": found, "rows": GOLDEN_ROWS}
    if not _free(about["input_shape"]):
        return entry
    image = next(array for key, array in arrays.items() if key.partition("/")[2] in ("x", "x_mean", "restored"))
    return {**entry, "height": image.shape[2], "width": image.shape[3]}
