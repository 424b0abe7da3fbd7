"""The artefact: graphs that compute what torch computes, written whole or not at all."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor, nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

from service.contract import manifest
from service.contract.corruption import FAMILIES
from service.contract.golden import deviation
from service.contract.graphs import GRAPHS, Signature, free_axes
from service.contract.manifest import Scoring
from training.distributions.likelihoods.bernoulli import Bernoulli
from training.distributions.priors.realnvp import RealNvp
from training.distributions.priors.standard_normal import StandardNormal
from training.errors import DiskError, ExportError
from training.export.export import PARITY, Exportable, export, exportables, to_onnx
from training.export.external import write_graph
from training.models.restoration import Recognition, simulate
from training.models.vae import VAE
from training.networks import Architecture
from training.networks.conv import Conv
from training.networks.mlp import Mlp
from training.networks.unet import UNetSettings

LATENT_DIM = 4
ABOUT: dict[str, Any] = {
    "input_shape": [1, 7, 5],
    "value_range": [0.0, 1.0],
    "latent_shape": [LATENT_DIM],
    "likelihood": "bernoulli",
    "prior": "standard_normal",
    "dataset": "digits",
    "noise_families": list(FAMILIES),
    "training": {"seed": 1},
    "quality": {"test_nll_nats": 84.2},
    "scoring": Scoring(
        binary=True,
        binarisation="sample",
        elbo_percentiles_nats=[float(k) for k in range(101)],
        images=10,
        draws=16,
        seed=1,
    ),
}
MLP = Mlp(architecture="mlp", hidden=(16, 8), activation="silu")
CONV = Conv(architecture="conv", channels=(4, 6), blocks=1, head=3)


def scrambled(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter moved, so that no layer that starts at zero hides a difference."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module


def graphs_of(architecture: Architecture, shape: tuple[int, int, int], *, restores: bool) -> dict[str, Exportable]:
    """Everything that a trained run would export, with weights of no meaning."""
    torch.manual_seed(3)
    channels, height, width = shape
    vae = VAE(
        architecture.encoder(shape, LATENT_DIM),
        architecture.decoder(LATENT_DIM, shape),
        Bernoulli(shape),
        RealNvp(LATENT_DIM, 2, 5) if restores else StandardNormal(LATENT_DIM),
    )
    planes = 2 * channels + len(FAMILIES)
    recognition = Recognition(
        architecture.encoder((planes, height, width), LATENT_DIM),
        architecture.encoder((2 * channels, height, width), len(FAMILIES)),
        UNetSettings(channels=(3, 4, 5)).network(planes + 2 * channels, 2 * channels, (height, width)),
    )
    scrambled(vae)
    scrambled(recognition)
    x = torch.rand(4, *shape)
    seen = simulate(x, torch.Generator().manual_seed(4))
    return exportables(vae.eval(), recognition.eval() if restores else None, x, seen)


def rows_like(graph: Exportable, size: int, **lengths: int) -> tuple[Tensor, ...]:
    """Other rows than those it was exported with, as many as asked for, and free axes as long as asked for."""
    generator = torch.Generator().manual_seed(size)
    free = free_axes(graph.signature.inputs)
    shapes = ([lengths.get(free.get(name, {}).get(axis, ""), length) for axis, length in enumerate(row.shape)]
              for name, row in zip(graph.signature.inputs, graph.rows, strict=True))  # fmt: skip
    return tuple(torch.rand(size, *shape[1:], generator=generator) for shape in shapes)


def largest_difference(path: Path, graph: Exportable, rows: tuple[Tensor, ...]) -> float:
    """Between onnxruntime and torch, over every output, as an export is judged."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs, outputs = list(graph.signature.inputs), list(graph.signature.outputs)
    found = session.run(outputs, dict(zip(inputs, (row.numpy() for row in rows), strict=True)))
    with torch.no_grad():
        answer = graph.module(*rows)
    expected = answer if isinstance(answer, tuple) else (answer,)
    named = zip(outputs, found, expected, strict=True)
    return max(deviation(name, one, other.numpy()) for name, one, other in named)


@pytest.mark.parametrize(
    ("architecture", "shape", "restores"),
    [(MLP, (1, 7, 5), False), (CONV, (3, 33, 20), True)],
    ids=["mlp-1x7x5", "conv-3x33x20"],
)
def test_graphs_compute_what_torch_computes(
    architecture: Architecture, shape: tuple[int, int, int], restores: bool, tmp_path: Path
) -> None:
    """At batches of 1, 3 and 64, and of whatever size is seen, every graph is within 1e-5 of torch.

    It holds no random operator, and no file lies beside it.
    """
    graphs = graphs_of(architecture, shape, restores=restores)
    folder = export(graphs, tmp_path, "tiny", "1", {**ABOUT, "input_shape": list(shape)})
    written = manifest.read(folder)
    assert set(written.graphs) == set(graphs)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["manifest.json", *(entry.file for entry in written.files())]
    )
    for name, graph in graphs.items():
        for size in (1, 3, 64):
            difference = largest_difference(folder / f"{name}.onnx", graph, rows_like(graph, size))
            assert difference <= PARITY, f"{name}, {size} rows"
            if free_axes(graph.signature.inputs):
                rows = rows_like(graph, size, seen_height=shape[1] // 3, seen_width=1)
                difference = largest_difference(folder / f"{name}.onnx", graph, rows)
                assert difference <= 2 * PARITY, f"{name}, less seen"  # random operators add up where real ones average
        model = onnx.load_model(folder / f"{name}.onnx", load_external_data=False)
        assert not [node.op_type for node in model.graph.node if "Random" in node.op_type]
        assert not any(tensor.external_data for tensor in model.graph.initializer)
        entry = written.graphs[name]
        shapes = [list(row.shape[1:]) for row in graph.rows]
        assert list(entry.inputs.items()) == list(zip(graph.signature.inputs, shapes, strict=True))


def test_manifest_answers_for_every_file(digits_models: Path) -> None:
    """What the pipeline writes, the service's reader reads: every digest matches its file."""
    folder = digits_models / "digits" / "1"
    written = manifest.read(folder)
    scoring = {"log_joint", "elbo_gradient"}
    restoring = {"recognition", "noise_level", "fusion", "correction", "refinement"}
    assert set(written.graphs) == {"encoder", "decoder"} | scoring | restoring
    for entry in written.files():
        assert manifest.digest((folder / entry.file).read_bytes()) == entry.sha256
    assert manifest.parse(written.to_json().encode()) == written
    assert (written.input_shape, written.latent_shape, written.dataset) == ([1, 8, 8], [8], "digits")


def test_golden_vectors_are_what_the_graphs_answer(digits_models: Path) -> None:
    """The golden inputs, replayed, give the golden outputs within 1e-5."""
    folder = digits_models / "digits" / "1"
    written = manifest.read(folder)
    with np.load(folder / written.golden.file, allow_pickle=False) as golden:
        for name, graph in written.graphs.items():
            session = ort.InferenceSession(folder / graph.file, providers=["CPUExecutionProvider"])
            feed = {key: golden[f"{name}/{key}"] for key in graph.inputs}
            assert {len(rows) for rows in feed.values()} == {written.golden.rows}
            for key, found in zip(graph.outputs, session.run(list(graph.outputs), feed), strict=True):
                np.testing.assert_allclose(found, golden[f"{name}/{key}"], atol=PARITY, rtol=0)


def test_measured_figures_and_settings_travel_along(digits_models: Path) -> None:
    """The manifest is valid JSON for everyone, and says how the model was trained and what it is worth."""
    text = (digits_models / "digits" / "1" / "manifest.json").read_text()

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    content = json.loads(text, parse_constant=refuse)
    assert content["training"]["settings"]["train"]["batch_size"] == 50
    assert content["training"]["seconds"].keys() == {"vae", "restoration"}
    quality = content["quality"]
    assert quality["test_elbo_standard_error_nats"] > 0.0
    # An importance-weighted bound is the tighter one.
    assert -quality["test_nll_nats"] > quality["test_elbo_nats"]


class Restless(nn.Module):
    """Answers differently every time."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """X and how often it was asked."""
        self.calls += 1
        return x + self.calls


class Noisy(nn.Module):
    """Draws noise inside the graph."""

    def forward(self, x: Tensor) -> Tensor:
        """X and noise."""
        return x + 1e-9 * torch.randn_like(x)


class Dropping(nn.Module):
    """Drops at random although it is in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        """X with half of it gone."""
        return x * torch.bernoulli(torch.full_like(x, 0.5))


class NotANumber(nn.Module):
    """Answers NaN."""

    def forward(self, x: Tensor) -> Tensor:
        """0 / 0."""
        return (x - x) / (x - x)


class Broken(nn.Module):
    """Cannot be run at all."""

    def forward(self, _x: Tensor) -> Tensor:
        """Never."""
        raise RuntimeError("this module is broken")


def one_graph(module: nn.Module) -> dict[str, Exportable]:
    """A version of one graph called decoder."""
    return {"decoder": Exportable(module, (torch.rand(4, 3),), GRAPHS["decoder"])}


class Line(nn.Module):
    """An encoder of images of one line."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 1, 1, 3) -> mean and log_var (n, 3)."""
        return x.flatten(1), -x.flatten(1)


LINE = {**ABOUT, "input_shape": [1, 1, 3], "latent_shape": [3]}


def two_graphs(decoder: nn.Module) -> dict[str, Exportable]:
    """A version that the service can read: of images of one line of three pixels, as `LINE` says."""
    image = nn.Sequential(decoder, nn.Unflatten(1, (1, 1, -1)))
    return {**one_graph(image), "encoder": Exportable(Line(), (torch.rand(4, 1, 1, 3),), GRAPHS["encoder"])}


def test_each_tensor_has_the_name_of_what_it_is(tmp_path: Path) -> None:
    """An encoder's mean and log variance are called so in the ONNX graph, in the manifest and in the golden rows."""
    folder = export(two_graphs(nn.Linear(3, 3)), tmp_path, "tiny", "1", LINE)
    with np.load(folder / "golden.npz") as golden:
        x = golden["encoder/x"]
        session = ort.InferenceSession(folder / "encoder.onnx", providers=["CPUExecutionProvider"])
        for name, sign in (("mean", 1.0), ("log_var", -1.0)):
            np.testing.assert_allclose(session.run([name], {"x": x})[0], sign * x.reshape(4, 3))
            np.testing.assert_allclose(golden[f"encoder/{name}"], sign * x.reshape(4, 3))


def test_a_version_that_the_service_would_refuse_is_not_written(tmp_path: Path) -> None:
    """A decoder of other images than the manifest's is an ExportError naming the tensor; nothing is left."""
    with pytest.raises(ExportError, match=r"graphs.decoder.outputs.x_mean must be \[1, 1, 3\], not \[1, 1, 5\]"):
        export(two_graphs(nn.Linear(3, 5)), tmp_path, "tiny", "1", LINE)
    assert not list((tmp_path / "tiny").iterdir())


@pytest.mark.parametrize("fake", [Restless, Noisy, Dropping, NotANumber])
def test_graph_that_is_not_the_module_is_refused(fake: type[nn.Module], tmp_path: Path) -> None:
    """A graph that differs from torch, draws at random or answers NaN is an ExportError naming it; nothing is left."""
    with pytest.raises(ExportError, match="decoder"):
        export(one_graph(fake()), tmp_path / "models", "tiny", "1", ABOUT)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not list((tmp_path / "models" / "tiny").iterdir())


def test_any_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    """An error nobody foresaw, after one graph is written, leaves no half version either."""
    graphs = {**one_graph(nn.Linear(3, 2)), "encoder": Exportable(Broken(), (torch.rand(4, 3),), GRAPHS["encoder"])}
    with pytest.raises(Exception, match="broken"):
        export(graphs, tmp_path, "tiny", "1", ABOUT)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


class Stopped(nn.Module):
    """Somebody presses Ctrl-C while it is exported."""

    def forward(self, _x: Tensor) -> Tensor:
        """Never."""
        raise KeyboardInterrupt


def test_existing_version_survives_all_but_a_good_replacement(tmp_path: Path) -> None:
    """Without `replace` an existing version is refused; an interrupted one leaves it; a good one takes its place.

    A key signs what is exported; without one, no signature stays.
    """
    key = Ed25519PrivateKey.generate()
    first = export(two_graphs(nn.Linear(3, 3)), tmp_path, "tiny", "1", LINE, key=key)
    key.public_key().verify((first / "manifest.json.sig").read_bytes(), (first / "manifest.json").read_bytes())
    before = {path.name: path.read_bytes() for path in first.iterdir()}

    def now() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in first.iterdir()}

    with pytest.raises(ExportError, match="--replace"):
        export(one_graph(nn.Linear(3, 2)), tmp_path, "tiny", "1", ABOUT)
    assert now() == before
    with pytest.raises(KeyboardInterrupt):
        export(one_graph(Stopped()), tmp_path, "tiny", "1", ABOUT, replace=True)
    assert now() == before
    replaced = export(two_graphs(nn.Linear(3, 3)), tmp_path, "tiny", "1", LINE, replace=True)
    assert replaced == first
    assert now()["decoder.onnx"] != before["decoder.onnx"]
    assert before.keys() - now().keys() == {"manifest.json.sig"}
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["1"]


@pytest.mark.parametrize(("large_bytes", "files"), [(2**20, {"line.onnx"}), (1000, {"line.onnx", "line.data"})])
def test_weights_of_a_large_graph_lie_beside_it(large_bytes: int, files: set[str], tmp_path: Path) -> None:
    """With their digest; tensors below 1 KiB stay inside, and the graph computes the same."""
    rng = np.random.default_rng(0)
    weight, bias = rng.random((32, 32), np.float32), rng.random(32, np.float32)
    line = onnx.helper.make_graph(
        [onnx.helper.make_node("Gemm", ["x", "weight", "bias"], ["y"])],
        "line",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 32])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 32])],
        [onnx.numpy_helper.from_array(weight, "weight"), onnx.numpy_helper.from_array(bias, "bias")],
    )
    model = onnx.helper.make_model(line, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 20)])
    entry = write_graph(model, tmp_path, "line", large_bytes)
    assert {path.name for path in tmp_path.iterdir()} == files
    for part in (entry, *entry.get("data", ())):
        assert manifest.digest((tmp_path / part["file"]).read_bytes()) == part["sha256"]
    assert [part["file"] for part in entry.get("data", ())] == sorted(files - {"line.onnx"})
    outside = {tensor.name for tensor in onnx.load(tmp_path / "line.onnx", load_external_data=False).graph.initializer
               if tensor.external_data}  # fmt: skip
    assert outside == ({"weight"} if len(files) == 2 else set())
    x = rng.random((3, 32), np.float32)
    session = ort.InferenceSession(tmp_path / "line.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(["y"], {"x": x})[0], x @ weight + bias, rtol=1e-5)


def test_the_file_that_names_the_default_model_is_left_alone(tmp_path: Path) -> None:
    """No export touches it, nor takes its name."""
    (tmp_path / "default").write_text("other\n")
    export(two_graphs(nn.Linear(3, 3)), tmp_path, "tiny", "1", LINE)
    with pytest.raises(ExportError, match="choose another name"):
        export(one_graph(nn.Linear(3, 2)), tmp_path, "default", "1", ABOUT, replace=True)
    assert (tmp_path / "default").read_text() == "other\n"


@pytest.mark.parametrize(
    ("name", "version"), [("../up", "1"), ("Upper", "1"), ("ok", ".hidden"), ("ok", ""), ("a/b", "1")]
)
def test_name_that_is_not_plain_is_refused(name: str, version: str, tmp_path: Path) -> None:
    """A name that leads elsewhere, or that the service would not list, is an ExportError naming it."""
    with pytest.raises(ExportError, match="plain name"):
        export(one_graph(nn.Linear(3, 2)), tmp_path, name, version, ABOUT)
    assert not list(tmp_path.iterdir())


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes: a write past it fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    """A write that fails is a DiskError naming the version; the half-written folder is gone."""
    graphs = one_graph(nn.Linear(3, 50_000))
    with files_of_at_most(100_000), pytest.raises(DiskError, match="tiny/1"):
        export(graphs, tmp_path, "tiny", "1", ABOUT)
    assert not list((tmp_path / "tiny").iterdir())


def test_repository_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """A repository below a file, where no folder can be, is a DiskError."""
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DiskError, match="file"):
        export(one_graph(nn.Linear(3, 2)), tmp_path / "file" / "models", "tiny", "1", ABOUT)


def test_exports_share_the_library_and_nothing_else() -> None:
    """The second graph is the first, byte for byte; what one export replaces in the library is gone after it."""
    module, rows = nn.Sequential(nn.Linear(3, 2), nn.LogSigmoid()), (torch.zeros(2, 3),)
    graph = Exportable(module, rows, Signature("a test", {"x": "pixels"}, {"y": "pixels"}))
    first = to_onnx(module, rows, graph)
    for functions in ONNXRegistry.from_torchlib().functions.values():
        assert not any(function.is_custom for function in functions)
    assert to_onnx(module, rows, graph) == first
