"""The page for people: what it is made of, who may ask for what, what a preview shows. All without a browser."""

from __future__ import annotations

import asyncio
import gzip
import io
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx
import numpy as np
import pytest
import tifffile
from fastapi import FastAPI
from PIL import Image

from service.app import create_app
from service.repository.repository import Repository
from service.settings import Settings

ROOT = Path(__file__).parents[2]
STATIC = ROOT / "service" / "api" / "playground" / "static"
HOME = "http://localhost/"
INFER, CONTROL = "infer-0123456789abcdef", "control-0123456789abcdef"
MOST_BYTES = 120_000
NAMED = re.compile(r'(?:src|href)="(page/[^"]+)"')


def asked(app: FastAPI, scenario: Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]]) -> None:
    """Run a scenario with a client of the application."""

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=HOME) as client:
            await scenario(client)

    asyncio.run(run())


def empty(**settings: Any) -> FastAPI:
    """A service without models."""
    return create_app(Settings(**settings), Repository({}, ""))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with a key that infers, and one that has both rights."""
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"alice {INFER} infer\nops {CONTROL} infer,control\n")
    path.chmod(0o600)
    return str(path)


def test_the_page_has_a_strict_policy() -> None:
    """It allows files and calls of the service alone: no other host, no inline script or style, no HTML from text."""

    async def scenario(client: httpx.AsyncClient) -> None:
        page = await client.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        (policy,) = page.headers.get_list("content-security-policy")
        rules = dict(part.split(" ", 1) for part in policy.split("; "))
        assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == rules["frame-ancestors"] == "'none'"
        for kind in ("script-src", "style-src", "img-src", "connect-src"):
            assert rules[kind] == "'self'"
        assert rules["require-trusted-types-for"] == "'script'"
        assert page.headers["x-frame-options"] == "DENY"
        assert page.headers["referrer-policy"] == "no-referrer"
        assert page.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"<script(?![^>]* src=)|<style| style=| on\w+=", page.text)
        assert "sha256-" in (await client.get("/docs")).headers["content-security-policy"]

    asked(empty(), scenario)


def test_the_page_and_its_files_are_small_and_all_there() -> None:
    """Every module is loaded with the page, relative, in less than 120 KB; nothing names another host."""

    async def scenario(client: httpx.AsyncClient) -> None:
        client.headers["accept-encoding"] = "identity"
        page = await client.get("/")
        named = set(NAMED.findall(page.text))
        assert {name.rpartition("/")[2] for name in named} >= {path.name for path in STATIC.glob("*.js")}
        total = len(page.content)
        for name in named:
            answer = await client.get(urljoin(HOME, name))
            assert answer.status_code == 200, name
            total += len(answer.content)
            if name.endswith((".js", ".css")):
                assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)\w", answer.text), name
        assert total < MOST_BYTES

    asked(empty(), scenario)


def test_files_are_kept_for_as_long_as_they_are_the_same() -> None:
    """The page is asked for anew with its ETag; its files have the version in their URL and are not asked for again."""

    async def scenario(client: httpx.AsyncClient) -> None:
        page = await client.get("/")
        assert page.headers["cache-control"] == "no-cache"
        again = await client.get("/", headers={"if-none-match": page.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        (name,) = (name for name in NAMED.findall(page.text) if name.endswith("app.js"))
        script = await client.get(urljoin(HOME, name))
        assert script.headers["cache-control"] == "public, max-age=31536000"
        assert script.headers["content-type"] == "text/javascript; charset=utf-8"
        async with client.stream("GET", urljoin(HOME, name), headers={"accept-encoding": "gzip"}) as packed:
            assert packed.headers["content-encoding"] == "gzip"
            content = b"".join([part async for part in packed.aiter_raw()])
            assert gzip.decompress(content) == (STATIC / "app.js").read_bytes()
        assert (await client.head("/")).status_code == 200
        for wrong in ("page/0123456789ab/app.js", "page/files/app.js", name.replace("app.js", "index.html")):
            assert (await client.get(urljoin(HOME, wrong))).status_code == 404
        for wrong in ("..%2fpage.py", "%2e%2e/page.py", "__init__.py"):
            assert (await client.get(urljoin(HOME, name.replace("app.js", wrong)))).status_code == 404

    asked(empty(), scenario)


def test_the_page_can_be_removed() -> None:
    """With VAE_PAGE=false nothing of it is left, and everything else is as before."""

    async def scenario(client: httpx.AsyncClient) -> None:
        for path in ("/", "/page/access", "/page/0123456789ab/app.js"):
            answer = await client.get(path)
            assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
        assert (await client.post("/page/models/mnist/preview")).status_code == 404
        for path in ("/docs", "/health/live", "/metrics", "/v1/models"):
            assert (await client.get(path)).status_code == 200

    asked(empty(page=False), scenario)


def test_a_page_without_documentation_names_none() -> None:
    """The link to /docs goes with /docs."""

    async def told(client: httpx.AsyncClient) -> None:
        assert 'href="docs"' in (await client.get("/")).text

    async def untold(client: httpx.AsyncClient) -> None:
        assert '"docs"' not in (await client.get("/")).text

    asked(empty(), told)
    asked(empty(docs=False), untold)


def test_below_a_path_the_page_finds_its_files() -> None:
    """Links are relative; the path without its slash leads to the one with it."""

    async def scenario(client: httpx.AsyncClient) -> None:
        page = await client.get("/vae/")
        for name in NAMED.findall(page.text):
            assert (await client.get(urljoin(f"{HOME}vae/", name))).status_code == 200
        bare = await client.get("/vae")
        assert (bare.status_code, urljoin(f"{HOME}vae", bare.headers["location"])) == (307, f"{HOME}vae/")
        assert (await client.get("/vae/page/access")).json()["key"] is None

    asked(empty(root_path="/vae"), scenario)
    with pytest.raises(ValueError, match="root path"):
        Settings(root_path="/page")


def test_the_page_is_open_and_what_it_asks_for_is_not(keys: str) -> None:
    """Without a key there are the page and its files, at a rate; what the caller may do, and previews, need one."""

    async def scenario(client: httpx.AsyncClient) -> None:
        page = await client.get("/")
        assert page.status_code == 200
        assert (await client.get(urljoin(HOME, NAMED.findall(page.text)[0]))).status_code == 200
        for method, path in (("GET", "/page/access"), ("POST", "/page/models/mnist/preview"), ("GET", "/page/a/b/c")):
            assert (await client.request(method, path)).status_code == 401, path
        told = await client.get("/page/access", headers={"authorization": f"Bearer {INFER}"})
        assert told.json() == {
            "key": "alice",
            "may": {"infer": None, "control": "this needs the right `control`, which the API key alice does not have"},
        }
        told = await client.get("/page/access", headers={"authorization": f"Bearer {CONTROL}"})
        assert told.json() == {"key": "ops", "may": {"infer": None, "control": None}}

    async def limited(client: httpx.AsyncClient) -> None:
        assert [(await client.get("/")).status_code for _ in range(4)] == [200, 200, 200, 429]

    asked(empty(api_keys=keys, model_control=True), scenario)
    asked(empty(open_rate="3/day"), limited)


def test_without_control_the_page_says_who_can_allow_it(keys: str) -> None:
    """The reason is the API's own, whether a key lacks the right or the setting does."""

    async def scenario(client: httpx.AsyncClient) -> None:
        told = (await client.get("/page/access", headers={"authorization": f"Bearer {CONTROL}"})).json()
        refused = await client.post("/v1/models/m/load", headers={"authorization": f"Bearer {CONTROL}"})
        assert told["may"]["control"] == refused.json()["detail"]
        assert "VAE_MODEL_CONTROL" in told["may"]["control"]

    asked(empty(api_keys=keys), scenario)


def test_a_preview_is_the_picture_that_was_sent(small: Repository) -> None:
    """A TIFF of 16 bits comes back as a PNG of the same numbers; `scale` and `fit` show what the model gets."""
    levels = np.random.default_rng(1).integers(0, 65536, (28, 28), np.uint16)
    file = io.BytesIO()
    tifffile.imwrite(file, levels)

    async def scenario(client: httpx.AsyncClient) -> None:
        async def shown(content: bytes, accept: str = "image/png", **options: str) -> bytes:
            path, headers = "/page/models/mnist-2d/preview", {"accept": accept}
            answer = await client.post(path, params=options, files={"file": content}, headers=headers)
            assert answer.status_code == 200, answer.text
            return answer.content

        def picture(content: bytes) -> Image.Image:
            return Image.open(io.BytesIO(content))

        assert np.array_equal(np.asarray(picture(await shown(file.getvalue()))), levels)
        scaled = np.load(io.BytesIO(await shown(file.getvalue(), "application/x-npy", scale="0,40000")))
        assert np.allclose(scaled[0, 0], levels / 40000, atol=1e-6)
        large = io.BytesIO()
        Image.new("RGB", (60, 40), "white").save(large, "PNG")
        assert picture(await shown(large.getvalue(), fit="resize")).size == (28, 28)
        refused = await client.post("/page/models/mnist-2d/preview", files={"file": b"no picture"})
        assert (refused.status_code, refused.json()["code"]) == (400, "unreadable_body")
        refused = await client.post("/page/models/nobody/preview", files={"file": file.getvalue()})
        assert (refused.status_code, refused.json()["code"]) == (404, "unknown_model")

    asked(create_app(Settings(), small), scenario)


def test_the_examples_are_those_of_the_project() -> None:
    """The photograph and the digits of the page are the files of examples/."""
    for name, example in (("photograph", "astronaut"), ("digit", "digit"), ("noisy", "noisy")):
        assert (STATIC / f"{name}.png").read_bytes() == (ROOT / "examples" / f"{example}.png").read_bytes()
    assert tifffile.imread(STATIC / "moon.tif").dtype == np.uint16


def test_the_wheel_has_every_file_of_the_page(tmp_path: Path) -> None:
    """An installed service serves the page, too."""
    project = tmp_path / "project"
    project.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "service", "training", "experiments"):
        (project / name).symlink_to(ROOT / name)
    build = "import setuptools.build_meta as build; build.build_wheel('wheel')"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", build], cwd=project, env=os.environ | {"PYTHONWARNINGS": "ignore"},
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = (project / "wheel").glob("*.whl")
    inside = {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if "playground/static/" in name}
    assert inside == {path.name for path in STATIC.iterdir()}
