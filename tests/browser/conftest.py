"""The page in Debian's Chromium, driven by Playwright.

Playwright and axe-core live in an environment of their own below .bench/, with pinned packages; the browser is the
system's. `make browser-test` runs these tests. BROWSER_PICTURES names a folder for the pictures of the README.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from benchmarks.environments import InstallFailed, ignored_home, prepare
from training.evaluation.served import started

ROOT = Path(__file__).parents[2]
MODELS = Path(os.environ.get("BROWSER_MODELS", ROOT / "models"))
WAIT_MS = int(os.environ.get("BROWSER_WAIT_MS", "60000"))
INFER, CONTROL = "infer-0123456789abcdef", "control-0123456789abcdef"


class Opened(NamedTuple):
    """A page, and what the browser says of it.

    Attributes:
        page: Playwright's page.
        faults: Errors in the console and in scripts.
        refused: Answers that are no success, as `status path`; the console repeats each, which is not counted.
        requests: URLs of all requests.
    """

    page: Any
    faults: list[str]
    refused: list[str]
    requests: list[str]


@pytest.fixture(scope="session")
def playwright() -> Iterator[Any]:
    """Playwright, of its own environment."""
    ignored_home()
    try:
        python = Path(prepare("browser", Path(__file__).parent / "requirements.txt"))
    except InstallFailed as error:
        pytest.skip(f"Playwright cannot be installed here: {error}")
    (packages,) = python.parent.parent.glob("lib/python*/site-packages")
    sys.path.append(str(packages))
    with import_module("playwright.sync_api").sync_playwright() as found:
        yield found


@pytest.fixture(scope="session")
def browser(playwright: Any) -> Iterator[Any]:
    """Chromium, as the system has it."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program:
        pytest.skip("needs Chromium: apt-get install chromium")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has none for root
    browser = playwright.chromium.launch(executable_path=program, args=sandbox)
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """The shipped models, served in a process of their own; every caller may load and unload."""
    with started(VAE_MODELS=str(MODELS), VAE_MODEL_CONTROL="anonymous") as (_, url):
        yield url


@pytest.fixture(scope="session")
def locked(small_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service that asks for keys: one that infers, and one with both rights."""
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"alice {INFER} infer\nops {CONTROL} infer,control\nreader reader-0123456789abcdef control\n")
    path.chmod(0o600)
    settings = {"VAE_API_KEYS": str(path), "VAE_MODEL_CONTROL": "true"}
    with started(VAE_MODELS=str(small_models), **settings) as (_, url):
        yield url


@pytest.fixture(scope="session")
def photo(url: str) -> str:
    """The name of a model that restores images of any size."""
    models = httpx.get(f"{url}/v1/models").json()["models"]
    names = [model["model"] for model in models if model.get("size") and "denoise" in model["operations"]]
    if not names:
        pytest.skip("needs a model that restores images of any size")
    return str(names[0])


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., AbstractContextManager[Opened]]]:
    """A function that opens a page: (URL, options of the browser's context)."""

    @contextmanager
    def open_page(url: str, **options: Any) -> Iterator[Opened]:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        context.set_default_timeout(WAIT_MS)
        page = context.new_page()
        found = Opened(page, [], [], [])
        page.on("request", lambda request: found.requests.append(request.url))
        page.on("pageerror", lambda error: found.faults.append(str(error)))
        page.on("console", lambda message: found.faults.append(message.text) if _counts(message) else None)
        page.on("response", lambda answer: found.refused.append(_status(answer)) if answer.status >= 400 else None)
        page.goto(url)
        yield found
        with suppress(Exception):
            context.close()

    return open_page


def _counts(message: Any) -> bool:
    """Whether a message of the console is of the page, not of the browser about an answer such as 401."""
    return message.type in ("error", "warning") and not message.text.startswith("Failed to load resource")


def _status(answer: Any) -> str:
    return f"{answer.status} {answer.url.partition('//')[2].partition('/')[2]}"


@pytest.fixture
def room(opened: Callable[..., AbstractContextManager[Opened]], url: str) -> Iterator[Callable[..., Opened]]:
    """A function that opens a room of the page. At the end nothing has failed, and no other host was asked."""
    held: list[tuple[AbstractContextManager[Opened], Opened]] = []

    def enter(name: str, **options: Any) -> Opened:
        manager = opened(f"{url}/#{name}", **options)
        found = manager.__enter__()
        held.append((manager, found))
        return found

    yield enter
    for manager, found in held:
        manager.__exit__(None, None, None)
        assert found.faults == []
        assert found.refused == []
        assert {request for request in found.requests if not request.startswith((f"{url}/", "blob:"))} == set()


@pytest.fixture(scope="session")
def expect(playwright: Any) -> Callable[..., Any]:
    """Playwright's assertions, which wait."""
    assert playwright
    module = import_module("playwright.sync_api")
    module.expect.set_options(timeout=WAIT_MS)
    return module.expect  # type: ignore[no-any-return]
