"""`python -m training export --quantise`: a version whose graphs run in int8 where that is faster."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from service.contract import manifest as manifests
from service.contract.files import check_files
from service.contract.golden import deviation, read_golden
from service.contract.graphs import GRAPHS
from service.contract.images import Pixels
from service.contract.manifest import FILE_NAME, Manifest, ManifestError, digest
from training.data import Dataset
from training.errors import ConfigError, DiskError, ExportError
from training.evaluation.tasks import chosen
from training.export import int8
from training.export.card_sheet import described
from training.export.export import check_graph, staged, version_folder
from training.export.int8 import Gain, Rows
from training.export.session import opened
from training.progress import tell
from training.signing import write_manifest

LEAST_GAIN = 1.3
"""A graph is quantised if it becomes at least so many times as fast."""
SIDE = 128
"""Height and width of calibration images where sizes are free, up to the model's multiple."""
DRAWS = 4
"""Posterior draws for the ELBO of an image."""
RESTORING = {"recognition", *GRAPHS["recognition"].needs}


@dataclass(frozen=True)
class QuantiseOptions:
    """Options of `export --quantise`.

    Attributes:
        folder: Folder of the version, models/<name>/<version>.
        data: Folder of its data set; of pictures, if its manifest names none.
        version: Name of the new version; None appends `-int8`.
        models: Model repository of the new version; None is that of the other.
        images: Held-out images. Half of them give the activations' ranges, the loss is measured on the others.
        seed: Seed of the choice of images and of what is done to them.
        replace: Whether an existing version is replaced.
    """

    folder: Path
    data: Path
    version: str | None = None
    models: Path | None = None
    images: int = 400
    seed: int = 0
    replace: bool = False


class Quantised(NamedTuple):
    """A graph in int8.

    Attributes:
        content: The .onnx file.
        gains: Gains of one row and of a batch.
        loss: Figures of `int8.loss`.
    """

    content: bytes
    gains: tuple[Gain, Gain]
    loss: dict[str, float]

    @property
    def gain(self) -> float:
        """The smaller median."""
        return min(gain.median for gain in self.gains)


@dataclass(frozen=True)
class Source:
    """A version to quantise.

    Attributes:
        folder: Its folder.
        manifest: Its manifest.
        sessions: Its graphs, opened, by name.
    """

    folder: Path
    manifest: Manifest
    sessions: dict[str, ort.InferenceSession]

    def run(self, name: str, rows: Rows) -> Rows:
        """Run a graph on its inputs."""
        return int8.run_in_batches(self.sessions[name], rows)

    def with_graphs(self, graphs: Mapping[str, Quantised]) -> Source:
        """The version with some graphs replaced."""
        sessions = {name: opened(graph.content) for name, graph in graphs.items()}
        return Source(self.folder, self.manifest, {**self.sessions, **sessions})


def quantise(plan: QuantiseOptions, least_gain: float = LEAST_GAIN, key: Ed25519PrivateKey | None = None) -> Path:
    """Write a version whose graphs are in int8, where they become faster by `least_gain`.

    Gain and loss of every graph are told, and written into the manifest.

    Args:
        plan: The options.
        least_gain: How many times as fast a graph must become, alone and in a batch.
        key: Signs the version; None leaves it unsigned.

    Returns:
        The folder of the new version.

    Raises:
        ExportError: No graph becomes so much faster; the version cannot be quantised; or the new one exists.
        ConfigError: The folder holds no version, or its data set is not known.
        DataError: The images cannot be loaded.
        DiskError: The folder cannot be written.
    """
    source = _source(plan.folder)
    manifest = source.manifest
    version = plan.version or f"{manifest.version}-int8"
    models = plan.models or plan.folder.absolute().parents[1]
    target = version_folder(models, manifest.name, version, replace=plan.replace)
    x = _held_out(manifest, plan)
    found = _quantised(source, x, plan.seed, least_gain)
    taken = {name: graph for name, graph in found.items() if graph.gain >= least_gain}
    if not taken:
        raise ExportError(f"no graph of {plan.folder} is {least_gain:g} times as fast in int8; nothing is written")
    scored = "log_joint" in manifest.graphs and taken.keys() & {"encoder", "posterior"}
    moved = _elbo_moved(source, source.with_graphs(taken), x[len(x) // 2 :], plan.seed) if scored else None
    try:
        with staged(target) as folder:
            manifest = _write(source, taken, moved, version, folder)
            write_manifest(folder, described(manifest, folder), key)
    except OSError as error:
        raise DiskError(f"cannot write {target} ({error}); make room and export again") from error
    return target


def _source(folder: Path) -> Source:
    """Read a version, and check its files.

    Raises:
        ConfigError: The folder holds none, or a file is not as the manifest says.
        ExportError: It has variants, or external data.
    """
    try:
        manifest = manifests.read(folder)
        if manifest.training.get("stored") == "int8":
            raise ConfigError(f"{folder} is in int8 already; quantise the version that it was made from")
        if manifest.variants or any(graph.data for graph in manifest.graphs.values()):
            raise ExportError(f"{folder} has variants or weights outside its graphs; quantise one whole variant")
        check_files(folder, manifest)
    except ManifestError as error:
        raise ConfigError(str(error)) from error
    if (manifest.name, manifest.version) != folder.absolute().parts[-2:]:
        raise ConfigError(f"{folder} holds version {manifest.version} of {manifest.name}; name the folders after them")
    sessions = {name: opened(folder / graph.file) for name, graph in manifest.graphs.items()}
    return Source(folder, manifest, sessions)


def _held_out(manifest: Manifest, plan: QuantiseOptions) -> Pixels:
    """Images of the validation split of the version's data set; of the pictures in `data`, where it names none.

    Raises:
        ConfigError: The data set is unknown, or has images of another size.
    """
    height, width = manifest.golden_size()
    if manifest.size is not None:
        height = width = manifest.size.padded(SIDE)
    mode = "L" if manifest.channels == 1 else "RGB"
    pictures = {"dataset": "folder", "height": height, "width": width, "mode": mode}
    settings = manifest.training.get("settings", {}).get("data", pictures)
    try:
        dataset: Dataset = TypeAdapter(Dataset).validate_python(settings)
    except ValidationError as error:
        raise ConfigError(f"training.settings.data of {plan.folder / FILE_NAME} is no data set: {error}") from error
    x = chosen(dataset.load(plan.data).validation, plan.images, plan.seed)
    wanted = (manifest.channels, *(axis for axis in manifest.input_shape[1:] if isinstance(axis, int)))
    if x.shape[1 : 1 + len(wanted)] != wanted or len(x) < 2:
        raise ConfigError(
            f"{plan.data} has {len(x)} held-out images of shape {x.shape[1:]}; two of {wanted} are needed"
        )
    return x


def _quantised(source: Source, x: Pixels, seed: int, least_gain: float) -> dict[str, Quantised]:
    """Every candidate in int8, with the fewest operators quantised that make it fast enough; else with all."""
    found: dict[str, Quantised] = {}
    for name, rows in int8.rows_of(source.manifest, source.run, x, seed).items():
        one = None
        for kept in int8.choices(source.folder / source.manifest.graphs[name].file):
            one = _measured(source, name, rows, kept)
            if one.gain >= least_gain:
                break
        if one is None:
            continue  # it has no convolution and no matrix product
        found[name] = one
        verdict = "int8" if one.gain >= least_gain else "stays float32"
        figures = ", ".join(f"{key} {value:.3g}" for key, value in one.loss.items())
        tell(f"{name:12} {verdict:14} {one.gains[0]} times as fast alone, {one.gains[1]} in a batch; {figures}")
    return found


def _measured(source: Source, name: str, rows: Rows, kept: tuple[int, int]) -> Quantised:
    half = len(next(iter(rows.values()))) // 2
    content = int8.quantised(source.folder / source.manifest.graphs[name].file, _part(rows, 0, half), kept)
    before, after, held_out = source.sessions[name], opened(content), _part(rows, half, None)
    alone, batch = (int8.gain(before, after, _part(held_out, 0, size)) for size in (1, int8.ROWS))
    known, found = (int8.run_in_batches(session, held_out) for session in (before, after))
    return Quantised(content, (alone, batch), int8.loss(known, found, source.manifest.value_range))


def _part(rows: Rows, first: int, end: int | None) -> Rows:
    return {key: array[first:end] for key, array in rows.items()}


def _elbo_moved(before: Source, after: Source, x: Pixels, seed: int) -> NDArray[Any]:
    """By how many nats the ELBO of each image has changed, (n,)."""
    values = [int8.elbo(one.manifest, one.run, x, DRAWS, seed) for one in (before, after)]
    moved: NDArray[Any] = values[1] - values[0]
    tell(
        f"ELBO of {len(x)} held-out images: {values[0].mean():.2f} nats, in int8 {values[1].mean():.2f} "
        f"({moved.mean():+.3f} +- {_error(moved):.3f})"
    )
    return moved


def _error(values: NDArray[Any]) -> float:
    return float(values.std() / np.sqrt(len(values)))


def _write(
    source: Source, graphs: Mapping[str, Quantised], moved: NDArray[Any] | None, version: str, folder: Path
) -> Manifest:
    """Write the files of the new version, copying what does not change, and return its manifest."""
    manifest = source.manifest
    entries = dict(manifest.graphs)
    for name, entry in manifest.graphs.items():
        if name not in graphs:
            shutil.copyfile(source.folder / entry.file, folder / entry.file)
            continue
        check_graph(name, onnx.load_model_from_string(graphs[name].content))
        (folder / entry.file).write_bytes(graphs[name].content)
        entries[name] = entry.model_copy(update={"sha256": digest(graphs[name].content)})
    changes: dict[str, Any] = {
        "version": version,
        "graphs": entries,
        "golden": _write_golden(source, graphs, folder),
        "training": {**manifest.training, "stored": "int8", "quantised": sorted(graphs)},
        "quality": {"int8": _told(graphs, moved), "before": manifest.quality},
        "card": None,
    }
    if graphs.keys() & RESTORING and manifest.calibration is not None:
        changes["calibration"] = None
        tell(
            "the factors of std are those of the float32 version and are left out; measure them anew with "
            f"python -m training calibrate --model {manifest.name}"
        )
    if moved is not None and manifest.scoring is not None:
        percentiles = [round(nats + float(moved.mean()), 3) for nats in manifest.scoring.elbo_percentiles_nats]
        changes["scoring"] = manifest.scoring.model_copy(update={"elbo_percentiles_nats": percentiles})
    return manifest.model_copy(update=changes)


def _write_golden(source: Source, graphs: Mapping[str, Quantised], folder: Path) -> manifests.Golden:
    """Write golden rows with the quantised graphs' answers, and return their entry.

    Float operations differ in the last digit between processors, which may move an activation by one of its 256
    steps. So an answer may be as far off as quantisation has moved it.
    """
    manifest, entry = source.manifest, source.manifest.golden
    golden = read_golden((source.folder / entry.file).read_bytes(), manifest)
    tolerance = entry.tolerance
    for name, graph in graphs.items():
        rows = {key: golden[f"{name}/{key}"] for key in manifest.graphs[name].inputs}
        for key, answer in int8.run_in_batches(opened(graph.content), rows).items():
            tolerance = max(tolerance, deviation(key, answer, golden[f"{name}/{key}"]))
            golden[f"{name}/{key}"] = answer
    np.savez_compressed(folder / entry.file, **golden)  # type: ignore[arg-type]
    found = digest((folder / entry.file).read_bytes())
    return entry.model_copy(update={"sha256": found, "tolerance": float(f"{tolerance:.2g}")})


def _told(graphs: Mapping[str, Quantised], moved: NDArray[Any] | None) -> dict[str, Any]:
    """Gain and loss for the manifest's `quality`."""
    told: dict[str, Any] = {
        name: {
            "speed_alone": round(graph.gains[0].median, 2),
            "speed_in_a_batch": round(graph.gains[1].median, 2),
            **{key: float(f"{value:.3g}") for key, value in graph.loss.items()},
        }
        for name, graph in graphs.items()
    }
    if moved is not None:
        told["elbo_moved_nats"] = round(float(moved.mean()), 3)
        told["elbo_moved_standard_error_nats"] = round(_error(moved), 3)
    return told
