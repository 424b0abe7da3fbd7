"""The programs in examples/clients/ and in docs/clients.md, against a running service, where the runtime can be had."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.clients.conftest import python_of
from training.evaluation.served import started

pytestmark = pytest.mark.clients
ROOT = Path(__file__).parents[2]
PROGRAMS, NOISY = ROOT / "examples" / "clients", ROOT / "examples" / "noisy.png"
PAGE = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "clients.md").read_text(), re.MULTILINE | re.DOTALL)
COMMANDS = {"denoise.mjs": ["node"], "Denoise.java": ["java"], "denoise.go": ["go", "run"]}
SETTINGS = {"VAE_MODELS": str(ROOT / "models"), "VAE_DEFAULT_MODEL": "mnist", "VAE_THREADS": "1"}
KEY = "alice-0123456789abcdef"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The shipped models, served to who has a key."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"alice {KEY} infer\n")
    with started(VAE_API_KEYS=str(keys), **SETTINGS) as (_, url):
        yield url


@pytest.fixture(scope="module")
def open_url() -> Iterator[str]:
    """The same without keys."""
    with started(**SETTINGS) as (_, url):
        yield url


def ran(command: list[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env=os.environ | environment
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_a_program_denoises_a_picture(url: str, name: str, tmp_path: Path) -> None:
    """The file that `/v1` answers, and the level that it found; a refusal is told and leaves no file."""
    program, *words = COMMANDS[name]
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed here")
    place = tmp_path / "restored.png"
    command = [found, *words, PROGRAMS / name, url, NOISY, place]
    cache = {"GOCACHE": str(tmp_path / "go"), "GO111MODULE": "off"}
    refused = ran(command, KEY="another-0123456789", **cache)
    assert refused.returncode != 0
    assert "unauthenticated" in refused.stdout + refused.stderr
    assert not place.exists()
    done = ran(command, KEY=KEY, **cache)
    assert done.returncode == 0, done.stderr
    headers = {"authorization": f"Bearer {KEY}", "content-type": "image/png", "accept": "image/png"}
    known = httpx.post(f"{url}/v1/models/mnist/denoise", content=NOISY.read_bytes(), headers=headers, timeout=60)
    assert place.read_bytes() == known.content
    assert done.stdout.split() == ["level", known.headers["x-level"]]


def test_the_generated_client_encodes(open_url: str, tmp_path: Path) -> None:
    """As the program says: document, generator, program."""
    python = python_of("openapi-python-client", "python")
    (tmp_path / "openapi.json").write_bytes(httpx.get(f"{open_url}/openapi.json").content)
    generator, client = Path(python).with_name("openapi-python-client"), tmp_path / "client"
    made = ran([generator, "generate", "--path", tmp_path / "openapi.json", "--output-path", client])
    assert made.returncode == 0, made.stderr
    done = ran([python, PROGRAMS / "generated.py", open_url, ROOT / "examples" / "digit.png"], PYTHONPATH=str(client))
    assert done.returncode == 0, done.stderr
    assert np.shape(json.loads(done.stdout)) == (1, 40)


@pytest.mark.parametrize("name", ["triton", "kserve"])
def test_programs_of_the_page_run(open_url: str, name: str) -> None:
    """What they print is what the comment beside it says."""
    (program,) = (block for block in PAGE if name in block)
    address = open_url.removeprefix("http://")
    done = ran([python_of(f"client-{name}", name), "-c", program.replace("127.0.0.1:8000", address)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == re.findall(r"print\(.*\)  # (.+)$", program, re.MULTILINE)[0]
