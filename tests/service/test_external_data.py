"""Graphs whose weights lie in files of their own: listed, digested, read once, and opened from memory alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from service.contract.files import MAX_DATA_BYTES
from service.contract.manifest import ManifestError
from service.errors import StartError
from service.repository.graph_check import check_graph
from service.repository.remote import sync
from service.repository.version import open_model, open_version
from service.runtime.session import Session
from training.export.external import write_graph

CPU = "CPUExecutionProvider"
Z = np.random.default_rng(0).standard_normal((3, 2), np.float32)
Seal = Callable[..., None]


@pytest.fixture
def folder(flat_models: Path, seal: Seal) -> Path:
    """The version `mnist-2d`, with the weights of each graph in a file beside it, as the trainer writes large ones."""
    folder = flat_models / "mnist-2d" / "1"
    graphs = json.loads((folder / "manifest.json").read_text())["graphs"]
    for name, graph in graphs.items():
        graph.update(write_graph(onnx.load(folder / graph["file"]), folder, name, large_bytes=0))
    seal(folder, graphs=graphs)
    return folder


def decoded(graph: Callable[..., Any]) -> bytes:
    return bytes(graph(Z)[0].tobytes())


def refusal(folder: Path) -> str:
    with pytest.raises(StartError) as caught:
        open_model(folder, CPU, 1, 8)
    assert str(caught.value).isprintable()
    return str(caught.value)


def overwrite(path: Path) -> None:
    """In place: the same file, of the same size, with other content."""
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))


def test_the_same_bytes_as_with_the_weights_inside(folder: Path, tmp_path: Path) -> None:
    """And another fingerprint where other weights are in an equal graph; a copy from elsewhere has the files too."""
    inside = Path(__file__).parents[2] / "models" / "mnist-2d" / "1"
    (folder.parents[1] / "default").write_text("mnist-2d\n")
    copy = sync(f"file://{folder.parents[1]}", tmp_path / "copy") / "mnist-2d" / "1"
    ours, theirs = (open_model(path, CPU, 1, 8) for path in (copy, inside))
    assert (folder / "decoder.onnx").stat().st_size < 2**14
    assert decoded(ours.graphs["decoder"]) == decoded(theirs.graphs["decoder"])
    entry = ours.manifest.graphs["decoder"]
    other = entry.model_copy(update={"data": [entry.data[0].model_copy(update={"sha256": 64 * "0"})]})
    changed = ours.manifest.model_copy(update={"graphs": {**ours.manifest.graphs, "decoder": other}})
    assert changed.fingerprint != ours.manifest.fingerprint


def test_a_file_changed_in_place_after_its_check_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between reading and opening, even from the folder itself; a further reading refuses it."""
    monkeypatch.chdir(folder)
    with open_version(folder) as version:
        graph = version.variants[0].graphs["decoder"]
        content, data = version.files.read(graph), version.files.read(graph.data[0])
        before = decoded(Session(content, CPU, 1, graph, {"decoder.data": data}))
        overwrite(folder / "decoder.data")
        assert decoded(Session(content, CPU, 1, graph, {"decoder.data": data})) == before
        with pytest.raises(ManifestError, match=r"decoder.data does not match the SHA-256 in its manifest"):
            version.files.read(graph.data[0])


def test_a_file_replaced_after_it_was_opened_is_not_read(folder: Path) -> None:
    """What is opened first is what is served; what is served stays, whatever becomes of the file."""
    with open_version(folder) as version:
        graph = version.variants[0].graphs["decoder"]
        before = (folder / "decoder.data").read_bytes()
        (folder / "decoder.data").unlink()
        (folder / "decoder.data").write_bytes(b"other")
        assert version.files.read(graph.data[0]) == before
    (folder / "decoder.data").write_bytes(before)
    model = open_model(folder, CPU, 1, 8)
    served = decoded(model.graphs["decoder"])
    overwrite(folder / "decoder.data")
    assert decoded(model.graphs["decoder"]) == served
    assert "decoder.data does not match the SHA-256" in refusal(folder)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def too_large(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(MAX_DATA_BYTES + 1)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (Path.unlink, "No such file or directory"),
        (overwrite, "does not match the SHA-256"),
        (cut_off, "has its data outside the graph's file, up to byte "),
        (too_large, f"is larger than the {MAX_DATA_BYTES} bytes that it may have"),
    ],
)
def test_a_file_of_data_that_is_not_as_listed_is_refused(
    folder: Path, spoil: Callable[[Path], None], says: str
) -> None:
    """By name."""
    spoil(folder / "encoder.data")
    said = refusal(folder)
    assert "encoder.data" in said
    assert says in said


def test_data_shorter_than_their_tensor_are_refused(folder: Path, seal: Seal) -> None:
    """Where the file has them, but the tensor's shape asks for more: onnxruntime reads no further."""
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    (length,) = (entry for entry in tensor.external_data if entry.key == "length")
    length.value = "4"
    onnx.save(model, folder / "decoder.onnx")
    seal(folder)
    assert "cannot be opened: decoder.onnx: " in refusal(folder)


def outside(*entries: tuple[str, str], location: int = TensorProto.EXTERNAL) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=location)
    for key, value in entries:
        tensor.external_data.add(key=key, value=value)
    return tensor


def graph_of(tensor: TensorProto, *nodes: onnx.NodeProto) -> onnx.ModelProto:
    return helper.make_model(helper.make_graph([*nodes], "g", [], [], [tensor]))


PLACE = (("location", "g.data"), ("offset", "16"), ("length", "16"))
INSIDE = numpy_helper.from_array(np.ones(4, np.float32), "w")
LISTED: dict[str, tuple[onnx.ModelProto, str]] = {
    "another file": (graph_of(outside(("location", "h.data"), *PLACE[1:])), "does not list it; list the file in"),
    "a path to it": (graph_of(outside(("location", "./g.data"), *PLACE[1:])), "does not list it"),
    "beyond its end": (graph_of(outside(*PLACE[:2], ("length", "17"))), "up to byte 33 of g.data, which has 32"),
    "a huge offset": (graph_of(outside(PLACE[0], ("offset", str(2**62)), PLACE[2])), "not by one location, offset"),
    "a negative offset": (graph_of(outside(PLACE[0], ("offset", "-1"), PLACE[2])), "not by one location, offset"),
    "no length": (graph_of(outside(*PLACE[:2])), "not by one location, offset and length"),
    "two lengths": (graph_of(outside(*PLACE, ("length", "1"))), "not by one location, offset and length"),
    "a further key": (graph_of(outside(*PLACE, ("basepath", "/etc"))), "not by one location, offset and length"),
    "unmarked": (graph_of(outside(*PLACE, location=TensorProto.DEFAULT)), "not by one location, offset and length"),
    "an attribute": (
        graph_of(INSIDE, helper.make_node("Constant", [], ["c"], value=outside(*PLACE))),
        "does not list it",
    ),
    "a subgraph": (
        graph_of(INSIDE, helper.make_node("If", ["b"], ["o"], then_branch=graph_of(outside(*PLACE)).graph)),
        "does not list it",
    ),
}


@pytest.mark.parametrize("where", LISTED)
def test_data_outside_are_of_listed_files_and_within_them(where: str) -> None:
    """Else the message names the tensor and what is wrong."""
    model, says = LISTED[where]
    with pytest.raises(ManifestError, match=r"^g.onnx: tensor 'w' has its data outside the graph's file") as caught:
        check_graph("g.onnx", model.SerializeToString(), {"g.data": 32})
    assert says in str(caught.value)


def test_listed_data_pass() -> None:
    """With an offset, or without one."""
    for entries in (PLACE, (PLACE[0], PLACE[2])):
        check_graph("g.onnx", graph_of(outside(*entries)).SerializeToString(), {"g.data": 32})
