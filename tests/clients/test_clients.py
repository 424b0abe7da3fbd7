"""Clients that generators make of the OpenAPI document, against a running service.

Each generator lives in an environment of its own below .bench/, with pinned packages. `make client-test` runs this.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks.environments import ignored_home
from service.app import create_app
from service.settings import Settings
from tests.clients.conftest import python_of
from tests.service.conftest import serving

pytestmark = pytest.mark.clients
HERE = Path(__file__).parent
IMAGES = np.random.default_rng(0).random((2, 1, 28, 28), np.float32).round(3)
NOT_READ = {"application/x-npy", "image/png", "image/jpeg", "image/webp", "image/bmp"}
"""Request bodies that the Python generator passes over; it has JSON, raw numbers and forms."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The shipped models, served."""
    with serving(create_app(Settings(models=HERE.parents[1] / "models", default_model="mnist", threads=1))) as url:
        yield url


@pytest.fixture(scope="module")
def document(url: str) -> bytes:
    """The OpenAPI document."""
    return httpx.get(f"{url}/openapi.json").content


@pytest.fixture(scope="module")
def expected(url: str) -> dict[str, Any]:
    """The answers that a client of any kind gets."""
    images = IMAGES.tolist()
    asked: dict[str, dict[str, Any]] = {
        "encode": {"images": images, "draws": 2, "seed": 7},
        "denoise": {"images": images, "level": 0.25, "uncertainty": True},
        "sample": {"count": 2, "seed": 7},
    }
    answers = {name: httpx.post(f"{url}/v1/{name}", json=body, timeout=60).json() for name, body in asked.items()}
    body = {"latents": answers["encode"]["mean"], "fingerprint": "another"}
    return {**answers, "decode": httpx.post(f"{url}/v1/decode", json=body).json()}


def ran(*command: str | Path, **options: Any) -> str:
    """What a command prints, on either stream."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_generated_python_client_works(url: str, document: bytes, expected: dict[str, Any], tmp_path: Path) -> None:
    """openapi-python-client drops no answer, and its client encodes, denoises, samples and reads a problem."""
    python = python_of("openapi-python-client", "python")
    (tmp_path / "openapi.json").write_bytes(document)
    generator = Path(python).with_name("openapi-python-client")
    told = ran(generator, "generate", "--path", "openapi.json", "--output-path", "client", cwd=tmp_path)
    assert "Cannot parse" not in told
    dropped = {line.rpartition(" ")[2] for line in told.splitlines() if line.startswith("Unsupported content type")}
    assert dropped <= NOT_READ
    script = HERE / "python" / "client.py"
    answers = ran(python, script, url, input=json.dumps(IMAGES.tolist()), env={"PYTHONPATH": str(tmp_path / "client")})
    assert json.loads(answers) == expected


def test_a_generated_typescript_client_works(
    url: str, document: bytes, expected: dict[str, Any], tmp_path: Path
) -> None:
    """openapi-typescript's types hold under a strict compiler, and the client does the same."""
    modules = node_modules()
    shutil.copytree(HERE / "typescript", tmp_path, dirs_exist_ok=True)
    (tmp_path / "node_modules").symlink_to(modules)
    (tmp_path / "openapi.json").write_bytes(document)
    ran(modules / ".bin" / "openapi-typescript", "openapi.json", "-o", "schema.ts", cwd=tmp_path)
    ran(modules / ".bin" / "tsc", cwd=tmp_path)
    answers = ran("node", "client.js", url, input=json.dumps(IMAGES.tolist()), cwd=tmp_path)
    assert json.loads(answers) == expected


def node_modules() -> Path:
    """The pinned packages, installed once and again when their lock changes; without npm the test is skipped."""
    lock, folder = HERE / "typescript" / "package-lock.json", ignored_home() / "openapi-typescript"
    wanted, stamp = sha256(lock.read_bytes()).hexdigest(), folder / ".lock"
    if not (stamp.exists() and stamp.read_text() == wanted):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in ("package.json", lock.name):
            shutil.copy(lock.with_name(name), folder)
        try:
            subprocess.run(
                ["npm", "ci", "--silent"], cwd=folder, capture_output=True, text=True, check=True, timeout=300
            )
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"openapi-typescript cannot be installed here: {error}")
        stamp.write_text(wanted)
    return (folder / "node_modules").absolute()
