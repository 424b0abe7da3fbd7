"""Default models: which model answers a request that names none, for each operation."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.app import create_app
from service.errors import StartError
from service.operations.abilities import CONDITIONAL, REASONS, REFINING
from service.operations.registry import OPERATIONS
from service.repository.defaults import Defaults, default_models
from service.repository.repository import Repository
from service.repository.selection import Selection
from service.settings import Settings
from tests.support.versions import conditional_version, free_version, opened

PHOTOGRAPHS = "mnist,denoise=photo,inpaint=photo,super-resolve=photo\n"
RESTORING = ["denoise", "inpaint", "super-resolve"]
FAST = "or ask for quality=fast"
CAN = "served models that can: mnist"
IMAGES = {"images": [[[[0.5] * 16] * 16]]}


def folders(folder: Path, line: str | None = None, names: tuple[str, ...] = ("mnist", "faces")) -> Path:
    """A repository as far as names go, with a file `default` that holds that line."""
    for name in names:
        (folder / name / "1").mkdir(parents=True)
    if line is not None:
        (folder / "default").write_text(line)
    return folder


@pytest.mark.parametrize(
    ("versions", "wanted", "line", "found"),
    [
        ("all", "", "mnist\n", "mnist"),
        ("all", "faces", "mnist\n", "faces"),
        ("faces:latest", "", "mnist\n", "faces"),
        ("mnist:all", "", None, "mnist"),
        ("all", "", " mnist, denoise = faces \n", "mnist,denoise=faces"),
        ("all", "faces,score=mnist", "mnist,denoise=faces", "faces,score=mnist"),
        ("all", "denoise=faces,faces,encode=faces", None, "faces"),
        ("mnist:1", "", "mnist,denoise=faces", "mnist"),
    ],
)
def test_the_default_models_are_told_or_the_only_one(
    tmp_path: Path, versions: str, wanted: str, line: str | None, found: str
) -> None:
    """By the setting, else by the file `default`; never by their place in the alphabet."""
    assert str(default_models(folders(tmp_path, line), Selection(versions), wanted)) == found


@pytest.mark.parametrize(
    ("wanted", "line", "says"),
    [
        ("", None, "no default model among faces, mnist; set VAE_DEFAULT_MODEL, or write one of them into "),
        ("", "\n", "no default model among faces, mnist"),
        ("", "digits\n", "default names 'digits', but the models are faces, mnist"),
        ("digits", "mnist\n", "VAE_DEFAULT_MODEL names 'digits', but the models are faces, mnist"),
        ("mnist,denoise=digits", None, "VAE_DEFAULT_MODEL names 'digits', but the models are faces, mnist"),
        ("", "mnist\nfaces\n", r"default names 'mnist\nfaces', but the models are faces, mnist"),
        ("", "m" * 1025, "default is larger than the 1024 bytes that it may have; write one model's name into it"),
        ("denoise=faces", None, "VAE_DEFAULT_MODEL names no model for the operations that it does not list"),
        ("mnist,faces", None, "VAE_DEFAULT_MODEL names 2 models for the operations that it does not list"),
        ("mnist,denoize=faces", None, "the operation 'denoize'; the operations are encode, decode, "),
        ("mnist,denoise=", None, "must name one model for denoise, as in mnist,denoise=photo"),
        ("mnist,denoise=faces,denoise=mnist", None, "must name one model for denoise"),
    ],
)
def test_unclear_defaults_among_several_models_are_refused(
    tmp_path: Path, wanted: str, line: str | None, says: str
) -> None:
    """In one line that names the setting, the file and the models there are."""
    with pytest.raises(StartError) as caught:
        default_models(folders(tmp_path, line), Selection("all"), wanted)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_may_be_named_default(tmp_path: Path) -> None:
    """A folder of that name says nothing about the others."""
    assert default_models(folders(tmp_path, names=("default",)), Selection("all"), "") == Defaults("default")


def test_a_file_gives_photographs_to_photo_where_it_is_there(tmp_path: Path) -> None:
    """It restores, and mnist does all else; whatever other models there are."""
    models = folders(tmp_path, PHOTOGRAPHS, ("a-model", "mnist", "photo"))
    found = default_models(models, Selection("all"), "")
    assert {operation.name: found.of(operation.name) for operation in OPERATIONS} == {
        operation.name: "photo" if operation.name in RESTORING else "mnist" for operation in OPERATIONS
    }


def test_the_file_may_name_a_model_that_is_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The model of the other operations takes its place, and the log says for which."""
    models = folders(tmp_path, PHOTOGRAPHS, ("mnist", "mnist-2d"))
    with caplog.at_level(logging.WARNING):
        assert str(default_models(models, Selection("all"), "")) == "mnist"
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{models / 'default'} names 'photo' for denoise, inpaint, super-resolve, but the models are mnist, mnist-2d; "
        "mnist answers these requests"
    )


# Over HTTP


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small `mnist` that does all, and a small `photo` that restores from other noise and has no p(x)."""
    folder = tmp_path_factory.mktemp("models")
    every = ("encoder", "decoder", "log_joint", "restoration")
    free_version(folder / "mnist" / "1", channels=(1,), graphs=every, noise_families=["poisson"])
    conditional_version(folder / "photo" / "1")
    (folder / "default").write_text(PHOTOGRAPHS)
    return folder


@pytest.fixture(scope="module")
def both(models: Path) -> Repository:
    """Both, opened, with the shipped defaults."""
    found = {name: {"1": opened(models / name / "1")} for name in ("mnist", "photo")}
    return Repository(found, str(default_models(models, Selection("all"), "")))


@asynccontextmanager
async def asking(settings: Settings, repository: Repository | None = None) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(settings, repository)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as client,
    ):
        yield client


def of_both(both: Repository, scenario: Callable[[httpx.AsyncClient], Any]) -> Any:
    """What a client of the two models finds."""

    async def run() -> Any:
        async with asking(Settings(), both) as client:
            return await scenario(client)

    return asyncio.run(run())


def test_each_operation_goes_to_its_default_model(both: Repository) -> None:
    """`/v1/models` says which; a path that names a model is for that model."""

    async def scenario(client: httpx.AsyncClient) -> None:
        for path, content, model in (
            ("denoise", IMAGES, "photo"),
            ("inpaint", {**IMAGES, "mask": [[[1] * 16] * 16]}, "photo"),
            ("super-resolve", IMAGES, "photo"),
            ("encode", IMAGES, "mnist"),
            ("models/mnist/denoise", {**IMAGES, "noise": "poisson"}, "mnist"),
            ("models/photo/encode", IMAGES, "photo"),
        ):
            answer = await client.post(f"/v1/{path}", json=content)
            assert (answer.status_code, answer.json().get("model")) == (200, model), answer.text
        told = {one["model"]: one["default_for"] for one in (await client.get("/v1/models")).json()["models"]}
        assert told["photo"] == RESTORING
        assert told["mnist"] == [one.name for one in OPERATIONS if one.name not in RESTORING]

    of_both(both, scenario)


def test_a_default_model_that_cannot_is_refused_with_one_that_can(both: Repository) -> None:
    """What lacks a graph, a prior, or training on that noise."""

    async def scenario(client: httpx.AsyncClient) -> list[str]:
        found = []
        for path, content in (
            *((f"models/photo/{name}", IMAGES) for name in ("reconstruct", "score")),
            ("models/photo/interpolate", {"images": IMAGES["images"] * 2}),
            ("models/photo/decode", {"latents": [[[[0.0] * 2] * 2] * 2]}),
            *((f"models/photo/{name}", {"height": 16, "width": 16}) for name in ("sample", "traverse")),
            ("denoise", {**IMAGES, "noise": "poisson"}),
            ("denoise", {**IMAGES, "noise": "masking"}),
            ("models/mnist/super-resolve", {**IMAGES, "level": 0.1}),
            ("models/mnist/denoise", {**IMAGES, "noise": "poisson", "quality": "refined"}),
        ):
            answer = await client.post(f"/v1/{path}", json=content)
            assert (answer.status_code, answer.json()["code"]) == (422, "unsupported_operation"), answer.text
            found.append(answer.json()["detail"])
        return found

    of_photo = "it was trained on noise of the kinds gaussian, processed and none"
    of_mnist = "it was trained on noise of the kinds poisson and none; served models that can: photo"
    assert of_both(both, scenario) == [
        f"model {told}"
        for told in (
            *(
                f"photo cannot {name}: {CONDITIONAL}; {CAN}"
                for name in ("reconstruct", "score", "interpolate", "decode", "sample", "traverse")
            ),
            f"photo cannot denoise with poisson noise: {of_photo}; {CAN}",
            f"photo cannot denoise with masking noise: {of_photo}; no served model can",
            f"mnist cannot super-resolve with gaussian noise: {of_mnist}",
            f"mnist cannot denoise with quality=refined: {REASONS[REFINING]}; no served model can; {FAST}",
        )
    ]


def test_readiness_waits_for_every_default_model(models: Path) -> None:
    """A service whose denoise would answer 503 is not ready; other operations answer all the same."""

    async def scenario() -> None:
        settings = Settings(models=models, max_rows=2, threads=1, model_control="anonymous")
        async with asking(settings) as client:
            assert (await client.get("/health/ready")).status_code == 200
            assert (await client.post("/v1/models/photo/unload")).status_code == 200
            ready = await client.get("/health/ready")
            assert (ready.status_code, ready.json()["detail"]) == (
                503, "no version of the default model photo is served",
            )  # fmt: skip
            refused = await client.post("/v1/denoise", json=IMAGES)
            assert (refused.status_code, refused.json()["code"]) == (503, "not_ready")
            assert "model photo" in refused.json()["detail"]
            assert (await client.post("/v1/encode", json=IMAGES)).json()["model"] == "mnist"
            await client.post("/v1/models/photo/load")
            assert (await client.get("/health/ready")).status_code == 200

    asyncio.run(scenario())


def test_a_default_model_that_cannot_be_served_ends_the_start(models: Path, tmp_path: Path) -> None:
    """Also one of a single operation, rather than another model's answers in its place."""
    (tmp_path / "mnist").symlink_to(models / "mnist")
    (tmp_path / "photo" / "1").mkdir(parents=True)
    with pytest.raises(StartError, match=r"photo/1/manifest\.json"):
        Repository.open(tmp_path, "mnist,denoise=photo", "CPUExecutionProvider", 1, 2)
