"""Requests that take long: large photographs within the default limits, and streams of progress."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.app import create_app
from service.repository.repository import Repository
from service.settings import Settings
from tests.support.versions import free_version, opened

PIXELS = 24e6
"""Of a photograph that the default limits are made for."""
SENT = (1200, 800)
IMAGES = {"images": [[[0.5] * 8] * 8], "level": 0.1}
STREAMS = ("text/event-stream", "application/x-ndjson")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A small model that restores grey and colour images of any size."""
    folder = tmp_path_factory.mktemp("models") / "free" / "1"
    free_version(folder, channels=(3, 1), graphs=("decoder", "restoration"), prior=None)
    return Repository({"free": {"1": opened(folder)}}, "free")


def asked(repository: Repository, settings: Settings, path: str, **request: Any) -> httpx.Response:
    """The answer of a service with these settings."""

    async def scenario() -> httpx.Response:
        app = create_app(settings, repository)
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as client,
        ):
            return await client.post(path, **request)

    return asyncio.run(scenario())


def photograph(form: str) -> bytes:
    """A smooth colour picture with a little noise."""
    y, x = np.mgrid[: SENT[1], : SENT[0]]
    waves = np.stack([np.sin(x / 37), np.cos(y / 53), np.sin((x + y) / 91)], -1)
    levels = 127.5 + 100.0 * waves + np.random.default_rng(0).normal(0, 8, waves.shape)
    file = io.BytesIO()
    Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8)).save(file, form)
    return file.getvalue()


@pytest.mark.parametrize(("form", "operation"), [("JPEG", "denoise"), ("PNG", "denoise?level=0.05")])
def test_a_photograph_of_24_megapixels_fits_the_default_limits(
    repository: Repository, form: str, operation: str
) -> None:
    """In pixels, in bytes and in the memory budget, here all at a twenty-fifth of the size."""
    usual, share = Settings(), SENT[0] * SENT[1] / PIXELS
    assert usual.max_pixels > PIXELS
    limits = {name: int(share * getattr(usual, name)) for name in ("max_pixels", "memory_bytes", "tile_pixels")}
    content = photograph(form)
    assert len(content) < share * usual.max_body_bytes
    answer = asked(repository, Settings(**limits), f"/v1/{operation}", files={"file": content})
    assert answer.status_code == 200, answer.text
    with Image.open(io.BytesIO(answer.content)) as image:
        assert (image.size, image.mode) == (SENT, "RGB")


def test_a_request_that_streams_its_progress_has_the_long_time(repository: Repository) -> None:
    """And no other; X-Timeout-Ms shortens it."""
    for short, settings in ((True, Settings(timeout_s=1e-6)), (False, Settings(long_timeout_s=1e-6))):
        for accept in ("application/json", *STREAMS):
            answer = asked(repository, settings, "/v1/denoise", json=IMAGES, headers={"accept": accept})
            late = short == (accept not in STREAMS)
            assert answer.status_code == (504 if late else 200), answer.text
            assert not late or "VAE_LONG_TIMEOUT_S" in answer.json()["detail"]
    hurried = {"accept": STREAMS[0], "x-timeout-ms": "1"}
    body = np.zeros((64, 3, 64, 64), np.float32)
    file = io.BytesIO()
    np.save(file, body)
    headers = {**hurried, "content-type": "application/x-npy"}
    assert asked(repository, Settings(), "/v1/denoise", content=file.getvalue(), headers=headers).status_code == 504
