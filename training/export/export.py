"""From a trained model to a version in the model repository: ONNX graphs, golden vectors, manifest; all or nothing."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from service.contract.golden import deviation
from service.contract.manifest import (
    DEFAULT_FILE,
    FILE_NAME,
    SCHEMA_VERSION,
    File,
    Golden,
    Graph,
    Manifest,
    digest,
    is_plain_name,
)
from training.distributions.gaussian import DiagonalGaussian
from training.distributions.interface import Prior
from training.distributions.priors.standard_normal import StandardNormal
from training.errors import DiskError, ExportError
from training.evaluation.scoring import ElboGradient, LogJoint
from training.inference.refinement import Refinement, differentiated
from training.models.restoration import FAMILIES, Observation, Recognition
from training.models.vae import VAE

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as in service/runtime/session.py
import onnxruntime as ort  # after the line above

PARITY = 1e-5  # between torch and onnxruntime, on the machine that exports
GOLDEN_TOLERANCE = 1e-3  # for whatever execution provider serves it later: TF32 keeps about three digits
GOLDEN_ROWS = 4
GOLDEN_FILE = "golden.npz"


@dataclass(frozen=True)
class Exportable:
    """One graph: a module, rows to run it on, and the names of what goes in and out.

    `free` names further axes of inputs that may have any length, by input and axis. A module that asks for gradients
    says so.
    """

    module: nn.Module
    rows: tuple[Tensor, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    free: dict[str, dict[int, str]] = field(default_factory=dict)
    gradients: bool = False


class Decode(nn.Module):
    """z -> E[x|z]."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.decoder, self.likelihood = vae.decoder, vae.likelihood

    def forward(self, z: Tensor) -> Tensor:
        """(n, d) -> (n, c, h, w)."""
        return self.likelihood.mean(self.decoder(z))


class Draw(nn.Module):
    """eps ~ N(0, I) -> z ~ p(z)."""

    def __init__(self, prior: Prior) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, eps: Tensor) -> Tensor:
        """(n, *noise_shape) -> (n, d)."""
        return self.prior.draw(eps)


class Recognise(nn.Module):
    """y, mask, level -> mean, log_var of q(z | y, mask, level)."""

    def __init__(self, recognition: Recognition) -> None:
        super().__init__()
        self.recognition = recognition

    def forward(self, y: Tensor, mask: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """(n, c, h, w), (n, c, h, w), (n, F) -> (n, d), (n, d)."""
        return self.recognition.posterior(Observation(y, mask, level))


class EstimateLevel(nn.Module):
    """y, mask -> the level of each noise family, were it the one at work."""

    def __init__(self, recognition: Recognition) -> None:
        super().__init__()
        self.recognition = recognition

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        """(n, c, h, w), (n, c, h, w) -> (n, F)."""
        return self.recognition.log_level(y, mask).mean.exp()


@torch.no_grad()
def exportables(vae: VAE, recognition: Recognition | None, x: Tensor, seen: Observation) -> dict[str, Exportable]:
    """Everything the service needs, with golden rows: clean images `x` and what is `seen` of them after corruption."""
    mean, log_var = vae.posterior(x)
    eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    graphs = {
        "encoder": Exportable(vae.encoder, (x,), ("x",), ("mean", "log_var")),
        "decoder": Exportable(Decode(vae), (mean,), ("z",), ("x_mean",)),
        "log_joint": Exportable(LogJoint(vae), (x, mean), ("x", "z"), ("log_likelihood", "log_prior")),
        "elbo_gradient": Exportable(
            ElboGradient(vae),
            (mean, log_var, eps, x),
            ("q_mean", "q_log_var", "eps", "x"),
            ("elbo", "q_mean_gradient", "q_log_var_gradient"),
            gradients=True,
        ),
    }
    if not isinstance(vae.prior, StandardNormal):  # whose draws are the noise itself
        prior = vae.prior.frozen()
        noise = torch.randn(len(x), *prior.noise_shape, generator=torch.Generator().manual_seed(0))
        graphs["prior"] = Exportable(Draw(prior), (noise,), ("eps",), ("z",))
    if recognition is not None:
        fusion, x_mean = recognition.fusion, Decode(vae)(recognition.posterior(seen).mean)
        observed, restored = ("y", "mask", "level"), ("restored", "variance")
        graphs |= {
            "recognition": Exportable(Recognise(recognition), tuple(seen), observed, ("mean", "log_var")),
            "noise_level": Exportable(EstimateLevel(recognition), (seen.y, seen.mask), ("y", "mask"), ("level",)),
            "fusion": Exportable(fusion, (x_mean, *seen), ("x_mean", *observed), restored),
            "correction": Exportable(
                recognition.correction,
                (*fusion(x_mean, *seen), *seen),
                ("fused", "fused_variance", *observed),
                restored,
            ),
            "refinement": _refinement(Refinement(vae, fusion), recognition.posterior(seen), seen),
        }
    return graphs


def _refinement(module: Refinement, start: DiagonalGaussian, seen: Observation) -> Exportable:
    """Golden rows: every level unknown, what is seen is the image itself."""
    n, _, height, width = seen.y.shape
    of_level = torch.zeros(n, len(FAMILIES))
    mean, log_var = (torch.cat([part, of_level], 1) for part in start)
    eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    operators = (torch.eye(size).repeat(n, 1, 1) for size in (height, width))
    size = {2: "seen_height", 3: "seen_width"}
    return Exportable(
        module,
        (mean, log_var, eps, seen.y, seen.mask, seen.level, torch.ones_like(of_level), *operators),
        ("q_mean", "q_log_var", "eps", "y", "mask", "level", "unknown", "rows", "columns"),
        ("elbo", "drawn", "q_mean_gradient", "q_log_var_gradient"),
        free={"y": size, "mask": size, "rows": {1: size[2]}, "columns": {1: size[3]}},
        gradients=True,
    )


def export(
    graphs: dict[str, Exportable],
    models: Path,
    name: str,
    version: str,
    about: dict[str, Any],
    *,
    replace: bool = False,
) -> Path:
    """Write models/<name>/<version>/ and give its path. `about` fills the rest of the manifest.

    Each graph is reloaded with onnxruntime and compared with torch. The folder appears in one step, whole, or not at
    all.
    Raises: ExportError where a graph differs by more than 1e-5 (of the value, where that is above 1; a
    gradient of its largest), holds a random operator or has external data, or where the version exists; DiskError.
    """
    target = version_folder(models, name, version, replace=replace)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _staged(target) as folder:
            golden: dict[str, np.ndarray] = {}
            entries = {graph: _write_graph(graph, one, folder, golden) for graph, one in graphs.items()}
            manifest = Manifest(
                schema_version=SCHEMA_VERSION,
                name=name,
                version=version,
                graphs=entries,
                golden=_write_golden(folder, golden),
                **about,
            )
            (folder / FILE_NAME).write_text(manifest.to_json())
    except OSError as error:
        raise DiskError(f"cannot write {target} ({error}); make room and export again") from error
    return target


def version_folder(models: Path, name: str, version: str, *, replace: bool) -> Path:
    """Where the version goes.

    Raises: ExportError for a name that is not plain or a version that exists and is not to be replaced; DiskError
    where nothing can be written there.
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
    """A hidden folder beside `target` that takes its place when the block ends well, and vanishes when not."""
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


def _write_graph(name: str, graph: Exportable, folder: Path, golden: dict[str, np.ndarray]) -> Graph:
    module = graph.module.eval().cpu()
    rows = tuple(row.detach().cpu().contiguous() for row in graph.rows)
    content = to_onnx(module, rows, graph)
    _check_graph(name, content)
    with torch.no_grad():
        answers = _tuple(module(*rows))
    _check_parity(name, content, rows, answers)
    golden |= {f"{name}/{key}": row.numpy() for key, row in zip(graph.inputs, rows, strict=True)}
    golden |= {f"{name}/{key}": row.numpy() for key, row in zip(graph.outputs, answers, strict=True)}
    file = f"{name}.onnx"
    (folder / file).write_bytes(content)
    shapes = [{key: list(row.shape[1:]) for key, row in zip(keys, tensors, strict=True)}
              for keys, tensors in ((graph.inputs, rows), (graph.outputs, answers))]  # fmt: skip
    return Graph(file=file, sha256=digest(content), inputs=shapes[0], outputs=shapes[1])


def to_onnx(module: nn.Module, rows: tuple[Tensor, ...], graph: Exportable) -> bytes:
    """One self-contained ONNX graph of the module with a dynamic first axis `n`, and what else is free."""
    axes = tuple({0: "n", **graph.free.get(key, {})} for key in graph.inputs)
    if graph.gradients:
        rows = _apart(rows, axes)
        module = differentiated(module, rows)
    # Names are given for shape sizes of 2 and more: torch.export takes a size of 1 for a constant.
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
            input_names=graph.inputs,
            output_names=graph.outputs,
            dynamic_shapes=shapes,
            external_data=False,
            verbose=False,
            custom_translation_table={torch.ops.aten.log_sigmoid.default: _log_sigmoid},
        )
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # where on this machine's disk the code stood
    return model.SerializeToString()


def _log_sigmoid(x: Any) -> Any:
    """log sigmoid(x) for every x: the exporter's log of onnxruntime's sigmoid is -inf below -37, even in double."""
    from onnxscript import opset18  # noqa: PLC0415  # likewise

    op: Any = opset18
    zero, one = (op.CastLike(op.Constant(value_float=value), x) for value in (0.0, 1.0))
    return op.Sub(op.Min(x, zero), op.Log(op.Add(one, op.Exp(op.Neg(op.Abs(x))))))


def _apart(rows: tuple[Tensor, ...], axes: tuple[dict[int, str], ...]) -> tuple[Tensor, ...]:
    """Rows of no meaning whose free axes have lengths that no other axis has."""
    fixed = {size for row, named in zip(rows, axes, strict=True) for k, size in enumerate(row.shape) if k not in named}
    names = dict.fromkeys(name for named in axes for name in named.values())
    lengths = dict(zip(names, (size for size in count(2) if size not in fixed), strict=False))
    shapes = [[lengths.get(named.get(k, ""), size) for k, size in enumerate(row.shape)]
              for row, named in zip(rows, axes, strict=True)]  # fmt: skip
    return tuple(torch.rand(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes)


def _check_graph(name: str, content: bytes) -> None:
    model = onnx.load_model_from_string(content)
    onnx.checker.check_model(model)
    random = {node.op_type for node in model.graph.node if "Random" in node.op_type or node.op_type == "Bernoulli"}
    if random:
        raise ExportError(f"{name} draws random numbers inside the graph ({', '.join(random)}); feed noise as an input")
    if any(tensor.external_data for tensor in model.graph.initializer):
        raise ExportError(f"{name} keeps weights outside its file")


def _check_parity(name: str, content: bytes, rows: tuple[Tensor, ...], answers: tuple[Tensor, ...]) -> None:
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in session.get_inputs()]
    for size in (1, len(rows[0])):
        found = session.run(None, {key: row[:size].numpy() for key, row in zip(names, rows, strict=True)})
        for key, mine, theirs in zip(session.get_outputs(), answers, found, strict=True):
            difference = deviation(key.name, theirs, mine[:size].numpy())
            if not difference <= PARITY:
                raise ExportError(f"{name}.{key.name} differs from torch by {difference:.2g} (at most {PARITY:g})")


def _write_golden(folder: Path, arrays: dict[str, np.ndarray]) -> Golden:
    path = folder / GOLDEN_FILE
    np.savez_compressed(path, **{key: array[:GOLDEN_ROWS] for key, array in arrays.items()})  # type: ignore[arg-type]
    entry = File(GOLDEN_FILE, digest(path.read_bytes()))
    return Golden(entry.file, entry.sha256, rows=GOLDEN_ROWS, tolerance=GOLDEN_TOLERANCE)


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return tuple(value) if isinstance(value, tuple) else (value,)
