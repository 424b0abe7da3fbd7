"""The manifest of a model version: its data model, strict parsing, and safe reading of the files beside it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from service.contract.graphs import GRAPHS, VECTORS, shape_of

FILE_NAME = "manifest.json"
DEFAULT_FILE = "default"
"""File beside the models whose one line names the default model."""
MAX_DEFAULT_BYTES = 128
SCHEMA_VERSION = 1
ADVICE = "export the model again"
PLAIN_NAME = frozenset("abcdefghijklmnopqrstuvwxyz0123456789._-")

MAX_MANIFEST_BYTES = 2**20
MAX_FILE_BYTES = 2**31 - 1
"""Limit of a graph's file, which is protobuf's."""
MAX_GOLDEN_BYTES = 2**30
"""Limit of the golden arrays, unpacked."""
MAX_DEPTH = 32
"""Limit of nested objects and lists. Some writers of JSON fail at 254."""
MAX_AXES, MAX_NUMBERS = 8, 2**28
"""Limits of one row of a tensor."""
MAX_ENTRIES = 64
"""Limit of an object's names: graphs, tensors of a graph, calibration factors."""
MAX_VALUES = 128
"""Limit of a list's values."""
MAX_ROWS = 4096
"""Limit of golden rows."""
MAX_FLOAT32 = 3.4e38
MAX_SHOWN = 60
"""Characters of a value that a message repeats."""
MAX_NAMED = 5
"""Names that a message lists."""


class ManifestError(ValueError):
    """An unusable manifest, or a file beside it. The message names the file, the fault and the fix."""


def is_plain_name(name: str) -> bool:
    """Whether a name is safe as a file, model or version name: lower-case letters, digits, `.`, `_`, `-`."""
    return 0 < len(name) <= 64 and PLAIN_NAME.issuperset(name) and not name.startswith(".")


def shown(value: Any) -> str:
    """A value as messages repeat it: in ASCII, of bounded length; text in single quotes, else JSON."""
    text = json.dumps(value, default=str)
    text = text[1:-1] if isinstance(value, str) else text
    text = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
    return f"'{text}'" if isinstance(value, str) else text


def _named(names: Iterable[str]) -> str:
    """Names in a message: the first few, each on one line and short."""
    return ", ".join(name if is_plain_name(name) else shown(name) for name in sorted(names)[:MAX_NAMED])


def _at_most(most: int) -> BeforeValidator:
    """Validator that bounds the length of a list or object before its entries are checked."""

    def checked(value: Any) -> Any:
        if isinstance(value, (list, dict)) and len(value) > most:
            raise ValueError(f"has {len(value)} entries, at most {most} are read")
        return value

    return BeforeValidator(checked)


def _must(be: str, holds: Callable[[Any], bool]) -> AfterValidator:
    """Validator that refuses values for which `holds` is false; `be` names what they must be in the message."""

    def checked(value: Any) -> Any:
        if not holds(value):
            raise ValueError(f"must be {be}, not {shown(value)}")
        return value

    return AfterValidator(checked)


def _is_name(name: str) -> bool:
    return name.isascii() and is_plain_name(name.lower())


Name = Annotated[str, _must("letters, digits, '.', '_' and '-'", _is_name)]
PlainName = Annotated[str, _must("a plain name of lower-case letters, digits, '.', '_' and '-'", is_plain_name)]
FileName = Annotated[
    str,
    _must(f"a plain file name other than {FILE_NAME}", lambda name: is_plain_name(name) and name != FILE_NAME),
]
Sha256 = Annotated[str, _must("64 hex digits", lambda text: re.fullmatch("[0-9a-f]{64}", text) is not None)]
Shape = Annotated[
    list[Annotated[int, Field(gt=0, lt=2**20)]],
    Field(max_length=MAX_AXES),
    _must(f"of at most {MAX_NUMBERS} numbers", lambda shape: math.prod(shape) <= MAX_NUMBERS),
    _at_most(MAX_VALUES),
]
Tensors = Annotated[dict[Name, Shape], Field(min_length=1), _at_most(MAX_ENTRIES)]
Positive = Annotated[float, Field(gt=0)]
QUALITIES = ("fast", "refined")
Quality = Annotated[str, _must(" or ".join(QUALITIES), QUALITIES.__contains__)]


class Part(BaseModel):
    """An object of the manifest: of exactly these keys, unchangeable, with values of exactly these types."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class File(Part):
    """A file beside the manifest."""

    file: FileName
    """Name of the file, which no other file of the version has."""
    sha256: Sha256
    """Digest of its content in lower-case hex."""


class Graph(File):
    """An ONNX graph and its tensors."""

    inputs: Tensors
    """Shape of each input after the batch axis, in the order of the graph's signature."""
    outputs: Tensors
    """Shape of each output likewise."""


class Golden(File):
    """Rows with known answers: an .npz with arrays `<graph>/<tensor>`."""

    rows: Annotated[int, Field(gt=0, le=MAX_ROWS)]
    """Number of rows of every array."""
    tolerance: Annotated[float, Field(ge=0)]
    """How far an answer may be from the known one: absolute, and relative above 1."""


class Scoring(Part):
    """What images the model can score, and the ELBO of images that it was not trained on."""

    binary: bool
    """Whether only images of 0 and 1 have a probability."""
    binarisation: Literal["sample", "none"]
    """How the held-out images were binarised, and how those to score are by default: `sample` draws each pixel with its
    grey level as its probability."""
    elbo_percentiles_nats: Annotated[
        list[float],
        _must("101 finite numbers, none below the one before it", lambda one: len(one) == 101 and sorted(one) == one),
        _at_most(MAX_VALUES),
    ]
    """Percentiles 0 to 100 of the ELBO of the held-out images."""
    images: int
    """Number of held-out images."""
    draws: int
    """Draws of the posterior for each image."""
    seed: int
    """Seed of the choice of images, their binarisation and the draws."""


class Calibration(Part):
    """Factors of `std`, such that mean +- 1.645 std holds 90 % of the true pixels of held-out images."""

    factors: dict[Quality, Annotated[dict[str, Positive], _at_most(MAX_ENTRIES)]]
    """By quality, then by the way in which a pixel is seen, as service/contract/calibration.py names them."""
    images: int
    """Number of validation images that the factors are measured on."""
    seed: int
    """Seed of their corruptions."""


def _in_order(graphs: dict[str, Graph]) -> dict[str, Graph]:
    """The graphs with their tensors in the order of their signatures, whatever the order in the file."""
    return {
        name: graph.model_copy(
            update={
                "inputs": _sorted_like(GRAPHS[name].inputs, graph.inputs),
                "outputs": _sorted_like(GRAPHS[name].outputs, graph.outputs),
            }
        )
        if name in GRAPHS
        else graph
        for name, graph in graphs.items()
    }


def _sorted_like(known: Mapping[str, str], shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    return {key: shapes[key] for key in (*known, *shapes) if key in shapes}


class Manifest(Part):
    """One version of one model. Shapes are without the batch axis."""

    schema_version: int
    """1."""
    name: Name
    """Name of the folder of the model."""
    version: Name
    """Name of the folder of the version."""
    input_shape: Annotated[Shape, _must("[channels, height, width]", lambda shape: len(shape) == 3)]
    """(c, h, w)."""
    value_range: Annotated[
        list[float],
        _must("[low, high]", lambda ends: len(ends) == 2 and ends[0] < ends[1]),
        _must("of float32 numbers", lambda ends: max(map(abs, ends)) <= MAX_FLOAT32),
        _at_most(MAX_VALUES),
    ]
    """Lowest and highest value of a pixel."""
    latent_shape: Annotated[Shape, Field(min_length=1)]
    """(d,) for a vector, or any other."""
    likelihood: str
    """Family of p(x|z), for people."""
    prior: str
    """Family of p(z), for people."""
    dataset: str
    """Name of the training images."""
    noise_families: Annotated[
        list[str],
        _must("different plain names", lambda names: len(set(names)) == len(names) and all(map(is_plain_name, names))),
        _at_most(MAX_VALUES),
    ]
    """The columns of the noise level that graphs take and give; empty where the model does not restore."""
    graphs: Annotated[dict[PlainName, Graph], AfterValidator(_in_order), _at_most(MAX_ENTRIES)]
    """By name: always `encoder` and `decoder`; every further ability is one more graph."""
    golden: Golden
    """Known answers of every graph, which the service replays when it loads the version."""
    training: dict[str, Any]
    """Settings and figures of the training, for people."""
    quality: dict[str, Any]
    """Measured figures with their units in the keys, for people."""
    scoring: Scoring | None = None
    """Required with the graph `log_joint`."""
    calibration: Calibration | None = None
    """Added to a version that restores; the fingerprint stays."""
    tileable: bool = False
    """Whether parts of larger images look like the training images, so that they may be restored tile by tile."""

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change when any graph does. Latents belong to one fingerprint."""
        digests = "".join(f"{name}:{graph.sha256};" for name, graph in sorted(self.graphs.items()))
        return hashlib.sha256(digests.encode()).hexdigest()[:16]

    @property
    def latent_dim(self) -> int | None:
        """d where a latent is a vector, else None."""
        return self.latent_shape[0] if len(self.latent_shape) == 1 else None

    def files(self) -> list[File]:
        """Every file of the version but the manifest."""
        return [*self.graphs.values(), self.golden]

    def golden_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the golden arrays by their names, `<graph>/<tensor>`."""
        return {
            f"{name}/{key}": (self.golden.rows, *shape)
            for name, graph in self.graphs.items()
            for key, shape in (*graph.inputs.items(), *graph.outputs.items())
        }

    def golden_bytes(self) -> int:
        """Size of the golden arrays in float32."""
        return sum(4 * math.prod(shape) for shape in self.golden_shapes().values())

    def to_json(self) -> str:
        """The manifest as text, each shape on one line."""
        text = json.dumps(self.model_dump(), indent=2)
        return re.sub(r"\[[^\[\]{}\"]*\]", lambda found: "".join(found.group().split()).replace(",", ", "), text) + "\n"

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        for name in ("encoder", "decoder"):
            if name not in self.graphs:
                raise ValueError(f"graphs lacks {name}")
        for name in self.graphs.keys() & GRAPHS.keys():
            self._check_graph(name)
        if self.golden_bytes() > MAX_GOLDEN_BYTES:
            raise ValueError(f"the golden rows would be {self.golden_bytes()} bytes, at most {MAX_GOLDEN_BYTES}")
        if self.scoring is None and "log_joint" in self.graphs:
            raise ValueError(f"graphs has log_joint, which needs scoring; {ADVICE}")
        names = [entry.file for entry in self.files()]
        if len(set(names)) < len(names):
            raise ValueError("every file must have a name of its own")
        return self

    def _check_graph(self, name: str) -> None:
        """Compares a graph with its signature."""
        graph, signature = self.graphs[name], GRAPHS[name]
        if missing := set(signature.needs) - self.graphs.keys():
            raise ValueError(f"graphs lacks {_named(missing)}, which {name} needs")
        for kind, shapes, known in (
            ("inputs", graph.inputs, signature.inputs),
            ("outputs", graph.outputs, signature.outputs),
        ):
            if shapes.keys() != known.keys():
                raise ValueError(f"graphs.{name}.{kind} must be {', '.join(known)}, not {_named(shapes)}")
            for key, axes in known.items():
                if axes in VECTORS and self.latent_dim is None:
                    raise ValueError(f"graphs has {name}, which needs latents that are vectors")
                shape = shape_of(axes, self.input_shape, self.latent_shape, len(self.noise_families))
                if shape is not None and shapes[key] != shape:
                    raise ValueError(f"graphs.{name}.{kind}.{key} must be {shape}, not {shown(shapes[key])}")


def manifest_of(content: Mapping[str, Any]) -> Manifest:
    """The manifest with these keys and values.

    Raises:
        ManifestError: A key is missing or unknown, a value has another type than its key or is out of bounds, or the
            parts do not fit together. The message names the key.
    """
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise ManifestError(_message(error)) from error


def _message(error: ValidationError) -> str:
    """The first fault on one line; missing and unknown keys of one object together."""
    faults = error.errors(include_url=False)
    first = faults[0]
    kind, place = first["type"], first["loc"]
    where, parent = (".".join(_named([str(part)]) for part in path if part != "[key]") for path in (place, place[:-1]))
    if kind in ("missing", "extra_forbidden"):
        names = [str(one["loc"][-1]) for one in faults if (one["type"], one["loc"][:-1]) == (kind, place[:-1])]
        return f"{parent or 'the manifest'} {'lacks' if kind == 'missing' else 'has unknown'} {_named(names)}"
    if kind == "value_error":
        return f"{where} {first['ctx']['error']}".strip()
    if kind in ("too_short", "too_long"):
        said = {"too_short": "at least", "too_long": "at most"}[kind]
        bound = first["ctx"].get("min_length", first["ctx"].get("max_length"))
        return f"{where} must be of {said} {bound} entries, not {len(first['input'])}"
    must = "an object" if kind in ("dict_type", "model_type") else first["msg"].removeprefix("Input should be ")
    return f"{where} must be {must}, not {shown(first['input'])}"


def parse(text: bytes) -> Manifest:
    """The manifest in JSON.

    Raises:
        ManifestError: The text is too large, not strict JSON or of a later schema; else as `manifest_of`.
    """
    if len(text) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"larger than the {MAX_MANIFEST_BYTES} bytes that a manifest may have")
    content = _json(text)
    if not isinstance(content, dict):
        raise ManifestError(f"not a JSON object; {ADVICE}")
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        advice = "upgrade the service" if isinstance(version, int) and version > SCHEMA_VERSION else ADVICE
        raise ManifestError(f"schema_version is {shown(version)}, this service reads {SCHEMA_VERSION}; {advice}")
    return manifest_of(content)


def _json(text: bytes) -> Any:
    """The value of a JSON text, if every JSON writer can write it again.

    So names stand once, numbers are finite and of 64 bits, and text has no lone surrogates.
    """

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
        raise ManifestError(f"not JSON in UTF-8; {ADVICE}") from error
    except RecursionError as error:
        raise ManifestError(f"not JSON of at most {MAX_DEPTH} levels; {ADVICE}") from error
    except ValueError as error:
        raise ManifestError(f"not JSON ({error}); {ADVICE}") from error
    _check_plain(content)
    return content


def _check_plain(content: Any) -> None:
    waiting = [(content, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise ManifestError(f"more than {MAX_DEPTH} levels deep; {ADVICE}")
        if isinstance(value, dict):
            waiting += ((part, depth + 1) for pair in value.items() for part in pair)
        elif isinstance(value, list):
            waiting += ((part, depth + 1) for part in value)
        elif isinstance(value, str):
            if any("\ud800" <= letter <= "\udfff" for letter in value):
                raise ManifestError(f"holds half a character (a lone surrogate); {ADVICE}")
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise ManifestError(f"holds a number that is not finite; {ADVICE}")
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ManifestError(f"holds a whole number of more than 64 bits; {ADVICE}")


def read(folder: Path) -> Manifest:
    """Read `folder`/manifest.json.

    Raises:
        ManifestError: The file is missing or unreadable, or as `parse` says. The message names the file.
    """
    return parse_file(folder, read_text(folder))


def read_text(folder: Path) -> bytes:
    """The bytes of `folder`/manifest.json.

    Raises:
        ManifestError: As `open_file`.
    """
    advice = f"a model version is a folder with a {FILE_NAME}"
    return read_file(folder, FILE_NAME, MAX_MANIFEST_BYTES, advice)


def parse_file(folder: Path, text: bytes) -> Manifest:
    """The manifest in the bytes of `folder`/manifest.json.

    Raises:
        ManifestError: As `parse`. The message names the file.
    """
    try:
        return parse(text)
    except ManifestError as error:
        raise ManifestError(f"{folder / FILE_NAME}: {error}") from error


def read_file(folder: Path, name: str, max_bytes: int, advice: str = ADVICE) -> bytes:
    """The content of a regular file of the version in `folder`.

    Raises:
        ManifestError: As `open_file`, or the file grew meanwhile.
    """
    with open_file(folder, name, max_bytes, advice) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1)  # allocates that many bytes at once
    if len(content) > size:
        raise ManifestError(f"{folder / name} grew while it was read; {advice}")
    return content


def has_digest(folder: Path, entry: File, max_bytes: int) -> bool:
    """Whether a file of the version in `folder` has the digest that its manifest gives.

    Raises:
        ManifestError: As `open_file`.
    """
    with open_file(folder, entry.file, max_bytes) as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256


@contextmanager
def open_file(folder: Path, name: str, max_bytes: int, advice: str = ADVICE) -> Iterator[BufferedReader]:
    """Open a regular file of the version in `folder` for reading.

    Follows links, since Kubernetes mounts files as links. Never waits for a writer, as opening a FIFO would.

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


def digest(content: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(content).hexdigest()
