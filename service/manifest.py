"""The manifest of a model version: what the trainer writes and the service reads. Standard library only."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

FILE_NAME = "manifest.json"
SCHEMA_VERSION = 1
BINARISATIONS = ("sample", "none")
QUALITIES = ("fast", "refined")
PLAIN_NAME = frozenset("abcdefghijklmnopqrstuvwxyz0123456789._-")


class ManifestError(ValueError):
    """The manifest cannot be used; the message says which file, what is wrong and what to do."""


@dataclass(frozen=True)
class File:
    """A file beside the manifest."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Graph:
    """An ONNX graph: tensors by name with their shape after the batch axis, in the order of the graph."""

    file: str
    sha256: str
    inputs: dict[str, list[int]]
    outputs: dict[str, list[int]]


@dataclass(frozen=True)
class Golden:
    """Rows with known answers: an .npz with arrays `<graph>/<tensor>`, and how far an answer may be from them."""

    file: str
    sha256: str
    rows: int
    tolerance: float


@dataclass(frozen=True)
class Scoring:
    """What images the model can score, and the ELBO of images that it was not trained on.

    binary: whether only images of 0 and 1 have a probability. binarisation: of the images below and, by default, of
    those to be scored: `sample` (each pixel drawn with its grey level as its probability) or `none`.
    `elbo_percentiles_nats` are the percents 0 to 100 over `images` images, each at `draws` draws.
    """

    binary: bool
    binarisation: str
    elbo_percentiles_nats: list[float]
    images: int
    draws: int
    seed: int


@dataclass(frozen=True)
class Calibration:
    """By how much `std` is widened, so that mean +- 1.645 std holds 90 % of the true pixels of held-out images.

    `factors` by quality, then by the way in which a pixel is seen, as service/calibration.py names them: measured on
    `images` validation images, spoilt by `seed`.
    """

    factors: dict[str, dict[str, float]]
    images: int
    seed: int


@dataclass(frozen=True)
class Manifest:
    """One version of one model.

    Shapes are without the batch axis: `input_shape` (c, h, w), `latent_shape` (d,) or any other. `graphs` always has
    `encoder` (x -> mean, log_var) and `decoder` (z -> x_mean); every further ability is one more graph.
    `noise_families` names the columns of the level that the graphs of denoising take or give; empty without them.
    `training` and `quality` are for people: settings and measured figures with their units in the keys.
    `scoring` goes with the graph `log_joint`; models exported before there was one have neither. `calibration` is added
    to a version that restores, whose fingerprint it leaves as it is.
    """

    schema_version: int
    name: str
    version: str
    input_shape: list[int]
    value_range: list[float]
    latent_shape: list[int]
    likelihood: str
    prior: str
    dataset: str
    noise_families: list[str]
    graphs: dict[str, Graph]
    golden: Golden
    training: dict[str, Any]
    quality: dict[str, Any]
    scoring: Scoring | None = None
    calibration: Calibration | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change when any graph does: whose latents these are."""
        digests = "".join(f"{name}:{graph.sha256};" for name, graph in sorted(self.graphs.items()))
        return hashlib.sha256(digests.encode()).hexdigest()[:16]

    @property
    def latent_dim(self) -> int | None:
        """d where a latent is a vector, else None."""
        return self.latent_shape[0] if len(self.latent_shape) == 1 else None

    def files(self) -> list[File | Graph | Golden]:
        """Everything the manifest answers for."""
        return [*self.graphs.values(), self.golden]

    def to_json(self) -> str:
        """The manifest as text; shapes stand on one line, as a person would write them."""
        text = json.dumps(asdict(self), indent=2)
        return re.sub(r"\[[^\[\]{}\"]*\]", lambda found: "".join(found.group().split()).replace(",", ", "), text) + "\n"


def read(folder: Path) -> Manifest:
    """Read `folder`/manifest.json.

    Raises: ManifestError for a missing or unreadable file, a later schema, a missing, unknown or ill-typed key, or a
    file name that leads out of the folder.
    """
    path = folder / FILE_NAME
    try:
        return parse(path.read_bytes())
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}; a model version is a folder with a {FILE_NAME}") from error
    except ManifestError as error:
        raise ManifestError(f"{path}: {error}") from error


def parse(text: bytes) -> Manifest:
    """The manifest in `text`.

    Raises: ManifestError, as `read` does.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"not JSON ({error}); export the model again") from error
    if not isinstance(content, dict):
        raise ManifestError("not a JSON object; export the model again")
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        advice = "upgrade the service" if isinstance(version, int) and version > SCHEMA_VERSION else "export it again"
        raise ManifestError(f"schema_version is {version!r}, this service reads {SCHEMA_VERSION}; {advice}")
    manifest = _build(Manifest, content, "")
    _check(manifest)
    return manifest


def digest(content: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(content).hexdigest()


def _build(kind: type[Any], content: Any, where: str) -> Any:
    if not isinstance(content, dict):
        raise ManifestError(f"{where or 'the manifest'} must be an object")
    names = {field.name: field for field in fields(kind)}
    required = {name for name, field in names.items() if field.default is MISSING}
    for wrong, verb in ((required - content.keys(), "lacks"), (content.keys() - names.keys(), "has unknown")):
        if wrong:
            raise ManifestError(f"{where or 'the manifest'} {verb} {', '.join(sorted(wrong))}")
    return kind(**{name: _value(str(names[name].type), value, f"{where}{name}") for name, value in content.items()})


def _value(kind: str, value: Any, where: str) -> Any:
    if kind == "Golden":
        return _build(Golden, value, f"{where}.")
    if kind in _OPTIONAL:
        return None if value is None else _build(_OPTIONAL[kind], value, f"{where}.")
    if kind == "dict[str, Graph]" and isinstance(value, dict):
        return {name: _build(Graph, graph, f"{where}.{name}.") for name, graph in value.items()}
    if not _CHECKS[kind](value):
        raise ManifestError(f"{where} must be {kind}, not {value!r:.60}")
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_int(size) and 0 < size < 2**20 for size in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_OPTIONAL = {"Scoring | None": Scoring, "Calibration | None": Calibration}

_CHECKS: dict[str, Callable[[Any], bool]] = {
    "bool": lambda value: isinstance(value, bool),
    "int": _is_int,
    "float": _is_number,
    "str": lambda value: isinstance(value, str),
    "list[int]": _is_shape,
    "list[str]": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "list[float]": lambda value: isinstance(value, list) and all(map(_is_number, value)),
    "dict[str, Any]": lambda value: isinstance(value, dict),
    "dict[str, Graph]": lambda value: isinstance(value, dict),
    "dict[str, list[int]]": lambda value: (
        isinstance(value, dict) and all(shape == [] or _is_shape(shape) for shape in value.values())
    ),  # [] is one number a row
    "dict[str, dict[str, float]]": lambda value: (
        isinstance(value, dict)
        and all(isinstance(part, dict) and all(map(_is_number, part.values())) for part in value.values())
    ),
}


def _check(manifest: Manifest) -> None:
    for required in ("encoder", "decoder"):
        if required not in manifest.graphs:
            raise ManifestError(f"graphs lacks {required}")
    if len(manifest.input_shape) != 3:
        raise ManifestError(f"input_shape must be [channels, height, width], not {manifest.input_shape}")
    if len(manifest.value_range) != 2 or not manifest.value_range[0] < manifest.value_range[1]:
        raise ManifestError(f"value_range must be [low, high], not {manifest.value_range}")
    _check_scoring(manifest)
    _check_calibration(manifest)
    for entry in manifest.files():
        if not is_plain_name(entry.file):
            raise ManifestError(f"{entry.file!r} is not a plain file name")


def _check_scoring(manifest: Manifest) -> None:
    scoring = manifest.scoring
    if scoring is None:
        if "log_joint" in manifest.graphs:
            raise ManifestError("graphs has log_joint, which needs scoring; export the model again")
        return
    if scoring.binarisation not in BINARISATIONS:
        raise ManifestError(f"scoring.binarisation must be sample or none, not {scoring.binarisation!r:.60}")
    values = scoring.elbo_percentiles_nats
    if len(values) != 101 or not all(map(math.isfinite, values)) or sorted(values) != values:
        raise ManifestError("scoring.elbo_percentiles_nats must be 101 finite numbers, none below the one before it")


def _check_calibration(manifest: Manifest) -> None:
    if manifest.calibration is None:
        return
    for quality, factors in manifest.calibration.factors.items():
        if quality not in QUALITIES:
            raise ManifestError(f"calibration.factors must be of {' and '.join(QUALITIES)}, not {quality!r:.60}")
        for way, factor in factors.items():
            if not 0.0 < factor < math.inf:
                raise ManifestError(f"calibration.factors of {quality} {way!r:.60} must be above 0, not {factor}")


def is_plain_name(name: str) -> bool:
    """Whether a name is safe as a file, model or version name: lower-case letters, digits, `.`, `_`, `-`."""
    return 0 < len(name) <= 64 and PLAIN_NAME.issuperset(name) and not name.startswith(".")
