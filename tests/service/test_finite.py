"""What is not finite is never an answer, and what is special about an answer is noted."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service.app import create_app
from service.repository.repository import Repository
from service.runtime.model import Model
from service.settings import Settings

SHIPPED = Path(__file__).parents[2] / "models"
FORMS = ("application/json", "application/x-npy", "application/octet-stream", "image/png")
EVENTS = ("text/event-stream", "application/x-ndjson")
NPY = {"content-type": "application/x-npy"}
Ask = Callable[..., httpx.Response]


def saved(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(array, np.float32))
    return file.getvalue()


def asker(repository: Repository, **settings: Any) -> Ask:
    """A function that posts to the application around these models."""
    app = create_app(Settings(max_rows=8, **settings), repository)

    def ask(path: str, **request: Any) -> httpx.Response:
        return asyncio.run(asked(path, request))

    async def asked(path: str, request: dict[str, Any]) -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as client:
            return await client.post(f"/v1/{path}", **request)

    return ask


@pytest.fixture(scope="module")
def shipped() -> Repository:
    """The models that come with the project."""
    return Repository.open(SHIPPED, "", "CPUExecutionProvider", 1, 8)


@pytest.fixture
def spoilt(digits_models: Path) -> Callable[[str, int], Repository]:
    """A function that gives the digits' model, one of whose graphs gives NaN for rows whose first number is 0.5."""
    model = Repository.open(digits_models, "", "CPUExecutionProvider", 1, 8).find("digits", None)

    def repository(name: str, output: int) -> Repository:
        def graph(first: Any, *further: Any) -> tuple[Any, ...]:
            found = [np.array(array) for array in model.graphs[name](first, *further)]
            found[output][first.reshape(len(first), -1)[:, 0] == 0.5] = np.nan
            return tuple(found)

        broken = Model(model.manifest, {**model.graphs, name: graph})  # type: ignore[dict-item]
        return Repository({"digits": {"1": broken}}, "digits")

    return repository


def nowhere_null(answer: httpx.Response) -> bool:
    """Whether every number of an answer is finite."""
    if answer.headers["content-type"] == "application/x-npy":
        return bool(np.isfinite(np.load(io.BytesIO(answer.content))).all())
    if answer.headers["content-type"] == "application/octet-stream":
        return bool(np.isfinite(np.frombuffer(answer.content, "<f4")).all())
    return b"null" not in answer.content


@pytest.mark.parametrize("accept", [*FORMS, *EVENTS])
def test_latents_beyond_all_sense_are_the_callers_mistake(shipped: Repository, accept: str) -> None:
    """In every form of the answer; an interpolation between such is too."""
    ask = asker(shipped)
    latents = np.full((2, shipped.find("mnist", None).latent_shape[0]), 3e38)
    for path in ("decode", "interpolate"):
        answer = ask(f"models/mnist/{path}", json={"latents": latents.tolist()}, headers={"accept": accept})
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_value")
        assert "3e+38" in answer.json()["detail"]


@pytest.mark.parametrize("value", [10.9, -9.9, 2.0])
@pytest.mark.parametrize(
    "path", ["denoise", "denoise?quality=refined&seed=1", "denoise?draws=3&uncertainty=true&seed=1"]
)
def test_what_is_restored_of_extreme_values_is_finite_or_refused(shipped: Repository, path: str, value: float) -> None:
    """And the level that is estimated is one that could have been told."""
    ask = asker(shipped)
    for accept in (*FORMS[:2], *EVENTS[1:]):
        headers = {**NPY, "accept": accept}
        answer = ask(f"models/mnist/{path}", content=saved(np.full((1, 28, 28), value)), headers=headers)
        if answer.status_code == 406:
            continue
        assert answer.status_code in (200, 422)
        assert nowhere_null(answer)
        if accept == "application/json" and answer.status_code == 200:
            assert 0 < answer.json()["level"][0] <= 1


@pytest.mark.parametrize("noise", ["gaussian", "poisson", "salt-and-pepper", "masking"])
@pytest.mark.parametrize("further", ["", "&quality=refined&seed=1"])
def test_an_estimated_level_is_one_that_could_be_told(shipped: Repository, noise: str, further: str) -> None:
    """Images of [-1, 1], as other programs scale them, get no level of thousands, and the rows of it are named."""
    ask = asker(shipped)
    x = np.random.default_rng(0).random((3, 28, 28)) > 0.8
    y = np.where(np.arange(3)[:, None, None] == 1, x, 2.0 * x - 1.0)
    answer = ask(f"models/mnist/denoise?noise={noise}{further}", json={"images": y.tolist()})
    found = answer.json()
    assert answer.status_code == 200
    assert all(0 < level <= 1 for level in found["level"])
    clipped = [row for row, level in enumerate(found["level"]) if level in (1.0, pytest.approx(1e-6))]
    noted = [note["rows"] for note in found.get("notes", []) if note["code"] == "level_clipped"]
    assert noted == ([clipped] if clipped else [])
    if noise == "poisson" and not further:
        assert 0 in clipped
        told = ask(f"models/mnist/denoise?noise={noise}", content=saved(y[:1]), headers={**NPY, "accept": "image/png"})
        assert told.headers["x-note"].startswith('level_clipped;rows="0";detail="the noise level')


def test_a_clipped_level_of_tiles_names_the_image(shipped: Repository) -> None:
    """Not the tile."""
    y = np.zeros((2, 28, 60))
    y[1] = 5.0
    model = shipped.find("mnist", None)
    tileable = Model(model.manifest.model_copy(update={"tileable": True}), model.graphs)  # type: ignore[arg-type]
    ask = asker(Repository({"mnist": {"3": tileable}}, "mnist"))
    found = ask("denoise?fit=tile", json={"images": y.tolist()}).json()
    (note,) = found["notes"]
    assert (note["code"], note["rows"]) == ("level_clipped", [1])
    assert found["level"][1] == 1.0


def test_several_notes_go_together(shipped: Repository) -> None:
    """In JSON, in the header, and in the last event."""
    ask, y, mask = asker(shipped), np.full((2, 28, 28), 5.0), np.ones((2, 28, 28))
    mask[1] = 0
    request = {"images": y.tolist(), "mask": mask.tolist()}
    answers = [ask("models/mnist/denoise", json=request, headers={"accept": one}) for one in (*FORMS, *EVENTS)]
    notes = answers[0].json()["notes"]
    assert [(note["code"], note["rows"]) for note in notes] == [("nothing_seen", [1]), ("level_clipped", [0])]
    for answer in answers[:4]:
        assert answer.headers["x-note"].count(';detail="') == 2
        assert ', level_clipped;rows="0";' in answer.headers["x-note"]
    assert json.loads(answers[5].text.splitlines()[-1])["notes"] == notes


@pytest.mark.parametrize(
    ("graph", "output", "path"),
    [
        ("encoder", 0, "encode"),
        ("encoder", 1, "encode"),
        ("encoder", 0, "reconstruct"),
        ("recognition", 0, "denoise"),
        ("noise_level", 0, "denoise"),
    ],
)
def test_a_graph_that_fails_is_the_services_fault(
    spoilt: Callable[[str, int], Repository], graph: str, output: int, path: str
) -> None:
    """500 in every form for an image in its range, and for nobody else."""
    ask, x = asker(spoilt(graph, output)), np.zeros((1, 8, 8), np.float32)
    good = ask(path, json={"images": x.tolist()})
    assert good.status_code == 200
    assert nowhere_null(good)
    x[:] = 0.5
    for accept in (*FORMS[:2], *EVENTS):
        answer = ask(path, content=saved(x), headers={**NPY, "accept": accept})
        assert (answer.status_code, answer.json()["code"]) == (500, "inference_failed")


def test_a_bad_row_harms_no_other_caller(spoilt: Callable[[str, int], Repository]) -> None:
    """Though they share a batch."""
    app = create_app(Settings(max_rows=8), spoilt("encoder", 0))

    async def scenario() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as client:
            bodies = [np.full((1, 8, 8), value) for value in (0.0, 0.5, 0.25, 0.5, 1.0)]
            return await asyncio.gather(*(client.post("/v1/encode", content=saved(x), headers=NPY) for x in bodies))

    assert [answer.status_code for answer in asyncio.run(scenario())] == [200, 500, 200, 500, 200]


def test_progress_is_finite_too(spoilt: Callable[[str, int], Repository]) -> None:
    """A preview that is not finite ends the stream with an error in place of an event."""
    ask = asker(spoilt("recognition", 0))
    path = "denoise?quality=refined&preview=true&level=0.2"
    answer = ask(path, json={"images": np.full((1, 8, 8), 0.5).tolist()}, headers={"accept": EVENTS[1]})
    assert answer.status_code == 500
    assert answer.json()["code"] == "inference_failed"


def test_an_answer_sent_in_parts_breaks_off(spoilt: Callable[[str, int], Repository], serve: Any) -> None:
    """Where a part that is not finite would come, so that no reader takes the rest for whole."""
    x = np.zeros((600, 8, 8), np.float32)
    x[500] = 0.5
    with serve(create_app(Settings(max_rows=8), spoilt("encoder", 0))) as url, httpx.Client(timeout=60) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            client.post(f"{url}/v1/encode", content=saved(x), headers=NPY)
        x[500] = 0.0
        assert client.post(f"{url}/v1/encode", content=saved(x), headers=NPY).status_code == 200
