"""The documentation: /docs needs no network, code blocks of the pages run; what is kept of it and of the metrics."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from base64 import b64encode
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx
import pytest
import yaml
from fastapi import FastAPI
from torch.distributed.run import get_args_parser

from benchmarks.capacity import parser as capacity_parser
from experiments.__main__ import _parser as experiments_parser
from service.api.admin.metrics import KEEP_S, RENDERS, Exposition
from service.app import create_app
from service.bulk.command import parser as bulk_parser
from service.contract.manifest import Manifest
from service.observability.metrics import Telemetry
from service.operations.registry import OPERATIONS
from service.repository.repository import Repository
from service.settings import Settings, read_settings
from tests.support.pages import FENCED, MARK, PAGES, ROOT, Block, blocks
from training.__main__ import _parser
from training.config import RestoringRun, kind_of, load_as
from vae_client.command import make_parser

HOME = "http://localhost/"
DOCUMENTED = "http://127.0.0.1:8000"
OWN_TEST = ("extending.md", "importing.md")
"""Pages that tests/service/test_extending.py and test_imported.py carry out."""
WALKS = ("tutorial.md", "own-vae.md")
"""Pages that tests/site/test_walks.py carries out, because they train. Their files are checked here."""
SIGNATURES = {".png": b"\x89PNG\r\n\x1a\n", ".npy": b"\x93NUMPY", ".json": b"{"}
ASSIGNMENT = re.compile(r"([A-Z_]+)=(.*)", re.DOTALL)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
VAE = f"""vae() {{ {sys.executable} -m vae_client "$@"; }}
vae-bulk() {{ {sys.executable} -m service.bulk "$@"; }}"""
"""The project's commands, where they are not on the path."""
BLOCKS = [block for path in PAGES if path.name not in OWN_TEST for block in blocks(path)]
RUN = [block for block in BLOCKS if block.language in ("sh", "python") and not block.reason and block.page not in WALKS]
NOT_RUN = [command for block in BLOCKS if block.language == "sh" and block.reason for command in block.commands]


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
        telemetry = Telemetry(lambda: (0, 0))
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


def paths_of(routes: Iterable[Any]) -> Iterator[str]:
    """The paths of routes, and of those in routers among them."""
    for route in routes:
        router = getattr(route, "original_router", None)
        yield from [route.path] if router is None else paths_of(router.routes)


def test_no_root_path_hides_a_path_of_the_service() -> None:
    """Of any face: what is below the root path would be served without it, and so not at all."""
    paths = {*paths_of(create_app(Settings(), Repository({}, "")).routes)}
    assert {"/v2", "/v1/sample", "/diffusers/{model}/decode"} <= paths
    for first in {path.split("/")[1] for path in paths} - {""}:
        with pytest.raises(ValueError, match="root path"):
            Settings(root_path=f"/{first}")


def test_the_document_names_the_faces_that_it_leaves_out() -> None:
    """So that who looks for them in /docs learns where they are described."""
    document = create_app(Settings(), Repository({}, "")).openapi()
    assert not [path for path in document["paths"] if path.startswith(("/v2", "/diffusers"))]
    for name in ("/v2", "/diffusers", "docs/clients.md"):
        assert name in document["info"]["description"]


def check_make(words: list[str]) -> None:
    subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)


def check_python(words: list[str]) -> None:
    """A module of ours with its options, or a script."""
    if words[1] != "-m":
        assert (ROOT / words[1]).is_file()
    elif words[2] == "service":
        read_settings(words[3:])
    else:
        parsers = {"training": _parser, "experiments": experiments_parser, "benchmarks.capacity": capacity_parser}
        parser = parsers[words[2]]()
        options = parser.parse_args(words[3:])
        config = getattr(options, "config", None)
        if config is not None and (ROOT / config).parent != ROOT:  # others are written by the reader
            load_as(kind_of(ROOT / config), ROOT / config)


def check_torchrun(words: list[str]) -> None:
    options = get_args_parser().parse_args(words[1:])
    check_python(["python", "-m", options.training_script, *options.training_script_args])


def check_pip(words: list[str]) -> None:
    """Of this project or its client, or of both."""
    for word in words[2:]:
        found = re.fullmatch(r"(\.(?:/client)?)(?:\[(.+)\])?", word)
        assert found or word.startswith("-")
        if found and found[2]:
            extras = PROJECT["optional-dependencies"].keys() if found[1] == "." else set[str]()
            assert set(found[2].split(",")) <= extras


def check_vae(words: list[str]) -> None:
    make_parser().parse_args(words[1:])


def check_bulk(words: list[str]) -> None:
    bulk_parser().parse_args(words[1:])


def check_serve(words: list[str]) -> None:
    read_settings(words[1:])


def check_ray_serve(words: list[str]) -> None:
    """Arguments of the application."""
    if words[1] == "run":
        page = (ROOT / "deploy" / "ray_serve.py").read_text()
        assert all(f"    {word.partition('=')[0]}: " in page for word in words[2:] if re.match(r"\w+=", word))


def check_docker(words: list[str]) -> None:
    """Profiles and services; the rest needs an engine."""
    if words[1] == "compose":
        profiles = {name for service in COMPOSE.values() for name in service.get("profiles", ())}
        assert {words[k + 1] for k, word in enumerate(words) if word == "--profile"} <= profiles
        if "run" in words or "restart" in words:
            assert COMPOSE.keys() & set(words)


def check_kubectl(words: list[str]) -> None:
    """A folder of ours; tests/clients/ builds it, and makes the Secret."""
    if words[1] == "apply":
        assert (ROOT / words[words.index("-k") + 1] / "kustomization.yml").is_file()


def check_program(words: list[str]) -> None:
    """A program of ours, and a picture that it reads; tests/clients/ runs it."""
    assert next(word for word in words if (ROOT / word).is_file()).startswith("examples/clients/")


def check_openssl(words: list[str]) -> None:
    """Its help has the options."""
    done = subprocess.run([*words[:2], "-help"], check=True, capture_output=True, text=True)
    assert {word for word in words[2:] if word.startswith("-")} <= set((done.stdout + done.stderr).split())


def check_curl(words: list[str]) -> None:
    """An operation of the service."""
    (url,) = (word for word in words if word.startswith((DOCUMENTED, DOCUMENTED.replace("http:", "https:"))))
    assert url.partition("?")[0].rpartition("/")[2] in {operation.name for operation in OPERATIONS}


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "make": check_make,
    "python": check_python,
    "torchrun": check_torchrun,
    "pip": check_pip,
    "vae": check_vae,
    "vae-bulk": check_bulk,
    "vae-serve": check_serve,
    "openssl": check_openssl,
    "docker": check_docker,
    "kubectl": check_kubectl,
    "curl": check_curl,
    **dict.fromkeys(("node", "java", "go"), check_program),
    **dict.fromkeys(("chmod", "export", "mkdir", "printf", "ray", "set"), lambda _: None),
    "serve": check_ray_serve,
    "for": lambda _: None,
    "openapi-python-client": lambda _: None,
    "npx": lambda _: None,
}
"""How commands that take hours, a container engine or the network are checked without running them, by program."""


def test_every_block_says_what_it_is() -> None:
    """So that no command hides from the tests below: `text` is what a program prints, or a form."""
    languages = {"sh", "python", "toml", "json", "yaml", "text", "mermaid"}
    assert {block.place() for block in BLOCKS if block.language not in languages} == set()
    programs = re.compile(rf"^(?:\.venv/bin/)?({'|'.join(CHECKS)}|curl|npx|import|from|def|class) ", re.MULTILINE)
    assert {block.place() for block in BLOCKS if block.language == "text" and programs.search(block.text)} == set()
    assert {block.page for block in RUN} >= {"README.md", "api.md", "deployment.md"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_mark_stands_above_a_block(path: Path) -> None:
    """A mark that no block follows would hide that its block is gone."""
    assert len(MARK.findall(path.read_text())) == sum(bool(block.reason) for block in blocks(path))


def test_the_readme_is_short() -> None:
    """At most 120 lines."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    """To pages, pictures and code; `make docs` checks the anchors too."""
    for target in re.findall(r"\]\(([^)\s#]+)", FENCED.sub("", path.read_text())):
        assert "://" in target or (path.parent / target).exists(), target


@pytest.fixture(scope="module")
def address(serve: Callable[[FastAPI], AbstractContextManager[str]]) -> Iterator[str]:
    """Where the shipped models are served."""
    with serve(create_app(Settings(models=ROOT / "models", threads=1, model_control="anonymous"))) as url:
        yield url


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A folder for the blocks of each page, which has the project's models and examples."""
    found = {page: tmp_path_factory.mktemp(page.replace(".", "-")) for page in dict.fromkeys(b.page for b in RUN)}
    for folder in found.values():
        (folder / "examples").symlink_to(ROOT / "examples")
        (folder / ".curlrc").write_text('write-out = "%{stderr}status %{http_code}\\n"\n')
    return found


@pytest.mark.parametrize("block", RUN, ids=Block.place)
def test_blocks_do_what_they_say(block: Block, address: str, folders: Mapping[str, Path]) -> None:
    """As written, but for the port and the environment: no error, no refusal, and files are what they are named."""
    folder = folders[block.page]
    if re.search(" models[/ ]", block.text) and not (folder / "models").exists():
        shutil.copytree(ROOT / "models", folder / "models")
    text = block.text.replace(DOCUMENTED, address).replace(".venv/bin/python", sys.executable)
    program = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
    own = {"CURL_HOME": str(folder), "KEY": "x", "VAE_CLIENT_URL": address, "PYTHONPATH": f"{ROOT}:{ROOT / 'client'}"}
    done = subprocess.run(
        [*program, text if block.language == "python" else f"{VAE}\n{text}"],
        env=os.environ | own, cwd=folder, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout, done.stderr)
    statuses = re.findall(r"status (\d+)", done.stderr)
    assert statuses == ["200"] * len(re.findall(r"\bcurl ", block.text)), done.stdout
    for path in folder.glob("*.*"):
        assert path.read_bytes().startswith(SIGNATURES.get(path.suffix, b"")), path.name
    if "/unload" in block.text:
        for path in ("/v1/models/mnist/versions/3/load", "/v1/models/mnist/load"):
            assert httpx.post(f"{address}{path}", timeout=60).status_code == 200


@pytest.mark.parametrize("block", [block for block in RUN if re.search("curl .* -o ", block.text)], ids=Block.place)
def test_a_refusal_leaves_no_file(block: Block, address: str, folders: Mapping[str, Path]) -> None:
    """What is named a picture is one. What the block sends is there, from the blocks before it."""
    folder = folders[block.page]
    for command in block.commands:
        if " -o " in command and DOCUMENTED in command:
            target = folder / re.findall(r" -o (\S+)", command)[0]
            target.unlink(missing_ok=True)
            refused = command.replace(f"{DOCUMENTED}/v1", f"{address}/v0")
            done = subprocess.run(["bash", "-c", refused], cwd=folder, capture_output=True, check=False)
            assert done.returncode == 22, done.stderr
            assert not target.exists()


@pytest.mark.parametrize("command", NOT_RUN)
def test_other_commands_are_well_formed(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their syntax, options and what they name."""
    subprocess.run(["bash", "-n", "-c", command], check=True)
    words = shlex.split(re.sub(r"\$\([^)]*\)", "x", command), comments=True)
    while words and (found := ASSIGNMENT.fullmatch(words[0])):
        if words.pop(0).startswith("VAE_"):
            monkeypatch.setenv(*found.groups())
    if not words:  # a variable of the shell alone
        return
    CHECKS[Path(words[0]).name](words)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "toml"], ids=Block.place)
def test_runs_are_complete(block: Block, tmp_path: Path) -> None:
    """A TOML can be trained as it stands."""
    path = tmp_path / "run.toml"
    path.write_text(block.text)
    load_as(RestoringRun if "[imported]" in block.text else kind_of(path), path)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in ("json", "yaml")], ids=Block.place)
def test_other_files_are_valid(block: Block) -> None:
    """A manifest is one, and what is for compose names its services."""
    if block.language == "json":
        Manifest.model_validate(json.loads(block.text))
    else:
        assert yaml.safe_load(block.text)["services"].keys() <= COMPOSE.keys()
