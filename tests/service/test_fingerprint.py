"""Fingerprints: latents name their model, and no other model decodes them by accident."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from service.app import create_app
from service.settings import Settings

IMAGES = np.zeros((2, 1, 28, 28), "<f4")
LATENTS = [[0.1, 0.2], [0.3, 0.4]]
RAW = {"content-type": "application/octet-stream", "accept": "application/octet-stream"}


@asynccontextmanager
async def client(models: Path) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(Settings(models=models, max_rows=8, threads=1)))
    base = "http://x/v1/models/mnist-2d/versions"
    async with httpx.AsyncClient(transport=transport, base_url=base, timeout=60) as one:
        yield one


def npy(array: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_every_answer_with_latents_names_the_model_that_they_are_of(
    flat_models: Path, brighter: Callable[..., Path]
) -> None:
    """JSON, headers and events have the fingerprint of /v1/models."""
    brighter(flat_models, "2")

    async def scenario() -> None:
        async with client(flat_models) as one:
            told = {version: (await one.get(f"/{version}")).json()["fingerprint"] for version in "12"}
            assert told["1"] != told["2"]
            for version, fingerprint in told.items():
                for operation, body in (
                    ("encode", {"images": IMAGES.tolist(), "draws": 1}),
                    ("sample", {"latents": True}),
                    ("traverse", {"size": 2, "latents": True}),
                    ("interpolate", {"latents": LATENTS, "latent_walk": True}),
                ):
                    answer = await one.post(f"/{version}/{operation}", json=body)
                    assert answer.json()["fingerprint"] == answer.headers["x-fingerprint"] == fingerprint
                raw = await one.post(f"/{version}/encode", content=IMAGES.tobytes(), headers=RAW)
                assert raw.headers["x-fingerprint"] == fingerprint
                accept = {"accept": "application/x-ndjson"}
                events = await one.post(f"/{version}/encode", json={"images": IMAGES.tolist()}, headers=accept)
                assert events.headers["x-fingerprint"] == json.loads(events.text)["fingerprint"] == fingerprint

    asyncio.run(scenario())


def test_latents_of_another_model_are_refused_by_both_names(flat_models: Path, brighter: Callable[..., Path]) -> None:
    """Another model refuses them before it checks their shape, and names both; the right one decodes them."""
    brighter(flat_models, "2")
    file = {"file": ("z.npy", npy(np.array(LATENTS, "<f4")))}

    async def scenario() -> None:
        async with client(flat_models) as one:
            own, other = [(await one.get(f"/{version}")).json()["fingerprint"] for version in "12"]
            for fingerprint, status in ((own, 200), (other, 409)):
                said: tuple[tuple[str, dict[str, Any]], ...] = (
                    ("decode", {"json": {"latents": LATENTS, "fingerprint": fingerprint}}),
                    ("decode", {"json": {"latents": LATENTS}, "params": {"fingerprint": fingerprint}}),
                    ("decode", {"json": {"latents": LATENTS}, "headers": {"x-fingerprint": fingerprint}}),
                    ("decode", {"files": file, "data": {"fingerprint": fingerprint}}),
                    ("interpolate", {"json": {"latents": LATENTS, "fingerprint": fingerprint}}),
                    ("interpolate", {"json": {"latents": LATENTS}, "headers": {"x-fingerprint": fingerprint}}),
                )
                for operation, request in said:
                    answer = await one.post(f"/1/{operation}", **request)
                    assert answer.status_code == status, answer.text[:300]
                    if status == 409:
                        assert answer.json()["code"] == "wrong_model"
                        assert own in answer.json()["detail"]
                        assert other in answer.json()["detail"]
            (document,) = (await one.get("http://x/openapi.json")).json()["paths"]["/v1/decode"].values()
            assert {named["name"] for named in document["parameters"]} == {"fingerprint", "X-Fingerprint", "channels"}
            longer = await one.post("/1/decode", json={"latents": [[0.0] * 40], "fingerprint": other})
            assert longer.status_code == 409

    asyncio.run(scenario())
