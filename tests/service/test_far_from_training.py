"""The note `far_from_training`: its figures, where it is given, and that it is not where no statistic is sound."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service.app import create_app
from service.contract.manifest import FarFromTraining
from service.contract.typical import far, figures
from service.repository.repository import Repository
from service.runtime.model import Model
from service.settings import Settings
from tests.support.versions import free_version, opened

BOUNDS = {"brightness": [0.3, 0.7], "greyness": [0.5, 1.0], "roughness": [0.01, 0.4]}
ABOUT: dict[str, Any] = {"bounds": BOUNDS, "held_out": 0.0, "caught": {"black": 1.0}, "images": 100, "seed": 0}
SIZE = (8, 12)


def test_the_figures_are_what_they_say() -> None:
    """By hand: a checkerboard of 0 and 1, and an even grey."""
    board = np.indices((4, 6)).sum(0) % 2
    x = np.stack([board, np.full((4, 6), 0.25)])[:, None].astype(np.float32)
    found = figures(x, x)
    np.testing.assert_allclose(found["brightness"], [0.5, 0.25])
    np.testing.assert_allclose(found["greyness"], [0.0, 0.75])
    np.testing.assert_allclose(found["roughness"], [1.0, 0.0])


@pytest.mark.parametrize(("family", "level"), [("salt-and-pepper", 0.3), ("masking", 0.5), ("gaussian", 0.2)])
def test_brightness_is_that_of_the_image_without_its_noise(family: str, level: float) -> None:
    """Pixels that are set to black or white, or to black, do not count; other noise has the mean 0."""
    rng = np.random.default_rng(0)
    x = rng.random((1, 1, 300, 300), np.float32) * 0.6
    hit = rng.random(x.shape) < level
    y = {
        "salt-and-pepper": np.where(hit, rng.integers(0, 2, x.shape), x),
        "masking": np.where(hit, 0.0, x),
        "gaussian": x + level * rng.standard_normal(x.shape),
    }[family].astype(np.float32)
    found = figures(y, x, family, np.array([level], np.float32))["brightness"]
    assert float(found[0]) == pytest.approx(float(x.mean()), abs=0.004)


def test_one_figure_outside_its_bounds_is_enough() -> None:
    """On either side."""
    found = {"brightness": np.float32([0.5, 0.2, 0.8, 0.5]), "greyness": np.float32([0.5, 0.5, 0.5, 0.9])}
    assert far(found, {"brightness": [0.3, 0.7], "greyness": [0.4, 0.6]}).tolist() == [False, True, True, True]


# Over HTTP


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A small model of grey images that has no word on what is far."""
    folder = tmp_path_factory.mktemp("models") / "free" / "1"
    return opened(free_version(folder, channels=(1,), graphs=("encoder", "decoder", "restoration")))


def notes(model: Model, far_from_training: FarFromTraining | None, path: str, **content: Any) -> list[dict[str, Any]]:
    """The notes of an answer about a usual image, a black and a white one."""
    manifest = model.manifest.model_copy(update={"far_from_training": far_from_training})
    known = dataclasses.replace(model, manifest=manifest, programs={})
    usual = 0.5 + 0.1 * np.sin(np.arange(96, dtype=np.float32)).reshape(1, 1, *SIZE)
    images = np.concatenate([usual, np.zeros_like(usual), np.ones_like(usual)])

    async def scenario() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(Settings(), Repository({"free": {"1": known}}, "free")))
        async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as client:
            return await client.post(f"/v1/{path}", json={"images": images.tolist(), **content})

    answer = asyncio.run(scenario())
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json().get("notes", [])
    return found


@pytest.mark.parametrize("operation", ["encode", "reconstruct", "denoise"])
def test_answers_about_other_images_carry_the_note(model: Model, operation: str) -> None:
    """It names their rows and the model, and the usual image gets none."""
    options = {"noise": "none"} if operation == "denoise" else {}
    (note,) = notes(model, FarFromTraining(sound=True, **ABOUT), operation, **options)
    assert (note["code"], note["rows"]) == ("far_from_training", [1, 2])
    assert "model free was trained on" in note["detail"]


def test_where_no_statistic_is_sound_there_is_no_note(model: Model) -> None:
    """Nor where the manifest is silent, nor behind a mask, for which nothing was measured."""
    sound = FarFromTraining(sound=True, **ABOUT)
    assert notes(model, FarFromTraining(sound=False, **ABOUT), "encode") == []
    assert notes(model, None, "encode") == []
    assert notes(model, sound, "inpaint", mask=np.ones((1, *SIZE)).tolist()) == []
    assert notes(model, sound, "denoise", noise="none", blur=1.0) == []


def test_the_manifest_keeps_it_and_the_fingerprint_stays(tmp_path: Path) -> None:
    """A version is read with it; what is no statistic is refused by name."""
    folder = free_version(tmp_path / "free" / "1")
    before = opened(folder).manifest.fingerprint
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**content, "far_from_training": {"sound": True, **ABOUT}}))
    manifest = opened(folder).manifest
    assert manifest.far_from_training == FarFromTraining(sound=True, **ABOUT)
    assert manifest.fingerprint == before
    with pytest.raises(ValueError, match="brightness or greyness or roughness"):
        FarFromTraining(sound=True, **{**ABOUT, "bounds": {"colour": [0.0, 1.0]}})
