"""Import of an encoder and a decoder that are ONNX already."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import TensorProto, compose, helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_model, uses_external_data

from service.contract.golden import deviation
from service.contract.graphs import GRAPHS
from training.errors import ModelFileError
from training.export.export import (
    GOLDEN_ROWS,
    Converted,
    check_graph,
    export,
    further_sizes,
    golden_size,
    version_folder,
)
from training.export.pair import LOG_VAR_RANGE, MODULE_PARITY, RANGES, shapes_told
from training.progress import tell

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as in service/runtime/session.py
import onnxruntime as ort  # after the line above

Rows = NDArray[np.float32]
Role = Literal["mean", "log_var", "var", "std", "moments"]

PREFIX = "imported."
"""Before every name inside an imported graph, so that the names of the contract are free."""
KNOWN: dict[Role, set[str]] = {
    "mean": {"mean", "mu", "loc", "z_mean", "latent_mean"},
    "log_var": {"log_var", "logvar", "log_variance", "z_log_var", "latent_log_var"},
    "var": {"var", "variance"},
    "std": {"std", "sigma", "stddev", "scale"},
    "moments": {"moments", "parameters", "latent_parameters"},
}
"""Names of an encoder's outputs, in lower case, by what they are. `moments` is mean and log_var joined along axis 1."""
PAIRS: tuple[set[Role], ...] = ({"mean", "log_var"}, {"mean", "var"}, {"mean", "std"}, {"moments"}, {"mean"})
"""What an encoder may give. With the mean alone every log_var is the lowest of `LOG_VAR_RANGE`."""
PROBE = (192, 128)
"""Height and width at which a graph of free sizes is run to find the size of its latents."""
CHANNELS = (3, 1)
"""Channels of images that are tried where the encoder names none."""
BELOW_ZERO = -0.25
"""A decoder whose darkest pixels are above this makes images in [0, 1], else in [-1, 1]."""
OLDEST_OPSET = 9
ERROR_SEVERITY = 3


@dataclass(frozen=True)
class Source:
    """An ONNX graph of one input.

    Attributes:
        name: `encoder` or `decoder`, for messages.
        model: The graph, with its weights.
        input: Its input.
    """

    name: str
    model: onnx.ModelProto
    input: onnx.ValueInfoProto

    @cached_property
    def session(self) -> ort.InferenceSession:
        """The graph, opened."""
        options = ort.SessionOptions()
        options.log_severity_level = ERROR_SEVERITY
        return ort.InferenceSession(self.model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    @property
    def outputs(self) -> list[str]:
        """Names of its outputs."""
        return [output.name for output in self.model.graph.output]

    @property
    def sizes(self) -> list[int | None]:
        """Sizes of the input after the batch axis; None where the graph leaves one free."""
        axes = self.input.type.tensor_type.shape.dim[1:]
        return [axis.dim_value if axis.HasField("dim_value") else None for axis in axes]

    def run(self, rows: Rows) -> dict[str, Rows]:
        """Outputs by name.

        Raises:
            ModelFileError: onnxruntime cannot run it on such rows.
        """
        try:
            found = self.session.run(self.outputs, {self.input.name: rows})
        except Exception as error:
            raise ModelFileError(
                f"the {self.name} does not run on {_joined(rows.shape)} numbers: {_line(error)}"
            ) from error
        return dict(zip(self.outputs, found, strict=True))

    def run_in_batches(self, rows: Rows) -> dict[str, Rows]:
        """Outputs by name, after checks that they do not depend on who shares the batch.

        Raises:
            ModelFileError: It cannot run several rows at once, or a row depends on the others.
        """
        alone = self.run(rows[:1])
        try:
            together = self.run(rows)
        except ModelFileError as error:
            raise ModelFileError(
                f"the {self.name} runs one row, but not {len(rows)}: a batch size is fixed inside it; export it with "
                f"a variable first axis ({error})"
            ) from error
        for key, one in alone.items():
            all_rows = together[key]
            if len(all_rows) != len(rows) or not deviation(key, one, all_rows[:1]) <= MODULE_PARITY:
                raise ModelFileError(
                    f"{key} of the {self.name} depends on the other rows of a batch; export it in evaluation mode"
                )
        return together

    def renamed(self, to: str) -> onnx.ModelProto:
        """A copy whose input has the contract's name and whose inner names are prefixed; it has no outputs yet."""
        model = compose.add_prefix(self.model, PREFIX)
        given = onnx.ValueInfoProto()
        given.CopyFrom(self.input)
        given.name = to
        given.type.tensor_type.shape.dim[0].dim_param = "n"
        nodes = [helper.make_node("Identity", [to], [PREFIX + self.input.name]), *model.graph.node]
        for field, kept in ((model.graph.input, [given]), (model.graph.output, []), (model.graph.node, nodes)):
            del field[:]
            field.extend(kept)
        model.ir_version = max(model.ir_version, 4)  # before, weights had to be inputs too
        return model


def import_onnx(
    encoder: Path,
    decoder: Path,
    models: Path,
    name: str,
    version: str = "1",
    *,
    encoder_outputs: Mapping[Role, str] | None = None,
    value_range: tuple[float, float] | None = None,
    size: tuple[int, int] | None = None,
    prior: Literal["standard_normal"] | None = None,
    replace: bool = False,
) -> Path:
    """Write models/<name>/<version>/ from two ONNX graphs, and tell what was found out about them.

    Args:
        encoder: Graph of the encoder: images (n, c, h, w) -> mean and log variance, or the like.
        decoder: Graph of the decoder: z (n, *latent_shape) -> images.
        models: The model repository.
        name: Name of the model.
        version: Its version.
        encoder_outputs: Names of the encoder's outputs by what they are; None goes by their names.
        value_range: Lowest and highest value of a pixel; None goes by the images that the decoder makes.
        size: Height and width of images; None takes them from the encoder, which may leave them free.
        prior: "standard_normal" if z ~ N(0, I) under the model, so that it can be sampled; None if that is not known.
        replace: Whether an existing version is replaced.

    Returns:
        The folder of the version.

    Raises:
        ModelFileError: A graph cannot be used; the message names the node or the tensor, and the fix.
        ExportError: As `export`.
        DiskError: The folder cannot be written.
    """
    version_folder(models, name, version, replace=replace)
    one, two = _read("encoder", encoder), _read("decoder", decoder)
    channels, fixed = _image(one, size)
    multiple_of = _factor(one, channels) if fixed is None else None
    x = _noise(GOLDEN_ROWS, channels, *(fixed or golden_size(multiple_of or 1)))
    roles = _roles(one, two, one.run(x[:1]), encoder_outputs)
    tell("encoder: " + ", ".join(f"{output} is {role}" for role, output in roles.items()))
    if value_range not in (None, *RANGES):
        raise ModelFileError(f"--value-range must be 0 1 or -1 1, not {_joined(value_range, ' ')}")
    low, high = value_range or _range(one, two, roles, x[:1])
    x = x * np.float32(high - low) + np.float32(low)
    encode = _encode(one, roles, one.run_in_batches(x))
    mean = encode.run(x)["mean"]
    decode = _decode(two, two.run_in_batches(mean), x.shape, (low, high))
    shapes = shapes_told(x.shape, mean.shape, multiple_of)
    tell(f"images: {shapes['input_shape']}, latents: {shapes['latent_shape']}")
    if multiple_of is not None:
        _check_sizes(encode, decode, channels, multiple_of)
    told = {"value_range": [float(low), float(high)], "prior": prior, "training": {"imported": "ONNX"}}
    graphs = {
        graph.name: Converted(graph.model, {key: rows}, graph.run(rows), GRAPHS[graph.name])
        for graph, key, rows in ((encode, "x", x), (decode, "z", mean))
    }
    return export(graphs, models, name, version, {**shapes, **told}, replace=replace)


def _noise(*shape: int) -> Rows:
    """Images of independent pixels in [0, 1]."""
    return np.random.default_rng(0).random(shape, dtype=np.float32)


def _check_sizes(encode: Source, decode: Source, channels: int, multiple_of: int) -> None:
    """Check that images of other sizes than the golden ones come back in their size.

    Raises:
        ModelFileError: They do not.
    """
    for height, width in further_sizes(multiple_of):
        x = _noise(1, channels, height, width)
        if decode.run(encode.run(x)["mean"])["x_mean"].shape != x.shape:
            raise ModelFileError(f"an image of {height} x {width} comes back in another size; fix it with --size")


def _read(name: str, path: Path) -> Source:
    """Read a graph with its weights.

    Raises:
        ModelFileError: It cannot be used.
        ExportError: It draws random numbers, or is not plain ONNX; the message names the node.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise ModelFileError(f"cannot read {path} as ONNX: {_line(error)}") from error
    _load_weights(path, model)
    check_graph(name, model)
    opset = max((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), default=0)
    if opset < OLDEST_OPSET:
        raise ModelFileError(f"{path} is of ONNX opset {opset}; export it with opset {OLDEST_OPSET} or later")
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [one for one in model.graph.input if one.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(one.name for one in inputs)
        raise ModelFileError(f"the {name} takes {len(inputs)} inputs ({names}); it must take one: export it so")
    (given,) = inputs
    kind = given.type.tensor_type
    if kind.elem_type != TensorProto.FLOAT:
        of = TensorProto.DataType.Name(kind.elem_type).lower()
        raise ModelFileError(f"{given.name} of the {name} is {of}; export it with float32 inputs")
    axes = kind.shape.dim
    if len(axes) < 2 or (name == "encoder" and len(axes) != 4):
        raise ModelFileError(f"{given.name} of the {name} has {len(axes)} axes; images must be (n, c, h, w)")
    if axes[0].HasField("dim_value"):
        raise ModelFileError(
            f"{given.name} of the {name} has a batch axis of {axes[0].dim_value} rows; export it with a variable first "
            "axis, such as dynamic_shapes={...: {0: 'n'}} of torch.onnx.export"
        )
    return Source(name, model, given)


def _load_weights(path: Path, model: onnx.ModelProto) -> None:
    """Load weights that lie beside the graph's file.

    Raises:
        ModelFileError: Their file is missing or cannot be read.
    """
    outside = [tensor for tensor in model.graph.initializer if uses_external_data(tensor)]
    for file in sorted({ExternalDataInfo(tensor).location for tensor in outside}):
        if not (path.parent / file).is_file():
            raise ModelFileError(f"{path} has its weights in {file}, which is not beside it; put it into {path.parent}")
    try:
        load_external_data_for_model(model, str(path.parent))
    except Exception as error:
        raise ModelFileError(f"the weights of {path} cannot be read: {_line(error)}") from error


def _image(encoder: Source, size: tuple[int, int] | None) -> tuple[int, tuple[int, int] | None]:
    """Channels of an image, and its height and width if they are fixed.

    Raises:
        ModelFileError: The encoder takes other sizes, or they cannot be found out.
    """
    channels, *sides = encoder.sizes
    fixed = [one for one in sides if one is not None]
    if size is not None and any(one not in (None, wanted) for one, wanted in zip(sides, size, strict=True)):
        raise ModelFileError(f"the encoder takes images of {_joined(sides)}; leave out --size {_joined(size)}")
    if size is None and len(fixed) == 1:
        raise ModelFileError(f"the encoder fixes one side of an image, {fixed[0]}, and not the other; pass --size")
    whole = size or ((fixed[0], fixed[1]) if fixed else None)
    if channels is not None:
        return channels, whole
    for tried in CHANNELS:
        try:
            encoder.run(np.zeros((1, tried, *(whole or PROBE)), np.float32))
        except ModelFileError:
            continue
        return tried, whole
    raise ModelFileError(f"the encoder runs on images of neither {_joined(CHANNELS, ' nor ')} channels")


def _factor(encoder: Source, channels: int) -> int:
    """Sizes of an image over those of its latent.

    Raises:
        ModelFileError: There is no such factor.
    """
    height, width = PROBE
    outputs = encoder.run(_noise(1, channels, height, width))
    for rows in outputs.values():
        if rows.ndim == 4 and rows.shape[2] * width == rows.shape[3] * height and height % rows.shape[2] == 0:
            return int(height // rows.shape[2])
    raise ModelFileError(
        f"the encoder makes {_told(outputs)} of an image of {height} x {width}, which tells no size of latents; name "
        "one size of images with --size"
    )


def _roles(
    encoder: Source, decoder: Source, outputs: Mapping[str, Rows], told: Mapping[Role, str] | None
) -> dict[Role, str]:
    """What the encoder's outputs are: their names by role.

    Raises:
        ModelFileError: That cannot be found out.
    """
    if told is not None:
        if set(told) not in PAIRS or not set(told.values()) <= outputs.keys():
            raise ModelFileError(
                "--encoder-outputs must name outputs of the encoder, which are "
                f"{', '.join(outputs)}: mean and log_var, mean and var, mean and std, moments, or mean alone"
            )
        return dict(told)
    found: dict[Role, str] = {}
    for key in outputs:
        found |= {role: key for role, names in KNOWN.items() if key.lower() in names and role not in found}
    for roles in PAIRS[:-1]:
        if roles <= found.keys():
            return {role: found[role] for role in found if role in roles}
    channels = decoder.sizes[0]
    (key, rows), *others = outputs.items()
    if not others and channels is not None and rows.shape[1] == 2 * channels:
        return {"moments": key}
    raise ModelFileError(
        f"the {encoder.name} gives {_told(outputs)}; say which is which with --encoder-outputs mean=NAME "
        "log_var=NAME (or var=NAME or std=NAME instead of log_var, or moments=NAME if one holds both); with mean=NAME "
        f"alone every log_var is {LOG_VAR_RANGE[0]:g}"
    )


def _encode(encoder: Source, roles: Mapping[Role, str], outputs: Mapping[str, Rows]) -> Source:
    """The encoder with the contract's tensors: x -> mean, log_var."""
    rows = next(outputs[name] for name in roles.values())
    channels = rows.shape[1] // 2 if "moments" in roles else rows.shape[1]
    lowest, highest = LOG_VAR_RANGE
    constants = {"two": 2.0, "nothing": 0.0, "lowest": lowest, "highest": highest}
    weights = [numpy_helper.from_array(np.array(value, np.float32), key) for key, value in constants.items()]
    halves = {"first": np.arange(channels), "second": np.arange(channels, 2 * channels)}
    weights += [numpy_helper.from_array(places, key) for key, places in halves.items()]
    inner = {role: PREFIX + name for role, name in roles.items()}
    node, nodes = helper.make_node, []
    if "moments" in roles:
        nodes += [
            node("Gather", [inner["moments"], half], [to], axis=1)
            for half, to in zip(halves, ("mean", "any"), strict=True)
        ]
    else:
        nodes += [node("Identity", [inner["mean"]], ["mean"])]
    if "log_var" in roles:
        nodes += [node("Identity", [inner["log_var"]], ["any"])]
    elif "var" in roles:
        nodes += [node("Log", [inner["var"]], ["any"])]
    elif "std" in roles:
        nodes += [node("Log", [inner["std"]], ["half"]), node("Mul", ["half", "two"], ["any"])]
    elif "moments" not in roles:
        nodes += [node("Mul", ["mean", "nothing"], ["zero"]), node("Add", ["zero", "lowest"], ["any"])]
    nodes += [node("Max", ["any", "lowest"], ["above"]), node("Min", ["above", "highest"], ["log_var"])]
    shape = ["n", channels, *(f"latent_{axis}" for axis in range(2, rows.ndim))]
    return _finished(encoder.name, encoder.renamed("x"), nodes, weights, {"mean": shape, "log_var": shape})


def _decode(
    decoder: Source, outputs: Mapping[str, Rows], shape: tuple[int, ...], value_range: tuple[float, float]
) -> Source:
    """The decoder with the contract's tensors: z -> x_mean, clamped to [0, 1] if that is the value range.

    Raises:
        ModelFileError: It does not give one image a row.
    """
    images = [key for key, rows in outputs.items() if rows.shape == shape]
    if len(images) != 1:
        raise ModelFileError(
            f"the decoder makes {_told(outputs)} of a latent of an image of {list(shape[1:])}, not one such image"
        )
    nodes, weights = [helper.make_node("Identity", [PREFIX + images[0]], ["x_mean"])], []
    if value_range == (0, 1):
        nodes = [helper.make_node("Clip", [PREFIX + images[0], "black", "white"], ["x_mean"])]
        ends = zip(("black", "white"), value_range, strict=True)
        weights = [numpy_helper.from_array(np.array(end, np.float32), key) for key, end in ends]
    return _finished(decoder.name, decoder.renamed("z"), nodes, weights, {"x_mean": ["n", shape[1], "height", "width"]})


def _finished(
    name: str,
    model: onnx.ModelProto,
    nodes: list[onnx.NodeProto],
    weights: list[onnx.TensorProto],
    outputs: Mapping[str, list[Any]],
) -> Source:
    """A renamed graph with these last nodes and outputs."""
    used = {key for node in nodes for key in node.input}
    model.graph.initializer.extend(weight for weight in weights if weight.name in used)
    model.graph.node.extend(nodes)
    model.graph.output.extend(
        helper.make_tensor_value_info(key, TensorProto.FLOAT, shape) for key, shape in outputs.items()
    )
    check_graph(name, model)
    return Source(name, model, model.graph.input[0])


def _range(encoder: Source, decoder: Source, roles: Mapping[Role, str], x: Rows) -> tuple[float, float]:
    """Value range of the images, by those that the decoder makes of random latents and of those of random images."""
    mean = _encode(encoder, roles, encoder.run(x)).run(x)["mean"]
    drawn = np.random.default_rng(1).standard_normal(mean.shape, dtype=np.float32)
    made = np.concatenate([rows.ravel() for z in (mean, drawn) for rows in decoder.run(z).values()])
    low, high = np.percentile(made, [1, 99])
    found = (0.0, 1.0) if low > BELOW_ZERO else (-1.0, 1.0)
    tell(
        f"pixels are taken to be from {found[0]:g} to {found[1]:g}, since the decoder makes pixels from {low:.2g} to "
        f"{high:.2g}; if that is wrong, pass --value-range"
    )
    return found


def _joined(values: Any, by: str = " x ") -> str:
    return by.join("any" if value is None else str(value) for value in values)


def _told(outputs: Mapping[str, Rows]) -> str:
    return ", ".join(f"{key} of {list(rows.shape[1:])}" for key, rows in outputs.items())


def _line(error: Exception) -> str:
    """The first line of an error, which onnxruntime's are many of."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
