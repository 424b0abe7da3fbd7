"""Conditional models of photographs: corruptions, networks, stages, and the version of two variants."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributions import Normal

from service.contract import manifest
from service.contract.graphs import at_size
from service.contract.manifest import Manifest
from training.__main__ import main
from training.conditional import ConditionalWorkshop
from training.config import ConditionalRun
from training.distributions.camera import demosaiced, mosaic_of
from training.distributions.spoiling import Corruptions, spoil
from training.errors import CheckpointError, ConfigError, ExportError
from training.evaluation.calibrate import FACTORS
from training.evaluation.conditional import factor_for, temperature_of
from training.export.conditional import weights_of
from training.export.session import opened
from training.loop.conditional_stages import STAGES, Parts, build_parts, keep_weights, trained_parts
from training.models.conditional import (
    LEAST_LEVEL,
    Complete,
    EstimateLevels,
    EstimateNoise,
    Restore,
    Temperature,
    block_density,
    conditions,
    estimated,
    latent_bound,
    level_bound,
    trunk_bound,
)
from training.networks.level import LevelSettings, NoiseEstimate
from training.networks.spatial_ladder import SpatialLadderSettings
from training.networks.trunk import TrunkSettings

BRIEF = {"epochs": 1, "batch_size": 8}
TABLES: dict[str, Any] = {
    "name": "tiny",
    "data": {
        "dataset": "folder", "height": 16, "width": 16, "test": 0.3, "validation": 0.3,
        "crops": {"per_epoch": 16, "scales": [1.0]},
    },
    "trunk": {"channels": [4, 6, 8], "blocks": 1, "train": BRIEF},
    "latents": {"channels": [4, 5, 6], "latents": [1, 2, 3], "train": BRIEF},
    "level": {"width": 4, "layers": 2, "train": BRIEF},
    "colour": {"trunk": {"channels": [5, 6, 8], "blocks": [2, 1, 1]}},
}  # fmt: skip
SIZES = [(16, 16), (40, 24)]


def run(**changed: Any) -> ConditionalRun:
    """A tiny run, some of its tables changed."""
    return ConditionalRun.model_validate({**TABLES, **changed})


class Fitted(NamedTuple):
    """A tiny run that was trained and exported."""

    workshop: ConditionalWorkshop
    folder: Path
    told: Manifest


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight smooth colour pictures of 24 x 32."""
    root = tmp_path_factory.mktemp("photographs")
    for number in range(8):
        levels = np.random.default_rng(number).integers(0, 256, (4, 5, 3), np.uint8)
        Image.fromarray(levels).resize((32, 24), Image.Resampling.BICUBIC).save(root / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def fitted(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """Both variants, trained for a moment."""
    root = tmp_path_factory.mktemp("conditional")
    workshop = ConditionalWorkshop.open(run(), pictures, root / "run", torch.device("cpu"))
    folder = workshop.fit(root / "models")
    return Fitted(workshop, folder, manifest.read(folder))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    """Seeded numbers in [0, 1)."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def shaken(parts: Parts) -> Parts:
    """The networks with random weights everywhere, so that no part of them is idle."""
    generator = torch.Generator().manual_seed(5)
    for parameter in itertools.chain(*(module.parameters() for module in parts)):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return parts.each(lambda module: module.eval().requires_grad_(requires_grad=False))


def test_demosaicing_is_exact_on_constant_colours_and_on_grey_ramps() -> None:
    """Malvar's filters pass colours that do not change, and planes that all channels share."""
    flat = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1).expand(1, 3, 12, 14)
    torch.testing.assert_close(demosaiced(mosaic_of(flat)), flat)
    rows, columns = torch.arange(12.0)[:, None], torch.arange(14.0)[None]
    ramp = (0.01 * rows + 0.02 * columns).expand(1, 3, 12, 14)
    inner = demosaiced(mosaic_of(ramp))[..., 2:-2, 2:-2]
    torch.testing.assert_close(inner, ramp[..., 2:-2, 2:-2])


def only(kind: str) -> Corruptions:
    """One kind of corruption."""
    return Corruptions(**{name: float(name == kind) for name in Corruptions().shares})


@pytest.mark.parametrize("channels", [1, 3])
def test_each_corruption_is_what_its_mask_and_level_say(channels: int) -> None:
    """Levels are root mean squares of what was added; masks mark missing pixels and means of blocks."""
    x, generator = uniform(64, 3, 16, 16), torch.Generator().manual_seed(1)
    white = spoil(x, channels, only("white"), generator)
    rms = (white.y - white.x).square().mean((1, 2, 3)).sqrt()
    cut = (white.y.amin((1, 2, 3)) >= 0) & (white.y.amax((1, 2, 3)) <= 1)  # those of eight bits
    torch.testing.assert_close(rms[~cut], white.level[~cut, 0], rtol=0.25, atol=1e-6)
    assert not white.level[:, 1].any()
    for kind in ("camera", "jpeg"):
        processed = spoil(x, channels, only(kind), generator)
        rms = (processed.y - processed.x).square().mean((1, 2, 3)).sqrt()
        assert float((processed.level[:, 1] / rms).log().std()) == pytest.approx(0.15, rel=0.3)
        assert not processed.level[:, 0].any()
    shrunk = spoil(x, channels, only("shrunk"), generator)
    factor = round(float(shrunk.mask[0, 0, 0, 0]) ** -0.5)
    means = torch.nn.functional.avg_pool2d(shrunk.x, factor)
    torch.testing.assert_close(shrunk.y[..., ::factor, ::factor], means)
    missing = spoil(x, channels, only("missing"), generator)
    assert bool((missing.y[missing.mask == 0] == 0.5).all())
    assert 0.05 < float((missing.mask == 0).float().mean()) < 0.9
    again = spoil(x, channels, Corruptions(), torch.Generator().manual_seed(7))
    assert all(map(torch.equal, again, spoil(x, channels, Corruptions(), torch.Generator().manual_seed(7))))


def test_conditions_say_how_each_pixel_is_seen() -> None:
    """Levels add in quadrature; a missing pixel has a deviation of 1, one of a block that of the block."""
    y, mask = uniform(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    mask[0, 1, 0, 0] = 0.0
    mask[:, :, 2:] = 0.25
    known = conditions(y, mask, torch.tensor([[0.03, 0.04]]))
    assert float(known.y[0, 1, 0, 0]) == 0.5
    torch.testing.assert_close(known.sigma[0, 0, 0], torch.tensor([1.0, 0.05, 0.05, 0.05]))
    torch.testing.assert_close(known.sigma[0, 0, 3], torch.full((4,), (0.05**2 + 0.15**2) ** 0.5))
    torch.testing.assert_close(known.kind[0, 0], torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))


def test_an_image_without_noise_comes_back_bit_for_bit() -> None:
    """E[x | y] is y where the level is 0, whatever the weights."""
    parts = shaken(build_parts(run().of("colour")))
    y = uniform(2, 3, 16, 24)
    restored, variance, _ = Restore(parts.trunk, parts.latents)(y, torch.ones_like(y), torch.zeros(2, 2))
    assert torch.equal(restored, y)
    assert not variance.any()


def test_a_trunk_of_no_residual_is_bounded_by_the_noise() -> None:
    """log p(x | y) of an image is that of a Gaussian with the mean square of the noise."""
    trunk = TrunkSettings(channels=(4,), blocks=1).build(1)
    torch.nn.init.zeros_(trunk.last.weight)
    spoilt = spoil(uniform(8, 1, 16, 16), 1, only("white"), torch.Generator().manual_seed(2))
    error = spoilt.y - spoilt.x
    std = error.square().mean((1, 2, 3), keepdim=True).sqrt()
    expected = Normal(0.0, std).log_prob(error).sum((1, 2, 3))
    seen = spoilt.level[:, 0] > 0.05  # elsewhere the least error counts
    bound = trunk_bound(trunk, spoilt)
    torch.testing.assert_close(bound.log_likelihood[seen], expected[seen], rtol=1e-3, atol=0.2)
    assert not bound.kl.any()


def test_latents_are_packed_as_the_manifest_says(fitted: Fitted) -> None:
    """Channel c, row i, column j of a block lie at channels[0] + (c block + i) block + j."""
    ladder = fitted.workshop.parts("grey").latents
    assert fitted.told.latent_shape == [ladder.depth, "height/8", "width/8"]
    groups = [
        uniform(1, k, 4 * block, 3 * block, seed=k) for k, block in zip(ladder.latents, ladder.blocks, strict=True)
    ]
    z = ladder.packed(groups)
    for told, group in zip(fitted.told.groups, groups[::-1], strict=True):
        assert at_size(told.shape, 32, 24) == group.shape[1:]
        first, end = told.channels
        assert end - first == told.shape[0] * told.block**2  # type: ignore[operator]
        for c, i, j in itertools.product(range(group.shape[1]), range(told.block), range(told.block)):
            place = first + (c * told.block + i) * told.block + j
            assert torch.equal(z[:, place], group[:, c, i :: told.block, j :: told.block])
    assert all(map(torch.equal, ladder.unpacked(z), groups))


def test_the_posterior_begins_as_the_prior() -> None:
    """Before training no latent knows the truth: the KL is 0, and the bound that of the decoder without latents."""
    parts = build_parts(run().of("grey"))
    spoilt = spoil(uniform(4, 1, 16, 16), 1, only("white"), torch.Generator().manual_seed(3))
    seen = estimated(parts.trunk, *spoilt[1:])
    bound = latent_bound(parts.latents, seen, spoilt.x, parts.latents.noise(spoilt.x, torch.Generator()))
    assert not bound.kl.any()
    torch.testing.assert_close(bound.log_likelihood, bound.without)


def test_latents_are_wanted_for_what_neighbouring_pixels_have_in_common() -> None:
    """Means of blocks have the density that independent pixels give them: a common error costs far more than noise."""
    noise = 0.5 * torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(5))
    log_std = torch.full_like(noise, math.log(0.5))
    wanted = sum(
        Normal(0.0, 0.5 / size).log_prob(torch.nn.functional.avg_pool2d(noise, size)).flatten(1).sum(1)
        for size in (4, 8)
    )
    torch.testing.assert_close(block_density(noise, log_std), wanted)
    common = torch.full_like(noise, 0.5)  # as large as the noise, pixel by pixel
    assert bool((block_density(common, log_std) < block_density(noise, log_std) - 100.0).all())


def test_a_completion_has_the_density_of_its_latents() -> None:
    """log p(z | y) is the sum of the conditional normals, and z is mean + std eps."""
    parts = shaken(build_parts(run().of("grey")))
    y = uniform(2, 1, 16, 24)
    mask, level = torch.ones_like(y), torch.tensor([[0.1, 0.0], [0.0, 0.2]])
    restored, _, features = Restore(parts.trunk, parts.latents)(y, mask, level)
    eps = parts.latents.noise(y, torch.Generator().manual_seed(4))
    _, variance, z, mean, log_var, log_p = Complete(parts.latents)(y, mask, level, restored, features, eps)
    std = torch.exp(0.5 * log_var)
    torch.testing.assert_close(z, mean + std * eps)
    torch.testing.assert_close(log_p, Normal(mean, std).log_prob(z).sum((1, 2, 3)), rtol=1e-4, atol=1e-3)
    assert bool((variance > 0.0).all())


def test_a_temperature_multiplies_the_noise_of_draws() -> None:
    """By the factor of the level of both families together: linear in the logarithm between the told ones."""
    temperature = Temperature([0.01, 0.1, 0.2], [1.0, 1.5, 1.1])
    level = torch.tensor([[0.0, 0.0], [0.01, 0.0], [0.1 * 0.1**0.5, 0.0], [0.06, 0.08], [0.0, 0.9]])
    torch.testing.assert_close(temperature(level).flatten(), torch.tensor([1.0, 1.0, 1.25, 1.5, 1.1]))
    parts = shaken(build_parts(run().of("grey")))
    y = uniform(1, 1, 16, 24)
    given = (y, torch.ones_like(y), torch.tensor([[0.1, 0.0]]))
    restored, _, features = Restore(parts.trunk, parts.latents)(*given)
    eps = parts.latents.noise(y, torch.Generator().manual_seed(4))
    hot = Complete(parts.latents, temperature)(*given, restored, features, eps)
    for one, other in zip(hot, Complete(parts.latents)(*given, restored, features, 1.5 * eps), strict=True):
        torch.testing.assert_close(one, other)


class Idle(nn.Module):
    """A trunk that leaves the noise, so that the error is 1 in units of the noise, and 1/8 in means of blocks."""

    def features(self, y: Tensor, _sigma: Tensor, _kind: Tensor) -> Tensor:
        """The image."""
        return y

    def residual(self, features: Tensor) -> Tensor:
        """Nothing."""
        return torch.zeros_like(features)


class Blocky(nn.Module):
    """Latents of one number a block, whose draws differ by it alone.

    Args:
        std: Standard deviation of the draws.
    """

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def noise(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """One number a block of 8 x 8 pixels."""
        return torch.randn(len(x), 1, x.shape[2] // 8, x.shape[3] // 8, generator=generator)

    def forward(self, _features: Tensor, eps: Tensor) -> SimpleNamespace:
        """What `temperature_of` reads of a draw."""
        mean = self.std * torch.nn.functional.interpolate(eps, scale_factor=8.0)
        return SimpleNamespace(mean=mean, log_std=torch.full_like(mean, -20.0))


@pytest.mark.parametrize(("std", "factor"), [(1.0, 1.0), (0.125, 1.0), (0.1, 1.25), (0.09, 1.39), (0.01, 1.5)])
def test_the_temperature_makes_means_of_blocks_vary_as_much_as_they_are_wrong(std: float, factor: float) -> None:
    """Where draws vary too little it is above 1, within its bounds."""
    parts = SimpleNamespace(trunk=Idle(), latents=Blocky(std), channels=1)
    images = (255 * uniform(8, 1, 64, 64, seed=3)).to(torch.uint8)
    found = temperature_of(parts, images, 0)  # type: ignore[arg-type]
    assert found["factors"] == pytest.approx([factor] * len(found["levels"]), rel=0.07)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("variant", ["grey", "colour"])
def test_graphs_compute_what_torch_computes(variant: Any, size: tuple[int, int], fitted: Fitted) -> None:
    """At the least size and at one that tracing has not seen, with the weights that the version stores."""
    parts = fitted.workshop.parts(variant).each(fitted.workshop.stored)
    view = next(one for one in fitted.told.views() if one.channels == parts.channels)
    y, mask = uniform(3, parts.channels, *size), (uniform(3, 1, *size, seed=1) < 0.8).float()
    mask = mask.expand_as(y).contiguous()
    level = torch.tensor([[0.1, 0.0], [0.0, 0.2], [0.0, 0.0]])
    restored, variance, features = Restore(parts.trunk, parts.latents)(y, mask, level)
    eps = parts.latents.noise(y, torch.Generator().manual_seed(6))
    temperature = Temperature(**fitted.told.quality[variant]["temperature"])
    expected = {
        "restoration": ((y, mask, level), (restored, variance, features)),
        "completion": (
            (y, mask, level, restored, features, eps),
            Complete(parts.latents, temperature)(y, mask, level, restored, features, eps),
        ),
        "noise_level": ((y, mask), (EstimateLevels(parts.level)(y, mask),)),
        "noise": ((y, mask), (EstimateNoise(parts.level)(y, mask),)),
    }
    assert view.graphs.keys() == expected.keys()
    for name, (inputs, outputs) in expected.items():
        graph = view.graphs[name]
        given = {key: value.numpy() for key, value in zip(graph.inputs, inputs, strict=True)}
        for key, known, found in zip(
            graph.outputs, outputs, opened(fitted.folder / graph.file).run([*graph.outputs], given), strict=True
        ):
            torch.testing.assert_close(torch.from_numpy(found), known, atol=1e-4, rtol=1e-4)
            assert known.shape[1:] == at_size(graph.outputs[key], *size)


def test_the_version_tells_both_variants(fitted: Fitted) -> None:
    """Sizes, families, calibration over the level, seconds of every stage, and figures of both."""
    told = fitted.told
    assert [view.channels for view in told.views()] == [1, 3]
    assert told.size is not None
    assert (told.size.multiple_of, told.size.min) == (8, 16)
    assert told.noise_families == ["gaussian", "processed"]
    for view in told.views():
        assert view.far_from_training is not None
        assert not view.far_from_training.sound
        assert view.far_from_training.caught.keys() == {"inverted", "2x - 1", "black", "white"}
        assert view.calibration is not None
        assert view.calibration.curves["fast"].keys() == {"gaussian", "processed"}
        assert view.calibration.factors["fast"].keys() >= {"missing-beside", "shrink-2", "shrink-4"}
    assert told.training["seconds"].keys() == {f"{one} {stage}" for one in ("grey", "colour") for stage in STAGES}
    assert told.training["settings"]["colour"]["trunk"]["channels"] == [5, 6, 8]
    assert told.quality["colour"]["restoration"]["gaussian"]["25/255"].keys() >= {"noisy_db", "restored_db", "auto_db"}
    card = (fitted.folder / "README.md").read_text()
    assert "A conditional variational auto-encoder of grey or colour images of any size" in card
    assert "### Colour" in card


def test_training_begins_with_the_weights_of_a_version(fitted: Fitted) -> None:
    """Every weight that inference needs is read back, as exactly as float16 holds it; the posterior is not there."""
    for variant in fitted.workshop.run.variants:
        weights = weights_of(fitted.folder, variant)
        trained = fitted.workshop.parts(variant).each(fitted.workshop.stored)
        begun = build_parts(fitted.workshop.run.of(variant), weights)
        for stage, one, other in zip(STAGES, begun, trained, strict=True):
            known = {name for name in other.state_dict() if not name.startswith("error.") and ".q." not in name}
            assert weights[stage].keys() == known
            assert all(torch.equal(one.state_dict()[name], other.state_dict()[name]) for name in known)


def test_a_version_of_other_networks_is_no_beginning(fitted: Fitted, tmp_path: Path) -> None:
    """The refusal names the table; so does that of a folder without a version."""
    wider = run(trunk={**TABLES["trunk"], "channels": [6, 6, 8]}).of("grey")
    with pytest.raises(ConfigError, match=r"\[trunk\] describes another network.*training.settings"):
        build_parts(wider, weights_of(fitted.folder, "grey"))
    with pytest.raises(ExportError, match="manifest"):
        weights_of(tmp_path, "grey")


def test_a_finished_run_is_not_trained_again_but_for_longer(fitted: Fitted, tmp_path: Path) -> None:
    """The same command leaves all checkpoints; a longer trunk continues, and its latents are trained anew."""
    folder = fitted.workshop.folder / "grey"
    before = {stage: (folder / f"{stage}.pt").read_bytes() for stage in STAGES}
    fitted.workshop.train()
    assert {stage: (folder / f"{stage}.pt").read_bytes() for stage in STAGES} == before
    shutil.copytree(fitted.workshop.folder, tmp_path, dirs_exist_ok=True)
    longer = run(variants=["grey"], colour={}, trunk={**TABLES["trunk"], "train": {**BRIEF, "epochs": 2}})
    ConditionalWorkshop(longer, fitted.workshop.images, tmp_path, torch.device("cpu")).train()
    after = {stage: (tmp_path / "grey" / f"{stage}.pt").read_bytes() for stage in STAGES}
    assert [after[stage] == before[stage] for stage in STAGES] == [False, False, True]


def test_a_run_from_a_version_begins_with_its_weights(fitted: Fitted, tmp_path: Path) -> None:
    """At a rate of next to nothing its trunk stays that of the version."""
    still = {**TABLES["trunk"], "train": {**BRIEF, "learning_rate": 1e-12}}
    tuned = run(**{"from": str(fitted.folder), "variants": ["grey"], "colour": {}, "trunk": still})
    workshop = ConditionalWorkshop(tuned, fitted.workshop.images, tmp_path, torch.device("cpu"))
    workshop.train()
    version = fitted.workshop.parts("grey").each(fitted.workshop.stored).trunk
    for one, other in zip(workshop.parts("grey").trunk.parameters(), version.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


def test_options_of_other_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--from` for a VAE, `--draws` for a conditional model."""
    configs = Path(__file__).parents[2] / "training" / "configs"
    assert main(["fit", str(configs / "digits.toml"), "--from", str(tmp_path), "--threads", "1"]) == 1
    assert "--from is for conditional models" in capsys.readouterr().err
    assert main(["fit", str(configs / "photos.toml"), "--draws", "3", "--threads", "1"]) == 1
    assert "neither --draws nor" in capsys.readouterr().err


def test_weights_trained_elsewhere_are_kept_as_a_finished_stage(fitted: Fitted, tmp_path: Path) -> None:
    """They come back from the run's folder; those of another network are refused."""
    grey = fitted.workshop.run.of("grey")
    parts = shaken(build_parts(grey))
    for stage, module in zip(STAGES, parts, strict=True):
        keep_weights(grey, stage, module.state_dict(), tmp_path / "grey", seconds=60.0)
    found = trained_parts(grey, tmp_path / "grey", torch.device("cpu"))
    for one, other in zip(found, parts, strict=True):
        assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    with pytest.raises(CheckpointError, match=r"no weights of \[trunk\]"):
        keep_weights(grey, "trunk", {}, tmp_path, seconds=0.0)


def test_a_factor_makes_intervals_hold() -> None:
    """Errors twice as large as told give 2; those of half the size 0.5. Almost certain pixels count if all are so."""
    generator = np.random.default_rng(0)
    std = np.full((20, 1, 50, 50), 0.02, np.float32)
    for scale in (0.5, 1.0, 2.0):
        mean = (0.5 + scale * std * generator.standard_normal(std.shape)).astype(np.float32)
        assert factor_for(mean, std, np.full_like(std, 0.5)) == pytest.approx(scale, rel=0.03)
    smooth = [np.concatenate([part, part]) for part in (mean, std, np.full_like(std, 0.5))]
    smooth[0][20:], smooth[1][20:] = 0.5, 0.002
    assert factor_for(*smooth) == pytest.approx(2.0, rel=0.03)
    assert factor_for(*(part[20:] for part in smooth)) == FACTORS[0]


def test_a_clean_image_has_no_noise_of_any_family() -> None:
    """Its bound falls with both levels; that of a noisy image with that of its own family alone."""
    spoilt = spoil(uniform(2, 1, 16, 16), 1, only("white"), torch.Generator().manual_seed(3))
    clean = torch.tensor([True, False])

    def bound(gaussian: float, processed: float) -> Tensor:
        logs = torch.stack([torch.tensor([0.0, float(spoilt.level[1, 0])]) + value for value in (gaussian, processed)])
        found = NoiseEstimate(*(logs + 1e-9).log(), torch.zeros(2))
        return level_bound(lambda _y, _mask: found, spoilt, clean).log_likelihood  # type: ignore[arg-type]

    true, gaussian, processed = bound(0.0, 0.0), bound(0.05, 0.0), bound(0.0, 0.05)
    assert gaussian[0] < true[0]
    assert processed[0] < true[0]
    assert gaussian[1] < true[1]
    assert processed[1] == true[1]


def test_a_level_of_processed_noise_is_rather_too_low() -> None:
    """A level a tenth too high costs three times what one a tenth too low costs."""
    spoilt = spoil(uniform(1, 3, 16, 16), 3, only("jpeg"), torch.Generator().manual_seed(3))
    level = (spoilt.y - spoilt.x).square().mean().sqrt()

    def cost(log_ratio: float) -> float:
        told = torch.stack([torch.zeros(()), ((level + LEAST_LEVEL) * math.exp(log_ratio) - LEAST_LEVEL).log()])
        found = NoiseEstimate(*told[:, None], torch.full((1,), 30.0))
        return -float(level_bound(lambda _y, _mask: found, spoilt, torch.zeros(1) > 0).log_likelihood)  # type: ignore[arg-type]

    assert cost(0.1) == pytest.approx(3.0 * cost(-0.1), rel=1e-3)


def test_a_level_network_ignores_missing_pixels() -> None:
    """What stands where a pixel is missing does not change the estimate."""
    network = shaken(build_parts(run().of("grey")))[2]
    y, mask = uniform(2, 1, 16, 16), (uniform(2, 1, 16, 16, seed=1) < 0.9).float()
    found, other = (network(image, mask) for image in (y * mask, y))
    torch.testing.assert_close(torch.stack([*found]), torch.stack([*other]))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"data": {**TABLES["data"], "mode": "L"}}, r'variants = \["grey"\]'),
    ({"variants": ["grey", "grey"]}, "names one twice"),
    ({"variants": ["grey"]}, 'variants lacks "colour"'),
    ({"colour": {"card": {}}}, "colour has card"),
    ({"colour": {"trunk": {"chanels": [4]}}}, "chanels"),
    ({"data": {**TABLES["data"], "height": 20}}, "must be multiples of 8, not 20 x 16"),
    ({"corruptions": {"white": 0.1}}, "must add up to 1"),
    ({"corruptions": {"qualities": [90, 10]}}, "least quality of JPEG, then the largest"),
    ({"trunk": {**TABLES["trunk"], "train": {**BRIEF, "draws": 2}}}, "leave out objective, draws"),
    ({"latents": {**TABLES["latents"], "latents": [1]}}, "as many as one another"),
    ({"trunk": {**TABLES["trunk"], "blocks": [1, 2]}}, "blocks has 2 values and channels 3: give one a level"),
    ({"trunk": {**TABLES["trunk"], "eight_bits": [True]}}, "eight_bits has 1 values and channels 3"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_settings_that_do_not_fit_together_are_refused(changed: dict[str, Any], message: str) -> None:
    """With the key and what it needs."""
    with pytest.raises(ValueError, match=message):
        run(**changed)


def test_the_shipped_networks_are_those_of_the_notes() -> None:
    """1.9 million parameters in the trunk of 48-96-160, and 112 numbers in z a block of 8 x 8 pixels."""
    trunk = TrunkSettings().build(1)
    assert sum(p.numel() for p in trunk.parameters()) == pytest.approx(1.92e6, rel=0.01)
    assert SpatialLadderSettings().build(48, 1).depth == 112
    assert len(list(LevelSettings().build(3).convs)) == 6
