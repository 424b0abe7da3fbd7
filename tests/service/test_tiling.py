"""Large images as tiles: nothing is lost, no seams, and what is refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.app import create_app
from service.errors import InvalidShape
from service.operations.inference.tiling import tiling
from service.repository.repository import Repository
from service.runtime.model import Model
from service.settings import Settings

Rows = NDArray[np.float32]
Graphs = dict[str, Callable[..., tuple[Rows, ...]]]


@given(st.integers(4, 40), st.integers(3, 40), st.integers(1, 3))
def test_what_is_cut_is_joined_again(height: int, width: int, images: int) -> None:
    """Of any size: every pixel is in some tile, tiles overlap by half, and untouched they make the same image."""
    found = tiling(images, (height, width), (4, 3))
    x = np.random.default_rng(0).random((images, 2, height, width)).astype(np.float32)
    tiles = found.cut(x)
    assert tiles.shape == (images * found.tiles, 2, 4, 3)
    assert np.allclose(found.joined(tiles), x, atol=1e-6)
    assert found.tops[0] == found.lefts[0] == 0
    assert (found.tops[-1], found.lefts[-1]) == (height - 4, width - 3)
    assert max(np.diff(found.tops), default=0) <= 2


def test_there_are_no_seams() -> None:
    """Tiles of two flat greys in turn are blended: no step is larger than a quarter of their difference."""
    found = tiling(1, (8, 40), (8, 8))
    flat = np.ones((found.tiles, 1, 8, 8), np.float32) * (np.arange(found.tiles) % 2)[:, None, None, None]
    assert np.abs(np.diff(found.joined(flat)[0, 0, 0])).max() <= 0.25


def test_smaller_images_are_refused() -> None:
    """With the way out."""
    with pytest.raises(InvalidShape, match="fit=pad"):
        tiling(1, (8, 5), (8, 8))


def page(images: Rows, sigma: float = 0.2) -> Rows:
    """Six by eight pixels more than a tile, noisy."""
    wide = np.concatenate([images[0, 0], images[1, 0]], 1)[None, None]
    return (wide + sigma * np.random.default_rng(0).standard_normal(wide.shape)).astype(np.float32)


def asked(client: httpx.Client, path: str, content: dict[str, Any]) -> dict[str, Any]:
    answer = client.post(path, json=content)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_a_page_is_restored_tile_by_tile(client: httpx.Client, images: Rows) -> None:
    """Each tile as it would be alone, blended; the answer has the page's size and one level."""
    y = page(images)
    found = asked(client, "/v1/denoise?fit=tile&level=0.2&uncertainty=true", {"images": y.tolist()})
    tiles = tiling(1, (8, 16), (8, 8))
    assert np.asarray(found["images"]).shape == np.asarray(found["std"]).shape == (1, 1, 8, 16)
    alone = asked(client, "/v1/denoise?level=0.2", {"images": tiles.cut(y).tolist()})
    expected = tiles.joined(np.asarray(alone["images"], np.float32))
    assert np.allclose(found["images"], expected, atol=1e-6)
    assert found["level"] == pytest.approx([0.2])


def test_an_unknown_level_is_that_of_the_whole_page(client: httpx.Client, images: Rows, graphs: Graphs) -> None:
    """The median of the tiles' estimates, and the answer is the one for that level told."""
    y = page(images)
    tiles = tiling(1, (8, 16), (8, 8)).cut(y)
    estimate = float(np.median(graphs["noise_level"](tiles, np.ones_like(tiles))[0][:, 0]))
    found = asked(client, "/v1/denoise?fit=tile", {"images": y.tolist()})
    assert found["level"] == pytest.approx([min(estimate, 1.0)], rel=1e-5)
    told = asked(client, f"/v1/denoise?fit=tile&level={found['level'][0]!r}", {"images": y.tolist()})
    assert np.allclose(told["images"], found["images"], atol=1e-5)


def test_a_page_is_inpainted_tile_by_tile(client: httpx.Client, images: Rows) -> None:
    """What is seen is kept; the mask has the page's size."""
    y, mask = page(images, 0.0), np.ones((8, 16))
    mask[2:5, 6:12] = 0
    found = asked(client, "/v1/inpaint?fit=tile&draws=3&seed=1", {"images": y.tolist(), "mask": mask.tolist()})
    assert np.allclose(np.asarray(found["images"])[0, 0][mask == 1], y[0, 0][mask == 1], atol=1e-6)
    assert np.abs(np.asarray(found["images"])[0, 0] - y[0, 0])[mask == 0].max() > 0.01
    wrong = client.post("/v1/inpaint?fit=tile", json={"images": y.tolist(), "mask": mask[:, :8].tolist()})
    assert (wrong.status_code, wrong.json()["code"]) == (422, "invalid_shape")


def refused(client: httpx.Client, path: str, *shape: int) -> tuple[int, str]:
    """Status and detail of the refusal of a black page."""
    file = io.BytesIO()
    np.save(file, np.zeros(shape, np.float32))
    answer = client.post(path, content=file.getvalue(), headers={"content-type": "application/x-npy"})
    return answer.status_code, answer.json()["detail"]


@pytest.mark.parametrize(
    ("path", "shape", "fewer"),
    [
        ("/v1/denoise?fit=tile", (1, 1, 1080, 1920), ""),
        ("/v1/denoise?fit=tile&draws=2", (1, 1, 400, 400), "fewer draws or "),
        ("/v1/denoise?fit=tile", (2, 1, 400, 400), "fewer images or "),
    ],
)
def test_tiles_count_as_rows(client: httpx.Client, path: str, shape: tuple[int, ...], fewer: str) -> None:
    """A page that would need more than a request may have is refused before anything is computed, with what works."""
    status, detail = refused(client, path, *shape)
    assert status == 413
    assert detail.endswith(f"VAE_MAX_REQUEST_ROWS is 16384; use {fewer}fit=resize, pad or crop")


@pytest.mark.parametrize(
    ("path", "shape", "advised"),
    [
        ("denoise", (1, 1, 8, 16), True),
        ("denoise?draws=2", (100, 100, 1), True),
        ("denoise", (1, 1, 6, 16), False),
        ("denoise", (1, 1, 1080, 1920), False),
        ("super-resolve?factor=2", (1, 1, 8, 16), False),
        ("encode", (1, 1, 8, 16), False),
    ],
)
def test_tiles_are_advised_where_they_work(
    client: httpx.Client, path: str, shape: tuple[int, ...], advised: bool
) -> None:
    """By the operation and for the image; the other ways always are."""
    status, detail = refused(client, f"/v1/{path}", *shape)
    assert status == 422
    assert "fit=resize, pad or crop" in detail
    assert ("fit=tile" in detail) == advised


def test_a_model_of_whole_images_restores_no_tiles(
    model: Model, serve: Callable[[FastAPI], AbstractContextManager[str]]
) -> None:
    """It says so, and what works, which no longer includes tiles."""
    whole = Model(model.manifest.model_copy(update={"tileable": False}), model.graphs)  # type: ignore[arg-type]
    app = create_app(Settings(), Repository({"digits": {"1": whole}}, "digits"))
    with serve(app) as url, httpx.Client(base_url=url) as one:
        status, detail = refused(one, "/v1/denoise?fit=tile", 1, 1, 8, 16)
        assert (status, "not tileable" in detail) == (422, True)
        assert detail.endswith("fit=resize, pad or crop brings images to its 8 x 8")
        assert "tile" not in refused(one, "/v1/denoise", 1, 1, 8, 16)[1]
        assert one.get("/v1/models/digits").json()["tileable"] is False
