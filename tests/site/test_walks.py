"""Pages that train: carried out from their first block to their last, as a reader does, beside a running service."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from service.app import create_app
from service.settings import Settings
from tests.service.conftest import serving
from tests.service.test_documentation import DOCUMENTED, WALKS
from tests.support.pages import ROOT, blocks

pytestmark = pytest.mark.site
NAMED = re.compile(r"# ([\w-]+\.(?:py|toml))\n")
"""First line of a block that is a file."""


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder with examples, a folder of pictures and models, and the address of a service of these models."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copytree(ROOT / "models" / "mnist-2d", tmp_path / "models" / "mnist-2d")
    (tmp_path / "pictures").mkdir()
    (tmp_path / ".curlrc").write_text('write-out = "%{stderr}status %{http_code}\\n"\n')
    draw = np.random.default_rng(0)
    for name in ("one", *map(str, range(59))):
        coarse = Image.fromarray(draw.integers(0, 256, (4, 5, 3), np.uint8))
        coarse.resize((50, 40), Image.Resampling.BICUBIC).save(tmp_path / "pictures" / f"{name}.png")
    settings = Settings(models=tmp_path / "models", default_model="mnist-2d", model_control="anonymous", threads=1)
    with serving(create_app(settings)) as url:
        yield tmp_path, url


@pytest.mark.parametrize("page", WALKS)
def test_the_page_can_be_carried_out(page: str, reader: tuple[Path, str]) -> None:
    """Its files are written, its commands run, what it trains is served, and every request is answered."""
    folder, url = reader
    environment = os.environ | {"CURL_HOME": str(folder), "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    ran = 0
    for block in blocks(ROOT / "docs" / page):
        if block.reason or block.language == "text":
            continue
        if found := NAMED.match(block.text):
            (folder / found[1]).write_text(block.text)
            continue
        text = block.text.replace(DOCUMENTED, url).replace(".venv/bin/python", sys.executable)
        program = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
        done = subprocess.run(
            [*program, text], cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode == 0, (block.place(), done.stdout, done.stderr)
        assert set(re.findall(r"status (\d+)", done.stderr)) <= {"200"}, (block.place(), done.stdout)
        for version in sorted((folder / "models").glob("*/*/manifest.json")):
            name, number = version.parts[-3:-1]
            path = f"{url}/v1/models/{name}/versions/{number}"
            if httpx.get(f"{path}/ready").status_code != 200:
                assert httpx.post(f"{path}/load", timeout=120).status_code == 200
        ran += 1
    assert ran >= 2
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))
