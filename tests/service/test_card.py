"""`GET /v1/models/{model}/card`: the model card and its picture."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from service.app import create_app
from service.repository.repository import Repository
from service.settings import Settings

PATHS = ("/v1/models/digits/card", "/v1/models/digits/versions/1/card")


@pytest.mark.parametrize("path", PATHS)
def test_card_and_picture_are_the_files_of_the_version(client: httpx.Client, digits_models: Path, path: str) -> None:
    """Byte for byte, with their media types, an ETag that answers 304, and gzip only where it is asked for."""
    folder = digits_models / "digits" / "1"
    for ending, name, kind in (
        ("", "README.md", "text/markdown; charset=utf-8"),
        ("/README.md", "README.md", "text/markdown; charset=utf-8"),
        ("/sheet.png", "sheet.png", "image/png"),
    ):
        answer = client.get(path + ending, headers={"accept-encoding": "identity"})
        assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
        assert answer.content == (folder / name).read_bytes()
        assert "content-encoding" not in answer.headers
        assert client.get(path + ending).content == answer.content  # httpx asks for gzip
        again = client.get(path + ending, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert client.head(path + ending).headers["content-type"] == kind


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["manifest.json", "golden.npz", "encoder.onnx", "..%2Fmanifest.json", "other.png"])
def test_no_other_file_of_the_version_is_served(client: httpx.Client, path: str, name: str) -> None:
    """A file that the card does not list is not found, whether it exists or not."""
    answer = client.get(f"{path}/{name}")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert "digits/1" not in answer.text


def test_the_commands_of_a_card_work(client: httpx.Client, tmp_path: Path) -> None:
    """As they stand, but for the address."""
    commands = re.findall(r"(?m)^curl .*$", client.get(PATHS[0]).text)
    assert len(commands) == 4
    for name in ("image.png", "noisy.png"):
        Image.new("L", (20, 16), 99).save(tmp_path / name)
    for command in commands:
        here = command.replace("http://127.0.0.1:8000", str(client.base_url).rstrip("/"))
        done = subprocess.run(["bash", "-c", here], cwd=tmp_path, capture_output=True, check=False)
        assert done.returncode == 0, (command, done.stderr)
    with Image.open(tmp_path / "restored.png") as restored:
        assert restored.size == (8, 8)


async def answers(repository: Repository, *paths: str, **settings: Any) -> list[httpx.Response]:
    """What a service of its own answers."""
    transport = httpx.ASGITransport(create_app(Settings(**settings), repository))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as one:
        return [await one.get(path) for path in paths]


def test_a_version_without_a_card_says_how_to_get_one(small_models: Path, tmp_path: Path) -> None:
    """404, naming the command; an unknown model and version are what they are everywhere."""
    folder = tmp_path / "mnist-2d" / "1"
    shutil.copytree(small_models / "mnist-2d" / "1", folder)
    content = json.loads((folder / "manifest.json").read_text())
    content.pop("card", None)
    (folder / "manifest.json").write_text(json.dumps(content))
    bare = Repository.open(tmp_path, "", "CPUExecutionProvider", 1, 8)
    paths = [f"/v1/models/{model}/card" for model in ("mnist-2d", "nobody", "mnist-2d/versions/7")]
    none, nobody, seven = asyncio.run(answers(bare, *paths, "/v1/models/mnist-2d/card/README.md"))[:3]
    assert (none.status_code, none.json()["code"]) == (404, "not_found")
    assert "python -m training card" in none.json()["detail"]
    assert {(one.status_code, one.json()["code"]) for one in (nobody, seven)} == {(404, "unknown_model")}


def test_a_card_needs_a_key_as_the_models_do(small: Repository, tmp_path: Path) -> None:
    """Without one it is 401, as `GET /v1/models` is."""
    keys = tmp_path / "keys"
    keys.write_text(f"alice sha256:{'0' * 64} infer\n")
    for answer in asyncio.run(answers(small, "/v1/models", "/v1/models/mnist-2d/card", api_keys=str(keys))):
        assert answer.status_code == 401


def test_a_card_that_was_changed_is_refused(small_models: Path, tmp_path: Path, seal: Callable[..., None]) -> None:
    """By name with the command that writes it anew, as every file that does not match its digest."""
    folder = tmp_path / "mnist-2d" / "1"
    shutil.copytree(small_models / "mnist-2d" / "1", folder)
    seal(folder)
    (folder / "README.md").write_text("# Trust me\n")
    with pytest.raises(Exception, match=r"README\.md does not match .*python -m training card"):
        Repository.open(tmp_path, "", "CPUExecutionProvider", 1, 8)
