"""Calibration: which pixels count as what, how `std` is widened, and that nothing else of an answer changes."""

from __future__ import annotations

import asyncio
import dataclasses
import io
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from service.app import create_app
from service.codecs.heat_map import heat_map
from service.contract.calibration import APART, BESIDE, MOST_STD, calibrated, ways, widened
from service.contract.corruption import Observation
from service.contract.manifest import Calibration, Curve
from service.repository.repository import Repository
from service.runtime.model import Model
from service.settings import Settings
from tests.support.versions import free_version, opened

Rows = NDArray[np.float32]
FAMILIES = ["gaussian", "masking"]
FACTORS = {"gaussian": 2.0, BESIDE: 1.5, APART: 3.0, "shrink-2": 1.25, "blur": 0.5}


@pytest.fixture(scope="module")
def restoring(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A small model that restores colour images of any size."""
    folder = tmp_path_factory.mktemp("models") / "free" / "1"
    free_version(folder, graphs=("encoder", "decoder", "restoration"))
    return Repository({"free": {"1": opened(folder)}}, "free")


def observation(mask: Rows, family: int | None = None, operator: Any = None) -> Observation:
    return Observation(mask, mask, np.zeros((len(mask), 2), np.float32), family, True, operator)


def test_small_deviations_are_multiplied_and_none_exceeds_the_largest_there_is() -> None:
    """In order, and undone by the inverse factor; a factor of 1 changes nothing."""
    std = np.linspace(0.0, 0.6, 200, dtype=np.float32)
    for factor in (0.5, 1.0, 5.0):
        found = widened(std, np.float32(factor))
        np.testing.assert_allclose(found[1:4], factor * std[1:4], rtol=0.01)
        assert (np.diff(found) >= -1e-7).all()
        assert found.max() == pytest.approx(MOST_STD)
        np.testing.assert_allclose(widened(found, np.float32(1 / factor)), np.minimum(std, MOST_STD), atol=1e-5)


def test_pixels_are_told_apart_by_how_they_are_seen() -> None:
    """A corner and an edge that are seen, the rest missing: by hand which missing ones are beside them."""
    mask = np.zeros((1, 1, 4, 5), np.float32)
    mask[0, 0, 0, 0] = mask[0, 0, 3, 4] = 1.0
    beside = [[0, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 1, 0]]
    found = ways(observation(mask, 1), FAMILIES)
    assert found[BESIDE].astype(int)[0, 0].tolist() == beside
    np.testing.assert_array_equal(found["masking"], mask > 0)
    np.testing.assert_array_equal(sum(where.astype(int) for where in found.values()), 1)
    assert set(ways(observation(mask), FAMILIES)) == {BESIDE, APART}


def test_each_pixel_gets_the_factor_of_its_way() -> None:
    """Missing ones theirs, whatever the noise on the others; under an operator all the same; 1 where none is told."""
    mask = np.ones((2, 1, 4, 4), np.float32)
    mask[1, :, 2:] = 0.0
    std = np.full(mask.shape, 1e-4, np.float32)
    found = calibrated(std, observation(mask, 0), FAMILIES, FACTORS) / std
    np.testing.assert_allclose(found[0], 2.0, rtol=1e-4)
    np.testing.assert_allclose(found[1, 0, :, 0], [2.0, 2.0, 1.5, 3.0], rtol=1e-4)
    unknown = calibrated(std, observation(mask, 1), FAMILIES, FACTORS) / std
    np.testing.assert_allclose(unknown[1, 0, :, 0], [1.0, 1.0, 1.5, 3.0], rtol=1e-4)
    for name, factor in ((("shrink", 2, 4, 4), 1.25), (("shrink", 4, 4, 4), 1.0), (("blur", 0.7, 4, 4), 0.5)):
        small = np.ones((2, 1, 2, 2), np.float32)
        through = calibrated(std, observation(small, 0, name), FAMILIES, FACTORS)
        np.testing.assert_allclose(through / std, factor, rtol=1e-4)


def test_a_curve_is_read_at_the_level_of_each_image() -> None:
    """Linear between knots, constant beyond; for other ways than noise at the level of all noise; before factors."""
    mask = np.ones((4, 1, 4, 4), np.float32)
    mask[:, :, 2:] = 0.0
    level = np.array([[0.1, 0.0], [0.2, 0.0], [0.3, 0.4], [0.0, 0.0]], np.float32)
    curves = {
        "gaussian": Curve(levels=[0.1, 0.3], factors=[1.0, 2.0]),
        BESIDE: Curve(levels=[0.0, 0.5], factors=[1.0, 3.0]),
    }
    std = np.full(mask.shape, 1e-4, np.float32)
    seen = Observation(mask, mask, level, 0, True)
    found = calibrated(std, seen, FAMILIES, FACTORS, curves) / std
    np.testing.assert_allclose(found[:, 0, 0, 0], [1.0, 1.5, 2.0, 1.0], rtol=1e-4)
    np.testing.assert_allclose(found[:, 0, 2, 0], [1.4, 1.8, 3.0, 1.0], rtol=1e-4)
    np.testing.assert_allclose(found[:, 0, 3, 0], 3.0, rtol=1e-4)


def test_of_several_kinds_of_noise_the_loudest_is_the_way() -> None:
    """Image by image; one without noise has no way."""
    mask = np.ones((3, 1, 2, 2), np.float32)
    level = np.array([[0.1, 0.2], [0.2, 0.1], [0.0, 0.0]], np.float32)
    found = ways(Observation(mask, mask, level, None, True), FAMILIES)
    assert {way: where[:, 0, 0, 0].tolist() for way, where in found.items()} == {
        "masking": [True, False, False],
        "gaussian": [False, True, False],
    }


@pytest.mark.parametrize("quality", ["fast", "refined"])
def test_a_calibrated_model_widens_std_and_nothing_else(model: Model, images: Rows, quality: str) -> None:
    """Images and completions to the byte; std by the quality's factors, of pixels that are missing alone."""
    told = {"fast": {BESIDE: 1.5, APART: 1.5}, "refined": {BESIDE: 3.0, APART: 3.0}}
    manifest = model.manifest.model_copy(update={"calibration": Calibration(factors=told, images=10, seed=0)})
    mask = np.ones((8, 8))
    mask[4:] = 0
    asked = {"images": images.tolist(), "mask": mask.tolist(), "quality": quality, "uncertainty": True, "seed": 1}

    async def scenario(one: Model) -> dict[str, Any]:
        app = create_app(Settings(), Repository({"digits": {"1": one}}, "digits"))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x", timeout=60) as client:
            answer = await client.post("/v1/inpaint", json={**asked, "draws": 2, "completions": True})
            assert answer.status_code == 200, answer.text
            described = (await client.get("/v1/models/digits")).json()
            return {**answer.json(), "calibration": described["calibration"]}

    plain, wide = (asyncio.run(scenario(one)) for one in (model, dataclasses.replace(model, manifest=manifest)))
    assert (plain.pop("calibration"), wide.pop("calibration")) == ({}, told)
    before, after = (np.array(answer.pop("std"), np.float32) for answer in (plain, wide))
    assert plain == wide
    np.testing.assert_array_equal(before[..., :4, :], after[..., :4, :])
    np.testing.assert_allclose(after, widened(before, np.where(mask > 0, 1.0, told[quality][APART])), rtol=1e-3)
    assert (after[..., 4:, :] > 1.01 * before[..., 4:, :]).all()


def test_a_heat_map_is_the_calibrated_deviation_in_colours(restoring: Repository) -> None:
    """Of each row a tile, on one scale, which the header tells; JSON has the numbers."""
    rng = np.random.default_rng(1)
    images = rng.random((2, 3, 8, 12)).tolist()
    query = {"noise": "none", "uncertainty": "map"}

    async def scenario() -> tuple[httpx.Response, httpx.Response]:
        transport = httpx.ASGITransport(create_app(Settings(), restoring))
        async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as client:
            mask = rng.integers(0, 2, (2, 1, 8, 12)).tolist()
            body = {"images": images, "mask": mask}
            told = await client.post("/v1/inpaint", params=query, json=body)
            return told, await client.post("/v1/inpaint", params=query, json=body, headers={"accept": "image/png"})

    told, picture = asyncio.run(scenario())
    assert (told.status_code, picture.status_code) == (200, 200), (told.text, picture.text)
    std, scale = np.asarray(told.json()["std"], np.float32), told.json()["std_scale"]
    deviation = np.sqrt(np.square(std).mean(1))
    assert scale == pytest.approx(np.percentile(deviation, 99), abs=1e-5)
    assert float(picture.headers["x-std-scale"]) == scale
    with Image.open(io.BytesIO(picture.content)) as image:
        sheet = np.asarray(image)
    assert sheet.shape == (8, 24, 3)
    found = np.concatenate([sheet[:, :12][None], sheet[:, 12:][None]])
    np.testing.assert_array_equal(np.moveaxis(found, -1, 1), heat_map(std, scale))


def test_colours_rise_in_lightness_and_end_at_the_top_of_the_scale() -> None:
    """From black to a light yellow, by even steps of CIE lightness; what is above the top has the last colour."""
    ramp = heat_map(np.linspace(0.0, 2.0, 512, dtype=np.float32).reshape(1, 1, 1, 512), 1.0)[0, :, 0].T
    np.testing.assert_array_equal(ramp[0], [0x00, 0x00, 0x04])
    np.testing.assert_array_equal(ramp[-200:], np.broadcast_to([0xFC, 0xFF, 0xA4], (200, 3)))
    linear = (ramp[:256] / 255.0) ** 2.2
    lightness = 116.0 * np.cbrt(np.maximum(linear @ [0.2126, 0.7152, 0.0722], 1e-9)) - 16.0
    assert (np.diff(lightness[16:]) >= -0.2).all()
    assert np.ptp(np.diff(lightness[32::32])) < 6.0
