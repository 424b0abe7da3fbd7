"""What ships a model is not trusted: every version that is not what its manifest says is refused in one line."""

from __future__ import annotations

import io
import os
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from service.contract.manifest import ManifestError
from service.errors import StartError
from service.repository.graph_check import check_graph
from service.repository.version import LoadRules, open_model
from service.runtime.model import Model

CPU = "CPUExecutionProvider"
Seal = Callable[..., None]
Hanging = Callable[[Path, str], None]
ONE = np.ones(1, np.float32)
SECRET = "/etc/passwd"  # noqa: S105  # a file, not a password


def opened(folder: Path, rules: LoadRules = LoadRules()) -> Model:  # noqa: B008  # a tuple
    return open_model(folder, CPU, 1, 8, rules)


def refusal(folder: Path, rules: LoadRules = LoadRules()) -> str:  # noqa: B008  # a tuple
    """Why a version is not opened: one printable line of bounded length."""
    with pytest.raises(StartError) as caught:
        opened(folder, rules)
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 1000
    assert "Traceback" not in line
    return line


@pytest.fixture
def folder(flat_models: Path) -> Path:
    """A version that a test may spoil."""
    return flat_models / "mnist-2d" / "1"


# What a graph must not hold.


def outside(name: str = "w", location: str = SECRET) -> TensorProto:
    """A tensor whose data lie in another file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def unlisted_location() -> TensorProto:
    tensor = numpy_helper.from_array(ONE, "w")
    tensor.data_location = TensorProto.EXTERNAL
    return tensor


def unmarked_entries() -> TensorProto:
    tensor = outside()
    tensor.ClearField("data_location")
    return tensor


def sparse(values: TensorProto, indices: TensorProto) -> onnx.SparseTensorProto:
    return helper.make_sparse_tensor(values, indices, [4])


def constant(**attribute: Any) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], "node-c", **attribute)


def graph_of(*nodes: onnx.NodeProto, initializer: Any = ()) -> onnx.GraphProto:
    return helper.make_graph([*nodes], "g", [], [], [*initializer])


def model_of(*nodes: onnx.NodeProto, **further: Any) -> onnx.ModelProto:
    return helper.make_model(graph_of(*nodes, **further))


def below(inner: onnx.GraphProto) -> onnx.NodeProto:
    """A node with a subgraph in a subgraph."""
    then = helper.make_graph([helper.make_node("If", ["b"], ["o"], "inner", then_branch=inner)], "t", [], [])
    return helper.make_node("If", ["b"], ["o"], "outer", then_branch=then)


def in_function(*nodes: onnx.NodeProto, default: onnx.AttributeProto | None = None) -> onnx.ModelProto:
    """A model whose function `own:F` has these nodes."""
    opsets = [helper.make_opsetid("", 20)]
    defaults = [default] if default is not None else []
    function = helper.make_function("own", "F", [], ["c"], [*nodes], opsets, [], defaults)
    model = helper.make_model(graph_of(helper.make_node("F", [], ["c"], "call", domain="own")))
    model.functions.append(function)
    return model


def in_training() -> onnx.ModelProto:
    model = model_of(constant(value=numpy_helper.from_array(ONE)))
    model.training_info.add().algorithm.initializer.append(outside())
    return model


def twice(model: onnx.ModelProto, other: onnx.ModelProto) -> bytes:
    """Two messages in one file, which protobuf merges into one."""
    return bytes(model.SerializeToString() + other.SerializeToString())


INDEX = numpy_helper.from_array(np.zeros(1, np.int64), "i")
GRAPHS_ATTRIBUTE = helper.make_attribute("g", [graph_of(initializer=[outside()])])
OUTSIDE: dict[str, onnx.ModelProto | bytes] = {
    "initialiser": model_of(initializer=[outside()]),
    "relative": model_of(initializer=[outside(location="golden.npz")]),
    "upwards": model_of(initializer=[outside(location="../../../keys")]),
    "memory address": model_of(initializer=[outside(location="*/_ORT_MEM_ADDR_/*")]),
    "location without entries": model_of(initializer=[unlisted_location()]),
    "entries without location": model_of(initializer=[unmarked_entries()]),
    "sparse initialiser's values": model_of(),
    "sparse initialiser's indices": model_of(),
    "attribute": model_of(constant(value=outside())),
    "attribute of tensors": model_of(helper.make_node("Constant", [], ["c"], "n", tensors=[outside()])),
    "attribute of a sparse tensor": model_of(constant(sparse_value=sparse(outside(), INDEX))),
    "attribute of sparse tensors": model_of(constant(many=[sparse(outside(), INDEX)])),
    "attribute of graphs": model_of(),
    "subgraph": model_of(below(graph_of(initializer=[outside()]))),
    "attribute in a subgraph": model_of(below(graph_of(constant(value=outside())))),
    "function": in_function(constant(value=outside())),
    "function's default": in_function(default=helper.make_attribute("a", outside())),
    "training information": in_training(),
    "appended": twice(model_of(), model_of(initializer=[outside()])),
}
OUTSIDE["sparse initialiser's values"].graph.sparse_initializer.append(sparse(outside(), INDEX))  # type: ignore[union-attr]
OUTSIDE["sparse initialiser's indices"].graph.sparse_initializer.append(  # type: ignore[union-attr]
    sparse(numpy_helper.from_array(ONE), outside("i"))
)
OUTSIDE["attribute of graphs"].graph.node.add(op_type="X").attribute.append(GRAPHS_ATTRIBUTE)  # type: ignore[union-attr]


def content_of(model: onnx.ModelProto | bytes) -> bytes:
    return model if isinstance(model, bytes) else bytes(model.SerializeToString())


@pytest.mark.parametrize("where", OUTSIDE)
def test_data_outside_the_graph_are_found_wherever_they_hide(where: str) -> None:
    """The message names the tensor."""
    with pytest.raises(ManifestError, match=r"^g.onnx: tensor '[wi]' has its data outside the graph's file"):
        check_graph("g.onnx", content_of(OUTSIDE[where]))


RANDOM = [
    *(helper.make_node(name, ["x"], ["c"], "dice") for name in ("Bernoulli", "Multinomial", "RandomNormalLike")),
    helper.make_node("RandomUniformLike", ["x"], ["c"], "dice"),
    helper.make_node("RandomNormal", [], ["c"], "dice", shape=[1]),
    helper.make_node("RandomUniform", [], ["c"], "dice", shape=[1]),
    helper.make_node("Dropout", ["x", "ratio", "training"], ["c"], "dice"),
]


@pytest.mark.parametrize("node", RANDOM, ids=lambda node: node.op_type)
def test_random_operators_are_refused_wherever_they_hide(node: onnx.NodeProto) -> None:
    """The message names the node."""
    for model in (model_of(node), model_of(below(graph_of(node))), in_function(node)):
        with pytest.raises(ManifestError, match=r"^g.onnx: node 'dice' .* draws random numbers"):
            check_graph("g.onnx", content_of(model))


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("EPContext", ["x"], ["c"], "other", domain="com.microsoft", ep_cache_context=SECRET),
        helper.make_node("Sampling", ["x"], ["c"], "other", domain="com.microsoft"),
        helper.make_node("Anything", ["x"], ["c"], "other", domain="custom"),
        helper.make_node("F", ["x"], ["c"], "other", domain="custom"),
    ],
    ids=lambda node: f"{node.domain}:{node.op_type}",
)
def test_operators_of_others_are_refused_wherever_they_hide(node: onnx.NodeProto) -> None:
    """They may read files or run code that is not onnxruntime's; the message names the node."""
    for model in (model_of(node), model_of(below(graph_of(node))), in_function(node)):
        with pytest.raises(ManifestError, match=r"^g.onnx: node 'other' .* is not an operator of ONNX"):
            check_graph("g.onnx", content_of(model))


def test_harmless_graphs_pass() -> None:
    """Dropout outside training, a function of the graph's own, subgraphs, sparse tensors with data inside."""
    dropout = helper.make_node("Dropout", ["x"], ["c"], "d")
    inside = sparse(numpy_helper.from_array(ONE), INDEX)
    for model in (model_of(dropout), in_function(dropout), model_of(below(graph_of(constant(sparse_value=inside))))):
        check_graph("g.onnx", content_of(model))


@pytest.mark.parametrize("content", [b"", b"\x08", b"\0" * 100, b"\xff" * 100, b"\x00\x00\x00\x00ORTM" + b"\0" * 99])
def test_what_is_no_onnx_graph_is_refused(content: bytes, folder: Path, seal: Seal) -> None:
    """By the version's opening, in one line."""
    (folder / "decoder.onnx").write_bytes(content)
    seal(folder)
    assert "decoder.onnx" in refusal(folder) or "cannot be opened" in refusal(folder)


# What it may do when it is opened and run.


@pytest.mark.parametrize("when", ["opened", "run"])
def test_an_endless_loop_is_refused_when_its_time_is_up(folder: Path, hanging: Hanging, when: str) -> None:
    """Whether onnxruntime runs into it while it folds constants, or when the graph is replayed."""
    hanging(folder, when)
    assert refusal(folder, LoadRules(3.0)).endswith(
        "was not opened and replayed within the 3 s of VAE_LOAD_LIMIT_S; raise it, or export the model again"
    )


HUGE = """
<ir_version: 10, opset_import: ["" : 20]>
decoder (float[n, 2] z) => (float[n, 1, 28, 28] x_mean) {{
    rows = Shape <start = 0, end = 1> (z)
    size = Constant <value = int64[1] {{10000000000}}> ()
    many = Mul (rows, size)
    zeros = ConstantOfShape ({size})
    end = ReduceSum <keepdims = 0> (zeros)
    image = Constant <value = int64[3] {{1, 28, 28}}> ()
    shape = Concat <axis = 0> (rows, image)
    x_mean = Expand (end, shape)
}}
"""


@pytest.mark.parametrize("size", ["size", "many"])
def test_a_huge_tensor_is_refused(folder: Path, seal: Seal, size: str) -> None:
    """Of 40 GB, whether it is made while constants are folded or when the graph is replayed."""
    onnx.save(onnx.parser.parse_model(HUGE.format(size=size)), folder / "decoder.onnx")
    seal(folder)
    assert "VAE_LOAD_MEMORY_BYTES" in refusal(folder, LoadRules(60.0, 2**30))


def wrapped(field: int, content: bytes) -> bytes:
    """A message as a field of another, in protobuf."""
    size, length = b"", len(content)
    while length > 127:
        size += bytes([length % 128 + 128])
        length //= 128
    return bytes([8 * field + 2]) + size + bytes([length]) + content


def test_a_graph_of_many_levels_is_refused() -> None:
    """More than protobuf reads."""
    graph = b""
    for _ in range(200):
        graph = wrapped(1, wrapped(5, wrapped(6, graph)))  # a node, its attribute, a graph in that
    with pytest.raises(ManifestError, match="not an ONNX graph"):
        check_graph("g.onnx", wrapped(7, graph))


# Names, shapes and types are the manifest's, and tensors are bound by name.


def changed_graph(folder: Path, seal: Seal, file: str, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(folder / file)
    change(model)
    onnx.save(model, folder / file)
    seal(folder)


def swap_outputs(model: onnx.ModelProto) -> None:
    first, second = list(model.graph.output)
    del model.graph.output[:]
    model.graph.output.extend([second, first])


def test_outputs_are_bound_by_name(folder: Path, seal: Seal) -> None:
    """An encoder whose outputs stand in the other order gives the same mean."""
    x = np.random.default_rng(0).random((2, 1, 28, 28), np.float32)
    mean, log_var = opened(folder).graphs["encoder"](x)
    changed_graph(folder, seal, "encoder.onnx", swap_outputs)
    swapped = opened(folder).graphs["encoder"](x)
    assert not np.allclose(mean, log_var)
    np.testing.assert_allclose(swapped[0], mean, atol=1e-5)
    np.testing.assert_allclose(swapped[1], log_var, atol=1e-5)


def rename(model: onnx.ModelProto) -> None:
    """The input, by an Identity of the old name."""
    model.graph.node.insert(0, helper.make_node("Identity", ["other"], [model.graph.input[0].name]))
    model.graph.input[0].name = "other"


def more_outputs(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", [model.graph.output[0].name], ["more"]))
    model.graph.output.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, None))


def fixed_rows(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4


def other_size(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 3


def other_rank(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim.add().dim_value = 1


def other_type(model: onnx.ModelProto) -> None:
    """Doubles, which are cast."""
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    (name, model.graph.input[0].name) = (model.graph.input[0].name, "z64")
    model.graph.node.insert(0, helper.make_node("Cast", ["z64"], [name], to=TensorProto.FLOAT))
    for node in model.graph.node:
        node.input[:] = [other if other != "z64" or node.op_type == "Cast" else name for other in node.input]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (rename, "its inputs are [other], in the manifest [z]"),
        (more_outputs, "its outputs are [more, x_mean], in the manifest [x_mean]"),
        (fixed_rows, "z of its inputs is tensor(float) of shape [4, 2], in the manifest float32 of shape [any, 2]"),
        (other_size, "decoder.onnx"),
        (other_rank, "decoder.onnx"),
        (other_type, "its inputs are [z64]"),
    ],
)
def test_a_graph_that_disagrees_with_its_manifest_is_refused(
    folder: Path, seal: Seal, change: Callable[[onnx.ModelProto], None], says: str
) -> None:
    """By name, number, shape and type of its inputs and outputs."""
    changed_graph(folder, seal, "decoder.onnx", change)
    line = refusal(folder)
    assert says in line
    assert "decoder.onnx" in line


# Its files.


@contextmanager
def bound(path: Path) -> Iterator[None]:
    """A socket in the file system, by a short name since long ones do not fit."""
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(path.parent)
        try:
            listener.bind(path.name)
        finally:
            os.chdir(here)
        yield


@pytest.mark.parametrize("file", ["manifest.json", "decoder.onnx", "golden.npz"])
def test_what_is_not_a_regular_file_is_refused(folder: Path, file: str) -> None:
    """A FIFO, a link to one, a directory, a device, a socket, a link to itself: nothing is waited for."""
    path = folder / file
    fifo = folder.parent / "fifo"
    os.mkfifo(fifo)

    def irregular(make: Callable[[], Any]) -> None:
        path.unlink()
        make()
        line = refusal(folder)
        assert line.startswith(f"{path} is not a regular file; ")
        path.rmdir() if path.is_dir() else path.unlink()
        path.touch()

    irregular(lambda: os.mkfifo(path))
    irregular(lambda: path.symlink_to(fifo))
    irregular(path.mkdir)
    irregular(lambda: path.symlink_to("/dev/zero"))
    with bound(folder.parent / "socket"):
        irregular(lambda: path.symlink_to(folder.parent / "socket"))
    path.unlink()
    path.symlink_to(path)
    assert refusal(folder).startswith(f"{path}: ")


def test_files_that_kubernetes_mounts_are_read(folder: Path) -> None:
    """Links to links in a hidden folder beside them."""
    (folder / "..2026").mkdir()
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(folder / "..2026" / path.name)
        path.symlink_to(Path("..data") / path.name)
    (folder / "..data").symlink_to("..2026")
    assert opened(folder).manifest.name == "mnist-2d"


# Its golden rows.


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def header(shape: str) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def bomb(member: str, size: int) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    return lambda members: {**members, member: bytes(size)}


def without(member: str) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    return lambda members: {name: content for name, content in members.items() if name != member}


def instead(member: str, content: bytes) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    return lambda members: {**members, member: content}


X_MEAN = "decoder/x_mean.npy"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (bomb(X_MEAN, 2**27), "must be float32 of shape"),
        (bomb("more.npy", 2**27), "'more' is no tensor of the graphs"),
        (without(X_MEAN), "'decoder/x_mean' is missing"),
        (instead(X_MEAN, b""), "must be float32"),
        (instead(X_MEAN, npy(np.zeros((1, 1, 28, 28), np.float32))), "must be float32"),
        (instead(X_MEAN, npy(np.zeros(3))), "must be float32"),
        (instead(X_MEAN, header("(2, 1, 28, 10000000)") + bytes(2**15)), "must be float32"),
        (instead(X_MEAN, npy(np.array([{}], dtype=object))), "must be float32"),
    ],
    ids=["a bomb", "a bomb beside", "missing", "empty", "fewer rows", "other type", "another size", "objects"],
)
def test_golden_rows_are_what_the_manifest_says(folder: Path, seal: Seal, change: Any, says: str) -> None:
    """Nothing else is unpacked, however small it is packed."""
    with zipfile.ZipFile(folder / "golden.npz") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / "golden.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in change(members).items():
            archive.writestr(name, content)
    seal(folder)
    line = refusal(folder, LoadRules(60.0, 2**26))
    assert "golden.npz" in line
    assert says in line


@pytest.mark.parametrize("content", [b"", b"PK", npy(np.zeros(3))])
def test_golden_rows_that_are_no_archive_are_refused(folder: Path, seal: Seal, content: bytes) -> None:
    """In one line."""
    (folder / "golden.npz").write_bytes(content)
    seal(folder)
    assert "golden.npz is no archive of arrays" in refusal(folder)


def test_a_golden_file_larger_than_its_rows_is_not_read(folder: Path, seal: Seal) -> None:
    """A sparse file of 8 GiB."""
    seal(folder)
    with (folder / "golden.npz").open("r+b") as file:
        file.truncate(2**33)
    assert "golden.npz is larger than the" in refusal(folder)
