"""Images that were never clean: their data, their two objectives, and the version that is served."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.nn import functional

from service.contract import manifest
from training.__main__ import main
from training.config import NoisyRun, kind_of, load_as
from training.data.noisy import Noisy, unpacked
from training.distributions.likelihoods.noise import NoiseSettings, UnitNoise, read_camera
from training.distributions.poisson_gaussian import PoissonGaussian
from training.distributions.priors.standard_normal import StandardNormal
from training.errors import ConfigError, DataError
from training.inference.photon_transfer import fitted
from training.loop.noisy_stages import build_noisy
from training.models.noisy import (
    CompleteNoisy,
    EstimateNoisy,
    RestoreNoisy,
    Seen,
    noise_seen,
    recorrupted_bound,
)
from training.models.vae import VAE
from training.noisy import NoisyWorkshop

CPU = torch.device("cpu")
TABLES: dict[str, Any] = {
    "name": "tiny",
    "seed": 1,
    "data": {"dataset": "noisy", "size": 16, "per_epoch": 12},
    "model": {
        "likelihood": {"likelihood": "noise"},
        "network": {
            "architecture": "ladder",
            "top": "spatial",
            "channels": [4, 4],
            "groups": [1, 1],
            "latents": [1, 2],
            "blocks": 0,
        },
    },
    "trunk": {"channels": [4, 4], "blocks": 1, "train": {"epochs": 1, "batch_size": 6}},
    "train": {"epochs": 1, "batch_size": 6},
}


def counts(rng: np.random.Generator, height: int = 24, width: int = 32, gain: float = 0.02) -> np.ndarray:
    """A ramp from 0.1 to 0.8 with Poisson noise."""
    ramp = np.add.outer(np.linspace(0.1, 0.4, height), np.linspace(0.0, 0.4, width))
    return rng.poisson(ramp / gain) * gain


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy pictures of all kinds: 8 bits, 16 bits in two pages, floating point, colour."""
    root, rng = tmp_path_factory.mktemp("noisy"), np.random.default_rng(0)
    Image.fromarray((counts(rng) * 255).clip(0, 255).astype(np.uint8)).save(root / "a.png")
    pages = [Image.fromarray((counts(rng) * 65535).clip(0, 65535).astype(np.uint16)) for _ in range(2)]
    pages[0].save(root / "b.tif", save_all=True, append_images=pages[1:])
    Image.fromarray(counts(rng).astype(np.float32)).save(root / "c.tif")
    Image.fromarray((np.stack([counts(rng)] * 3, 2) * 255).clip(0, 255).astype(np.uint8)).save(root / "d.png")
    return root


@pytest.fixture(scope="module")
def workshop(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> NoisyWorkshop:
    """A tiny run, trained for a moment and exported."""
    root = tmp_path_factory.mktemp("run")
    found = NoisyWorkshop.open(NoisyRun.model_validate(TABLES), folder, root / "run", CPU)
    found.fit(root / "models")
    return found


def test_every_channel_and_page_is_an_image_with_its_noise(folder: Path) -> None:
    """In units of white, whatever the file's bits; crops carry the gain and offset of their image."""
    images = Noisy(dataset="noisy", size=8, per_epoch=60, validation=0.2, test=0.2).load(folder)
    assert images.shape == (3, 8, 8)
    every = torch.cat([images.train, images.validation, images.test])
    y, noise = unpacked(every)
    assert float(y.min()) >= 0.0
    assert 0.2 < float(y.mean()) < 0.8
    assert 0.005 < float(noise.gain.median()) < 0.05
    planes = {
        name: len(list(Noisy(dataset="noisy", size=8).planes(folder / name)))
        for name in ("a.png", "b.tif", "c.tif", "d.png")
    }
    assert planes == {"a.png": 1, "b.tif": 2, "c.tif": 1, "d.png": 3}


def test_known_noise_goes_with_every_crop(folder: Path) -> None:
    """It replaces the blind estimate."""
    known = NoiseSettings(likelihood="noise", sigma=0.1).known()
    _, noise = unpacked(Noisy(dataset="noisy", size=8, per_epoch=8).load(folder, known).train)
    assert float(noise.gain.max()) == 0.0
    torch.testing.assert_close(noise.offset.sqrt(), torch.full_like(noise.offset, 0.1))


def test_pictures_too_small_for_a_crop_are_named(folder: Path) -> None:
    """With their size."""
    with pytest.raises(DataError, match="24 x 32 pixels hold no crop of 64 x 64"):
        Noisy(dataset="noisy", size=64).load(folder)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sigma": 0.1, "gain": 0.1, "offset": 0.0}, "give one of"),
        ({"gain": 0.1}, "belong together"),
        ({"gain": 0.0, "offset": 0.0}, "above 0"),
    ],
)
def test_contradictory_noise_is_refused(keys: dict[str, float], message: str) -> None:
    """The message names the fix."""
    with pytest.raises(ValidationError, match=message):
        NoiseSettings(likelihood="noise", **keys)


def test_the_bound_is_log_p_where_the_posterior_is_exact() -> None:
    """A linear decoder and unit noise: t ~ N(0, W W^T + I), and the bound at the exact q(z|t) has no gap."""
    weight = torch.tensor([[1.0, 0.3], [-0.5, 0.7], [0.2, -1.0]])
    covariance = torch.linalg.inv(weight.T @ weight + torch.eye(2))
    std = covariance.diagonal().sqrt()
    # q must be diagonal: rotate z so that the posterior's covariance is.
    values, vectors = torch.linalg.eigh(covariance)
    turned = weight @ vectors

    class Exact(nn.Module):
        def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
            mean = (t.flatten(1) @ turned) * values
            return mean, values.log().expand(len(t), 2)

    class Linear(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return (z @ turned.T).view(-1, 1, 1, 3)

    assert std.min() > 0
    model = VAE(Exact(), Linear(), UnitNoise((1, 1, 3)), StandardNormal(2))
    generator = torch.Generator().manual_seed(0)
    t = torch.randn(4, 1, 1, 3, generator=generator)
    known = MultivariateNormal(torch.zeros(3), weight @ weight.T + torch.eye(3)).log_prob(t.flatten(1))
    bound = model.bound(t, torch.randn(40000, 4, 2, generator=generator))
    torch.testing.assert_close(bound.elbo, known, atol=0.02, rtol=0.0)
    torch.testing.assert_close(model.log_weights(t, torch.randn(3, 4, 2)), known.expand(3, 4))


class Blur(nn.Module):
    """In place of the mean network: a mean of 3 x 3 pixels, mixed with the image itself."""

    def __init__(self, own: float) -> None:
        super().__init__()
        self.own = own

    def forward(self, t: Tensor, _mask: Tensor, _std: Tensor) -> Seen:
        """The filtered image."""
        padded = functional.pad(t, (1, 1, 1, 1), mode="reflect")
        return Seen(self.own * t + (1.0 - self.own) * functional.avg_pool2d(padded, 3, 1), t)


@pytest.mark.parametrize("gain", [0.0, 0.02])
def test_recorrupted_pairs_know_the_error_of_the_clean_image(gain: float) -> None:
    """Of two filters: the difference of their estimated errors is that of their errors from the clean signal."""
    generator = torch.Generator().manual_seed(3)
    x = 0.5 + 0.2 * torch.sin(torch.arange(96) / 5.0).view(1, 1, 1, -1) * torch.cos(torch.arange(96) / 7.0).view(-1, 1)
    x = x.expand(16, 1, -1, -1)
    offset = 0.0 if gain else 0.01
    noise = PoissonGaussian(torch.full((16, 1, 1, 1), gain), torch.full((16, 1, 1, 1), offset))

    def noisy() -> Tensor:
        if gain:
            return torch.poisson(x / gain, generator) * gain
        return x + 0.1 * torch.randn(x.shape, generator=generator)

    clean = torch.stack([noise.stabilised(noisy()) for _ in range(200)]).mean(0)
    y = noisy()

    def told(own: float) -> float:
        model: Any = Blur(own)
        return -2.0 * float(recorrupted_bound(model, y, noise, generator).elbo.mean()) / x[0].numel()

    def known(own: float) -> float:
        found = Blur(own)(noise.stabilised(y), y, y).t
        return float((found - clean).square().mean())

    # The pairs have somewhat more noise than the image, so that the filters' errors are a little larger too.
    assert told(0.8) - told(0.0) == pytest.approx(known(0.8) - known(0.0), rel=0.35)
    assert told(0.0) - told(1.0) < -0.5


def test_the_moments_are_those_of_the_draws(workshop: NoisyWorkshop) -> None:
    """Learnt from single draws; for Gaussian noise the mean is the mean network's."""
    parts = workshop.parts()
    y = unpacked(workshop.images.test[:2].repeat(4, 1, 1, 1))[0]
    noise = PoissonGaussian(*(torch.full((len(y), 1, 1, 1), value) for value in (0.02, 0.0)))
    trunk, model = parts.trunk.requires_grad_(requires_grad=False), parts.vae.requires_grad_(requires_grad=False)
    with torch.no_grad():
        seen = trunk.seen(y, torch.ones_like(y), noise)
        posterior = model.vae.posterior(model.encoded(noise.stabilised(y), seen.features))
        eps = model.vae.noise(400, len(y), torch.Generator().manual_seed(0))
        draws = model.likelihood.mean(model.vae.infer(posterior, eps).parameters)
    model.moments.requires_grad_(requires_grad=True)
    optimiser, generator = torch.optim.Adam(model.moments.parameters(), 0.01), torch.Generator().manual_seed(1)
    for _ in range(200):
        optimiser.zero_grad()
        (-model.bound(y, noise, seen, model.vae.noise(1, len(y), generator)).elbo.mean()).backward()
        optimiser.step()
    with torch.no_grad():
        mean, log_variance = model.moments_of(noise.stabilised(y), seen, noise)
        before, after = ((found - draws.mean(0)).square().mean() for found in (seen.t, mean))
        assert after < 0.2 * before
        assert float(log_variance.exp().mean()) == pytest.approx(float((draws - mean).square().mean()), rel=0.3)
        gaussian = noise._replace(gain=torch.zeros_like(noise.gain))
        torch.testing.assert_close(model.moments_of(noise.stabilised(y), seen, gaussian)[0], seen.t)


@torch.no_grad()
def test_the_version_computes_what_torch_computes(workshop: NoisyWorkshop) -> None:
    """At a size that no tracing has seen: mean, draws, and the noise of both families."""
    folder = workshop.folder.parent / "models" / "tiny" / "1"
    told = manifest.read(folder)
    assert told.input_shape == [1, "height", "width"]
    assert told.noise_families == ["poisson", "gaussian"]
    assert told.likelihood == "noise"
    parts = workshop.parts().each(workshop.stored)  # with the weights in float16
    y = torch.from_numpy(counts(np.random.default_rng(5), 40, 24)[None, None]).float()
    mask, level = torch.ones_like(y), torch.tensor([[math.sqrt(0.02), 0.0]])

    def answer(graph: str, *inputs: Tensor) -> list[Tensor]:
        entry = told.graphs[graph]
        session = ort.InferenceSession(folder / entry.file, providers=["CPUExecutionProvider"])
        given = {name: value.numpy() for name, value in zip(entry.inputs, inputs, strict=True)}
        return [torch.from_numpy(value) for value in session.run(list(entry.outputs), given)]

    seen = RestoreNoisy(parts.trunk, parts.vae)(y, mask, level)
    eps = torch.randn(1, parts.vae.vae.latent_shape[0], 10, 6)
    drawn = CompleteNoisy(parts.vae)(y, mask, level, seen[0], seen[2], eps)
    cases = {
        "restoration": ((y, mask, level), seen),
        "completion": ((y, mask, level, seen[0], seen[2], eps), drawn),
        "noise": ((y, mask), (EstimateNoisy(alone=False)(y, mask),)),
        "noise_level": ((y, mask), (EstimateNoisy(alone=True)(y, mask),)),
    }
    for name, (inputs, outputs) in cases.items():
        for found, known in zip(answer(name, *inputs), outputs, strict=True):
            torch.testing.assert_close(found, known, atol=1e-3, rtol=1e-3)


def test_the_rounds_of_the_estimate_are_one_node(workshop: NoisyWorkshop) -> None:
    """Unrolled, they made a graph of 1,700 nodes; and no node, inner ones included, tells of this machine's files."""
    folder = workshop.folder.parent / "models" / "tiny" / "1"
    for entry in manifest.read(folder).graphs.values():
        assert b".py" not in (folder / entry.file).read_bytes()
    for name in ("noise", "noise_level"):
        nodes = onnx.load(folder / manifest.read(folder).graphs[name].file).graph.node
        assert "Scan" in {node.op_type for node in nodes}
        assert len(nodes) < 100


def test_a_finished_run_is_read_back(workshop: NoisyWorkshop, folder: Path) -> None:
    """Evaluation loads the checkpoints with centre and scale of the training images, and repeats its figures."""
    again = NoisyWorkshop.open(workshop.run, folder, workshop.folder, CPU)
    assert again.evaluate() == workshop.evaluate()
    trunk = again.parts().trunk
    assert float(trunk.likelihood.scale) != 1.0


def test_a_black_level_is_found_where_no_gaussian_noise_is_told() -> None:
    """And is not looked for where the level has Gaussian noise, which tells the variance at 0."""
    rng = np.random.default_rng(1)
    y = torch.from_numpy(counts(rng, 512, 512) + 0.1)[None, None].float()
    found = noise_seen(y, torch.ones_like(y), torch.tensor([[math.sqrt(0.02), 1e-6]]))
    assert float(found.black) == pytest.approx(0.1, abs=0.03)
    told = noise_seen(y, torch.ones_like(y), torch.tensor([[math.sqrt(0.02), 0.05]]))
    assert float(told.black) == 0.0


def test_frames_of_static_scenes_give_gain_and_offset() -> None:
    """Dark and flat frames, within 3 %, though the light drifts."""
    rng = np.random.default_rng(2)
    scenes = []
    for light in (0.0, 0.2, 0.7):
        signal = 0.05 + light * np.linspace(0.5, 1.0, 40)[None, :].repeat(40, 0)
        drift = 1.0 + 0.02 * rng.standard_normal((60, 1, 1)) * (light > 0)
        frames = rng.poisson((signal - 0.05) * drift / 0.004) * 0.004 + 0.05 + 0.01 * rng.standard_normal((60, 40, 40))
        scenes.append(frames.astype(np.float32))
    found = fitted(scenes)
    assert found.gain == pytest.approx(0.004, rel=0.03)
    assert found.offset == pytest.approx(0.01**2 - 0.004 * 0.05, abs=1e-5)


def test_the_command_writes_what_a_run_reads(tmp_path: Path) -> None:
    """Frames in a folder to a file that `calibration` names."""
    rng = np.random.default_rng(3)
    frames = tmp_path / "frames"
    frames.mkdir()
    for index in range(12):
        levels = (counts(rng) * 65535).clip(1, 65534).astype(np.uint16)
        Image.fromarray(levels).save(frames / f"{index}.png")
    assert main(["noise-model", str(frames), "--out", str(tmp_path / "noise.toml")]) == 0
    assert read_camera(tmp_path / "noise.toml").gain == pytest.approx(0.02, rel=0.15)
    assert NoiseSettings(likelihood="noise", calibration=tmp_path / "noise.toml").known() is not None


def test_a_calibration_without_frames_is_refused(tmp_path: Path) -> None:
    """One frame shows no noise; a file that is no noise model names the command."""
    Image.new("L", (8, 8), 100).save(tmp_path / "one.png")
    assert main(["noise-model", str(tmp_path), "--out", str(tmp_path / "noise.toml")]) == 1
    (tmp_path / "noise.toml").write_text("x = 1")
    with pytest.raises(ConfigError, match="noise-model"):
        read_camera(tmp_path / "noise.toml")


def test_a_toml_of_noisy_images_is_known_by_its_likelihood() -> None:
    """Every config of the house that has it loads, and a network with a vector is refused."""
    for path in sorted((Path(__file__).parents[2] / "training" / "configs").glob("noisy-*.toml")):
        assert kind_of(path) is NoisyRun
        assert build_noisy(load_as(NoisyRun, path)).trunk is not None
    network = {**TABLES["model"]["network"], "top": "vector"}
    with pytest.raises(ValidationError, match="spatial"):
        NoisyRun.model_validate({**TABLES, "model": {**TABLES["model"], "network": network}})
