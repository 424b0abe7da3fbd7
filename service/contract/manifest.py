"""The manifest of a model version: what the trainer writes and the service reads. Standard library only."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import Any

FILE_NAME = "manifest.json"
DEFAULT_FILE = "default"
"""Beside the models: one line, the name of the model that requests without a name mean."""
MAX_DEFAULT_BYTES = 128
SCHEMA_VERSION = 1
ADVICE = "export the model again"
BINARISATIONS = ("sample", "none")
QUALITIES = ("fast", "refined")
PLAIN_NAME = frozenset("abcdefghijklmnopqrstuvwxyz0123456789._-")

MAX_MANIFEST_BYTES = 2**20
MAX_FILE_BYTES = 2**31 - 1
"""Of a graph: protobuf takes no more."""
MAX_GOLDEN_BYTES = 2**30
"""Of the golden arrays, unpacked."""
MAX_DEPTH = 32
"""Objects and lists inside each other in a manifest; writers of JSON give up at 254."""
MAX_AXES, MAX_NUMBERS = 8, 2**28
"""Of one row of a tensor."""
MAX_ENTRIES = 64
"""Graphs of a version, tensors of a graph, noise families."""
MOST_VALUES = 128
"""Values of a list."""
MAX_ROWS = 4096
"""Golden rows."""
MAX_FLOAT32 = 3.4e38
MOST_SHOWN = 60
"""Characters of a value that a message repeats."""

IMAGES = ("x", "y", "mask", "x_mean", "restored", "variance", "fused", "fused_variance")
LATENTS = ("z", "mean", "log_var")
LEVELS = ("level", "unknown", "drawn")
NUMBERS = ("elbo", "log_likelihood", "log_prior")
"""What the tensors of the graphs below are, by their names."""
OBSERVED, RESTORED = ("y", "mask", "level"), ("restored", "variance")
SIGNATURES = {
    "encoder": (("x",), ("mean", "log_var")),
    "decoder": (("z",), ("x_mean",)),
    "prior": (("eps",), ("z",)),
    "log_joint": (("x", "z"), ("log_likelihood", "log_prior")),
    "elbo_gradient": (("q_mean", "q_log_var", "eps", "x"), ("elbo", "q_mean_gradient", "q_log_var_gradient")),
    "recognition": (OBSERVED, ("mean", "log_var")),
    "noise_level": (("y", "mask"), ("level",)),
    "fusion": (("x_mean", *OBSERVED), RESTORED),
    "correction": (("fused", "fused_variance", *OBSERVED), RESTORED),
    "refinement": (
        ("q_mean", "q_log_var", "eps", *OBSERVED, "unknown", "rows", "columns"),
        ("elbo", "drawn", "q_mean_gradient", "q_log_var_gradient"),
    ),
}
"""Inputs and outputs of the graphs that the service runs, in the order in which it gives and takes them."""
ASCENTS = ("elbo_gradient", "refinement")
"""Graphs whose `q_...` is a posterior of the latents, in `refinement` followed by the levels of the noise."""
NEEDS = {
    **dict.fromkeys(("recognition", "refinement"), ("recognition", "noise_level", "fusion", "correction")),
}
"""Graphs that are run together."""


class ManifestError(ValueError):
    """The manifest cannot be used; the message says which file, what is wrong and what to do."""


@dataclass(frozen=True)
class File:
    """A file beside the manifest."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Graph:
    """An ONNX graph: tensors by name with their shape after the batch axis, in the order of `SIGNATURES`."""

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

    `factors` by quality, then by the way in which a pixel is seen, as service/contract/calibration.py names them:
    measured on `images` validation images, spoilt by `seed`.
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
    to a version that restores, whose fingerprint it leaves as it is. `tileable` says that parts of larger images look
    like the images that the model was trained on, so that these may be restored tile by tile.
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
    tileable: bool = False

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

    def golden_shapes(self) -> dict[str, tuple[int, ...]]:
        """The golden arrays, `<graph>/<tensor>`, with their shapes."""
        return {
            f"{name}/{key}": (self.golden.rows, *shape)
            for name, graph in self.graphs.items()
            for key, shape in (*graph.inputs.items(), *graph.outputs.items())
        }

    def golden_bytes(self) -> int:
        """What the golden arrays take in float32."""
        return sum(4 * math.prod(shape) for shape in self.golden_shapes().values())

    def to_json(self) -> str:
        """The manifest as text; shapes stand on one line, as a person would write them."""
        text = json.dumps(asdict(self), indent=2)
        return re.sub(r"\[[^\[\]{}\"]*\]", lambda found: "".join(found.group().split()).replace(",", ", "), text) + "\n"


def read(folder: Path) -> Manifest:
    """Read `folder`/manifest.json.

    Raises: ManifestError for a missing or unreadable file, a later schema, a missing, unknown or ill-typed key, or a
    file name that leads out of the folder.
    """
    return parse_file(folder, read_text(folder))


def read_text(folder: Path) -> bytes:
    """The bytes of `folder`/manifest.json.

    Raises: ManifestError, as `read_file` does.
    """
    advice = f"a model version is a folder with a {FILE_NAME}"
    return read_file(folder, FILE_NAME, MAX_MANIFEST_BYTES, advice)


def parse_file(folder: Path, text: bytes) -> Manifest:
    """The manifest in `text`, which lies in `folder`.

    Raises: ManifestError that names the file.
    """
    try:
        return parse(text)
    except ManifestError as error:
        raise ManifestError(f"{folder / FILE_NAME}: {error}") from error


def read_file(folder: Path, name: str, max_bytes: int, advice: str = ADVICE) -> bytes:
    """The content of a regular file of the version in `folder`.

    Raises: ManifestError, as `open_file` does.
    """
    with open_file(folder, name, max_bytes, advice) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1)  # which takes memory for so many bytes at once
    if len(content) > size:
        raise ManifestError(f"{folder / name} grew while it was read; {advice}")
    return content


def has_digest(folder: Path, entry: File | Graph | Golden, max_bytes: int) -> bool:
    """Whether a file of the version in `folder` is as its manifest says.

    Raises: ManifestError, as `open_file` does.
    """
    with open_file(folder, entry.file, max_bytes) as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256


@contextmanager
def open_file(folder: Path, name: str, max_bytes: int, advice: str = ADVICE) -> Iterator[BufferedReader]:
    """A regular file of the version in `folder`, opened for reading.

    Links are followed, since Kubernetes mounts files as links. Never waits for a writer, as opening a FIFO would.

    Raises:
        ManifestError: The file is missing, not regular, larger than `max_bytes`, or cannot be read.
    """
    path = folder / name
    irregular = ManifestError(f"{path} is not a regular file; {advice}")
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a device may already do something
            raise irregular
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise irregular
            if found.st_size > max_bytes:
                raise ManifestError(f"{path} is larger than the {max_bytes} bytes that it may have; {advice}")
            yield file
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}; {advice}") from error


def parse(text: bytes) -> Manifest:
    """The manifest in `text`.

    Raises: ManifestError, as `read` does.
    """
    if len(text) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"larger than the {MAX_MANIFEST_BYTES} bytes that a manifest may have")
    content = _json(text)
    if not isinstance(content, dict):
        raise ManifestError("not a JSON object; export the model again")
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        advice = "upgrade the service" if isinstance(version, int) and version > SCHEMA_VERSION else "export it again"
        raise ManifestError(f"schema_version is {shown(version)}, this service reads {SCHEMA_VERSION}; {advice}")
    manifest = _build(Manifest, content, "")
    _check(manifest)
    return manifest


def digest(content: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(content).hexdigest()


def _json(text: bytes) -> Any:
    """What the text says, if every JSON writer can say it again: names once, finite numbers of 64 bits, real text."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise ManifestError(f"{_named([name])} stands twice in one object; keep one of them")
        return found

    try:
        content = json.loads(text.decode("utf-8-sig"), object_pairs_hook=once)
    except ManifestError:
        raise
    except UnicodeDecodeError as error:
        raise ManifestError("not JSON in UTF-8; export the model again") from error
    except RecursionError as error:
        raise ManifestError(f"not JSON of at most {MAX_DEPTH} levels; export the model again") from error
    except ValueError as error:
        raise ManifestError(f"not JSON ({error}); export the model again") from error
    _check_plain(content)
    return content


def _check_plain(content: Any) -> None:
    waiting = [(content, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise ManifestError(f"more than {MAX_DEPTH} levels deep; export the model again")
        if isinstance(value, dict):
            waiting += ((part, depth + 1) for pair in value.items() for part in pair)
        elif isinstance(value, list):
            waiting += ((part, depth + 1) for part in value)
        elif isinstance(value, str):
            if any("\ud800" <= letter <= "\udfff" for letter in value):
                raise ManifestError("holds half a character (a lone surrogate); export the model again")
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise ManifestError("holds a number that is not finite; export the model again")
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ManifestError("holds a whole number of more than 64 bits; export the model again")


def shown(value: Any) -> str:
    """A value from a file as messages repeat it: in ASCII, of bounded length; text in single quotes, else JSON."""
    text = json.dumps(value)
    text = text[1:-1] if isinstance(value, str) else text
    text = text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
    return f"'{text}'" if isinstance(value, str) else text


def _named(names: Iterable[str]) -> str:
    """Names in a message: the first few, each on one line and short."""
    first = sorted(names)[:5]
    return ", ".join(name if is_plain_name(name) else f"{shown(name)}" for name in first)


def _build(kind: type[Any], content: Any, where: str) -> Any:
    if not isinstance(content, dict):
        raise ManifestError(f"{where or 'the manifest'} must be an object")
    names = {field.name: field for field in fields(kind)}
    required = {name for name, field in names.items() if field.default is MISSING}
    for wrong, verb in ((required - content.keys(), "lacks"), (content.keys() - names.keys(), "has unknown")):
        if wrong:
            raise ManifestError(f"{where or 'the manifest'} {verb} {_named(wrong)}")
    return kind(**{name: _value(str(names[name].type), value, f"{where}{name}") for name, value in content.items()})


def _value(kind: str, value: Any, where: str) -> Any:
    if kind == "Golden":
        return _build(Golden, value, f"{where}.")
    if kind in _OPTIONAL:
        return None if value is None else _build(_OPTIONAL[kind], value, f"{where}.")
    if kind == "dict[str, Graph]" and isinstance(value, dict):
        if len(value) > MAX_ENTRIES:
            raise ManifestError(f"{where} has {len(value)} entries, at most {MAX_ENTRIES} are read")
        graphs = {name: _build(Graph, graph, f"{where}.{_named([name])}.") for name, graph in value.items()}
        return {name: _ordered(name, graph) for name, graph in graphs.items()}
    if isinstance(value, list) and len(value) > MOST_VALUES:
        raise ManifestError(f"{where} has {len(value)} entries, at most {MOST_VALUES} are read")
    if not _CHECKS[kind](value):
        raise ManifestError(f"{where} must be {kind}, not {shown(value)}")
    return value


def _ordered(name: str, graph: Graph) -> Graph:
    """The graph with its tensors in the order of its signature: they are given and taken by place."""
    inputs, outputs = (
        {key: shapes[key] for key in (*known, *shapes) if key in shapes}
        for known, shapes in zip(SIGNATURES.get(name, ((), ())), (graph.inputs, graph.outputs), strict=True)
    )
    return replace(graph, inputs=inputs, outputs=outputs)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 0 < len(value) <= MAX_AXES
        and all(_is_int(size) and 0 < size < 2**20 for size in value)
        and math.prod(value) <= MAX_NUMBERS
    )


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
        isinstance(value, dict)
        and 0 < len(value) <= MAX_ENTRIES
        and all(shape == [] or _is_shape(shape) for shape in value.values())
    ),  # [] is one number a row
    "dict[str, dict[str, float]]": lambda value: (
        isinstance(value, dict)
        and all(
            isinstance(part, dict) and len(part) <= MAX_ENTRIES and all(map(_is_number, part.values()))
            for part in value.values()
        )
    ),
}


def _check(manifest: Manifest) -> None:
    _check_names(manifest)
    if len(manifest.input_shape) != 3:
        raise ManifestError(f"input_shape must be [channels, height, width], not {shown(manifest.input_shape)}")
    if len(manifest.value_range) != 2 or not manifest.value_range[0] < manifest.value_range[1]:
        raise ManifestError(f"value_range must be [low, high], not {shown(manifest.value_range)}")
    if max(map(abs, manifest.value_range)) > MAX_FLOAT32:
        raise ManifestError("value_range must hold float32 numbers")
    for required in ("encoder", "decoder"):
        if required not in manifest.graphs:
            raise ManifestError(f"graphs lacks {required}")
    for name, graph in manifest.graphs.items():
        _check_graph(manifest, name, graph)
    _check_golden(manifest)
    _check_scoring(manifest)
    _check_calibration(manifest)
    _check_files(manifest)


def _check_names(manifest: Manifest) -> None:
    for key, name in (("name", manifest.name), ("version", manifest.version)):
        if not (name.isascii() and is_plain_name(name.lower())):
            raise ManifestError(f"{key} must be letters, digits, '.', '_' and '-', not {shown(name)}")
    families = manifest.noise_families
    if len(set(families)) < len(families) or not all(map(is_plain_name, families)):
        raise ManifestError(f"noise_families must be different plain names, not {_named(families)}")
    for name in manifest.graphs:
        if not is_plain_name(name):
            raise ManifestError(f"graphs holds {shown(name)}, which is not a plain name")


def _check_files(manifest: Manifest) -> None:
    files = manifest.files()
    for entry in files:
        if not is_plain_name(entry.file):
            raise ManifestError(f"{shown(entry.file)} is not a plain file name")
        if not re.fullmatch("[0-9a-f]{64}", entry.sha256):
            raise ManifestError(f"the SHA-256 of {entry.file} must be 64 hex digits, not {shown(entry.sha256)}")
    if len({FILE_NAME, *(entry.file for entry in files)}) <= len(files):
        raise ManifestError(f"every file must have a name of its own, other than {FILE_NAME}")


def _check_graph(manifest: Manifest, name: str, graph: Graph) -> None:
    if missing := set(NEEDS.get(name, ())) - manifest.graphs.keys():
        raise ManifestError(f"graphs lacks {_named(missing)}, which {name} needs")
    for kind, shapes, known in zip(
        ("inputs", "outputs"), (graph.inputs, graph.outputs), SIGNATURES.get(name, (None, None)), strict=True
    ):
        if not all(is_plain_name(key.lower()) for key in shapes):
            raise ManifestError(f"graphs.{name}.{kind} must be named in letters, digits, '.', '_' and '-'")
        if known is None:
            continue
        if shapes.keys() != set(known):
            raise ManifestError(f"graphs.{name}.{kind} must be {', '.join(known)}, not {_named(shapes)}")
        for key in known:
            wanted = _known_shape(manifest, name, key)
            if wanted is not None and shapes[key] != wanted:
                raise ManifestError(f"graphs.{name}.{kind}.{key} must be {wanted}, not {shown(shapes[key])}")


def _known_shape(manifest: Manifest, graph: str, key: str) -> list[int] | None:
    """What a tensor's shape must be, None where the graph is free to choose."""
    _, height, width = manifest.input_shape
    levels = [len(manifest.noise_families)]
    shapes = {
        **dict.fromkeys(IMAGES, manifest.input_shape),
        **dict.fromkeys(LATENTS, manifest.latent_shape),
        **dict.fromkeys(LEVELS, levels),
        **{number: [] for number in NUMBERS},
        "rows": [height, height],
        "columns": [width, width],
    }
    if graph in ASCENTS and (key == "eps" or key.startswith("q_")):
        if manifest.latent_dim is None:
            raise ManifestError(f"graphs has {graph}, which needs latents that are vectors")
        return [manifest.latent_dim + (levels[0] if graph == "refinement" else 0)]
    return shapes.get(key)


def _check_golden(manifest: Manifest) -> None:
    golden = manifest.golden
    if not 0 < golden.rows <= MAX_ROWS:
        raise ManifestError(f"golden.rows must be 1 to {MAX_ROWS}, not {golden.rows}")
    if golden.tolerance < 0:
        raise ManifestError(f"golden.tolerance must not be below 0, as {golden.tolerance} is")
    if manifest.golden_bytes() > MAX_GOLDEN_BYTES:
        raise ManifestError(f"the golden rows would be {manifest.golden_bytes()} bytes, at most {MAX_GOLDEN_BYTES}")


def _check_scoring(manifest: Manifest) -> None:
    scoring = manifest.scoring
    if scoring is None:
        if "log_joint" in manifest.graphs:
            raise ManifestError("graphs has log_joint, which needs scoring; export the model again")
        return
    if scoring.binarisation not in BINARISATIONS:
        raise ManifestError(f"scoring.binarisation must be sample or none, not {shown(scoring.binarisation)}")
    values = scoring.elbo_percentiles_nats
    if len(values) != 101 or not all(map(math.isfinite, values)) or sorted(values) != values:
        raise ManifestError("scoring.elbo_percentiles_nats must be 101 finite numbers, none below the one before it")


def _check_calibration(manifest: Manifest) -> None:
    if manifest.calibration is None:
        return
    for quality, factors in manifest.calibration.factors.items():
        if quality not in QUALITIES:
            raise ManifestError(f"calibration.factors must be of {' and '.join(QUALITIES)}, not {shown(quality)}")
        for way, factor in factors.items():
            if not 0.0 < factor < math.inf:
                raise ManifestError(f"calibration.factors of {quality} {shown(way)} must be above 0, not {factor}")


def is_plain_name(name: str) -> bool:
    """Whether a name is safe as a file, model or version name: lower-case letters, digits, `.`, `_`, `-`."""
    return 0 < len(name) <= 64 and PLAIN_NAME.issuperset(name) and not name.startswith(".")
