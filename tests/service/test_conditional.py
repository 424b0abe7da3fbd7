"""Conditional models: one graph restores, another draws, a third tells the noise. All are Gaussian and known."""

from __future__ import annotations

import asyncio
import io
import json
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from numpy.typing import NDArray
from PIL import Image

from service.api.memory import answer_bytes
from service.app import create_app
from service.contract.calibration import widened
from service.contract.corruption import Blocks, operator_of, projected
from service.contract.manifest import Calibration, Curve
from service.operations.denoise import DenoiseOptions
from service.operations.inference.conditional import BEGUN, TURNS, restoration_rows, turned_rows
from service.operations.inference.levels import PARTS, SIDE
from service.repository.repository import Repository
from service.settings import Settings
from tests.support.versions import MIDDLE, OF_LATENTS, SPREAD, conditional_version, ladder_version, opened

Rows = NDArray[np.float32]
JSON, NPY, PNG = "application/json", "application/x-npy", "image/png"
SIZE = (21, 37)
"""Height and width of images that must be padded."""
SIGMA = 0.1


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """`pictures` with all its graphs, `mean` with `restoration` alone, and a ladder that is not conditional."""
    folder = tmp_path_factory.mktemp("conditional")
    pictures = opened(conditional_version(folder / "pictures" / "1"))
    mean = opened(conditional_version(folder / "mean" / "1", channels=(1,), graphs=("restoration",)))
    ladder = opened(ladder_version(folder / "ladder" / "1"))
    return Repository({"pictures": {"1": pictures}, "mean": {"1": mean}, "ladder": {"1": ladder}}, "pictures")


@pytest.fixture(scope="module")
def app(repository: Repository) -> FastAPI:
    """Images of more than 100 x 100 pixels are worked off in tiles."""
    return create_app(Settings(tile_pixels=10_000), repository)


def sent(app: FastAPI, path: str, **request: Any) -> httpx.Response:
    async def scenario() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as client:
            return await client.post(f"/v1/{path}", **request)

    return asyncio.run(scenario())


def asked(app: FastAPI, path: str, y: Rows, **options: Any) -> dict[str, Any]:
    """A JSON answer, its lists of numbers as arrays."""
    answer = sent(app, path, json={"images": y.tolist(), **options})
    assert answer.status_code == 200, answer.text
    arrays = ("images", "std", "completions", "mean", "log_var", "latents")
    return {key: np.asarray(value, np.float32) if key in arrays else value for key, value in answer.json().items()}


def refused(app: FastAPI, path: str, y: Rows, **options: Any) -> str:
    answer = sent(app, path, json={"images": y.tolist(), **options})
    assert answer.status_code == 422, answer.text
    return str(answer.json()["detail"])


def drawn(rows: int = 2, channels: int = 3, size: tuple[int, int] = SIZE, seed: int = 0) -> Rows:
    """Images of the model's own prior, but for the values that lie outside [0, 1]."""
    x = np.random.default_rng(seed).normal(MIDDLE, SPREAD**0.5, (rows, channels, *size))
    return np.clip(x, 0.0, 1.0).astype(np.float32)


def noisy(x: Rows, sigma: float = SIGMA) -> Rows:
    return (x + sigma * np.random.default_rng(9).standard_normal(x.shape)).astype(np.float32)


def posterior(y: Rows, sigma: float, mask: Any = 1.0) -> tuple[Rows, Rows]:
    """Mean and variance of pixels that are N(MIDDLE, SPREAD), seen with noise as parts 1 / mask of a mean."""
    gain = mask * SPREAD / (mask * SPREAD + sigma**2 + 1e-9)
    return np.asarray(MIDDLE + gain * (y - MIDDLE)), np.asarray(SPREAD * (1.0 - mask * gain) + 0.0 * y)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_noisy_image_becomes_its_posterior_mean(app: FastAPI, channels: int) -> None:
    """By the closed form, of grey and colour; its deviation too, and a level that is told is the answer's."""
    y = noisy(drawn(channels=channels))
    found = asked(app, "denoise", y, level=SIGMA, uncertainty=True)
    mean, variance = posterior(y, SIGMA)
    np.testing.assert_allclose(found["images"], mean, atol=1e-5)
    np.testing.assert_allclose(found["std"], np.sqrt(variance), atol=1e-5)
    assert found["level"] == pytest.approx([SIGMA, SIGMA])
    assert "noise" not in found


def test_all_noise_is_estimated_together(app: FastAPI) -> None:
    """By default: the level of a flat image is found, the kind is the louder one, and the answer is that of both."""
    y = noisy(np.full((2, 3, 64, 64), 0.4, np.float32))
    found = asked(app, "denoise", y)
    level = np.sqrt(np.square(np.diff(y, axis=-1)).mean((1, 2, 3)) / 2.0)
    assert found["level"] == pytest.approx(level, rel=1e-5)
    assert found["level"] == pytest.approx([SIGMA, SIGMA], rel=0.05)
    assert found["noise"] == ["gaussian", "gaussian"]
    np.testing.assert_allclose(found["images"], posterior(y, level[:, None, None, None])[0], atol=1e-5)
    assert asked(app, "denoise", y, noise="auto")["level"] == found["level"]
    named = asked(app, "denoise", y, noise="processed")
    assert named["level"] == pytest.approx(level, rel=1e-5)
    assert "noise" not in named


def test_the_kind_of_noise_is_in_the_headers(app: FastAPI) -> None:
    """Where the answer is a picture, which has no other fields; an image without noise has the kind none."""
    y = (255 * noisy(np.full((1, 1, 64, 64), 0.4, np.float32)).clip(0, 1)).astype(np.uint8)
    for levels, kind in ((y, "gaussian"), (np.full_like(y, 7), "none")):
        file = io.BytesIO()
        Image.fromarray(levels[0, 0]).save(file, "PNG")
        answer = sent(app, "denoise", content=file.getvalue(), headers={"content-type": PNG, "accept": PNG})
        assert answer.headers["x-noise"] == kind
        assert "x-note" not in answer.headers


def test_deviations_are_calibrated_by_curves(repository: Repository) -> None:
    """With the factor at the level of the image; the images stay."""
    model = repository.models["pictures"]["1"]
    curve = Curve(levels=[0.0, 0.2], factors=[1.0, 2.0])
    calibration = Calibration(factors={}, curves={"fast": {"gaussian": curve}}, images=1, seed=0)
    one = replace(model, manifest=model.manifest.model_copy(update={"calibration": calibration}))
    y = noisy(drawn(channels=1))
    plain, wide = (
        asked(
            create_app(Settings(), Repository({"one": {"1": of}}, "one")), "denoise", y, level=SIGMA, uncertainty=True
        )
        for of in (model, one)
    )
    np.testing.assert_array_equal(plain["images"], wide["images"])
    np.testing.assert_allclose(wide["std"], widened(plain["std"], np.float32(1.5)), rtol=1e-4)


def test_draws_follow_the_posterior(app: FastAPI) -> None:
    """Their mean is the answer, their spread and what is left make up the variance, and one seed repeats them."""
    y = noisy(drawn(rows=1))
    asking = {"level": SIGMA, "draws": 64, "completions": True, "uncertainty": True, "seed": 3}
    found = asked(app, "denoise", y, **asking)
    mean, variance = posterior(y, SIGMA)
    np.testing.assert_allclose(found["images"], found["completions"].mean(1), atol=1e-5)
    np.testing.assert_allclose(found["images"], mean, atol=5 * np.sqrt(OF_LATENTS * variance.max() / 64))
    expected = (1 - OF_LATENTS) * variance + found["completions"].var(1)
    np.testing.assert_allclose(np.square(found["std"]), expected, rtol=1e-3)
    assert np.square(found["std"]).mean() == pytest.approx(variance.mean(), rel=0.1)
    again = asked(app, "denoise", y, **{**asking, "draws": 2})
    np.testing.assert_array_equal(again["completions"], found["completions"][:, :2])


def test_missing_pixels_have_the_prior_and_seen_ones_stay(app: FastAPI) -> None:
    """Without noise; beside a plain image in one request."""
    y, mask = drawn(), np.ones((2, *SIZE), np.float32)
    mask[0, 5:9, 3:30] = 0.0
    found = asked(app, "inpaint", y, mask=mask.tolist(), uncertainty=True)
    hidden = np.broadcast_to(mask[:, None] == 0, y.shape)
    np.testing.assert_allclose(found["images"][~hidden], y[~hidden], atol=1e-6)
    np.testing.assert_allclose(found["images"][hidden], MIDDLE, atol=1e-6)
    np.testing.assert_allclose(found["std"][hidden], SPREAD**0.5, atol=1e-6)


@pytest.mark.parametrize("factor", [2, 3, 16])
def test_means_of_blocks_are_kept(app: FastAPI, factor: int) -> None:
    """The answer and every completion has the block means that were sent, its deviation is exact, of any size."""
    y = drawn(rows=1, size=(7, 11))
    found = asked(app, f"super-resolve?factor={factor}", y, uncertainty=True)
    assert found["images"].shape == (1, 3, factor * 7, factor * 11)
    np.testing.assert_allclose(Blocks(factor, factor**-2).seen(found["images"]), y, atol=1e-4)
    np.testing.assert_allclose(found["std"], np.sqrt(SPREAD * (1 - factor**-2)), atol=1e-4)
    inner = np.clip(y, 0.3, 0.7)  # so that no draw is cut to [0, 1]
    draws = asked(app, f"super-resolve?factor={factor}", inner, draws=2, completions=True, seed=1)["completions"]
    assert draws[:, 0].std() > 0.01
    means = Blocks(factor, factor**-2).seen(draws)
    inside = Blocks(factor, 1.0).seen((draws <= 0) | (draws >= 1)) == 0
    np.testing.assert_allclose(np.where(inside, means, 0), np.where(inside, inner[:, None], 0), atol=3e-3)


def test_means_of_blocks_with_noise_are_not_used_twice(app: FastAPI) -> None:
    """The answer is the posterior mean, which differs from what was sent."""
    y = drawn(rows=1)
    found = asked(app, "super-resolve?factor=2", y, level=0.1)
    mean, _ = posterior(y, 0.1, 0.25)
    np.testing.assert_allclose(found["images"], np.repeat(np.repeat(mean, 2, 2), 2, 3), atol=1e-5)


def test_an_answer_that_misses_the_means_is_mended_where_they_have_no_noise() -> None:
    """Of a graph that always answers grey: without noise its block means are those that were sent, with noise grey."""

    def grey(y: Rows, _mask: Rows, _level: Rows) -> tuple[Rows, ...]:
        return np.full_like(y, 0.5), np.full_like(y, 0.01), y

    y = np.random.default_rng(0).uniform(0.3, 0.7, (2, 1, 4, 6)).astype(np.float32)
    level = np.array([[0.0, 0.0], [0.0, 0.1]], np.float32)
    compute = restoration_rows({"restoration": grey}, ("shrink", 2, 0, 0), uncertainty=False, completions=False)
    (found,) = compute(y, np.ones_like(y), level)
    np.testing.assert_allclose(Blocks(2, 0.25).seen(found[:1]), y[:1], atol=1e-3)
    np.testing.assert_array_equal(found[1], 0.5)


def test_a_picture_of_24_megapixels_fits_the_budget(repository: Repository) -> None:
    """Its answer is levels, and no latents are drawn."""
    model = repository.models["pictures"]["1"].variants[3]
    estimate = answer_bytes(model, DenoiseOptions(), 1, (4000, 6000), levels="uint8")
    pixels = 3 * 4000 * 6000
    assert estimate + 2 * pixels < 0.9 * Settings().memory_bytes
    assert answer_bytes(model, DenoiseOptions(draws=1), 1, (4000, 6000), levels="uint8") > estimate


def test_a_conditional_model_refines_without_drawing_latents(repository: Repository) -> None:
    """Refining needs no more memory than one pass, which it repeats."""
    model = repository.models["pictures"]["1"].variants[1]
    fast, refined = DenoiseOptions(quality="fast"), DenoiseOptions(quality="refined")
    assert answer_bytes(model, refined, 1, (512, 512)) == answer_bytes(model, fast, 1, (512, 512))


def test_means_of_blocks_need_no_matrices() -> None:
    """What `Blocks` computes is what the matrices of the operator compute, and one step solves it."""
    rng = np.random.default_rng(0)
    x, variance = rng.random((2, 3, 12, 8), np.float32), 0.01 + rng.random((2, 3, 12, 8), np.float32)
    y, noise = rng.random((2, 3, 3, 2), np.float32), np.full((2, 1, 1, 1), 0.01, np.float32)
    mask = (rng.random(y.shape) < 0.7).astype(np.float32)
    blocks, matrices = Blocks(4, 1 / 16), operator_of(("shrink", 4, 12, 8))
    for found, known in zip(blocks.lifted(y, mask), matrices.lifted(y, mask), strict=True):
        np.testing.assert_allclose(found, known, rtol=1e-5)
    for found, known in zip(
        projected(blocks, x, variance, y, mask, noise), projected(matrices, x, variance, y, mask, noise), strict=True
    ):
        np.testing.assert_allclose(found, known, atol=1e-5)


@pytest.mark.parametrize("path", ["denoise?level=0.1", "inpaint", "super-resolve?factor=3&level=0.05"])
def test_tiles_make_the_answer_of_the_whole(repository: Repository, app: FastAPI, path: str) -> None:
    """As floats and as levels of 8 bits; with draws, whose noise is that of the whole image."""
    levels = (255 * drawn(1, 3, (83, 119))).astype(np.uint8)
    mask = np.ones((83, 119), np.uint8)
    mask[20:60, 30:90] = 0
    whole = create_app(Settings(), repository)
    file, hole = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.moveaxis(levels[0], 0, -1)).save(file, "PNG")
    Image.fromarray(255 * mask).save(hole, "PNG")
    files = {"file": file.getvalue(), "mask": hole.getvalue()} if path == "inpaint" else {"file": file.getvalue()}
    joint = "&" if "?" in path else "?"
    for drawing in ("", f"{joint}draws=2&seed=4"):
        one, other = (sent(of, path + drawing, files=files, headers={"accept": NPY}) for of in (whole, app))
        assert one.status_code == other.status_code == 200, other.text
        expected = np.load(io.BytesIO(one.content))
        np.testing.assert_allclose(np.load(io.BytesIO(other.content)), expected, atol=2e-3 if drawing else 1e-5)
    picture = sent(app, path, files=files, headers={"accept": PNG})
    with Image.open(io.BytesIO(picture.content)) as image:
        found = np.moveaxis(np.asarray(image), -1, 0)
    plain = np.load(io.BytesIO(sent(whole, path, files=files, headers={"accept": NPY}).content))
    assert np.abs(found - 255.0 * plain[0].clip(0, 1)).max() <= 0.51


def test_a_large_image_has_one_level_from_some_of_its_parts(app: FastAPI) -> None:
    """Of more than 4 x 4 parts: the median of these, whatever lies between them and in one of them."""
    side = PARTS * SIDE
    y = np.full((1, 1, side, side + 64), 0.4, np.float32)
    y += np.float32(SIGMA) * np.random.default_rng(0).standard_normal(y.shape).astype(np.float32)
    gap = SIDE + 2
    y[..., gap : gap + 8] = np.random.default_rng(1).random((1, 1, side, 8), np.float32)  # between two parts
    y[..., :SIDE, :SIDE] = 0.0
    file = io.BytesIO()
    np.save(file, y)
    headers = {"content-type": NPY, "accept": NPY}
    answer = sent(app, "denoise", content=file.getvalue(), headers=headers)
    assert float(answer.headers["x-level"]) == pytest.approx(SIGMA, rel=0.01)
    expected, _ = posterior(y, float(answer.headers["x-level"]))
    np.testing.assert_allclose(np.load(io.BytesIO(answer.content)), expected, atol=1e-3)


def test_every_turn_is_turned_back() -> None:
    """Of a graph that answers with its input, the answer is the input; the graph sees eight different images."""
    shown: list[Rows] = []

    def graph(y: Rows, mask: Rows, _level: Rows) -> tuple[Rows, ...]:
        shown.append(y)
        return y, mask, y

    y = np.arange(12, dtype=np.float32).reshape(1, 1, 3, 4)
    for turn in range(TURNS):
        restored, mask = turned_rows({"restoration": graph}, turn)(y, -y, np.zeros((1, 1), np.float32))
        np.testing.assert_array_equal(restored, y)
        np.testing.assert_array_equal(mask, -y)
    assert len({one.tobytes() + str(one.shape).encode() for one in shown}) == TURNS


def test_refined_is_the_mean_over_turns_or_splitting(app: FastAPI) -> None:
    """Plain noise: a graph that turns do not change gives what `fast` gives. A mask: seen pixels stay."""
    y = noisy(drawn(rows=1))
    fast, refined = (asked(app, "denoise", y, level=SIGMA, quality=quality) for quality in ("fast", "refined"))
    np.testing.assert_allclose(refined["images"], fast["images"], atol=1e-6)
    x, mask = drawn(rows=1), np.ones(SIZE, np.float32)
    mask[4:9, 5:20] = 0.0
    found = asked(app, "inpaint", x, mask=mask.tolist(), quality="refined")["images"]
    seen = np.broadcast_to(mask == 1, x.shape)
    np.testing.assert_allclose(found[seen], x[seen], atol=2e-3)
    np.testing.assert_allclose(found[~seen], MIDDLE, atol=0.02)


@pytest.mark.parametrize("quality", ["fast", "refined"])
def test_a_blurred_image_becomes_sharp(app: FastAPI, quality: str) -> None:
    """Blurred again it is what was sent, without noise; draws are refused."""
    smooth = np.linspace(0.3, 0.7, 40, dtype=np.float32) * np.ones((1, 1, 40, 1), np.float32)
    smooth[..., 12:20, 15:25] += 0.1
    blur = operator_of(("blur", 1.0, 40, 40))
    y = blur.seen(smooth)
    found = asked(app, "denoise", y, blur=1.0, noise="none", quality=quality)["images"]
    assert np.abs(blur.seen(found) - y).max() < 0.01
    assert np.abs(found - smooth).mean() < np.abs(y - smooth).mean()
    assert "behind a blur" in refused(app, "denoise", y, blur=1.0, draws=2)


def test_steps_and_tiles_are_reported(app: FastAPI) -> None:
    """Of refined work every step, with a preview; of an image in tiles every tile."""

    def events(path: str, y: Rows) -> list[dict[str, Any]]:
        answer = sent(app, path, json={"images": y.tolist()}, headers={"accept": "application/x-ndjson"})
        return [json.loads(line) for line in answer.text.splitlines()]

    found = events("denoise?level=0.1&quality=refined&preview=true", drawn(1, 1))
    assert [one["event"] for one in found][-1] == "answer"
    assert found[-2]["step"] == found[-2]["steps"]
    np.testing.assert_allclose(found[-2]["images"], found[-1]["images"], atol=1e-6)
    y, hole = drawn(1, 1), np.ones(SIZE)
    hole[4:9, 5:20] = 0.0
    answer = sent(
        app, "inpaint", json={"images": y.tolist(), "mask": hole.tolist()}, headers={"accept": "application/x-ndjson"}
    )
    assert json.loads(answer.text.splitlines()[-2])["steps"] == BEGUN.fast
    tiled = events("denoise?level=0.1", drawn(1, 1, (150, 90)))
    assert tiled[-2]["tile"] == tiled[-2]["tiles"] > 1


def test_encode_gives_the_latents_of_a_noisy_image(app: FastAPI) -> None:
    """p(z|y) at noise 0, and draws of it."""
    y = drawn(2, 1, (16, 24))
    found = asked(app, "encode", y, level=SIGMA, draws=3, seed=1)
    blocks = Blocks(8, 1 / 64).seen(y)
    np.testing.assert_allclose(found["mean"], np.concatenate([blocks, blocks], 1), atol=1e-6)
    np.testing.assert_allclose(found["log_var"], np.log(0.25), atol=1e-6)
    assert found["latents"].shape == (2, 3, 2, 2, 3)
    np.testing.assert_allclose(found["latents"].mean((1, 2, 3, 4)), found["mean"].mean((1, 2, 3)), atol=0.5)
    assert "encodes clean images" in refused(app, "models/ladder/encode", np.zeros((1, 1, 4, 6), np.float32), level=0.1)


@pytest.mark.parametrize(
    ("path", "options", "says"),
    [
        ("denoise", {"noise": "poisson", "level": 0.1}, "of the kinds gaussian, processed and none"),
        ("denoise", {"noise": "auto", "level": 0.1}, "a level is that of one kind of noise"),
        ("denoise", {"blur": 1.0, "noise": "processed"}, "after a blur it must be gaussian or none"),
        ("denoise", {"draws": 2, "quality": "refined", "level": 0.1}, "draws with quality=fast alone"),
        ("models/mean/denoise", {"draws": 2, "level": 0.1}, "gives the mean alone"),
        ("models/mean/denoise", {}, "does not estimate the level of gaussian noise alone; name level"),
        ("models/mean/denoise", {"noise": "auto"}, "does not tell kinds of noise apart"),
        ("models/mean/encode", {}, "a model of images given a corrupted one"),
        ("reconstruct", {}, "a model of images given a corrupted one"),
        ("score", {}, "served models that can: ladder"),
    ],
)
def test_what_a_conditional_model_cannot_do_is_refused(
    app: FastAPI, path: str, options: dict[str, Any], says: str
) -> None:
    """With the reason, and what works."""
    path = path if "/" in path else f"models/pictures/{path}"
    assert says in refused(app, path, drawn(1, 1, (16, 16)), **options)


@pytest.mark.parametrize("operation", ["sample", "traverse", "decode"])
def test_it_makes_no_images_of_nothing(app: FastAPI, operation: str) -> None:
    """The refusal names the ladder, which can."""
    content = {"json": {"latents": np.zeros((1, 2, 2, 2)).tolist()}} if operation == "decode" else {}
    answer = sent(app, f"models/pictures/{operation}", **content)
    assert answer.status_code == 422
    assert "p(x|y)" in answer.json()["detail"]
    assert "ladder" in answer.json()["detail"]
