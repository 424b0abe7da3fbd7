"""Export of a trained model as a version in the model repository: ONNX graphs, golden rows and manifest."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor, nn

from service.contract.golden import deviation
from service.contract.graphs import GRAPHS, Signature, free_axes
from service.contract.manifest import (
    DEFAULT_FILE,
    FILE_NAME,
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
from training.export.external import write_graph
from training.inference.refinement import Refinement, differentiated
from training.models.restoration import Corrupted, Recognition
from training.models.vae import VAE
from training.signing import write_signature

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as in service/runtime/session.py
import onnxruntime as ort  # after the line above

PARITY = 1e-5
"""Maximum difference between torch and onnxruntime, on the machine that exports."""
GOLDEN_TOLERANCE = 1e-3
"""Tolerance of golden rows on any execution provider; TF32 keeps about three digits."""
GOLDEN_ROWS = 4
GOLDEN_FILE = "golden.npz"


@dataclass(frozen=True)
class Exportable:
    """One graph to export.

    Attributes:
        module: Maps tensors to tensors, both in the order of the signature.
        rows: Golden rows, one tensor (n, ...) for each input.
        signature: Names and axes of its inputs and outputs.
        gradients: Whether the module computes gradients.
    """

    module: nn.Module
    rows: tuple[Tensor, ...]
    signature: Signature
    gradients: bool = False


class Decode(nn.Module):
    """Decoder and likelihood: z -> E[x|z]."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.decoder, self.likelihood = vae.decoder, vae.likelihood

    def forward(self, z: Tensor) -> Tensor:
        """Map z (n, d) to mean images (n, c, h, w)."""
        return self.likelihood.mean(self.decoder(z))


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
        """Map y and mask (n, c, h, w) and level (n, F) to mean and log_var, (n, d) each."""
        return self.recognition.posterior(Corrupted(y, mask, level))


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
    mean, log_var = vae.posterior(x)
    parts: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
        "encoder": (vae.encoder, (x,)),
        "decoder": (Decode(vae), (mean,)),
        "log_joint": (LogJoint(vae), (x, mean)),
        "elbo_gradient": (ElboGradient(vae), (mean, log_var, _normal(mean.shape), x)),
    }
    if not isinstance(vae.prior, StandardNormal):  # draws of N(0, I) are the noise itself
        prior = vae.prior.frozen()
        parts["prior"] = (Draw(prior), (_normal((len(x), *prior.noise_shape)),))
    if recognition is not None:
        fusion, posterior = recognition.fusion, recognition.posterior(seen)
        x_mean = Decode(vae)(posterior.mean)
        parts |= {
            "recognition": (Recognise(recognition), tuple(seen)),
            "noise_level": (EstimateLevel(recognition), (seen.y, seen.mask)),
            "fusion": (fusion, (x_mean, *seen)),
            "correction": (recognition.correction, (*fusion(x_mean, *seen), *seen)),
            "refinement": (Refinement(vae, fusion), _refinement_rows(posterior, seen)),
        }
    return {
        name: Exportable(module, rows, GRAPHS[name], gradients=isinstance(module, (ElboGradient, Refinement)))
        for name, (module, rows) in parts.items()
    }


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
    graphs: dict[str, Exportable],
    models: Path,
    name: str,
    version: str,
    about: dict[str, Any],
    *,
    replace: bool = False,
    key: Ed25519PrivateKey | None = None,
) -> Path:
    """Write models/<name>/<version>/ atomically: a failed export leaves no version behind.

    Each graph is reloaded with onnxruntime and compared with torch.

    Args:
        graphs: The graphs by name.
        models: The model repository.
        name: Name of the model.
        version: Its version.
        about: Further keys of the manifest.
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
        target.parent.mkdir(parents=True, exist_ok=True)
        with _staged(target) as folder:
            golden: dict[str, np.ndarray] = {}
            entries = {graph: _write_graph(graph, one, folder, golden) for graph, one in graphs.items()}
            manifest = manifest_of(
                {
                    "schema_version": SCHEMA_VERSION,
                    "name": name,
                    "version": version,
                    "graphs": entries,
                    "golden": _write_golden(folder, golden),
                    **about,
                }
            )
            text = manifest.to_json().encode()
            (folder / FILE_NAME).write_bytes(text)
            if key is not None:
                write_signature(folder, text, key)
    except ManifestError as error:
        raise ExportError(f"{target} cannot be exported: {error}") from error
    except OSError as error:
        raise DiskError(f"cannot write {target} ({error}); make room and export again") from error
    return target


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
        raise ExportError(f"{target} exists; choose another version in the TOML or pass --replace")
    nearest = next(folder for folder in target.absolute().parents if folder.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise DiskError(f"cannot write into {nearest}; choose another --out")
    return target


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """Make a hidden folder beside `target`. It replaces `target` if the block succeeds, and is removed otherwise."""
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


def _write_graph(name: str, graph: Exportable, folder: Path, golden: dict[str, np.ndarray]) -> dict[str, Any]:
    """Write the graph, add its rows to `golden`, and return its entry in the manifest."""
    module = graph.module.eval().cpu()
    rows = tuple(row.detach().cpu().contiguous() for row in graph.rows)
    entry = write_graph(_traced(module, rows, graph), folder, name)
    path = folder / entry["file"]
    _check_graph(name, path)
    with torch.no_grad():
        answers = _tuple(module(*rows))
    inputs, outputs = (
        {key: row.numpy() for key, row in zip(names, tensors, strict=True)}
        for names, tensors in ((graph.signature.inputs, rows), (graph.signature.outputs, answers))
    )
    _check_parity(name, path, inputs, outputs)
    golden |= {f"{name}/{key}": row for key, row in (*inputs.items(), *outputs.items())}
    shapes = [{key: list(row.shape[1:]) for key, row in tensors.items()} for tensors in (inputs, outputs)]
    return {**entry, "inputs": shapes[0], "outputs": shapes[1]}


def to_onnx(module: nn.Module, rows: tuple[Tensor, ...], graph: Exportable) -> bytes:
    """Convert a module to one self-contained ONNX graph.

    Args:
        module: The module, in evaluation mode.
        rows: Example inputs, one tensor (n, ...) each.
        graph: The graph's signature. Its free axes and the batch axis `n` stay variable.

    Returns:
        The graph as bytes of a .onnx file.
    """
    return _traced(module, rows, graph).SerializeToString()


def _traced(module: nn.Module, rows: tuple[Tensor, ...], graph: Exportable) -> onnx.ModelProto:
    free = free_axes(graph.signature.inputs)
    axes = tuple({0: "n", **free.get(key, {})} for key in graph.signature.inputs)
    if graph.gradients:
        rows = _apart(rows, axes)
        module = differentiated(module, rows)
    # Example sizes of named axes must be 2 or more, because torch.export treats a size of 1 as a constant.
    names = dict.fromkeys(name for named in axes for name in named.values())
    dims = {name: torch.export.Dim(name, min=1, max=2**20) for name in names}
    shapes = tuple({axis: dims[name] for axis, name in named.items()} for named in axes)
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
            dynamic_shapes=shapes,
            external_data=False,
            verbose=False,
            custom_translation_table={torch.ops.aten.log_sigmoid.default: _log_sigmoid},
        )
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # they hold paths of source files on this machine
    return model


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


def _check_graph(name: str, path: Path) -> None:
    onnx.checker.check_model(path)
    model = onnx.load(path, load_external_data=False)
    random = {node.op_type for node in model.graph.node if "Random" in node.op_type or node.op_type == "Bernoulli"}
    if random:
        raise ExportError(f"{name} draws random numbers inside the graph ({', '.join(random)}); feed noise as an input")


def _check_parity(name: str, path: Path, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> None:
    """Compare the graph's outputs with torch's, by name, for one row and for all rows."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in (1, len(next(iter(inputs.values())))):
        found = session.run(list(outputs), {key: row[:size] for key, row in inputs.items()})
        for (key, known), answer in zip(outputs.items(), found, strict=True):
            difference = deviation(key, answer, known[:size])
            if not difference <= PARITY:
                raise ExportError(f"{name}.{key} differs from torch by {difference:.2g} (at most {PARITY:g})")


def _write_golden(folder: Path, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Write the golden rows, and return their entry in the manifest."""
    path = folder / GOLDEN_FILE
    np.savez_compressed(path, **{key: array[:GOLDEN_ROWS] for key, array in arrays.items()})  # type: ignore[arg-type]
    found = digest(path.read_bytes())
    return {"file": GOLDEN_FILE, "sha256": found, "rows": GOLDEN_ROWS, "tolerance": GOLDEN_TOLERANCE}


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return tuple(value) if isinstance(value, tuple) else (value,)
