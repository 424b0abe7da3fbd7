"""Refinement, inpainting and super-resolution, against the graphs run by hand."""

from __future__ import annotations

import asyncio
import base64
import io
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from numpy.typing import NDArray
from PIL import Image

from service.app import create_app
from service.contract.corruption import Observation, Operator, operator_of, projected
from service.operations.inference.latent import Noise, standard_normal
from service.operations.inference.refinement import RATE, REFINEMENT_STREAM, STEPS
from service.operations.inference.restoration import RestoreChoices, restore
from service.operations.inference.vae import Result
from service.repository.repository import Repository
from service.runtime.batcher import Batcher
from service.runtime.model import Model
from service.settings import Settings

Rows = NDArray[np.float32]
Graphs = dict[str, Callable[..., tuple[Rows, ...]]]
JSON = "application/json"
REFINED = RestoreChoices(refined=True, draws=0, uncertainty=True, completions=False)


def post(client: httpx.Client, path: str, **request: Any) -> httpx.Response:
    answer = client.post(path, **request)
    assert answer.status_code == 200, answer.text
    return answer


def numbers(answer: httpx.Response, name: str = "images") -> Rows:
    return np.asarray(answer.json()[name], np.float32)


def noisy(images: Rows, sigma: float = 0.2) -> Rows:
    return (images + sigma * np.random.default_rng(1).standard_normal(images.shape)).astype(np.float32)


def observation(y: Rows, sigma: float = 0.2, *, known: bool = True) -> Observation:
    level = np.zeros((len(y), 4), np.float32)
    level[:, 0] = sigma if known else 0.0
    return Observation(y, np.ones_like(y), level, 0, known)


def by_hand(graphs: Graphs, y: Rows, sigma: float, seed: int) -> Rows:
    """Adam as the textbook has it, one image at a time, in double."""
    level, eye = np.float32([[sigma, 0, 0, 0]]), np.eye(8, dtype=np.float32)[None]
    eps = standard_normal(seed, len(y), (STEPS, 8 + 4), stream=REFINEMENT_STREAM)
    restored = []
    for row in range(len(y)):
        one, mask = y[row : row + 1], np.ones((1, 1, 8, 8), np.float32)
        q = np.zeros((2, 12))
        q[:, :8] = np.concatenate(graphs["recognition"](one, mask, level))
        q[1, 8:] = math.log(0.01)
        first = second = np.zeros_like(q)
        for t in range(STEPS):
            mean, log_var = np.float32(q)[:, None]
            noise = eps[row : row + 1, t]
            given = (mean, log_var, noise, one, mask, level, np.zeros_like(level), eye, eye)
            gradient = np.concatenate(graphs["refinement"](*given)[2:])
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            rate = RATE * 0.5 * (1 + math.cos(math.pi * t / STEPS))
            q = q + rate * (first / (1 - 0.9 ** (t + 1))) / (np.sqrt(second / (1 - 0.999 ** (t + 1))) + 1e-8)
        decoded = graphs["decoder"](np.float32(q[:1, :8]))[0]
        fused = graphs["fusion"](decoded, one, mask, level)
        restored.append(graphs["correction"](*fused, one, mask, level)[0][0])
    return np.stack(restored)


def test_refined_denoising_is_adam_on_the_bound(client: httpx.Client, images: Rows, graphs: Graphs) -> None:
    """As an independent loop finds it, unless a row comes to rest before; the seed is named, the bound is told."""
    y = noisy(images)
    request = {"content": y.tobytes(), "headers": {"content-type": "application/octet-stream"}}
    path = "/v1/denoise?level=0.2&quality=refined&seed=4"
    answer = client.post(path, **request)  # type: ignore[arg-type]
    restored = np.frombuffer(answer.content, np.float32).reshape(images.shape)
    assert answer.headers["x-seed"] == "4"
    assert np.abs(restored - by_hand(graphs, y, 0.2, 4)).max() < 0.02
    assert answer.content == client.post(path, **request).content  # type: ignore[arg-type]


def test_the_seed_that_is_named_repeats_steps_and_draws(client: httpx.Client, images: Rows) -> None:
    """Of a refined answer that asked for draws and named no seed."""
    request = {"images": noisy(images).tolist(), "level": 0.2, "quality": "refined", "draws": 3}
    first = post(client, "/v1/denoise", json=request).json()
    again = post(client, "/v1/denoise", json={**request, "seed": first["seed"]}).json()
    assert again["images"] == first["images"]


def run(model: Model, *requests: tuple[Observation, RestoreChoices, int]) -> list[Result]:
    """Side by side through one batcher."""

    async def scenario() -> list[Result]:
        engine = Batcher(max_rows=8, queue_rows=4096)
        try:
            jobs = [restore(model, engine.submit, seen, choices, Noise(seed)) for seen, choices, seed in requests]
            return await asyncio.gather(*jobs)
        finally:
            await engine.close()

    return asyncio.run(scenario())


def test_refinement_never_depends_on_batch_mates(model: Model, images: Rows) -> None:
    """To the byte, alone, beside others at other steps and levels, and one row at a time."""
    y = noisy(images)
    mine = (observation(y), REFINED, 3)
    (alone,) = run(model, mine)
    others = [(observation(noisy(images[:k], 0.1), 0.1, known=k > 1), REFINED, k) for k in (1, 2, 3)]
    beside = run(model, *others, mine)[-1]
    for name, array in alone.outputs.items():
        assert array.tobytes() == beside.outputs[name].tobytes()
    assert alone.about["elbo"].tobytes() == beside.about["elbo"].tobytes()
    first = run(model, (observation(y[:1]), REFINED, 3))[0]
    assert first.outputs["images"].tobytes() == alone.outputs["images"][:1].tobytes()


def test_refinement_raises_the_bound(model: Model, graphs: Graphs, images: Rows) -> None:
    """Of every image, above where recognition starts it."""
    y = noisy(images)
    level, eye = np.float32([[0.2, 0, 0, 0]] * 3), np.eye(8, dtype=np.float32)[None].repeat(3, 0)
    mask, zeros = np.ones_like(y), np.zeros((3, 4), np.float32)
    mean, log_var = (np.concatenate([part, zeros], 1) for part in graphs["recognition"](y, mask, level))
    rest = (y, mask, level, zeros, eye, eye)
    start = [graphs["refinement"](mean, log_var, standard_normal(k, 3, (12,)), *rest)[0] for k in range(64)]
    (result,) = run(model, (observation(y), REFINED, 0))
    assert (result.about["elbo"] > np.mean(start, 0)).all()


def test_an_unknown_level_is_inferred_with_the_image(model: Model, images: Rows) -> None:
    """From noise of a known standard deviation on digits it comes out nearer than a factor of two, and is told."""
    (result,) = run(model, (observation(noisy(images, 0.3), known=False), REFINED, 0))
    assert result.about["level"].shape == (3,)
    assert np.all((result.about["level"] > 0.15) & (result.about["level"] < 0.6))


def test_refinement_stops_when_its_time_is_up(client: httpx.Client, images: Rows) -> None:
    """Between slices: the caller is told, and nothing more is computed."""
    answer = client.post(
        "/v1/denoise?level=0.2&quality=refined",
        json={"images": noisy(images).tolist()},
        headers={"x-timeout-ms": "1"},
    )
    assert answer.status_code == 504
    assert answer.json()["code"] == "deadline_passed"


def test_projection_is_bayes_rule() -> None:
    """E[x | y] and, where blocks do not overlap, Var[x | y], as dense linear algebra gives them."""
    rng = np.random.default_rng(0)
    operator = operator_of(("shrink", 2, 6, 4))
    x_mean = rng.uniform(0.3, 0.7, (2, 1, 6, 4)).astype(np.float32)
    variance = rng.uniform(0.001, 0.01, x_mean.shape).astype(np.float32)
    y = operator.seen(x_mean) + np.float32(0.05) * rng.standard_normal((2, 1, 3, 2)).astype(np.float32)
    noise = np.full((2, 1, 1, 1), 0.01, np.float32)
    mean, left = projected(operator, x_mean, variance, y, np.ones_like(y), noise)
    matrix = np.kron(operator.rows, operator.columns).astype(np.float64)
    for row in range(2):
        prior = np.diag(variance[row].ravel().astype(np.float64))
        gain = prior @ matrix.T @ np.linalg.inv(matrix @ prior @ matrix.T + 0.01 * np.eye(6))
        expected = x_mean[row].ravel() + gain @ (y[row].ravel() - matrix @ x_mean[row].ravel())
        np.testing.assert_allclose(mean[row].ravel(), expected, atol=1e-5)
        np.testing.assert_allclose(left[row].ravel(), np.diag(prior - gain @ matrix @ prior), atol=1e-6)


@pytest.mark.parametrize("deviation", [5e-324, 1e-300, 1e-3])
def test_the_sharpest_blur_sees_every_pixel_alone(deviation: float) -> None:
    """Also where dividing by its deviation would overflow, which numpy warns of."""
    operator = operator_of(("blur", deviation, 6, 5))
    np.testing.assert_array_equal(operator.rows, np.eye(6))
    np.testing.assert_array_equal(operator.columns, np.eye(5))


def test_projection_through_a_blur_is_bayes_rule_too() -> None:
    """Where what is seen overlaps, and some of it is missing, the mean is still exact."""
    rng = np.random.default_rng(1)
    blur = np.float32([[0.5, 0.5, 0, 0], [0.25, 0.5, 0.25, 0], [0, 0.25, 0.5, 0.25], [0, 0, 0.5, 0.5]])
    operator = Operator(blur, blur)
    x_mean = np.full((1, 1, 4, 4), 0.5, np.float32)
    variance = rng.uniform(0.001, 0.01, x_mean.shape).astype(np.float32)
    y = operator.seen(x_mean) + np.float32(0.05) * rng.standard_normal(x_mean.shape).astype(np.float32)
    mask = np.ones_like(y)
    mask[..., 1, 2] = mask[..., 3, 0] = 0.0
    mean, _ = projected(operator, x_mean, variance, y, mask, np.full((1, 1, 1, 1), 0.002, np.float32))
    seen = mask.ravel() > 0
    matrix, y = np.kron(blur, blur).astype(np.float64)[seen], y.ravel()[seen]
    prior = np.diag(variance.ravel().astype(np.float64))
    gain = prior @ matrix.T @ np.linalg.inv(matrix @ prior @ matrix.T + 0.002 * np.eye(14))
    expected = x_mean.ravel() + gain @ (y - matrix @ x_mean.ravel())
    np.testing.assert_allclose(mean.ravel(), expected, atol=1e-5)


def half_seen(image: Rows) -> tuple[bytes, bytes]:
    """A PNG whose lower half is transparent, and the mask as a PNG."""
    alpha = np.zeros((8, 8), np.uint8)
    alpha[:4] = 255
    picture = Image.merge("LA", [Image.fromarray(np.rint(image[0] * 255).astype(np.uint8)), Image.fromarray(alpha)])
    files = []
    for one in (picture, Image.fromarray(alpha)):
        file = io.BytesIO()
        one.save(file, "PNG")
        files.append(file.getvalue())
    return files[0], files[1]


def test_a_mask_comes_in_any_form(client: httpx.Client, images: Rows) -> None:
    """An array, a second picture, or transparency, as a picture and in JSON: one answer, which keeps what was seen."""
    picture, mask = half_seen(images[0])
    rows = np.zeros((8, 8))
    rows[:4] = 1
    accept = {"accept": "application/json"}
    opaque = io.BytesIO()
    Image.fromarray(np.rint(images[0, 0] * 255).astype(np.uint8)).save(opaque, "PNG")
    answers = [
        post(client, "/v1/inpaint", json={"images": images[:1].tolist(), "mask": rows.tolist()}),
        post(client, "/v1/inpaint", content=picture, headers={"content-type": "image/png", **accept}),
        post(client, "/v1/inpaint", json={"images": base64.b64encode(picture).decode()}),
        post(client, "/v1/inpaint", files={"file": picture}, headers=accept),
        post(client, "/v1/inpaint", files={"file": opaque.getvalue(), "mask": mask}, headers=accept),
    ]
    assert len({str(answer.json()["images"]) for answer in answers}) == 1
    assert np.allclose(numbers(answers[0])[..., :4, :], images[:1, :, :4], atol=1e-6)


def test_inpainting_without_a_mask_says_how_to_send_one(client: httpx.Client, images: Rows) -> None:
    """In place of a guess."""
    answer = client.post("/v1/inpaint", json={"images": images.tolist()})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_shape")
    assert "transparency" in answer.json()["detail"]
    wrong = client.post("/v1/inpaint", json={"images": images.tolist(), "mask": [[1, 0], [0, 1]]})
    assert (wrong.status_code, wrong.json()["code"]) == (422, "invalid_shape")


def test_several_completions_are_plausible(client: httpx.Client, images: Rows) -> None:
    """They agree with what is seen, differ elsewhere, and `uncertainty` is largest there."""
    mask = np.zeros((8, 8))
    mask[:4] = 1
    asked = {"mask": mask.tolist(), "draws": 5, "seed": 1, "completions": True, "uncertainty": True}
    answer = post(client, "/v1/inpaint", json={"images": images.tolist(), **asked})
    completions, std = numbers(answer, "completions"), numbers(answer, "std")
    assert completions.shape == (3, 5, 1, 8, 8)
    assert np.allclose(completions[..., :4, :], images[:, None, :, :4], atol=1e-6)
    assert float(completions[..., 4:, :].std(1).mean()) > 0.005
    assert std[..., 4:, :].mean() > 10 * std[..., :4, :].mean()
    refused = client.post("/v1/inpaint", json={"images": images.tolist(), "mask": mask.tolist(), "completions": True})
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_option")


@pytest.mark.parametrize("quality", ["fast", "refined"])
def test_where_nothing_is_seen_the_answer_is_the_priors_mean(
    client: httpx.Client, images: Rows, graphs: Graphs, quality: str
) -> None:
    """And says so; the other images are completed as ever."""
    masks = np.ones((3, 1, 8, 8))
    masks[1] = 0
    answer = post(client, "/v1/inpaint", json={"images": images.tolist(), "mask": masks.tolist(), "quality": quality})
    prior = graphs["decoder"](standard_normal(0, 64, (8,)))[0].mean(0)
    assert np.allclose(numbers(answer)[1], prior, atol=1e-5)
    assert np.allclose(numbers(answer)[0], images[0], atol=1e-6)
    (note,) = answer.json()["notes"]
    assert (note["code"], note["rows"]) == ("nothing_seen", [1])
    assert "mean of the prior" in note["detail"]
    assert answer.headers["x-note"].startswith('nothing_seen;rows="1";detail="the mask hides all')


@pytest.mark.parametrize("quality", ["fast", "refined"])
def test_what_is_enlarged_shrinks_to_what_was_sent(client: httpx.Client, images: Rows, quality: str) -> None:
    """By the mean of every block, for each way to send it."""
    small = images.reshape(3, 1, 4, 2, 4, 2).mean((3, 5))
    path = f"/v1/super-resolve?factor=2&quality={quality}&seed=1"
    answer = post(client, path, json={"images": small.tolist()})
    found = numbers(answer)
    assert found.shape == images.shape
    inside = (found > 0.0) & (found < 1.0)
    shrunk, whole = found.reshape(3, 1, 4, 2, 4, 2).mean((3, 5)), inside.reshape(3, 1, 4, 2, 4, 2).all((3, 5))
    assert whole.any()
    assert np.abs(shrunk - small)[whole].max() < 0.02
    raw = client.post(path, content=small.tobytes(), headers={"content-type": "application/octet-stream"})
    assert np.allclose(np.frombuffer(raw.content, np.float32).reshape(images.shape), found, atol=1e-6)


@pytest.mark.parametrize("quality", ["fast", "refined"])
def test_what_is_sharpened_is_blurred_as_it_was_sent(
    client: httpx.Client, images: Rows, graphs: Graphs, quality: str
) -> None:
    """Through a Gaussian blur the answer is what was sent, closer than what the decoder alone says."""
    blur = operator_of(("blur", 0.8, 8, 8))
    y = blur.seen(images)
    asked = {"images": y.tolist(), "noise": "none", "blur": 0.8, "quality": quality, "seed": 1}
    found = numbers(post(client, "/v1/denoise", json=asked))
    lifted, weights = blur.lifted(y, np.ones_like(y))
    assert np.array_equal(lifted, y)
    assert float(weights.max()) < 0.4
    mean, _ = graphs["recognition"](y, weights, np.zeros((3, 4), np.float32))
    decoded = graphs["decoder"](mean)[0]
    off, decoders = (np.abs(blur.seen(x) - y).mean() for x in (found, decoded))
    assert off < 0.3 * decoders
    refused = client.post("/v1/denoise?noise=masking&level=0.2&blur=1", json={"images": y.tolist()})
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_option")
    assert "gaussian or none" in refused.json()["detail"]


def test_poisson_noise_is_a_family_of_its_own(client: httpx.Client, images: Rows, graphs: Graphs) -> None:
    """Its level is the last column, told or estimated."""
    y, mask = images.clip(0.0, 1.0), np.ones_like(images)
    (estimate,) = graphs["noise_level"](y, mask)
    for told in (0.3, "auto"):
        level = np.zeros((3, 4), np.float32)
        level[:, 3] = estimate[:, 3] if told == "auto" else told
        decoded = graphs["decoder"](graphs["recognition"](y, mask, level)[0])[0]
        restored, _ = graphs["correction"](*graphs["fusion"](decoded, y, mask, level), y, mask, level)
        answer = post(client, "/v1/denoise", json={"images": y.tolist(), "noise": "poisson", "level": told})
        assert np.allclose(numbers(answer), restored, atol=1e-5)
        assert np.allclose(answer.json()["level"], level[:, 3])


def test_a_factor_must_divide(client: httpx.Client, images: Rows) -> None:
    """The message names those that do."""
    answer = client.post("/v1/super-resolve?factor=3", json={"images": images[..., :2, :2].tolist()})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_option")
    assert "2, 4, 8" in answer.json()["detail"]
    wrong = client.post("/v1/super-resolve?factor=4", json={"images": images.tolist()})
    assert (wrong.status_code, wrong.json()["code"]) == (422, "invalid_shape")
    assert "(n, 1, 2, 2)" in wrong.json()["detail"]


def test_the_factor_is_judged_once_the_body_has_named_it(
    model: Model, serve: Callable[[FastAPI], AbstractContextManager[str]]
) -> None:
    """A model of 15 x 9, which the default of 2 does not divide: factor 3 in JSON, a form and the query; and errors."""
    size = (1, 15, 9)
    graphs = {
        **model.graphs,
        "recognition": lambda y, *_: (np.zeros((len(y), 8), np.float32),) * 2,
        "decoder": lambda z: (np.full((len(z), *size), 0.5, np.float32),),
        "fusion": lambda x_mean, *_: (x_mean, np.full_like(x_mean, 0.01)),
        "correction": lambda fused, variance, *_: (fused, variance),
    }
    odd = Model(model.manifest.model_copy(update={"input_shape": list(size)}), graphs)  # type: ignore[arg-type]
    small = np.random.default_rng(0).uniform(0.4, 0.6, (2, 1, 5, 3)).astype(np.float32)
    file = io.BytesIO()
    np.save(file, small)
    npy = {"content": file.getvalue(), "headers": {"content-type": "application/x-npy", "accept": "application/json"}}
    path = "/v1/super-resolve"
    with (
        serve(create_app(Settings(), Repository({"odd": {"1": odd}}, "odd"))) as url,
        httpx.Client(base_url=url) as client,
    ):
        answers = [
            post(client, path, json={"images": small.tolist(), "factor": 3}),
            post(client, path, files={"file": file.getvalue()}, data={"factor": "3"}, headers={"accept": JSON}),
            post(client, f"{path}?factor=3", **npy),
        ]
        for answer in answers:
            assert np.allclose(numbers(answer).reshape(2, 1, 5, 3, 3, 3).mean((3, 5)), small, atol=1e-3)
        refused = [
            client.post(path, json={"images": small.tolist()}),
            client.post(path, json={"images": small.tolist(), "factor": 50}),
            client.post(path, json={"images": small[..., :2].tolist(), "factor": 3}),
        ]
    told = [(answer.json()["code"], answer.json()["detail"]) for answer in refused]
    assert [code for code, _ in told] == ["invalid_option", "invalid_option", "invalid_shape"]
    assert all(detail.endswith("must divide 15 x 9: 3") for _, detail in told[:2])
    assert "(n, 1, 5, 3)" in told[2][1]
