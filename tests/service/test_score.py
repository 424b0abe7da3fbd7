"""Scores, against a model whose log p(x) is known, and against the graphs run by hand."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from numpy.typing import NDArray

from service.app import create_app
from service.contract.manifest import Scoring
from service.operations.inference.latent import Noise, standard_normal, uniform
from service.operations.inference.scoring import BINARISATION_STREAM, SLICE, ScoreChoices, score
from service.operations.inference.vae import Result
from service.repository.repository import Repository
from service.runtime.batcher import Batcher
from service.runtime.model import Model
from service.runtime.program import Trip
from service.settings import Settings

Rows = NDArray[np.float32]
Graphs = dict[str, Callable[..., tuple[Rows, ...]]]
CHOICES = ScoreChoices("none", weighted=True, refined=False, draws=16, error=False)
RAW = {"content-type": "application/octet-stream"}
FIGURES = ["elbo", "log_likelihood", "kl", "importance_weighted", "standard_error", "percentile"]


def run(model: Model, *requests: tuple[Rows, ScoreChoices, int]) -> list[Result]:
    """Side by side through one batcher."""

    async def scenario() -> list[Result]:
        engine = Batcher(max_rows=8, queue_rows=4096)
        try:
            return await asyncio.gather(*(score(model, engine.submit, x, w, Noise(s)) for x, w, s in requests))
        finally:
            await engine.close()

    return asyncio.run(scenario())


class Linear:
    """The graphs of z ~ N(0, I) in two dimensions and x = W z + N(0, v I) in six pixels, whose posterior q can equal.

    W's columns are orthogonal. Source: Tipping and Bishop (1999), equations 4 to 6.
    """

    weight = np.array([[1.0, 2.0], [2.0, -1.0], [0.0, 1.0], [-1.0, 0.0], [0.5, 0.0], [0.0, 0.5]])
    variance = 0.3

    def __init__(self, shift: float = 0.0, scale: float = 1.0) -> None:
        self.precision = 1.0 + np.square(self.weight).sum(0) / self.variance
        self.shift, self.log_var = shift, -np.log(self.precision) + 2.0 * math.log(scale)

    def encoder(self, x: Rows) -> tuple[Rows, Rows]:
        """The exact posterior, moved and widened."""
        mean = x.reshape(-1, 6) @ self.weight / self.variance / self.precision + self.shift
        return mean.astype(np.float32), np.broadcast_to(self.log_var, mean.shape).astype(np.float32)

    def log_joint(self, x: Rows, z: Rows) -> tuple[Any, Any]:
        """log p(x|z), log p(z)."""
        square = np.square(x.reshape(-1, 6) - z @ self.weight.T).sum(1) / self.variance
        log_likelihood = -0.5 * (square + 6 * math.log(2 * math.pi * self.variance))
        return log_likelihood, -0.5 * (np.square(z).sum(1) + 2 * math.log(2 * math.pi))

    def elbo_gradient(self, mean: Rows, log_var: Rows, eps: Rows, x: Rows) -> tuple[Rows, Rows, Rows]:
        """By the chain rule."""
        noise = np.exp(0.5 * log_var) * eps
        z = mean + noise
        in_z = ((x.reshape(-1, 6) - z @ self.weight.T) @ self.weight / self.variance - z).astype(np.float32)
        return self.log_joint(x, z)[0], in_z, 0.5 * in_z * noise + np.float32(0.5)

    def log_prob(self, x: Rows) -> NDArray[np.float64]:
        """The exact log p(x)."""
        covariance = self.weight @ self.weight.T + self.variance * np.eye(6)
        flat = x.reshape(-1, 6).astype(np.float64)
        square = np.einsum("ni,ij,nj->n", flat, np.linalg.inv(covariance), flat)
        found: NDArray[np.float64] = -0.5 * (square + np.linalg.slogdet(2 * math.pi * covariance)[1])
        return found

    def model(self) -> Model:
        """As a model of the service."""
        graphs: Any = {name: getattr(self, name) for name in ("encoder", "log_joint", "elbo_gradient")}
        manifest: Any = SimpleNamespace(name="linear", channels=1, latent_shape=[2], size=None)
        return Model(manifest, graphs)

    def x(self, n: int) -> Rows:
        """Draws of p(x)."""
        rng = np.random.default_rng(0)
        z = rng.standard_normal((n, 2))
        noise = math.sqrt(self.variance) * rng.standard_normal((n, 6))
        return (z @ self.weight.T + noise).astype(np.float32).reshape(n, 1, 2, 3)


def test_under_the_exact_posterior_every_weight_is_the_evidence() -> None:
    """So the importance-weighted figure is log p(x) without error; the ELBO is its mean over draws."""
    linear = Linear()
    x = linear.x(50)
    (result,) = run(linear.model(), (x, CHOICES, 1))
    exact = linear.log_prob(x)
    np.testing.assert_allclose(result.outputs["importance_weighted"], exact, atol=1e-4)
    assert float(result.outputs["standard_error"].max()) < 1e-4
    assert abs(float((result.outputs["elbo"] - exact).mean())) < 0.1


def test_the_standard_error_is_that_of_repeated_estimates() -> None:
    """Over 300 seeds, under a posterior that is too wide, within a fifth; and log p(x) is near."""
    linear = Linear(shift=0.1, scale=1.5)
    x = np.repeat(linear.x(1), 300, axis=0)
    (result,) = run(linear.model(), (x, CHOICES._replace(draws=40), 5))
    estimates, errors = result.outputs["importance_weighted"], result.outputs["standard_error"]
    assert float(errors.mean()) == pytest.approx(float(estimates.std()), rel=0.2)
    assert float(estimates.mean()) == pytest.approx(float(linear.log_prob(x)[0]), abs=0.05)


def test_refinement_climbs_to_the_evidence() -> None:
    """From a posterior that is off, the refined bound and its importance-weighted figure come near log p(x)."""
    linear = Linear(shift=0.3, scale=1.3)
    x = linear.x(8)
    exact = linear.log_prob(x)
    fast, refined = run(linear.model(), (x, CHOICES, 1), (x, CHOICES._replace(refined=True), 1))
    assert np.array_equal(fast.outputs["elbo"], refined.outputs["elbo"])
    gap, left = exact - fast.outputs["elbo"], exact - refined.outputs["refined_elbo"]
    assert gap.mean() > 1.0
    assert abs(left.mean()) < 0.3
    assert refined.outputs["standard_error"].mean() < 0.5 * fast.outputs["standard_error"].mean()
    assert np.abs(refined.outputs["importance_weighted"] - exact).mean() < 0.15


def test_more_draws_than_a_slice_holds_are_one_estimate() -> None:
    """As if they had not been cut."""
    linear = Linear(shift=0.1)
    x, draws = linear.x(3), 2 * SLICE + 5
    (result,) = run(linear.model(), (x, CHOICES._replace(draws=draws), 3))
    mean, log_var = linear.encoder(x)
    eps = standard_normal(3, 3, (draws, 2))
    z = mean[:, None] + np.exp(0.5 * log_var)[:, None] * eps
    joint = linear.log_joint(np.repeat(x, draws, axis=0), z.reshape(-1, 2))
    log_q = -0.5 * (np.square(eps) + log_var[:, None] + math.log(2 * math.pi)).sum(2)
    log_weights = (joint[0] + joint[1]).reshape(3, draws) - log_q
    expected = np.log(np.exp(log_weights).mean(1))
    np.testing.assert_allclose(result.outputs["importance_weighted"], expected, atol=1e-4)


@pytest.mark.parametrize(("images", "draws", "slices"), [(4, 16, 1), (5, 16, 2), (1, SLICE, 1), (1, 3 * SLICE, 3)])
def test_much_work_is_cut_up_and_gives_way(images: int, draws: int, slices: int) -> None:
    """Up to a slice of images times draws is short work; above it, long, whose thread gives way."""
    linear, rounds = Linear(), []

    async def submit(program: Any, arrays: Any, **_: Any) -> Trip:
        if program.operation == "weigh":
            rounds.append(program.rounds)
        return Trip(program.run(*arrays), 0.0, 0.0)

    asyncio.run(score(linear.model(), submit, linear.x(images), CHOICES._replace(draws=draws), Noise(1)))
    assert rounds == [slices] * -(-draws // SLICE)


def test_figures_are_those_of_the_graphs(client: httpx.Client, images: Rows, graphs: Graphs, model: Model) -> None:
    """Binarised, encoded, drawn and weighed by hand; the seed and what was done to the pixels are told."""
    answer = client.post("/v1/score?seed=5&error=true", json={"images": images.tolist()})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert (found["seed"], found["binarisation"], answer.headers["x-binarisation"]) == (5, "sample", "sample")
    x = (uniform(5, 3, (1, 8, 8), stream=BINARISATION_STREAM) < images).astype(np.float32)
    mean, log_var = graphs["encoder"](x)
    eps = standard_normal(5, 3, (16, 8))
    z = mean[:, None] + np.exp(0.5 * log_var)[:, None] * eps
    joint = graphs["log_joint"](np.repeat(x, 16, axis=0), z.reshape(-1, 8))
    log_likelihood, log_prior = (part.reshape(3, 16).astype(np.float64) for part in joint)
    log_q = -0.5 * (np.square(eps) + log_var[:, None] + math.log(2 * math.pi)).sum(2)
    log_weights = log_likelihood + log_prior - log_q
    kl = -0.5 * (log_var + 1 + math.log(2 * math.pi)).sum(1) - log_prior.mean(1)
    expected = {
        "log_likelihood": log_likelihood.mean(1),
        "kl": kl,
        "elbo": log_likelihood.mean(1) - kl,
        "importance_weighted": np.log(np.exp(log_weights - log_weights.max()).mean(1)) + log_weights.max(),
        "error": np.square(graphs["decoder"](mean)[0] - x),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-4)
    assert (np.asarray(found["importance_weighted"]) > np.asarray(found["elbo"])).all()
    scoring = model.manifest.scoring
    assert scoring is not None
    below = [np.mean(np.asarray(scoring.elbo_percentiles_nats) < elbo) * 100 for elbo in found["elbo"]]
    np.testing.assert_allclose(found["percentile"], below, atol=1.0)


def test_the_likelihood_of_pixels_is_bernoullis(graphs: Graphs) -> None:
    """log_joint against the decoder's mean and N(0, I), in double."""
    rng = np.random.default_rng(0)
    z, x = rng.standard_normal((5, 8)).astype(np.float32), rng.integers(0, 2, (5, 1, 8, 8)).astype(np.float32)
    mean = graphs["decoder"](z)[0].astype(np.float64)
    log_likelihood, log_prior = graphs["log_joint"](x, z)
    expected = np.log(np.where(x > 0, mean, 1 - mean)).reshape(5, -1).sum(1)
    np.testing.assert_allclose(log_likelihood, expected, rtol=1e-3)
    np.testing.assert_allclose(log_prior, -0.5 * (np.square(z) + math.log(2 * math.pi)).sum(1), rtol=1e-6)


def test_refined_bounds_are_higher(model: Model, images: Rows) -> None:
    """In the mean over images that the encoder has not seen the like of."""
    choices = CHOICES._replace(binarisation="sample", refined=True)
    (result,) = run(model, (images, choices, 0))
    assert result.outputs["refined_elbo"].mean() > result.outputs["elbo"].mean() + 0.5


@pytest.mark.parametrize("refined", [False, True])
def test_a_score_never_depends_on_batch_mates(model: Model, images: Rows, refined: bool) -> None:
    """To the byte: alone, one image at a time, beside others, as short work or cut up as long."""
    choices = CHOICES._replace(binarisation="sample", refined=refined, error=True)
    mine = (images, choices, 3)
    (alone,) = run(model, mine)
    others = [(images[:k], choices._replace(draws=draws), k) for k, draws in ((1, 16), (2, 16), (3, 5))]
    beside = run(model, *others, mine)[-1]
    (first,) = run(model, (images[:1], choices, 3))
    (many,) = run(model, (np.concatenate([images, images, images]), choices, 3))
    for name, array in alone.outputs.items():
        assert array.tobytes() == beside.outputs[name].tobytes()
        assert array[:1].tobytes() == first.outputs[name].tobytes()
        assert array.tobytes() == many.outputs[name][:3].tobytes()


def test_grey_levels_are_drawn_or_cut(client: httpx.Client) -> None:
    """Black and white stay, a seed repeats its pixels, and `threshold` is what its pixels say."""
    grey = np.full((2, 1, 8, 8), 0.5, np.float32)
    bits = (grey >= 0.5).astype(np.float32)

    def elbo(x: Rows, options: str) -> Any:
        answer = client.post(f"/v1/score?seed=1&{options}", json={"images": x.tolist()})
        assert answer.status_code == 200, answer.text
        return answer.json()["elbo"]

    assert elbo(grey, "") == elbo(grey, "binarise=sample") != elbo(grey, "binarise=threshold")
    assert elbo(grey, "binarise=threshold") == elbo(bits, "") == elbo(bits, "binarise=none")
    share = uniform(1, 300, (1, 8, 8), stream=BINARISATION_STREAM) < np.float32(0.3)
    assert float(share.mean()) == pytest.approx(0.3, abs=0.01)


def test_many_images_come_part_by_part(client: httpx.Client, images: Rows) -> None:
    """The binary answer of more rows than a part has is that of JSON, one column a figure."""
    x = np.tile(images, (100, 1, 1, 1))
    raw = client.post("/v1/score?draws=2&seed=1", content=x.tobytes(), headers=RAW)
    assert raw.status_code == 200, raw.text
    assert raw.headers["x-outputs"].split(",") == FIGURES
    found = np.frombuffer(raw.content, "<f4").reshape(300, len(FIGURES))
    told = client.post("/v1/score?draws=2&seed=1", json={"images": x.tolist()}).json()
    for column, name in enumerate(FIGURES):
        assert np.array_equal(found[:, column], np.float32(told[name]))


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ("binarise=none", "invalid_option", "use binarise=sample or binarise=threshold"),
        ("binarise=round", "invalid_option", "binarise"),
        ("draws=0", "invalid_option", "draws"),
        ("draws=65", "invalid_option", "VAE_MAX_DRAWS"),
        ("quality=best", "invalid_option", "quality"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    client: httpx.Client, images: Rows, options: str, code: str, says: str
) -> None:
    """With the way out."""
    answer = client.post(f"/v1/score?{options}", json={"images": images.tolist()})
    assert (answer.status_code, answer.json()["code"]) == (422, code)
    assert says in answer.json()["detail"]


def test_grey_in_a_later_part_is_refused_before_the_first_is_sent(client: httpx.Client) -> None:
    """The whole request is looked at, not its parts."""
    x = np.zeros((300, 1, 8, 8), np.float32)
    x[-1] = 0.5
    answer = client.post("/v1/score?draws=1&binarise=none", content=x.tobytes(), headers=RAW)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_option")


Serve = Callable[[FastAPI], AbstractContextManager[str]]


def served_as(model: Model, serve: Serve, scoring: Scoring | None, without: str = "") -> AbstractContextManager[str]:
    """The same model, described otherwise."""
    graphs = {name: graph for name, graph in model.graphs.items() if name != without}
    other = Model(model.manifest.model_copy(update={"scoring": scoring}), graphs)
    return serve(create_app(Settings(), Repository({"digits": {"1": other}}, "digits")))


def test_of_grey_levels_under_black_and_white_pixels_there_is_only_a_bound(
    model: Model, serve: Serve, images: Rows
) -> None:
    """A model trained on them has no importance-weighted figure, and says why; of a binarisation it has."""
    scoring = model.manifest.scoring
    assert scoring is not None
    request = {"images": images.tolist()}
    with (
        served_as(model, serve, scoring.model_copy(update={"binarisation": "none"})) as url,
        httpx.Client(base_url=url) as client,
    ):
        grey, bits = (client.post(f"/v1/score?seed=1{more}", json=request).json() for more in ("", "&binarise=sample"))
    assert {"elbo", "log_likelihood", "kl", "percentile"} <= grey.keys()
    assert not {"importance_weighted", "standard_error"} & grey.keys()
    assert [(note["code"], note["rows"]) for note in grey["notes"]] == [("grey_levels", [0, 1, 2])]
    assert "no probability" in grey["notes"][0]["detail"]
    assert "importance_weighted" in bits
    assert not {"notes", "percentile"} & bits.keys()  # the percentiles are those of grey levels


def test_a_model_of_grey_levels_takes_them_as_they_are(model: Model, serve: Serve, images: Rows) -> None:
    """`none` is its default, and nothing else makes sense."""
    scoring = model.manifest.scoring
    assert scoring is not None
    request = {"images": images.tolist()}
    with (
        served_as(model, serve, scoring.model_copy(update={"binary": False, "binarisation": "none"})) as url,
        httpx.Client(base_url=url) as client,
    ):
        found = client.post("/v1/score", json=request).json()
        refused = client.post("/v1/score?binarise=threshold", json=request)
    assert found["binarisation"] == "none"
    assert "importance_weighted" in found
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_option")


@pytest.mark.parametrize(
    ("lacking", "options", "says"), [("log_joint", "", "log_joint"), ("elbo_gradient", "?quality=refined", "fast")]
)
def test_a_model_without_the_graph_refuses(
    model: Model, serve: Serve, images: Rows, lacking: str, options: str, says: str
) -> None:
    """And names what it lacks, or what it can."""
    with served_as(model, serve, model.manifest.scoring, lacking) as url, httpx.Client(base_url=url) as client:
        answer = client.post(f"/v1/score{options}", json={"images": images.tolist()})
    assert (answer.status_code, answer.json()["code"]) == (422, "unsupported_operation")
    assert says in answer.json()["detail"]
