"""Operations of models of other kinds: hierarchical posteriors, images of any size, no prior, a decoder alone."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from numpy.typing import NDArray

from service.app import create_app
from service.errors import InvalidShape, TooLarge, UnsupportedOperation
from service.operations.denoise import DenoiseOptions, denoise
from service.operations.encode import EncodeOptions, encode
from service.operations.inference.latent import standard_normal
from service.operations.inference.vae import Result
from service.operations.interpolate import InterpolateOptions, interpolate
from service.operations.operation import MEANS, Inputs, Operation, Options
from service.operations.reconstruct import reconstruct
from service.operations.registry import OPERATIONS, warm_up
from service.operations.restoration import observed
from service.operations.score import ScoreOptions, score
from service.operations.super_resolve import SuperResolveOptions, super_resolve
from service.repository.repository import Repository
from service.repository.version import open_version
from service.runtime.model import Model
from service.runtime.program import Trip
from service.runtime.scheduler import Engine
from service.settings import Settings
from tests.support.versions import FACTOR, OFFSET, SLOPE, VARIANCE_X, VARIANCE_Z2, free_version, ladder_version, opened

Rows = NDArray[np.float32]
EVERY = ("encoder", "decoder", "log_joint", "restoration")
WIDE = 1.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with a version of each kind."""
    folder = tmp_path_factory.mktemp("kinds")
    ladder_version(folder / "ladder" / "1")
    ladder_version(folder / "wide" / "1", spread=WIDE)
    free_version(folder / "free" / "1", channels=(3, 1), graphs=EVERY)
    free_version(folder / "priorless" / "1", prior=None)
    free_version(folder / "drawing" / "1", graphs=("decoder",))
    return folder


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, Model]:
    """Their models."""
    return {path.name: opened(path / "1") for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def kinds(
    models: dict[str, Model], small: Repository, serve: Callable[[FastAPI], AbstractContextManager[str]]
) -> Iterator[httpx.Client]:
    """A client of a service of all of them and of mnist-2d."""
    repository = Repository({**{name: {"1": model} for name, model in models.items()}, **small.models}, "mnist-2d")
    app = create_app(Settings(max_rows=8), repository)
    with serve(app) as url, httpx.Client(base_url=url, timeout=60.0) as client:
        yield client


@pytest.fixture(scope="module")
def x() -> Rows:
    """Five draws of the hierarchical model."""
    rng = np.random.default_rng(4)
    above = np.repeat(np.repeat(rng.standard_normal((5, 1, 2, 3)), 2, axis=2), 2, axis=3)
    below = FACTOR * above + math.sqrt(VARIANCE_Z2) * rng.standard_normal(above.shape)
    drawn = SLOPE * below + OFFSET + math.sqrt(VARIANCE_X) * rng.standard_normal(above.shape)
    return np.clip(drawn, 0.0, 1.0).astype(np.float32)


def asked(client: httpx.Client, path: str, content: Any = None) -> dict[str, Any]:
    answer = client.post(path, json=content)
    assert answer.status_code == 200, answer.text
    return {
        name: np.asarray(value, np.float32) if isinstance(value, list) else value
        for name, value in answer.json().items()
    }


def refused(client: httpx.Client, path: str, content: Any = None, code: str = "unsupported_operation") -> str:
    answer = client.post(path, json=content)
    assert (answer.status_code, answer.json()["code"]) == (422, code), answer.text
    return str(answer.json()["detail"])


def performed(
    model: Model, operation: Operation, *requests: tuple[Inputs, Options], tile_pixels: int = 2**20
) -> list[Result]:
    """Requests side by side through one engine."""

    async def scenario() -> list[Result]:
        engine = Engine(max_rows=8, queue_rows=4096, tile_pixels=tile_pixels)
        try:
            runs = [operation.perform(model, engine.submit, inputs, options) for inputs, options in requests]
            return await asyncio.gather(*runs)
        finally:
            await engine.close()

    return asyncio.run(scenario())


def blocks(images: Rows) -> NDArray[np.float64]:
    """(n, 1, 2 h, 2 w) -> (n, 4, h, w), as the manifest's groups are packed."""
    n, _, height, width = images.shape
    cut = images.astype(np.float64).reshape(n, height // 2, 2, width // 2, 2)
    return cut.transpose(0, 2, 4, 1, 3).reshape(n, 4, height // 2, width // 2)


def by_hand(x: Rows, eps: Rows, spread: float = 1.0) -> tuple[NDArray[np.float64], ...]:
    """z, mean and log_var (n, 5, 2, 3) of the posterior, from Bayes' rule in its textbook form, block by block."""
    marginal = SLOPE**2 * VARIANCE_Z2 + VARIANCE_X
    variance1 = 1.0 / (1.0 + 4.0 * (FACTOR * SLOPE) ** 2 / marginal)
    variance2 = 1.0 / (1.0 / VARIANCE_Z2 + SLOPE**2 / VARIANCE_X)
    y = blocks(x) - OFFSET
    mean1 = variance1 * FACTOR * SLOPE * y.sum(1, keepdims=True) / marginal
    z1 = mean1 + spread * math.sqrt(variance1) * eps[:, :1]
    mean2 = variance2 * (FACTOR * z1 / VARIANCE_Z2 + SLOPE * y / VARIANCE_X)
    z2 = mean2 + spread * math.sqrt(variance2) * eps[:, 1:]
    log_var = np.log(spread**2 * np.array([variance1, *[variance2] * 4])).reshape(1, 5, 1, 1)
    mean = np.concatenate([mean1, mean2], 1)
    return np.concatenate([z1, z2], 1), mean, np.broadcast_to(log_var, mean.shape)


def log_evidence(x: Rows) -> NDArray[np.float64]:
    """The exact log p(x) in nats: blocks are independent Gaussians of four pixels that share z1."""
    covariance = (SLOPE**2 * VARIANCE_Z2 + VARIANCE_X) * np.eye(4) + (FACTOR * SLOPE) ** 2
    y = blocks(x) - OFFSET
    square = np.einsum("niab,ij,njab->n", y, np.linalg.inv(covariance), y)
    found: NDArray[np.float64] = -0.5 * (square + 6 * np.linalg.slogdet(2.0 * math.pi * covariance)[1])
    return found


def test_encode_gives_the_conditional_means_and_seeded_draws(kinds: httpx.Client, x: Rows) -> None:
    """Mean and log_var of a hierarchical posterior at noise 0, and draws at the noise that the seed gives."""
    found = asked(kinds, "/v1/models/ladder/encode", {"images": x.tolist(), "draws": 3, "seed": 7})
    _, mean, log_var = by_hand(x, np.zeros((5, 5, 2, 3), np.float32))
    np.testing.assert_allclose(found["mean"], mean, atol=1e-5)
    np.testing.assert_allclose(found["log_var"], log_var, atol=1e-5)
    eps = standard_normal(7, 5, (3, 5, 2, 3))
    for k in range(3):
        np.testing.assert_allclose(found["latents"][:, k], by_hand(x, eps[:, k])[0], atol=1e-5)


def test_draws_never_depend_on_who_shares_the_batch(models: dict[str, Model], x: Rows) -> None:
    """Bit for bit, alone and among others."""
    mine = Inputs(x), EncodeOptions(draws=3, seed=7)
    (alone,) = performed(models["ladder"], encode, mine)
    others = [(Inputs(x[k:]), EncodeOptions(draws=3, seed=k)) for k in range(4)]
    beside = performed(models["ladder"], encode, *others, mine)[-1]
    for name, array in alone.outputs.items():
        assert array.tobytes() == beside.outputs[name].tobytes()


def test_reconstructions_follow_the_means_or_average_draws(kinds: httpx.Client, x: Rows) -> None:
    """The decoder is linear, so both are known."""
    eps = standard_normal(2, 5, (4, 5, 2, 3))
    for drawn, options in (([np.zeros_like(eps[:, 0])], {}), (list(eps.swapaxes(0, 1)), {"draws": 4, "seed": 2})):
        found = asked(kinds, "/v1/models/ladder/reconstruct", {"images": x.tolist(), **options})
        z = np.mean([by_hand(x, one)[0] for one in drawn], 0)
        np.testing.assert_allclose(blocks(found["images"]), SLOPE * z[:, 1:] + OFFSET, atol=1e-5)


def test_under_the_exact_posterior_every_weight_is_the_evidence(kinds: httpx.Client, x: Rows) -> None:
    """So both bounds are log p(x) at any draws, as the covariance of the pixels gives it."""
    found = asked(kinds, "/v1/models/ladder/score", {"images": x.tolist(), "seed": 1, "error": True})
    np.testing.assert_allclose(found["elbo"], log_evidence(x), atol=1e-4)
    np.testing.assert_allclose(found["importance_weighted"], log_evidence(x), atol=1e-4)
    assert float(found["standard_error"].max()) < 1e-4
    mean = asked(kinds, "/v1/models/ladder/reconstruct", {"images": x.tolist()})["images"]
    np.testing.assert_allclose(found["error"], np.square(mean - x), atol=1e-5)


def test_a_wide_posterior_loses_what_the_divergence_says(kinds: httpx.Client, x: Rows) -> None:
    """log p(x) less KL(q || p(z|x)) in closed form; importance weights win most of it back."""
    many = np.repeat(x[:1], 60, axis=0)
    found = asked(kinds, "/v1/models/wide/score", {"images": many.tolist(), "seed": 1, "draws": 64})
    divergence = 30 * 0.5 * (WIDE**2 - 1.0 - math.log(WIDE**2))
    exact = log_evidence(x[:1])[0]
    assert float(found["elbo"].mean()) == pytest.approx(exact - divergence, abs=0.1)
    assert abs(float(found["importance_weighted"].mean()) - exact) < 0.1 * divergence
    np.testing.assert_allclose(found["elbo"], found["log_likelihood"] - found["kl"], atol=1e-4)


def test_what_a_hierarchical_model_cannot_do_is_refused(kinds: httpx.Client, x: Rows) -> None:
    """With the reason, and the models that can."""
    refined = refused(kinds, "/v1/models/ladder/score?quality=refined", {"images": x.tolist()})
    assert refined == (
        "model ladder cannot score with quality=refined: its q(z|x) is not one diagonal Gaussian; no served model can; "
        "or ask for quality=fast"
    )
    between = refused(kinds, "/v1/models/ladder/interpolate", {"images": x[:2].tolist()})
    assert "cannot interpolate: its latents are groups" in between
    assert between.endswith("served models that can: drawing, free, priorless, mnist-2d")


def test_a_hierarchical_prior_is_sampled(kinds: httpx.Client) -> None:
    """Images of many draws have the mean and variance of the model."""
    images = asked(kinds, "/v1/models/ladder/sample?count=512&seed=1")["images"]
    assert images.shape == (512, 1, 4, 6)
    assert float(images.mean()) == pytest.approx(OFFSET, abs=0.05)
    assert float(images.var()) == pytest.approx(SLOPE**2 * (FACTOR**2 + VARIANCE_Z2), rel=0.1)


@pytest.mark.parametrize("operation", ["sample", "traverse"])
def test_without_a_prior_nothing_is_sampled(kinds: httpx.Client, operation: str) -> None:
    """The refusal says why, and names a model that can."""
    detail = refused(kinds, f"/v1/models/priorless/{operation}")
    reason = "it has no prior p(z), because its latents were never fitted to one"
    able = "served models that can: drawing, free, ladder, wide, mnist-2d"
    assert detail == f"model priorless cannot {operation}: {reason}; {able}"


def test_what_a_model_can_is_listed(kinds: httpx.Client) -> None:
    """By its graphs, prior and groups."""
    listed = {name: kinds.get(f"/v1/models/{name}").json()["operations"] for name in ("ladder", "priorless", "drawing")}
    assert listed == {
        "ladder": ["encode", "decode", "reconstruct", "score", "sample", "traverse"],
        "priorless": ["encode", "decode", "reconstruct", "interpolate"],
        "drawing": ["decode", "sample", "interpolate", "traverse"],
    }


def test_a_decoder_alone_draws(kinds: httpx.Client, models: dict[str, Model]) -> None:
    """And goes from latent to latent; what needs an encoder is refused."""
    model, z = models["drawing"], standard_normal(3, 2, (2, 3, 5))
    request = Inputs(z, latents=True, size=(12, 20)), InterpolateOptions(steps=3, path="linear")
    (found,) = performed(model, interpolate, request)
    ends = model.graphs["decoder"](np.stack([z[0], z.mean(0), z[1]]))[0]
    np.testing.assert_allclose(found.outputs["images"], ends, atol=1e-5)
    assert "it has no encoder" in refused(kinds, "/v1/models/drawing/encode", {"images": []})
    assert interpolate.check is not None
    with pytest.raises(UnsupportedOperation, match="send latents"):
        interpolate.check(model, Inputs(np.zeros((2, 3, 12, 20), np.float32)), InterpolateOptions())


@pytest.mark.parametrize("size", [(21, 13), (3, 50), (16, 8)])
def test_samples_have_the_size_that_is_asked_for(
    kinds: httpx.Client, models: dict[str, Model], size: tuple[int, int]
) -> None:
    """Drawn at the next multiple, and cut."""
    height, width = size
    found = asked(kinds, f"/v1/models/free/sample?height={height}&width={width}&count=2&seed=3&latents=true")
    eps = standard_normal(3, 2, (2, max(2, -(-height // 4)), max(2, -(-width // 4))))
    np.testing.assert_array_equal(found["latents"], eps)
    whole = models["free"].graphs["decoder"](eps)[0]
    np.testing.assert_allclose(found["images"], whole[..., :height, :width], atol=1e-5)


def test_a_map_of_free_size(kinds: httpx.Client) -> None:
    """The latents lie on the grid, and images have the size."""
    found = asked(kinds, "/v1/models/free/traverse?axes=0&size=3&height=9&width=8&latents=true")
    assert found["images"].shape == (3, 3, 9, 8)
    assert found["latents"].shape == (3, 2, 3, 2)
    assert found["latents"].reshape(3, -1)[1].tolist() == [0.0] * 12


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("free/sample", "makes images of any size up to 8192 x 8192; name one with height and width"),
        ("free/sample?height=8", "name one with height and width"),
        ("free/sample?height=8193&width=8", "at most 8192 x 8192"),
        ("free/sample?height=0&width=8", "height"),
        ("mnist-2d/sample?height=28&width=28", "images of 28 x 28 and no others; leave out height and width"),
        ("mnist-2d/traverse?width=28", "leave out height and width"),
        ("mnist-2d/sample?channels=3", "channels is 3, but images of model mnist-2d have 1"),
        ("free/sample?channels=2&height=8&width=8", "have 1 or 3"),
    ],
)
def test_sizes_that_a_model_has_not_are_refused(kinds: httpx.Client, path: str, says: str) -> None:
    """The message names the fix."""
    assert says in refused(kinds, f"/v1/models/{path}", code="invalid_option")


def test_an_image_that_is_too_large_for_the_memory_is_refused(
    models: dict[str, Model], serve: Callable[[FastAPI], AbstractContextManager[str]]
) -> None:
    """By the size that is asked for, before anything is drawn."""
    app = create_app(Settings(memory_bytes=2**28), Repository({"free": {"1": models["free"]}}, "free"))
    with serve(app) as url, httpx.Client(base_url=url, timeout=60.0) as client:
        assert client.post("/v1/sample?height=64&width=64&count=4").status_code == 200
        answer = client.post("/v1/sample?height=4096&width=4096&count=4")
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")


def test_channels_choose_the_variant(kinds: httpx.Client, models: dict[str, Model]) -> None:
    """The first one by default."""
    size = "height=8&width=8&seed=3"
    for channels in (1, 3):
        found = asked(kinds, f"/v1/models/free/sample?channels={channels}&{size}")
        whole = models["free"].variants[channels].graphs["decoder"](standard_normal(3, 1, (2, 2, 2)))[0]
        np.testing.assert_allclose(found["images"], whole, atol=1e-5)
    assert asked(kinds, f"/v1/models/free/sample?{size}")["images"].shape == (1, 3, 8, 8)


def test_padding_is_cut_from_answers_and_progress(models: dict[str, Model]) -> None:
    """From every output that is an image, and from no other."""

    async def run(_model: Model, _submit: Any, inputs: Inputs, _options: Options) -> Result:
        images = np.arange(96, dtype=np.float32).reshape(1, 1, 8, 12)
        assert inputs.observe is not None
        inputs.observe(Result({"images": images}, {"step": 1}, Trip((), 0.0, 0.0)))
        return Result({"images": images, "figure": np.ones((1, 12), np.float32)}, {}, Trip((), 0.0, 0.0))

    known = {"name": "any", "summary": "", "description": "", "options": Options, "run": run, "inputs": ()}
    operation = Operation(**known, outputs=(MEANS,), row_wise=True, example={}, answer={})  # type: ignore[arg-type]
    seen: list[Result] = []
    inputs = Inputs(np.zeros((1, 0), np.float32), size=(7, 9), observe=seen.append)
    result = asyncio.run(operation.perform(models["free"], Engine(max_rows=1, queue_rows=1).submit, inputs, Options()))
    expected = np.arange(96, dtype=np.float32).reshape(1, 1, 8, 12)[..., :7, :9]
    for found in (result, *seen):
        np.testing.assert_array_equal(found.outputs["images"], expected)
    assert result.outputs["figure"].shape == (1, 12)
    assert len(seen) == 1


def test_an_unknown_level_is_estimated_first(models: dict[str, Model]) -> None:
    """Then the answer is the one for that level told, at any size, and cut."""
    y = np.random.default_rng(0).random((2, 3, 24, 16), np.float32)
    (found,) = performed(models["free"], denoise, (Inputs(y, size=(21, 13)), DenoiseOptions()))
    level = np.square(y).mean((1, 2, 3))
    np.testing.assert_allclose(found.about["level"], level, rtol=1e-5)
    for k in range(2):
        one = Inputs(y[k : k + 1], size=(21, 13)), DenoiseOptions(level=float(found.about["level"][k]))
        np.testing.assert_allclose(
            performed(models["free"], denoise, one)[0].outputs["images"], found.outputs["images"][k : k + 1], atol=1e-6
        )
    assert found.outputs["images"].shape == (2, 3, 21, 13)


def test_an_unmasked_observation_is_not_copied(models: dict[str, Model]) -> None:
    """It is the image as it was sent, and a mask of one number."""
    y = np.zeros((1, 3, 64, 64), np.uint8)
    seen = observed(models["free"], Inputs(y), "gaussian", "auto")  # type: ignore[arg-type]
    assert seen.y is y
    assert seen.mask.shape == y.shape
    assert not any(seen.mask.strides)
    mask = np.zeros(y.shape, np.float32)
    assert observed(models["free"], Inputs(y + np.uint8(9), mask), None, "auto").y.dtype == np.uint8  # type: ignore[arg-type]


def test_small_images_of_any_size_are_enlarged(models: dict[str, Model]) -> None:
    """The block means of the answer are what was sent."""
    sent = 0.4 + 0.2 * np.random.default_rng(0).random((1, 3, 6, 4), np.float32)
    inputs = Inputs(sent, size=(11, 8))
    (found,) = performed(models["free"], super_resolve, (inputs, SuperResolveOptions(factor=2)))
    assert found.outputs["images"].shape == (1, 3, 11, 8)
    blurred = found.outputs["images"][..., :10, :].reshape(1, 3, 5, 2, 4, 2).mean((3, 5))
    np.testing.assert_allclose(blurred, sent[..., :5, :], atol=0.02)


def test_an_operator_on_a_huge_image_is_refused(models: dict[str, Model]) -> None:
    """Before its matrices are made, which would be larger than the image."""
    request = Inputs(np.zeros((1, 3, 8, 4096), np.float32)), DenoiseOptions(blur=1.0)
    with pytest.raises(TooLarge, match="at most 1024 x 1024, not 8 x 4096"):
        performed(models["free"], denoise, request)


def test_nothing_seen_of_any_size_is_noted(models: dict[str, Model]) -> None:
    """The answer is the model's own, because the mean of its prior would take many images of that size."""
    y = np.zeros((1, 3, 8, 8), np.float32)
    inputs = Inputs(y, np.zeros_like(y), size=(8, 8))
    (found,) = performed(models["free"], denoise, (inputs, DenoiseOptions(noise="none")))
    (note,) = found.about["notes"]
    assert note["code"] == "nothing_seen"
    assert "without any observation" in note["detail"]


def test_padded_images_are_not_scored(models: dict[str, Model]) -> None:
    """Padding would count; the message names what to crop to. Other images have no percentile of another size."""
    model, rows = models["free"], np.full((1, 3, 24, 16), 0.5, np.float32)
    assert score.check is not None
    with pytest.raises(InvalidShape, match=r"21 x 13 cannot be scored.* multiples of 4 that are at least 8"):
        score.check(model, Inputs(rows, size=(21, 13)), ScoreOptions())
    score.check(model, Inputs(rows, size=(24, 16)), ScoreOptions())
    (found,) = performed(model, score, (Inputs(rows, size=(24, 16)), ScoreOptions(seed=1)))
    assert "percentile" not in found.outputs


@pytest.mark.parametrize("operation", [reconstruct, denoise])
def test_large_images_are_worked_off_in_tiles(models: dict[str, Model], operation: Operation) -> None:
    """With the answer of the whole image, for floats and levels alike; what needs whole images refuses them."""
    model, levels = models["free"], np.random.default_rng(0).integers(0, 256, (1, 3, 96, 80), np.uint8)
    rows = levels.astype(np.float32) / np.float32(255.0)
    (whole,) = performed(model, operation, (Inputs(rows, size=(95, 77)), operation.options()))
    for sent in (rows, levels):
        request = Inputs(sent, size=(95, 77)), operation.options()  # type: ignore[arg-type]
        (tiled,) = performed(model, operation, request, tile_pixels=64**2)
        assert tiled.trip.tiled
        close = {"atol": 1e-4} if operation is reconstruct else {"atol": 0.02}  # a level is the median of the tiles'
        np.testing.assert_allclose(tiled.outputs["images"], whole.outputs["images"], **close)
    with pytest.raises(TooLarge, match="send a smaller one"):
        performed(model, score, (Inputs(rows, size=(96, 80)), ScoreOptions()), tile_pixels=64**2)


def test_every_kind_is_warmed_up(folder: Path, models: dict[str, Model]) -> None:
    """Each operation that it offers submits a program, at the size of its golden rows."""
    for name, model in models.items():
        offered = [operation for operation in OPERATIONS if operation.offered_by(model)]
        with open_version(folder / name / "1") as version:
            golden = version.golden[0]
        for operation in offered:
            assert list(warm_up(model, golden, (operation,))), (name, operation.name)
