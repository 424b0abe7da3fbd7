"""A model of images of any size: what is exported computes what torch computes, at sizes that no tracing has seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from service.contract import manifest
from service.contract.graphs import at_size
from service.contract.manifest import Manifest
from training.config import Run
from training.data import Digits, ImageSet
from training.errors import ConfigError
from training.loop.stages import build_recognition, build_vae
from training.models.restoration import Corrupted, Recognition
from training.models.vae import VAE
from training.pipeline import Workshop

SPATIAL = {"architecture": "conv", "latents": "spatial", "channels": [4], "blocks": 0, "head": 3}
POOLED = {"architecture": "conv", "latents": "pooled", "channels": [3], "blocks": 0}
TABLES: dict[str, Any] = {
    "name": "tiny",
    "data": {"dataset": "digits"},
    "model": {"latent_dim": 2, "likelihood": {"likelihood": "gaussian"}, "network": SPATIAL},
    "train": {"epochs": 1},
    "restoration": {
        "network": SPATIAL,
        "level_network": POOLED,
        "correction": {"channels": [3, 4]},
        "train": {"epochs": 1},
    },
    "evaluation": {"draws": 2, "images": 10},
}
SIZES = [(4, 4), (8, 8), (14, 38), (96, 6)]


def run(**changed: Any) -> Run:
    """The tables of a tiny run, some of them changed."""
    return Run.model_validate({**TABLES, **changed})


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Path, VAE, Recognition]:
    """A version of a model that was trained for a moment on the digits of 8 x 8."""
    root = tmp_path_factory.mktemp("spatial")
    digits = Digits(dataset="digits").load(root)
    images = ImageSet(*(split[:100] for split in (digits.train, digits.validation, digits.test)))
    workshop = Workshop(run(), images, root / "run", torch.device("cpu"))
    folder = workshop.fit(root / "models")
    recognition = workshop.recognition()
    assert recognition is not None
    return manifest.read(folder), folder, workshop.vae(), recognition


def answer(exported: tuple[Manifest, Path, VAE, Recognition], graph: str, *inputs: Tensor) -> list[Tensor]:
    """What onnxruntime computes."""
    entry = exported[0].graphs[graph]
    session = ort.InferenceSession(exported[1] / entry.file, providers=["CPUExecutionProvider"])
    given = {name: value.numpy() for name, value in zip(entry.inputs, inputs, strict=True)}
    return [torch.from_numpy(value) for value in session.run(list(entry.outputs), given)]


def test_manifest_leaves_the_size_free(exported: tuple[Manifest, Path, VAE, Recognition]) -> None:
    """Images of any multiple of 2, latents of half of it, golden rows not square, no graph that needs vectors."""
    told = exported[0]
    assert told.input_shape == [1, "height", "width"]
    assert told.latent_shape == [2, "height/2", "width/2"]
    assert told.size is not None
    assert told.size.multiple_of == 2
    assert told.golden.height != told.golden.width
    assert set(told.graphs) == {"encoder", "decoder", "log_joint", "recognition", "noise_level", "fusion", "correction"}


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_graphs_compute_what_torch_computes(
    size: tuple[int, int], exported: tuple[Manifest, Path, VAE, Recognition]
) -> None:
    """At the least size, that of the training, and two that neither training nor tracing has seen."""
    told, _, vae, recognition = exported
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(2, 3, 1, *size, generator=generator)
    mask = (torch.rand(3, 1, *size, generator=generator) < 0.7).float()
    level = torch.tensor([[0.1, 0.0, 0.0, 0.0], [0.0, 0.2, 0.0, 0.0], [0.0, 0.0, 0.0, 0.3]])
    seen = Corrupted(y * mask, mask, level)
    q, z = vae.posterior(x), recognition.posterior(seen).mean
    assert z.shape[1:] == at_size(told.latent_shape, *size)
    fused = recognition.fusion(vae.x_mean(z), *seen)
    expected = {
        "encoder": ((x,), q),
        "decoder": ((q.mean,), [vae.reconstruct(x)]),
        "log_joint": ((x, q.mean), [vae.likelihood.log_prob(vae.decode(q.mean), x), vae.prior.log_prob(q.mean)]),
        "recognition": (seen, recognition.posterior(seen)),
        "noise_level": (seen[:2], [recognition.log_level(*seen[:2]).mean.exp()]),
        "fusion": ((vae.x_mean(z), *seen), fused),
        "correction": ((*fused, *seen), recognition.restored(vae, seen)),
    }
    for graph, (inputs, outputs) in expected.items():
        for found, known in zip(answer(exported, graph, *inputs), outputs, strict=True):
            torch.testing.assert_close(found, known, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_tiles_equal_the_whole_beyond_the_margin(exported: tuple[Manifest, Path, VAE, Recognition]) -> None:
    """A part of an image is reconstructed and restored as in the whole, but for the manifest's margin."""
    told, _, vae, recognition = exported
    assert told.tiles is not None
    assert told.tiles.exact
    margin = told.tiles.margin
    x = torch.rand(1, 1, 6, 80, generator=torch.Generator().manual_seed(2))

    def restored(y: Tensor) -> Tensor:
        level = torch.tensor([[0.3, 0.0, 0.0, 0.0]])
        return recognition.restored(vae, Corrupted(y, torch.ones_like(y), level))[0]

    for answer_of in (vae.reconstruct, restored):
        whole, tile = answer_of(x), answer_of(x[..., :40])
        torch.testing.assert_close(tile[..., : 40 - margin], whole[..., : 40 - margin], atol=1e-6, rtol=0)
        assert not torch.equal(tile, whole[..., :40])


def test_likelihood_has_one_scale_a_channel() -> None:
    """A place in a crop is none in the picture, so no parameter belongs to one."""
    vae = build_vae(run(), (1, 8, 8))
    assert [tuple(p.shape) for p in vae.likelihood.parameters()] == [(1, 1, 1)]
    assert vae.latent_shape == (2, 4, 4)
    assert build_recognition(run(), (1, 8, 8)).correction.network is not None


def test_size_that_the_levels_do_not_divide_is_refused() -> None:
    """With what to change."""
    with pytest.raises(ConfigError, match="multiples of 2, not 8 x 9; change the size"):
        build_vae(run(), (1, 8, 9))


RESTORATION = TABLES["restoration"]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": {**TABLES["model"], "prior": {"prior": "vamp"}}}, 'needs prior = "standard_normal"'),
    ({"model": {**TABLES["model"], "network": POOLED}}, '"pooled" is for a level_network'),
    ({"restoration": {**RESTORATION, "level_network": SPATIAL}}, 'level_network needs latents = "pooled"'),
    ({"restoration": {**RESTORATION, "network": {**SPATIAL, "channels": [4, 4]}}}, "as many levels as model.network"),
    ({"restoration": {**RESTORATION, "correction": {"channels": [3, 4, 5]}}}, "correction has too many levels"),
    (
        {"model": {"latent_dim": 2, "network": {**SPATIAL, "latents": "vector"}}},
        'restoration.network needs latents = "vector", because model.network has latents = "vector"',
    ),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_networks_that_do_not_fit_together_are_refused(changed: dict[str, Any], message: str) -> None:
    """With the key and the value that it needs."""
    with pytest.raises(ValueError, match=message):
        run(**changed)
