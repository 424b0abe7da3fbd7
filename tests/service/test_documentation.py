"""The documentation, which needs no network, and what is kept of it and of the metrics."""

from __future__ import annotations

import asyncio
import gzip
import re
from base64 import b64encode
from collections.abc import Callable, Coroutine
from hashlib import sha256
from typing import Any
from urllib.parse import urljoin

import httpx
import pytest
from fastapi import FastAPI

from service.app import create_app
from service.config import Settings
from service.engine import Engine
from service.repository import Repository
from service.routes.metrics import KEEP_S, RENDERS, Exposition

HOME = "http://localhost/"


def asked(scenario: Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]], **settings: Any) -> FastAPI:
    """Run a scenario with a client of a service without models."""
    app = create_app(Settings(**settings), Repository({}, ""))

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=HOME) as client:
            await scenario(client)

    asyncio.run(run())
    return app


def test_the_page_names_no_other_host() -> None:
    """Nor does its policy; what it names is there, with the media type that `nosniff` demands."""

    async def scenario(client: httpx.AsyncClient) -> None:
        page = await client.get("/docs")
        assert "//" not in page.text
        policy = page.headers["content-security-policy"]
        assert "//" not in policy
        assert "'unsafe-eval'" not in policy
        script_policy = next(part for part in policy.split("; ") if part.startswith("script-src"))
        assert "unsafe" not in script_policy
        (script,) = re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL)
        assert b64encode(sha256(script.encode()).digest()).decode() in script_policy
        assert 'validatorUrl": null' in script
        named = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        kinds = {"js": "text/javascript", "css": "text/css", "png": "image/png"}
        assert {name.rpartition(".")[2] for name in named} == kinds.keys()
        for name in named:
            answer = await client.get(urljoin(f"{HOME}docs", name))
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith(kinds[name.rpartition(".")[2]])
            assert len(answer.content) > 1000
        (document,) = re.findall(r"url: '([^']+)'", script)
        assert (await client.get(urljoin(f"{HOME}docs", document))).json()["openapi"].startswith("3.")

    asked(scenario)


@pytest.mark.parametrize(
    "path", ["/docs", "/docs/swagger-ui-bundle.js", "/docs/favicon.png", "/openapi.json", "/metrics"]
)
def test_who_has_it_is_not_sent_it_again(path: str) -> None:
    """304 for the ETag, whatever stands beside it; gzip for who takes it, which says the same."""

    async def scenario(client: httpx.AsyncClient) -> None:
        client.headers["accept-encoding"] = "identity"
        full = await client.get(path)
        assert "content-encoding" not in full.headers
        etag = full.headers["etag"]
        for known in (etag, etag.removeprefix("W/"), f'"other", {etag}', "*"):
            answer = await client.get(path, headers={"if-none-match": known})
            assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
        assert (await client.get(path, headers={"if-none-match": '"other"'})).content == full.content
        async with client.stream("GET", path, headers={"accept-encoding": "br, gzip;q=0.5"}) as packed:
            content = b"".join([part async for part in packed.aiter_raw()])
        assert packed.headers["content-encoding"] == "gzip"
        assert packed.headers["vary"] == "Accept-Encoding"
        assert gzip.decompress(content) == full.content
        assert "content-encoding" not in (await client.get(path, headers={"accept-encoding": "gzip;q=0"})).headers

    asked(scenario)


def test_the_document_is_rendered_once() -> None:
    """The bytes are kept: not even a change of what they were made of changes them."""

    async def scenario(client: httpx.AsyncClient) -> None:
        first = await client.get("/openapi.json")
        app = client._transport.app  # type: ignore[attr-defined]
        app.openapi = None
        app.openapi_schema.clear()
        assert (await client.get("/openapi.json")).content == first.content

    asked(scenario)


def test_a_flood_of_scrapes_renders_little() -> None:
    """What is counted shows at once, until somebody asks too often; then after a moment."""

    async def scenario() -> None:
        now = 0.0
        telemetry = Engine(Settings()).telemetry
        exposition = Exposition(telemetry, lambda: now)
        first = exposition.current()
        assert exposition.current() is first, "nothing was counted"
        rendered = {first.etag}
        for _ in range(100):
            telemetry.refused("unauthenticated")
            rendered.add(exposition.current().etag)
        assert len(rendered) == RENDERS
        now = KEEP_S
        assert b'vae_refused_total{code="unauthenticated"} 100.0' in exposition.current().content
        before = exposition.current()
        now = 2 * KEEP_S
        assert exposition.current() is not before, "gauges change without a call"

    asyncio.run(scenario())


def test_under_a_root_path_everything_is_found() -> None:
    """Whether the proxy removes the path or not; the document names it as its server."""

    async def scenario(client: httpx.AsyncClient) -> None:
        for path in ("/openapi.json", "/vae/openapi.json"):
            assert (await client.get(path)).json()["servers"] == [{"url": "/vae"}]
        for path in ("/vae/docs", "/vae/docs/swagger-ui.css", "/vae/v1/models", "/vae/health/live"):
            assert (await client.get(path)).status_code == 200
            assert (await client.get(path.removeprefix("/vae"))).status_code == 200
        for path in ("/vaex/docs", "/vae/vae/docs", "/va/docs"):
            assert (await client.get(path)).status_code == 404
        answer = await client.get("/vae/docs/")
        assert urljoin(f"{HOME}vae/docs/", answer.headers["location"]) == f"{HOME}vae/docs"

    asked(scenario, root_path="/vae/")


@pytest.mark.parametrize(
    "root_path", ["vae", "//vae", "/vae//x", "/v1", "/docs/x", "/a b", "/../x", "/%76", "/a?b", "http://x/vae"]
)
def test_a_root_path_is_a_plain_path(root_path: str) -> None:
    """Others would be read in two ways, or hide what the service serves."""
    with pytest.raises(ValueError, match="root path"):
        Settings(root_path=root_path)
