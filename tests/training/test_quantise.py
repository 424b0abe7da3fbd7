"""`python -m training export --quantise`: what is measured, what is written, and when nothing is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from PIL import Image
from sklearn.datasets import load_digits
from torch.distributions import Normal, kl_divergence

from service.contract import manifest as manifests
from service.contract.manifest import Manifest, manifest_of
from service.repository.version import open_model
from tests.training.conftest import LinearGaussian
from training.__main__ import main
from training.errors import ConfigError, ExportError
from training.export import int8
from training.export.quantise import QuantiseOptions, quantise
from training.export.session import opened
from training.export.weights import store_as_float16
from training.importing.onnx_pair import import_onnx

CPU = "CPUExecutionProvider"
MNIST = Path(__file__).parents[2] / "models" / "mnist" / "3"
UNREACHED, ANY = 1000.0, 0.0


def weights(*shape: int, seed: int) -> NDArray[np.float32]:
    """Normal numbers of a size that keeps a layer's outputs as large as its inputs."""
    scale = np.sqrt(2.0 / np.prod(shape[1:]))
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@pytest.fixture
def pair(tmp_path: Path, onnx_file: Callable[..., Path]) -> Callable[..., Path]:
    """A function that makes a version of two small graphs of convolutions, for colour images of any or one size."""
    encoder = onnx_file(
        tmp_path / "encoder.onnx", "x", ["n", 3, "h", "w"],
        [helper.make_node("Conv", ["x", "a"], ["one"], pads=[1] * 4), helper.make_node("Relu", ["one"], ["two"]),
         helper.make_node("Conv", ["two", "b"], ["three"], strides=[2, 2]),
         helper.make_node("Relu", ["three"], ["four"]),
         helper.make_node("Conv", ["four", "c"], ["moments"])],
        "moments", a=weights(16, 3, 3, 3, seed=1), b=weights(16, 16, 2, 2, seed=2), c=weights(8, 16, 1, 1, seed=3),
    )  # fmt: skip
    decoder = onnx_file(
        tmp_path / "decoder.onnx", "z", ["n", 4, "h", "w"],
        [helper.make_node("Conv", ["z", "a"], ["one"], pads=[1] * 4), helper.make_node("Relu", ["one"], ["two"]),
         helper.make_node("Conv", ["two", "c"], ["three"], pads=[1] * 4),
         helper.make_node("ConvTranspose", ["three", "b"], ["four"], strides=[2, 2]),
         helper.make_node("Sigmoid", ["four"], ["image"])],
        "image", a=weights(16, 4, 3, 3, seed=4), c=weights(16, 16, 3, 3, seed=5), b=weights(16, 3, 2, 2, seed=6),
    )  # fmt: skip

    def made(size: tuple[int, int] | None = None) -> Path:
        return import_onnx(encoder, decoder, tmp_path / "models", "pair", value_range=(0.0, 1.0), size=size)

    return made


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of handwritten digits as pictures of 28 x 28."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, digit in enumerate(load_digits().images[:60]):
        grey = np.pad(np.kron(digit, np.ones((3, 3))), 2) * (255.0 / 16.0)
        Image.fromarray(grey.astype(np.uint8)).save(folder / f"{number}.png")
    return folder


def test_a_version_that_gains_too_little_is_not_written(
    pair: Callable[..., Path], pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gain and loss of each graph are told, then the error says that nothing is written, and nothing is."""
    folder = pair()
    with pytest.raises(ExportError, match=r"no graph of .* is 1000 times as fast in int8; nothing is written"):
        quantise(QuantiseOptions(folder, pictures, images=4), UNREACHED)
    assert [path.name for path in folder.parent.iterdir()] == ["1"]
    told = capsys.readouterr().err.splitlines()
    assert [line.split()[:3] for line in told[-2:]] == [[name, "stays", "float32"] for name in ("encoder", "decoder")]


def test_a_quantised_version_is_served(pair: Callable[..., Path], pictures: Path) -> None:
    """The service replays and opens it; its answers are near; a second time is refused."""
    source = pair((28, 28))
    folder = quantise(QuantiseOptions(source, pictures, images=8), ANY)
    assert folder == source.parent / "1-int8"
    models = [open_model(path, CPU, 1, 4) for path in (source, folder)]
    x = np.random.default_rng(0).random((2, 3, 28, 28), np.float32)
    known, found = (model.graphs["decoder"](model.graphs["encoder"](x)[0])[0] for model in models)
    assert not np.array_equal(found, known)
    assert np.abs(found - known).max() < 0.1
    assert np.square(found - known).mean() < 1e-4
    manifest = models[1].manifest
    assert manifest.training["quantised"] == ["decoder", "encoder"]
    told = manifest.quality["int8"]
    assert told["decoder"]["psnr_db"] > 40.0
    assert told["encoder"].keys() >= {"speed_alone", "speed_in_a_batch", "kl_nats"}
    assert manifest.golden.tolerance < 0.1
    with pytest.raises(ConfigError, match="int8 already"):
        quantise(QuantiseOptions(folder, pictures), ANY)


def test_the_version_is_written_where_out_names(pair: Callable[..., Path], pictures: Path, tmp_path: Path) -> None:
    """Without --out it lies beside the other."""
    source = pair((28, 28))
    folder = quantise(QuantiseOptions(source, pictures, models=tmp_path / "other", images=8), ANY)
    assert folder == tmp_path / "other" / source.parent.name / "1-int8"
    assert [path.name for path in source.parent.iterdir()] == ["1"]


def test_a_version_that_scores_and_restores_is_quantised(tmp_path: Path, pictures: Path) -> None:
    """Gradients, densities and the prior stay as they are; percentiles move as the ELBO does; factors are left out."""
    shutil.copytree(MNIST, source := tmp_path / "models" / "mnist" / "3")
    content = json.loads((source / "manifest.json").read_text())
    data = {"dataset": "folder", "height": 28, "width": 28, "mode": "L", "validation": 0.3}
    content["training"]["settings"]["data"] = data
    (source / "manifest.json").write_text(json.dumps(content))
    folder = quantise(QuantiseOptions(source, pictures, "4", images=12), ANY)
    before, after = manifests.read(source), open_model(folder, CPU, 1, 4).manifest
    changed = {name for name, graph in after.graphs.items() if graph != before.graphs[name]}
    assert changed == {"encoder", "decoder", "recognition", "noise_level", "correction"}
    assert after.calibration is None
    told = after.quality["int8"]
    assert 0.0 < abs(told["elbo_moved_nats"]) < 30.0
    assert after.scoring is not None
    assert before.scoring is not None
    moved = np.subtract(after.scoring.elbo_percentiles_nats, before.scoring.elbo_percentiles_nats)
    np.testing.assert_allclose(moved, told["elbo_moved_nats"], atol=2e-3)
    assert told["correction"]["psnr_db"] > 40.0
    assert after.quality["before"] == before.quality


def test_weights_in_float16_are_quantised_too(tmp_path: Path, onnx_file: Callable[..., Path]) -> None:
    """The same graph comes out as from float32 weights: no conversion hides a weight from quantisation."""
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    kernel = weights(16, 4, 3, 3, seed=1).astype(np.float16).astype(np.float32)
    path = onnx_file(tmp_path / "float32.onnx", "x", ["n", 4, 8, 8], [node], "y", w=kernel)
    model = onnx.load(path)
    store_as_float16(model)
    assert model.graph.initializer[0].data_type == TensorProto.FLOAT16
    onnx.save(model, tmp_path / "float16.onnx")
    rows = {"x": np.random.default_rng(0).random((20, 4, 8, 8), np.float32)}
    found, known = (int8.quantised(tmp_path / f"{name}.onnx", rows) for name in ("float16", "float32"))
    kinds = [tensor.data_type for tensor in onnx.load_model_from_string(found).graph.initializer]
    assert TensorProto.INT8 in kinds
    assert TensorProto.FLOAT16 not in kinds
    answers = [int8.run_in_batches(opened(content), rows)["y"] for content in (found, known)]
    np.testing.assert_array_equal(*answers)


def test_the_loss_of_a_posterior_is_the_divergence() -> None:
    """As torch's own closed form has it."""
    generator = np.random.default_rng(0)
    before, after = ({key: generator.standard_normal((5, 3)) for key in ("mean", "log_var")} for _ in range(2))
    p, q = (Normal(*map(torch.from_numpy, (one["mean"], np.exp(one["log_var"] / 2)))) for one in (before, after))
    assert int8.loss(before, after, [0.0, 1.0])["kl_nats"] == pytest.approx(float(kl_divergence(p, q).sum(1).mean()))


def linear_manifest(inference: str) -> Manifest:
    """Of the model whose log p(x) is known exactly, with q as the graph `encoder` or `posterior`."""
    x, z, file = [1, 2, 3], [2], {"sha256": "0" * 64}
    signatures: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "encoder": ({"x": x}, {"mean": z, "log_var": z}),
        "posterior": ({"x": x, "eps": z}, {"z": z, "mean": z, "log_var": z, "log_q": []}),
        "log_joint": ({"x": x, "z": z}, {"log_likelihood": [], "log_prior": []}),
    }
    graphs = {
        name: {"file": f"{name}.onnx", **file, "inputs": signatures[name][0], "outputs": signatures[name][1]}
        for name in (inference, "log_joint")
    }
    scoring = {"binary": False, "binarisation": "none", "elbo_percentiles_nats": [0.0] * 101}
    return manifest_of(
        {
            "schema_version": 1, "name": "linear", "version": "1",
            "input_shape": x, "latent_shape": z, "graphs": graphs,
            "golden": {"file": "golden.npz", **file, "rows": 1, "tolerance": 0.0},
            "scoring": {**scoring, "images": 1, "draws": 1, "seed": 0},
        }
    )  # fmt: skip


@pytest.mark.parametrize(("inference", "draws", "error"), [("posterior", 1, 1e-4), ("encoder", 2000, 0.15)])
def test_the_elbo_of_the_exact_posterior_is_log_p(
    inference: str, draws: int, error: float, linear_gaussian: LinearGaussian
) -> None:
    """In closed form: of every single draw, or on average where the entropy is taken in closed form."""
    vae, x = linear_gaussian.vae(), linear_gaussian.x(20)

    def run(name: str, rows: int8.Rows) -> int8.Rows:
        given = MappingProxyType({key: torch.from_numpy(array).float() for key, array in rows.items()})
        if name == "log_joint":
            z = given["z"]
            found = {"log_likelihood": vae.likelihood.log_prob(vae.decoder(z), given["x"]),
                     "log_prior": Normal(0.0, 1.0).log_prob(z).sum(1)}  # fmt: skip
        else:
            q = vae.posterior(given["x"])
            z = q.draw(given["eps"]) if "eps" in given else q.mean
            found = {"mean": q.mean, "log_var": q.log_var, "z": z, "log_q": q.log_prob(z)}
        return {key: tensor.numpy() for key, tensor in found.items()}

    assert int8.rows_of(linear_manifest(inference), run, x.numpy(), 0).keys() == {inference}
    elbo = int8.elbo(linear_manifest(inference), run, x.numpy(), draws, 0)
    np.testing.assert_allclose(elbo, linear_gaussian.log_prob(x), atol=error)


@pytest.mark.usefixtures("own_signals")
def test_the_command_names_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run or a version, not both; a folder without a version is an error in one line."""
    for wrong, says in (
        ([], "takes the TOML of a run, or --quantise"),
        (["run.toml", "--quantise", "models/mnist/3"], "takes the TOML of a run, or --quantise"),
        (["--quantise", str(tmp_path)], "a model version is a folder with a manifest.json"),
    ):
        assert main(["export", *wrong]) == 1
        assert says in capsys.readouterr().err
