"""Import of others' VAEs: an AutoencoderKL of diffusers, graphs of ONNX, pairs of torch modules."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from service.contract import manifest
from training.__main__ import main
from training.errors import ExportError, ModelFileError
from training.importing.onnx_pair import import_onnx

Nodes = list[onnx.NodeProto]

WEIGHT = np.random.default_rng(5).normal(0.0, 0.3, (8, 3, 2, 2)).astype(np.float32)
"""Of a convolution that halves an image's sides and gives mean and log_var of four channels each."""
BACK = np.random.default_rng(6).normal(0.0, 0.3, (4, 3, 2, 2)).astype(np.float32)
"""Of one that doubles them."""


def graph(path: Path, given: str, shape: list[Any], nodes: Nodes, outputs: list[str], **weights: np.ndarray) -> Path:
    """Write an ONNX graph of one float32 input."""
    values = [helper.make_tensor_value_info(given, TensorProto.FLOAT, shape)]
    made = helper.make_graph(
        nodes, "test", values, [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", None, None, None]) for name in outputs],
        [numpy_helper.from_array(weight, name) for name, weight in weights.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def encoder_of(path: Path, *last: onnx.NodeProto, outputs: list[str], shape: list[Any] | None = None) -> Path:
    """An encoder whose convolution gives `joined`, followed by these nodes."""
    nodes = [helper.make_node("Conv", ["pixels", "w"], ["joined"], "conv", strides=[2, 2]), *last]
    return graph(path, "pixels", shape or ["n", 3, "h", "w"], nodes, outputs, w=WEIGHT, splits=np.array([4, 4]))


def decoder_of(path: Path, last: str = "Sigmoid") -> Path:
    """A decoder of one convolution and this operator."""
    nodes = [
        helper.make_node("ConvTranspose", ["x", "w"], ["made"], strides=[2, 2]),
        helper.make_node(last, ["made"], ["sample"]),
    ]
    return graph(path, "x", ["n", 4, "h", "w"], nodes, ["sample"], w=BACK)


SPLIT = helper.make_node("Split", ["joined", "splits"], ["a", "b"], axis=1)
EXPONENT = helper.make_node("Exp", ["b"], ["c"])


def answers(folder: Path, name: str, **rows: np.ndarray) -> dict[str, np.ndarray]:
    """What a graph of a version makes of rows, by name of the output."""
    session = ort.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
    outputs = [one.name for one in session.get_outputs()]
    return dict(zip(outputs, session.run(outputs, rows), strict=True))


@pytest.mark.parametrize(
    ("last", "outputs", "told", "factor"),
    [
        ([], ["joined"], None, 1.0),
        ([SPLIT], ["a", "b"], {"mean": "a", "log_var": "b"}, 1.0),
        ([SPLIT, helper.make_node("Identity", ["a"], ["mu"]), helper.make_node("Identity", ["b"], ["logvar"])],
         ["logvar", "mu"], None, 1.0),
        ([SPLIT, EXPONENT, helper.make_node("Identity", ["c"], ["std"])], ["a", "std"], {"mean": "a", "std": "std"}, 2.0),
        ([SPLIT, EXPONENT], ["a", "c"], {"mean": "a", "var": "c"}, 1.0),
    ],
    ids=["moments", "told", "named", "std", "var"],
)  # fmt: skip
def test_the_heads_of_an_encoder_become_mean_and_log_var(
    last: Nodes, outputs: list[str], told: Any, factor: float, tmp_path: Path
) -> None:
    """Joined, apart, as variance or as standard deviation: at a size that was not probed they are torch's numbers."""
    encoder, decoder = encoder_of(tmp_path / "e.onnx", *last, outputs=outputs), decoder_of(tmp_path / "d.onnx")
    folder = import_onnx(encoder, decoder, tmp_path / "models", "pair", encoder_outputs=told)
    x = np.random.default_rng(0).random((3, 3, 26, 14), dtype=np.float32)
    found = answers(folder, "encoder", x=x)
    mean, log_var = functional.conv2d(torch.from_numpy(x), torch.from_numpy(WEIGHT), stride=2).chunk(2, 1)
    np.testing.assert_allclose(found["mean"], mean, atol=1e-5)
    np.testing.assert_allclose(found["log_var"], factor * log_var, atol=1e-5)
    images = functional.conv_transpose2d(mean, torch.from_numpy(BACK), stride=2).sigmoid()
    np.testing.assert_allclose(answers(folder, "decoder", z=mean.numpy())["x_mean"], images, atol=1e-5)
    written = manifest.read(folder)
    assert (written.input_shape, written.latent_shape) == ([3, "height", "width"], [4, "height/2", "width/2"])
    assert (written.value_range, written.prior) == ([0.0, 1.0], None)


DRAWN = [
    SPLIT,
    helper.make_node("RandomNormalLike", ["b"], ["noise"], "eps"),
    helper.make_node("Add", ["a", "noise"], ["z"]),
]
IN_A_BRANCH = helper.make_node(
    "If", ["always"], ["z"],
    then_branch=helper.make_graph([helper.make_node("RandomNormalLike", ["joined"], ["z1"], "hidden")], "then", [],
                                  [helper.make_tensor_value_info("z1", TensorProto.FLOAT, None)]),
    else_branch=helper.make_graph([helper.make_node("Identity", ["joined"], ["z2"])], "else", [],
                                  [helper.make_tensor_value_info("z2", TensorProto.FLOAT, None)]),
)  # fmt: skip
ALWAYS = helper.make_node("Constant", [], ["always"], value=numpy_helper.from_array(np.array(True)))
ONE_ROW = [helper.make_node("Constant", [], ["flat"], value_ints=[1, 8, 24, 23]),
           helper.make_node("Reshape", ["joined", "flat"], ["moments"])]  # fmt: skip
CENTRED = [helper.make_node("ReduceMean", ["joined"], ["average"], axes=[0]),
           helper.make_node("Sub", ["joined", "average"], ["moments"])]  # fmt: skip
FOREIGN = helper.make_node("FusedGelu", ["joined"], ["moments"], "gelu", domain="com.microsoft")


@pytest.mark.parametrize(
    ("last", "output", "shape", "complaint"),
    [
        (DRAWN, "z", None, r"encoder: node 'eps' \(RandomNormalLike\) draws random numbers"),
        ([ALWAYS, IN_A_BRANCH], "z", None, r"encoder: node 'hidden' \(RandomNormalLike\) draws random numbers"),
        ([SPLIT], "a", None, r"gives a of \[4, .*--encoder-outputs mean=NAME"),
        ([], "joined", [1, 3, "h", "w"], "pixels of the encoder has a batch axis of 1 rows; export it with a variable"),
        ([], "joined", ["n", 3, 64, "w"], "fixes one side of an image, 64, and not the other; pass --size"),
        ([], "joined", ["n", "c", "h"], "pixels of the encoder has 3 axes"),
        (ONE_ROW, "moments", ["n", 3, 48, 46], "runs one row, but not 4: a batch size is fixed inside"),
        (CENTRED, "moments", None, "moments of the encoder depends on the other rows of a batch"),
    ],
    ids=["random", "random-in-a-branch", "one-output", "batch-of-1", "one-side", "three-axes", "reshape", "batch-norm"],
)  # fmt: skip
def test_an_encoder_that_cannot_be_served_is_refused_in_plain_words(
    last: Nodes, output: str, shape: list[Any] | None, complaint: str, tmp_path: Path
) -> None:
    """The error names the node or the tensor, and the fix; nothing is written."""
    encoder = encoder_of(tmp_path / "e.onnx", *last, outputs=[output], shape=shape)
    with pytest.raises((ModelFileError, ExportError), match=complaint):
        import_onnx(encoder, decoder_of(tmp_path / "d.onnx"), tmp_path / "models", "pair")
    assert not list(tmp_path.rglob("manifest.json"))


def test_weights_outside_a_graph_are_read_or_their_file_is_named(tmp_path: Path) -> None:
    """A graph whose weights lie beside it imports; without them the error names the file and where it belongs."""
    inside = encoder_of(tmp_path / "inside.onnx", outputs=["joined"])
    outside, decoder = tmp_path / "outside.onnx", decoder_of(tmp_path / "d.onnx")
    onnx.save(onnx.load(inside), outside, save_as_external_data=True, location="weights.bin", size_threshold=0)
    one, two = (import_onnx(path, decoder, tmp_path / "models", path.stem) for path in (inside, outside))
    x = np.random.default_rng(0).random((1, 3, 8, 8), dtype=np.float32)
    assert all(
        np.array_equal(*both) for both in zip(*(answers(f, "encoder", x=x).values() for f in (one, two)), strict=True)
    )
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(
        ModelFileError, match=f"its weights in weights.bin, which is not beside it; put it into {tmp_path}"
    ):
        import_onnx(outside, decoder, tmp_path / "models", "missing")


def test_one_size_is_taken_from_the_graph_or_told(tmp_path: Path) -> None:
    """An encoder of one size makes a model of that size; `size` fixes a free one, and must be the graph's."""
    decoder, models = decoder_of(tmp_path / "d.onnx"), tmp_path / "models"
    fixed = encoder_of(tmp_path / "fixed.onnx", outputs=["joined"], shape=["n", 3, 16, 12])
    free = encoder_of(tmp_path / "free.onnx", outputs=["joined"])
    for folder in (
        import_onnx(fixed, decoder, models, "fixed"),
        import_onnx(free, decoder, models, "told", size=(16, 12)),
    ):
        written = manifest.read(folder)
        assert (written.input_shape, written.latent_shape) == ([3, 16, 12], [4, 8, 6])
    with pytest.raises(ModelFileError, match="takes images of 16 x 12; leave out --size 8 x 8"):
        import_onnx(fixed, decoder, models, "other", size=(8, 8))


def test_the_value_range_is_guessed_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A decoder that ends in tanh makes images from -1 to 1, and the import says that it took that; or it is told."""
    encoder, decoder = encoder_of(tmp_path / "e.onnx", outputs=["joined"]), decoder_of(tmp_path / "d.onnx", "Tanh")
    guessed = import_onnx(encoder, decoder, tmp_path / "models", "guessed")
    assert manifest.read(guessed).value_range == [-1.0, 1.0]
    assert "pixels are taken to be from -1 to 1, since the decoder makes pixels from -" in capsys.readouterr().err
    told = import_onnx(encoder, decoder, tmp_path / "models", "told", value_range=(0.0, 1.0))
    assert manifest.read(told).value_range == [0.0, 1.0]
