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
from itertools import pairwise
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

from service.contract.graphs import FEATURES, GRAPHS, VECTORS, Axis, at_size, fraction_of, shape_of
from service.contract.typical import STATISTICS

FILE_NAME = "manifest.json"
SIGNATURE_FILE = f"{FILE_NAME}.sig"
"""A signature of the manifest's bytes, as service/contract/signature.py checks it; versions need not have one."""
DEFAULT_FILE = "default"
"""File beside the models whose one line names the default models; see service/repository/defaults.py."""
MAX_DEFAULT_BYTES = 1024
SCHEMA_VERSION = 1
ADVICE = "export the model again"
PLAIN_NAME = frozenset("abcdefghijklmnopqrstuvwxyz0123456789._-")

MAX_MANIFEST_BYTES = 2**20
MAX_FILE_BYTES = 2**31 - 1
"""Limit of a graph's file, which is protobuf's."""
MAX_GOLDEN_BYTES = 2**30
"""Limit of the golden arrays, unpacked."""
MAX_CARD_BYTES = 2**20
"""Limit of each file of a model card."""
MAX_DEPTH = 32
"""Limit of nested objects and lists. Some writers of JSON fail at 254."""
MAX_AXES, MAX_NUMBERS = 8, 2**28
"""Limits of one row of a tensor."""
MAX_LENGTH = 2**20
"""Limit of an axis."""
MAX_SIZE = 2**16
"""Limit of the height and width of images of free size."""
MAX_ENTRIES = 64
"""Limit of an object's names: graphs, tensors of a graph, calibration factors."""
MAX_VALUES = 128
"""Limit of a list's values."""
MAX_VARIANTS = 3
"""Limit of further variants."""
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
    _must(
        f"a plain file name other than {FILE_NAME} and {SIGNATURE_FILE}",
        lambda name: is_plain_name(name) and name not in (FILE_NAME, SIGNATURE_FILE),
    ),
]
CARD_FILE = "README.md"
CardName = Annotated[str, _must(CARD_FILE, CARD_FILE.__eq__)]
Sha256 = Annotated[str, _must("64 hex digits", lambda text: re.fullmatch("[0-9a-f]{64}", text) is not None)]


def _is_axis(axis: Axis) -> bool:
    return 0 < axis < MAX_LENGTH if isinstance(axis, int) else fraction_of(axis) is not None


def _is_small(shape: list[Axis]) -> bool:
    return math.prod(axis for axis in shape if isinstance(axis, int)) <= MAX_NUMBERS


Shape = Annotated[
    list[Annotated[Axis, _must("a length below 2**20, or height, width or a fraction such as height/8", _is_axis)]],
    Field(max_length=MAX_AXES),
    _must(f"of at most {MAX_NUMBERS} numbers", _is_small),
    _at_most(MAX_VALUES),
]
"""Lengths of axes. `height` and `width` are those of the image that a request sends."""
Tensors = Annotated[dict[Name, Shape], Field(min_length=1), _at_most(MAX_ENTRIES)]
Positive = Annotated[float, Field(gt=0)]
Length = Annotated[int, Field(gt=0, le=MAX_SIZE)]
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


class Card(File):
    """The model card, for people."""

    file: CardName
    """README.md: Markdown in UTF-8."""
    pictures: Annotated[list[File], _at_most(MAX_ENTRIES)] = []
    """Pictures that it shows, in PNG."""


class Graph(File):
    """An ONNX graph and its tensors."""

    inputs: Tensors
    """Shape of each input after the batch axis, in the order of the graph's signature."""
    outputs: Tensors
    """Shape of each output likewise."""
    data: Annotated[list[File], _at_most(MAX_ENTRIES)] = []
    """Files of ONNX external data, which hold weights of the graph."""


class Size(Part):
    """Heights and widths of images where they are free. The service pads images to the next multiple."""

    multiple_of: Length = 1
    """Heights and widths of the graphs are multiples of this number."""
    min: Length = 1
    """Least height and width of the graphs, a multiple."""
    max: Length = 8192
    """Largest height and width of an image, a multiple."""

    @model_validator(mode="after")
    def _check(self) -> Size:
        if self.min > self.max or self.min % self.multiple_of or self.max % self.multiple_of:
            raise ValueError(f"needs min <= max, both multiples of multiple_of ({self.multiple_of})")
        return self

    def padded(self, length: int, scale: int = 1) -> int:
        """The height or width that the graphs take for an image of this one, as a multiple of `scale` too."""
        step = math.lcm(self.multiple_of, scale)
        return -(-max(self.min, length) // step) * step


class Tiles(Part):
    """How larger images are cut into tiles."""

    side: Length | None = None
    """Largest height and width of a tile; VAE_TILE_PIXELS may make it smaller."""
    margin: Annotated[int, Field(ge=0, le=MAX_SIZE)]
    """Pixels from an inner edge of a tile within which its answer differs from that of the whole image."""
    exact: bool
    """Whether the answers are equal beyond the margin, to within a level of 16 bits. They are not where operations see
    the whole image, such as attention or group normalisation."""


class Group(Part):
    """A group of latents of a hierarchical model, packed into channels of the latent by space-to-depth.

    Channel c, row i and column j of a block become channel `channels[0] + (c * block + i) * block + j`.
    """

    name: Name
    """Name of the group, from the top of the hierarchy down."""
    shape: Annotated[Shape, _must("[channels, height, width]", lambda shape: len(shape) == 3)]
    """(c, h, w) before packing."""
    channels: Annotated[list[int], _must("[first, end]", lambda ends: len(ends) == 2 and 0 <= ends[0] < ends[1])]
    """First channel of the group in the latent, and the channel after its last."""
    block: Annotated[int, Field(gt=0, le=MAX_SIZE)]
    """Height and width of the blocks that become channels."""


class Golden(File):
    """Rows with known answers: an .npz with arrays `<graph>/<tensor>`."""

    rows: Annotated[int, Field(gt=0, le=MAX_ROWS)]
    """Number of rows of every array."""
    tolerance: Annotated[float, Field(ge=0)]
    """How far an answer may be from the known one: absolute, and relative above 1."""
    height: Length | None = None
    """Height of the images, given where it is free."""
    width: Length | None = None
    """Width of the images, given where it is free."""


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


class Curve(Part):
    """Factors of `std` that depend on the noise level, linear between knots and constant beyond them."""

    levels: Annotated[
        list[Annotated[float, Field(ge=0, le=1)]],
        _must("rising numbers", lambda levels: all(a < b for a, b in pairwise(levels))),
        Field(min_length=1),
        _at_most(MAX_VALUES),
    ]
    """Levels at the knots."""
    factors: Annotated[list[Positive], _at_most(MAX_VALUES)]
    """Factors at the knots."""

    @model_validator(mode="after")
    def _check(self) -> Curve:
        if len(self.factors) != len(self.levels):
            raise ValueError(f"has {len(self.factors)} factors for {len(self.levels)} levels; give one a level")
        return self


class Calibration(Part):
    """Factors of `std`, such that mean +- 1.645 std holds 90 % of the true pixels of held-out images."""

    factors: dict[Quality, Annotated[dict[str, Positive], _at_most(MAX_ENTRIES)]]
    """By quality, then by the way in which a pixel is seen, as service/contract/calibration.py names them."""
    curves: dict[Quality, Annotated[dict[str, Curve], _at_most(MAX_ENTRIES)]] = {}
    """Factors that depend on the level, by quality and way likewise. They go before those in `factors`."""
    images: int
    """Number of validation images that the factors are measured on."""
    seed: int
    """Seed of their corruptions."""


Share = Annotated[float, Field(ge=0, le=1)]


class FarFromTraining(Part):
    """Bounds outside which an image counts as far from the training images, and the measured error rates of that test.

    The statistics are those of service/contract/typical.py. Shares are of images with noise of every kind that the
    model removes, and without noise.
    """

    sound: bool
    """Whether answers carry the note: at most 1 % of held-out images get it, and at least 95 % of each kind in
    `caught`."""
    bounds: dict[
        Annotated[str, _must(" or ".join(STATISTICS), STATISTICS.__contains__)],
        Annotated[list[float], _must("[lowest, highest]", lambda ends: len(ends) == 2 and ends[0] <= ends[1])],
    ]
    """Lowest and highest figure of an image without the note, by statistic."""
    held_out: Share
    """Share of held-out images that get the note, over all kinds and levels of noise."""
    caught: Annotated[dict[str, Share], _at_most(MAX_ENTRIES)]
    """Share of images of other kinds that get it likewise, by kind."""
    images: int
    """Number of held-out images."""
    seed: int
    """Seed of their choice and corruptions."""


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


def _sorted_like(known: Mapping[str, str], shapes: dict[str, list[Axis]]) -> dict[str, list[Axis]]:
    return {key: shapes[key] for key in (*known, *shapes) if key in shapes}


class Variant(Part):
    """Graphs for images of one number of channels. Shapes are without the batch axis."""

    input_shape: Annotated[Shape, _must("[channels, height, width]", lambda shape: len(shape) == 3)]
    """(c, h, w). Height and width are numbers, or `height` and `width` where they are free."""
    latent_shape: Annotated[Shape, Field(min_length=1)]
    """(d,) for a vector, or any other."""
    groups: Annotated[list[Group], _at_most(MAX_ENTRIES)] = []
    """Groups of a hierarchical latent; empty where the latent is one group."""
    graphs: Annotated[dict[PlainName, Graph], AfterValidator(_in_order), _at_most(MAX_ENTRIES)]
    """By name; see service/contract/graphs.py. Every ability of a model is a graph."""
    golden: Golden
    """Known answers of every graph, which the service replays when it loads the version."""
    scoring: Scoring | None = None
    """Required with the graph `log_joint`."""
    calibration: Calibration | None = None
    """Added to a version that restores; the fingerprint stays."""
    far_from_training: FarFromTraining | None = None
    """Added likewise. Without it no answer says that an image is far from those that the model was trained on."""

    @property
    def channels(self) -> int:
        """Channels of its images."""
        channels = self.input_shape[0]
        assert isinstance(channels, int)
        return channels

    @property
    def latent_dim(self) -> int | None:
        """d where a latent is a vector, else None."""
        dim = self.latent_shape[0]
        return dim if len(self.latent_shape) == 1 and isinstance(dim, int) else None

    @property
    def latent_block(self) -> int:
        """Height and width in pixels of one place of the latent; 1 where it has no height and width of its own."""
        found = [fraction_of(axis) for axis in self.latent_shape if isinstance(axis, str)]
        return next((known[1] for known in found if known is not None), 1)

    def golden_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the golden arrays by their names, `<graph>/<tensor>`."""
        height, width = self.golden_size()
        return {
            f"{name}/{key}": (self.golden.rows, *at_size(shape, height, width))
            for name, graph in self.graphs.items()
            for key, shape in (*graph.inputs.items(), *graph.outputs.items())
        }

    def golden_size(self) -> tuple[int, int]:
        """Height and width of the golden images."""
        free = (self.golden.height or 0, self.golden.width or 0)
        height, width = at_size(self.input_shape[1:], *free)
        return height, width

    def golden_bytes(self) -> int:
        """Size of the golden arrays in float32."""
        return sum(4 * math.prod(shape) for shape in self.golden_shapes().values())


WRITTEN_FIRST = (
    "schema_version", "name", "version", "input_shape", "value_range", "latent_shape", "likelihood", "prior", "dataset",
    "noise_families", "graphs", "golden", "training", "quality", "scoring", "calibration",
)  # fmt: skip
"""Keys of the first schema, in their order in the file; later keys follow."""
SHAPE_TEXT = re.compile(r'\[(?:[^\[\]{}"]|"(?:height|width)[/\d]*")*\]')


class Manifest(Variant):
    """One version of one model. It describes one variant, and lists the others, if there are any, in `variants`."""

    schema_version: int
    """1."""
    name: Name
    """Name of the folder of the model."""
    version: Name
    """Name of the folder of the version."""
    variants: Annotated[list[Variant], _at_most(MAX_VARIANTS)] = []
    """Variants for images of other numbers of channels. The channels of a request's images choose."""
    size: Size | None = None
    """Given where height and width are free."""
    tiles: Tiles | None = None
    """How images above VAE_TILE_PIXELS are cut into tiles, where height and width are free."""
    value_range: Annotated[
        list[float],
        _must("[0.0, 1.0] or [-1.0, 1.0]", lambda ends: ends in ([0.0, 1.0], [-1.0, 1.0])),
    ] = [0.0, 1.0]
    """Black and white in the graphs `encoder`, `posterior`, `decoder` and `log_joint`. In all other graphs and over
    HTTP they are 0 and 1."""
    scaling_factor: Positive = 1.0
    """What diffusion models multiply latents by, after they subtract `shift_factor`. Latents over HTTP are neither."""
    shift_factor: float = 0.0
    """What diffusion models subtract from latents."""
    prior: str | None = None
    """Family of p(z); None where the model has no prior, and cannot be sampled."""
    noise_families: Annotated[
        list[str],
        _must("different plain names", lambda names: len(set(names)) == len(names) and all(map(is_plain_name, names))),
        _at_most(MAX_VALUES),
    ] = []
    """The columns of the noise level that graphs take and give; empty where the model does not restore."""
    tileable: bool = False
    """Whether parts of larger images look like the training images, so that they may be restored tile by tile."""
    card: Card | None = None
    """The model card; the fingerprint stays when it changes."""
    likelihood: str = ""
    """Family of p(x|z), for people."""
    dataset: str = ""
    """Name of the training images, for people."""
    training: dict[str, Any] = {}
    """Settings and figures of the training, for people."""
    quality: dict[str, Any] = {}
    """Measured figures with their units in the keys, for people."""

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change when any graph does. Latents belong to one fingerprint."""
        every = [self, *self.variants]
        names = sorted(
            (f"{one.channels}/{name}" if self.variants else name, graph)
            for one in every
            for name, graph in one.graphs.items()
        )
        digests = "".join(f"{name}:{';'.join(_digests(graph))};" for name, graph in names)
        return hashlib.sha256(digests.encode()).hexdigest()[:16]

    def views(self) -> list[Manifest]:
        """The manifest as each of its variants sees it: that variant is described, the others are in `variants`."""
        every = [{name: getattr(one, name) for name in Variant.model_fields} for one in (self, *self.variants)]
        return [
            self.model_copy(update={**one, "variants": [Variant(**other) for other in every if other is not one]})
            for one in every
        ]

    def files(self) -> list[File]:
        """Every file of the version but the manifest."""
        return [
            *(
                file
                for one in (self, *self.variants)
                for file in (*(part for graph in one.graphs.values() for part in (graph, *graph.data)), one.golden)
            ),
            *self.card_files(),
        ]

    def card_files(self) -> list[File]:
        """The files of the model card, README.md first; none without a card."""
        return [] if self.card is None else [self.card, *self.card.pictures]

    def to_json(self) -> str:
        """The manifest as text, each shape on one line, without later keys that have their default."""
        told = self.model_dump(exclude_defaults=True)
        content = {**{key: told.get(key, getattr(self, key)) for key in WRITTEN_FIRST}, **told}
        text = json.dumps({key: value for key, value in content.items() if value is not None}, indent=2)
        return SHAPE_TEXT.sub(lambda found: "".join(found.group().split()).replace(",", ", "), text) + "\n"

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        for view in (self, *self.variants):
            self._check_variant(view)
        channels = [one.channels for one in (self, *self.variants)]
        if len(set(channels)) < len(channels):
            raise ValueError("every variant must have a number of channels of its own")
        names = [entry.file for entry in self.files()]
        if len(set(names)) < len(names):
            raise ValueError("every file must have a name of its own")
        return self

    def _check_variant(self, variant: Variant) -> None:
        """Compares a variant with the size, its graphs with their signatures."""
        channels, golden = variant.input_shape[0], variant.golden
        free = variant.input_shape[1:] == ["height", "width"]
        if not (isinstance(channels, int) and (free or variant.input_shape[1:] == _numbers(variant.input_shape[1:]))):
            raise ValueError(
                f'input_shape must be three numbers or [channels, "height", "width"], not {shown(variant.input_shape)}'
            )
        for key, known in (("size", self.size), ("golden.height", golden.height), ("golden.width", golden.width)):
            if (known is not None) != free:
                raise ValueError(
                    f"{key} is needed, because input_shape leaves height and width free"
                    if free
                    else f"{key} is only for images whose height and width input_shape leaves free"
                )
        if not variant.graphs.keys() & {"encoder", "posterior", "decoder", "restoration"}:
            raise ValueError("graphs lacks encoder, posterior, decoder and restoration; give one at least")
        if variant.graphs.keys() >= {"encoder", "posterior"}:
            raise ValueError("graphs has both encoder and posterior; give one of them")
        for name in sorted(variant.graphs.keys() & GRAPHS.keys()):
            self._check_graph(variant, name)
        try:
            size = variant.golden_bytes()
        except ValueError as error:
            raise ValueError(f"a shape does not fit the golden images: {error}") from error
        if size > MAX_GOLDEN_BYTES:
            raise ValueError(f"the golden rows would be {size} bytes, at most {MAX_GOLDEN_BYTES}")
        if variant.scoring is None and "log_joint" in variant.graphs:
            raise ValueError(f"graphs has log_joint, which needs scoring; {ADVICE}")

    def _check_graph(self, variant: Variant, name: str) -> None:
        """Compares a graph with its signature."""
        graph, signature = variant.graphs[name], GRAPHS[name]
        if missing := set(signature.needs) - variant.graphs.keys():
            raise ValueError(f"graphs lacks {_named(missing)}, which {name} needs")
        if both := set(signature.excludes) & variant.graphs.keys():
            raise ValueError(f"graphs has both {name} and {_named(both)}, which restore in two ways; give one of them")
        for kind, shapes, known in (
            ("inputs", graph.inputs, signature.inputs),
            ("outputs", graph.outputs, signature.outputs),
        ):
            if shapes.keys() != known.keys():
                raise ValueError(f"graphs.{name}.{kind} must be {', '.join(known)}, not {_named(shapes)}")
            for key, axes in known.items():
                if axes in VECTORS and variant.latent_dim is None:
                    raise ValueError(f"graphs has {name}, which needs latents that are vectors")
                shape = shape_of(axes, variant.input_shape, variant.latent_shape, len(self.noise_families))
                if shape is not None and shapes[key] != shape:
                    raise ValueError(f"graphs.{name}.{kind}.{key} must be {shown(shape)}, not {shown(shapes[key])}")
                if axes == FEATURES and shapes[key] != variant.graphs["restoration"].outputs.get(key):
                    raise ValueError(f"graphs.{name}.{kind}.{key} must have the shape that restoration gives it")


def _numbers(shape: list[Axis]) -> list[Axis]:
    return [axis for axis in shape if isinstance(axis, int)]


def _digests(graph: Graph) -> list[str]:
    return [graph.sha256, *(file.sha256 for file in graph.data)]


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
    place = place[:-1] if place[-1:] == ("int",) else place  # an axis may be a text too
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
