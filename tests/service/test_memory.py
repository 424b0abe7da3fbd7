"""Memory: what would need too much is refused before it is there."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image

from service.api.memory import Memory, Share
from service.app import create_app
from service.errors import Overloaded, TooLarge
from service.operations.inference.restoration import fuse_rows
from service.operations.inference.vae import encode_rows
from service.repository.repository import Repository
from service.runtime.model import MOST_PROGRAMS, Model
from service.settings import Settings

MIB = 2**20
RAW = {"content-type": "application/octet-stream"}
JSON, NPY = {"accept": "application/json"}, {"accept": "application/x-npy"}


@cache
def app_of(models: Path, memory_bytes: int) -> FastAPI:
    """Shared by the cases of one limit."""
    return create_app(Settings(models=models, memory_bytes=memory_bytes, max_pixels=2**16))


def answers(app: FastAPI, *requests: tuple[str, dict[str, Any]]) -> list[httpx.Response]:
    """To requests made at once."""

    async def scenario() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as one:
            return await asyncio.gather(*(one.post(f"/v1/{path}", **request) for path, request in requests))

    return asyncio.run(scenario())


def black(side: int) -> str:
    file = io.BytesIO()
    Image.new("L", (side, side)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


IMAGES = np.zeros((200, 64), "<f4").tobytes()
GREEDY: dict[str, tuple[str, dict[str, Any], int]] = {
    "many rows": ("sample?count=16384", {"headers": JSON}, MIB),
    "many completions": ("denoise?draws=64&completions=true", {"content": IMAGES, "headers": {**RAW, **JSON}}, MIB),
    "many latents": ("encode?draws=64", {"content": IMAGES, "headers": {**RAW, **JSON}}, MIB),
    "much noise": ("score?quality=refined", {"content": IMAGES, "headers": {**RAW, **JSON}}, MIB),
    "small images to be large": ("encode?fit=resize", {"json": {"images": [[[0.0]]] * 9000}}, MIB),
    "many tiles": ("denoise?fit=tile", {"json": {"images": np.zeros((8, 4096), int).tolist()}}, MIB),
    "the same in parts": (
        "encode?fit=resize",
        {"json": {"images": [[[0.0]]] * 9000}, "headers": {"accept": "application/x-npy"}},
        MIB,
    ),
    "a form that cannot hold it": (
        "encode?draws=4",
        {"content": np.zeros((1200, 64), "<f4").tobytes(), "headers": {**RAW, "accept": "application/x-npy,*/*;q=0.5"}},
        MIB,
    ),
    "many numbers": ("encode", {"json": {"images": [0] * (MIB // 2)}}, 4 * MIB),
    "a large body": ("encode", {"content": bytes(2 * MIB), "headers": RAW}, MIB),
}


@pytest.mark.parametrize("case", GREEDY)
def test_what_needs_too_much_is_refused_by_the_name_of_the_setting(digits_models: Path, case: str) -> None:
    """Whatever makes it much; a modest request is answered."""
    path, request, limit = GREEDY[case]
    (answer,) = answers(app_of(digits_models, limit), (path, request))
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large"), answer.text
    assert "VAE_MEMORY_BYTES" in answer.json()["detail"]


def test_the_same_in_parts_is_answered(digits_models: Path) -> None:
    """What is sent part by part needs the memory of a few parts."""
    (whole,) = answers(app_of(digits_models, 4 * MIB), ("sample?count=16384", {"headers": NPY}))
    assert whole.status_code == 200
    assert np.load(io.BytesIO(whole.content)).shape == (16384, 1, 8, 8)


def test_pictures_of_one_request_are_counted_together(digits_models: Path) -> None:
    """Small files can be large pictures."""
    body = {"images": [black(128)] * 5}
    (answer,) = answers(app_of(digits_models, 4 * MIB), ("encode?fit=resize", {"json": body}))
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert "VAE_MAX_PIXELS" in answer.json()["detail"]


def test_what_others_leave_no_room_for_may_come_back(slow: Callable[[Callable[[], object]], Repository]) -> None:
    """503 beside what is under way, answered after it; nothing stays taken, whatever became of the requests."""
    app = create_app(Settings(max_rows=8, memory_bytes=2 * MIB), slow(lambda: time.sleep(0.005)))
    greedy = ("sample?count=1500", {"headers": JSON})
    found = answers(app, greedy, greedy, ("decode", {"json": {"latents": [[0.0] * 8]}}))
    assert sorted(answer.status_code for answer in found) == [200, 200, 503]
    refused = next(answer for answer in found if answer.status_code == 503)
    assert refused.json()["code"] == "overloaded"
    assert "VAE_MEMORY_BYTES" in refused.json()["detail"]
    assert int(refused.headers["retry-after"]) >= 1


def test_programs_are_not_remembered_for_ever(model: Model) -> None:
    """However many blurs are named; what requests without options need stays."""
    usual = model.plan("encode", encode_rows, 0, model.latent_at)
    for k in range(2 * MOST_PROGRAMS):
        assert model.plan("fuse", fuse_rows, 0, ("blur", 1.0 + k, 8, 8)).operation == "fuse"
    assert len(model.programs) <= MOST_PROGRAMS
    assert model.plan("encode", encode_rows, 0, model.latent_at) is usual


def test_long_queries_are_not_remembered(digits_models: Path) -> None:
    """Nor are they any worse for it."""
    app = app_of(digits_models, 3 * MIB)
    first, again = answers(app, *[(f"sample?seed={'0' * 4000}7", {"headers": NPY})] * 2)
    short = answers(app, ("sample?seed=7", {"headers": NPY}))[0]
    assert first.content == again.content == short.content
    route = next(one for one in app.routes if getattr(one, "path", "") == "/v1/sample")
    assert route.app._remembered.cache_info().currsize == 1  # type: ignore[attr-defined]


def test_shares_are_given_back() -> None:
    """All that was taken, once; what is needed beside a body is not added up."""
    memory = Memory(100)
    for _ in range(3):
        one, other = Share(memory), Share(memory)
        one.grow(20)
        one.need(30)
        one.need(10)
        assert memory.taken == 50
        with pytest.raises(TooLarge):
            one.need(90)
        with pytest.raises(Overloaded):
            other.need(60)
        one.give_back()
        other.need(60)
        other.give_back()
        assert memory.taken == 0
