"""Import of others' VAEs: an AutoencoderKL of diffusers, graphs of ONNX, pairs of torch modules."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional

from service.contract import manifest
from training.__main__ import main
from training.distributions.gaussian import DiagonalGaussian
from training.errors import ExportError, ModelFileError
from training.export import export_vae
from training.export.pair import Encode
from training.importing.autoencoder_kl import read_autoencoder_kl
from training.importing.onnx_pair import import_onnx
from training.models.frozen import Frozen

Nodes = list[onnx.NodeProto]

WEIGHT = np.random.default_rng(5).normal(0.0, 0.3, (8, 3, 2, 2)).astype(np.float32)
"""Of a convolution that halves an image's sides and gives mean and log_var of four channels each."""
BACK = np.random.default_rng(6).normal(0.0, 0.3, (4, 3, 2, 2)).astype(np.float32)
"""Of one that doubles them."""


class Graphs(NamedTuple):
    """Writes ONNX graphs of one convolution into a folder."""

    folder: Path
    write: Callable[..., Path]

    def encoder(
        self, *last: onnx.NodeProto, outputs: list[str], shape: list[Any] | None = None, name: str = "e"
    ) -> Path:
        """Its convolution gives `joined`, and is followed by these nodes."""
        nodes = [helper.make_node("Conv", ["pixels", "w"], ["joined"], strides=[2, 2]), *last]
        splits = {"splits": np.array([4, 4])} if SPLIT in last else {}
        axes = shape or ["n", 3, "h", "w"]
        return self.write(self.folder / f"{name}.onnx", "pixels", axes, nodes, *outputs, w=WEIGHT, **splits)

    def decoder(self, last: str = "Sigmoid") -> Path:
        """Its convolution is followed by this operator."""
        nodes = [
            helper.make_node("ConvTranspose", ["x", "w"], ["made"], strides=[2, 2]),
            helper.make_node(last, ["made"], ["sample"]),
        ]
        return self.write(self.folder / "d.onnx", "x", ["n", 4, "h", "w"], nodes, "sample", w=BACK)


@pytest.fixture
def graphs(tmp_path: Path, onnx_file: Callable[..., Path]) -> Graphs:
    """A writer of graphs."""
    return Graphs(tmp_path, onnx_file)


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
        ([SPLIT, EXPONENT], ["a", "c"], {"mean": "a", "std": "c"}, 2.0),
        ([SPLIT, EXPONENT], ["a", "c"], {"mean": "a", "var": "c"}, 1.0),
    ],
    ids=["moments", "told", "named", "std", "var"],
)  # fmt: skip
def test_the_heads_of_an_encoder_become_mean_and_log_var(
    last: Nodes, outputs: list[str], told: Any, factor: float, graphs: Graphs, tmp_path: Path
) -> None:
    """Joined, apart, as variance or as standard deviation: at a size that was not probed they are torch's numbers."""
    encoder, decoder = graphs.encoder(*last, outputs=outputs), graphs.decoder()
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
    last: Nodes, output: str, shape: list[Any] | None, complaint: str, graphs: Graphs, tmp_path: Path
) -> None:
    """The error names the node or the tensor, and the fix; nothing is written."""
    encoder = graphs.encoder(*last, outputs=[output], shape=shape)
    with pytest.raises((ModelFileError, ExportError), match=complaint):
        import_onnx(encoder, graphs.decoder(), tmp_path / "models", "pair")
    assert not list(tmp_path.rglob("manifest.json"))


def test_weights_outside_a_graph_are_read_or_their_file_is_named(graphs: Graphs, tmp_path: Path) -> None:
    """A graph whose weights lie beside it imports; without them the error names the file and where it belongs."""
    inside = graphs.encoder(name="inside", outputs=["joined"])
    outside, decoder = tmp_path / "outside.onnx", graphs.decoder()
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


def test_one_size_is_taken_from_the_graph_or_told(graphs: Graphs, tmp_path: Path) -> None:
    """An encoder of one size makes a model of that size; `size` fixes a free one, and must be the graph's."""
    decoder, models = graphs.decoder(), tmp_path / "models"
    fixed = graphs.encoder(name="fixed", outputs=["joined"], shape=["n", 3, 16, 12])
    free = graphs.encoder(name="free", outputs=["joined"])
    for folder in (
        import_onnx(fixed, decoder, models, "fixed"),
        import_onnx(free, decoder, models, "told", size=(16, 12)),
    ):
        written = manifest.read(folder)
        assert (written.input_shape, written.latent_shape) == ([3, 16, 12], [4, 8, 6])
    with pytest.raises(ModelFileError, match="takes images of 16 x 12; leave out --size 8 x 8"):
        import_onnx(fixed, decoder, models, "other", size=(8, 8))


def test_the_value_range_is_guessed_and_said(
    graphs: Graphs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A decoder that ends in tanh makes images from -1 to 1, and the import says that it took that; or it is told."""
    encoder, decoder = graphs.encoder(outputs=["joined"]), graphs.decoder("Tanh")
    guessed = import_onnx(encoder, decoder, tmp_path / "models", "guessed")
    assert manifest.read(guessed).value_range == [-1.0, 1.0]
    assert "pixels are taken to be from -1 to 1, since the decoder makes pixels from -" in capsys.readouterr().err
    told = import_onnx(encoder, decoder, tmp_path / "models", "told", value_range=(0.0, 1.0))
    assert manifest.read(told).value_range == [0.0, 1.0]


def test_the_posterior_of_an_encoder_without_variance_is_a_point(graphs: Graphs, tmp_path: Path) -> None:
    """If told so: every log_var is -30."""
    encoder = graphs.encoder(SPLIT, outputs=["a"])
    folder = import_onnx(encoder, graphs.decoder(), tmp_path / "models", "point", encoder_outputs={"mean": "a"})
    x = np.random.default_rng(0).random((2, 3, 8, 8), dtype=np.float32)
    assert np.array_equal(answers(folder, "encoder", x=x)["log_var"], np.full((2, 4, 4, 4), -30.0, np.float32))


@pytest.mark.usefixtures("own_signals")
def test_the_command_prints_one_line_of_what_is_wrong(
    graphs: Graphs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`import onnx` ends with 1 and the message; with the option that it names it ends with 0 and the version."""
    encoder, decoder = graphs.encoder(SPLIT, outputs=["a", "b"]), graphs.decoder()
    words = ["import", "onnx", "--encoder", str(encoder), "--decoder", str(decoder), "--name", "pair"]
    words += ["--models", str(tmp_path / "models"), "--version", "2"]
    assert main(words) == 1
    assert "vae-train: the encoder gives a of [4, 24, 23], b of [4, 24, 23]; say which" in capsys.readouterr().err
    assert main([*words, "--encoder-outputs", "mean=a", "log_var=b", "--value-range", "-1", "1"]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'models' / 'pair' / '2'}\n"


class Sides(nn.Conv2d):
    """A fully convolutional encoder that halves the sides: mean and log_var, joined."""

    def __init__(self) -> None:
        super().__init__(3, 8, 2, 2)


class Drawing(Sides):
    """An encoder that draws z itself."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Z twice."""
        mean, log_var = super().forward(x).chunk(2, 1)
        z = mean + log_var.exp() * torch.randn_like(mean)
        return z, z


class Dictionary(Sides):
    """An encoder whose answer is a dictionary."""

    def forward(self, x: Tensor) -> Any:
        """One tensor by name."""
        return {"z": super().forward(x)}


class Choosing(Sides):
    """An encoder that does something else with bright images."""

    def forward(self, x: Tensor) -> Tensor:
        """Mean and log_var, joined."""
        return super().forward(x if x.mean() > 0.5 else -x)


class Reshaping(Sides):
    """An encoder that has the size of its latents written into it."""

    def forward(self, x: Tensor) -> Tensor:
        """Mean and log_var, joined."""
        return super().forward(x).reshape(-1, 8, 24, 23)


def back() -> nn.Module:
    """A decoder of what `Sides` encodes."""
    return nn.Sequential(nn.ConvTranspose2d(4, 3, 2, 2), nn.Sigmoid())


def test_a_pair_of_any_size_keeps_weights_in_float16(tmp_path: Path) -> None:
    """The numbers of torch with rounded weights, at a size that was not traced; the modules stay as they were."""
    torch.manual_seed(0)
    encoder, decoder = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 8, 2, 2)), back()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    folder = export_vae(encoder, decoder, torch.rand(1, 3, 16, 24), tmp_path, "half", multiple_of=4, float16=True)
    assert encoder.training
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    weights = {
        tensor.data_type for tensor in onnx.load(folder / "encoder.onnx").graph.initializer if tensor.dims[:1] == [64]
    }
    assert TensorProto.FLOAT16 in weights
    assert set(manifest.read(folder).training["largest_rounding_error"]) >= {"encoder/mean", "encoder/log_var"}
    for convolution in (encoder[1], encoder[2]):
        convolution.weight.data = convolution.weight.data.half().float()
    x = torch.rand(3, 3, 28, 8)
    mean, log_var = encoder.eval()(x).detach().chunk(2, 1)
    found = answers(folder, "encoder", x=x.numpy())
    np.testing.assert_allclose(found["mean"], mean, atol=1e-5)
    np.testing.assert_allclose(found["log_var"], log_var, atol=1e-5)
    assert manifest.read(folder).size.multiple_of == 4


@pytest.mark.parametrize(
    ("encoder", "x", "options", "complaint"),
    [
        (Drawing(), torch.rand(2, 3, 8, 8), {}, r"encoder: node '.*' \(RandomNormalLike\) draws random numbers"),
        (Choosing(), torch.rand(2, 3, 8, 8), {}, "torch cannot export encoder: Could not guard on data-dependent"),
        (Reshaping(), torch.rand(2, 3, 8, 8), {"multiple_of": 2}, "do not take images of every size"),
        (Dictionary(), torch.rand(2, 3, 8, 8), {}, "the encoder must return mean and log_var, or one tensor"),
        (Sides(), torch.rand(2, 3, 8, 8) - 1.0, {}, r"pixels from -.* outside value_range \[0, 1\]"),
        (Sides(), torch.rand(3, 8, 8), {}, r"x must be example images .* not of shape \[3, 8, 8\]"),
        (Sides(), torch.rand(2, 3, 12, 12), {"multiple_of": 3}, r"the decoder makes \[4, 3, 48, 44\] of the latents"),
        (Sides(), torch.rand(2, 3, 9, 8), {}, r"of the latents of images of \[4, 3, 9, 8\]"),
    ],
    ids=["draws", "choosing", "one-size", "dictionary", "range", "axes", "divisor", "decoder"],
)  # fmt: skip
def test_modules_that_do_not_fit_together_are_refused(
    encoder: nn.Module, x: Tensor, options: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    """The error says what is wrong and what would be right; nothing is written."""
    with pytest.raises(ExportError, match=complaint):
        export_vae(encoder, back(), x, tmp_path, "pair", **options)
    assert not list(tmp_path.rglob("manifest.json"))


def saved(folder: Path, **settings: Any) -> Path:
    """The smallest AutoencoderKL."""
    diffusers = pytest.importorskip("diffusers", reason="needs the extra `diffusers`")
    diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2, **settings).save_pretrained(
        folder
    )
    return folder


def test_a_folder_that_is_no_autoencoder_kl_is_refused(tmp_path: Path) -> None:
    """By what it is, or by what is missing; a pickle is not opened."""
    folder = saved(tmp_path / "pipeline" / "vae")
    with pytest.raises(ModelFileError, match=f"no config.json; pass {folder}"):
        read_autoencoder_kl(tmp_path / "pipeline")
    text = (folder / "config.json").read_text()
    for change, complaint in (
        (("AutoencoderKL", "VQModel"), "a model of the class VQModel; only AutoencoderKL is imported"),
        (
            ('"latent_channels": 2', '"latent_channels": 3'),
            "diffusers cannot read .*size mismatch for encoder.conv_out.weight",
        ),
        (('"layers_per_block": 1', '"layers_per_block": 2'), "do not fit its config.json: missing_keys"),
    ):
        (folder / "config.json").write_text(text.replace(*change))
        with pytest.raises(ModelFileError, match=complaint):
            read_autoencoder_kl(folder)
    (folder / "config.json").write_text(text)
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelFileError, match="has no weights in safetensors"):
        read_autoencoder_kl(folder)


def test_reading_an_autoencoder_kl_connects_to_nothing(tmp_path: Path) -> None:
    """Not even while diffusers is imported: the interpreter reports no look-up and no connection."""
    folder = saved(tmp_path / "vae")
    script = f"""
import sys
from pathlib import Path
seen = []
sys.addaudithook(lambda event, _: seen.append(event) if event in ("socket.connect", "socket.getaddrinfo") else None)
from training.importing.autoencoder_kl import read_autoencoder_kl
found = read_autoencoder_kl(Path({str(folder)!r}))
import socket
assert not seen, seen
try:
    socket.create_connection(("127.0.0.1", 9), 1)
except OSError:
    assert seen  # the hook sees one that is tried
print(found.multiple_of, found.weights)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("1 ['F32']\n", 0), done.stderr


MINE = """
import torch
from sklearn.datasets import load_digits
from torch import nn

x = torch.from_numpy(load_digits().data / 16.0).float()
mean, (_, _, basis) = x.mean(0), torch.linalg.svd(x - x.mean(0), full_matrices=False)


class Encoder(nn.Module):
    def forward(self, x):
        z = ((x.flatten(1) + 1.0) / 2.0 - mean.to(x)) @ basis[:12].T.to(x)
        return z, torch.full_like(z, -3.0)


class Decoder(nn.Module):
    def forward(self, z):
        return ((mean.to(z) + z @ basis[:12].to(z)).clamp(0.0, 1.0) * 2.0 - 1.0).reshape(-1, 1, 8, 8)


encoder, decoder = Encoder(), Decoder()
"""
"""Principal components of the digits as a VAE of images from -1 to 1."""
RESTORING = """
name = "components"
data = {{ dataset = "digits" }}
imported = {{ file = "{file}", value_range = [-1.0, 1.0] }}

[restoration]
network = {{ architecture = "mlp", hidden = [64], activation = "silu" }}
level_network = {{ architecture = "mlp", hidden = [32], activation = "silu" }}
train = {{ epochs = 8, learning_rate = 3e-3, batch_size = 50, ema_decay = 0.99 }}
"""


SPATIAL = """
import torch
from torch import nn

torch.manual_seed(0)
encoder, decoder = nn.Conv2d(1, 4, 2, 2), nn.Sequential(nn.ConvTranspose2d(2, 1, 2, 2), nn.Sigmoid())
"""
RESTORING_SPATIAL = """
name = "spatial"
data = {{ dataset = "digits" }}
imported = {{ file = "{file}", multiple_of = 2 }}

[restoration]
network = {{ architecture = "conv", channels = [4], head = 2, latents = "{latents}" }}
level_network = {{ architecture = "conv", channels = [4], head = 2, latents = "pooled" }}
correction = {{ channels = [2, 4] }}
train = {{ epochs = 1, batch_size = 400 }}
"""


def test_the_bound_of_a_frozen_vae_is_a_kl_divergence() -> None:
    """From the encoder's posterior to the given one, as torch.distributions has it; 0 for the encoder's own."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(4, 6))
    vae = Frozen(Encode(encoder), nn.Identity(), (3,), (-1.0, 1.0))
    x, other = torch.rand(5, 1, 2, 2), DiagonalGaussian(torch.randn(5, 3), torch.randn(5, 3))
    mean, log_var = encoder(2.0 * x - 1.0).chunk(2, 1)
    q, r = (Normal(loc, (0.5 * log).exp()) for loc, log in ((mean, log_var), other))
    torch.testing.assert_close(-vae.bound(x, x, other).elbo, kl_divergence(q, r).sum(1))
    torch.testing.assert_close(vae.bound(x, x, DiagonalGaussian(mean, log_var)).elbo, torch.zeros(5))


@pytest.mark.usefixtures("own_signals")
def test_restoration_is_trained_for_an_imported_vae(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It raises the PSNR of noisy digits; encoder and decoder are those of the file; options of others are refused."""
    (tmp_path / "mine.py").write_text(MINE)
    config = tmp_path / "run.toml"
    config.write_text(RESTORING.format(file=tmp_path / "mine.py"))
    words = ["fit", str(config), "--restore-only", "--threads", "1"]
    words += ["--out", str(tmp_path), "--run", str(tmp_path / "run")]
    assert main(words) == 0
    folder = tmp_path / "components" / "1"
    written = manifest.read(folder)
    assert written.graphs.keys() == {"encoder", "decoder", "recognition", "noise_level", "fusion", "correction"}
    assert (written.value_range, written.prior) == ([-1.0, 1.0], None)
    row = written.quality["restoration"]["gaussian"]["0.25"]
    assert row["auto_db"] > row["noisy_db"] + 1.0
    names = runpy.run_path(str(tmp_path / "mine.py"))
    x = 2.0 * torch.rand(2, 1, 8, 8) - 1.0
    np.testing.assert_allclose(answers(folder, "encoder", x=x.numpy())["mean"], names["encoder"](x)[0], atol=1e-5)
    assert main(words) == 1
    assert "--replace" in capsys.readouterr().err
    assert main([*words, "--draws", "5"]) == 1
    assert "--restoration-epochs alone" in capsys.readouterr().err


@pytest.mark.usefixtures("own_signals")
def test_restoration_of_images_of_any_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its latents must have the form of those of the VAE; the graphs take other sizes than that of the digits."""
    (tmp_path / "mine.py").write_text(SPATIAL)
    config = tmp_path / "run.toml"
    words = ["fit", str(config), "--restore-only", "--threads", "1"]
    words += ["--out", str(tmp_path), "--run", str(tmp_path / "run")]
    config.write_text(RESTORING_SPATIAL.format(file=tmp_path / "mine.py", latents="vector"))
    assert main(words) == 1
    assert "restoration.network makes latents of [2], the VAE of [2, 4, 4]" in capsys.readouterr().err
    config.write_text(RESTORING_SPATIAL.format(file=tmp_path / "mine.py", latents="spatial"))
    assert main(words) == 0
    folder = tmp_path / "spatial" / "1"
    written = manifest.read(folder)
    assert written.graphs["recognition"].outputs["mean"] == [2, "height/2", "width/2"]
    assert written.graphs["correction"].outputs["restored"] == [1, "height", "width"]
    assert written.tiles is not None
    assert written.tiles.exact
    y, level = np.random.default_rng(0).random((2, 1, 14, 30), dtype=np.float32), np.zeros((2, 4), np.float32)
    assert answers(folder, "recognition", y=y, mask=np.ones_like(y), level=level)["mean"].shape == (2, 2, 7, 15)
