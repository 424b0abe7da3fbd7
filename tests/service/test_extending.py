"""docs/extending.md: its parts, put into a copy of the project, train, export and serve as the page shows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [(found[1], found[2]) for found in FENCED.finditer(PAGE)]
DOCUMENTED = "http://127.0.0.1:8000"


class House(NamedTuple):
    """A copy of the project with everything that the page adds, and the service that runs from it."""

    folder: Path
    url: str


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language]


def extend(folder: Path) -> None:
    """Write the page's new files, and make its changes, each of lines that stand there exactly once."""
    for text in blocks("python"):
        path = folder / text.splitlines()[0].removeprefix("# ")
        assert not path.exists()
        path.write_text(text.split("\n", 1)[1])
    for change in blocks("diff"):
        name, _, rest = change.removeprefix("--- ").partition("\n")
        path = folder / name
        source = path.read_text()
        for part in rest.split("@@\n"):
            lines = part.splitlines(keepends=True)
            before, after = ("".join(line[1:] for line in lines if line[0] in " " + sign) for sign in "-+")
            assert source.count(f"\n{before}") == 1, (name, before)
            source = source.replace(f"\n{before}", f"\n{after}")
        path.write_text(source)


def environment(folder: Path) -> dict[str, str]:
    """The copy's modules, and none of this process's settings."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VAE_")}
    return {**clean, "PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """The page carried out: files, lists, the run, and a service of what it made beside a shipped model."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("service", "training"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "examples", folder / "examples")
    shutil.copytree(ROOT / "models" / "mnist-2d", folder / "models" / "mnist-2d")
    extend(folder)
    (toml,), (command,) = blocks("toml"), [text for text in blocks("sh") if " -m training " in text]
    (folder / "laplace.toml").write_text(toml)
    words = command.split()
    trained = subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, env=environment(folder), capture_output=True, text=True, check=False
    )
    assert trained.returncode == 0, trained.stderr
    process = subprocess.Popen(
        [sys.executable, "-m", "service"], cwd=folder, stdout=subprocess.PIPE, text=True,
        env={**environment(folder), "VAE_PORT": "0", "VAE_THREADS": "1", "VAE_DEFAULT_MODEL": "mnist-2d"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        found = re.search(r"http://[\d.]+:\d+", process.stdout.readline())
        assert found, "the extended service does not start"
        yield House(folder, found.group())
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.mark.parametrize("command", [text for text in blocks("sh") if "curl" in text], ids=range(3))
def test_the_commands_of_the_page_run(house: House, command: str) -> None:
    """Every curl command answers 200 and writes the file that it names."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command.replace(DOCUMENTED, house.url)],
        cwd=house.folder, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in re.findall(r" -o (\S+)", command):
        content = (house.folder / name).read_bytes()
        assert content.startswith(b"\x89PNG") if name.endswith(".png") else len(content.splitlines()) == 3


def test_the_new_operation_takes_no_step_at_step_0(house: House) -> None:
    """`vary` at step 0 is `reconstruct`; at another it is a function of the seed."""
    image = {"images": [[[0.5] * 28] * 28] * 2}

    def varied(**options: float) -> np.ndarray:
        return np.array(
            httpx.post(f"{house.url}/v1/vary", json={**image, **options}).raise_for_status().json()["images"]
        )

    expected = httpx.post(f"{house.url}/v1/reconstruct", json=image).json()["images"]
    np.testing.assert_allclose(varied(step=0), expected, atol=1e-6)
    assert np.array_equal(varied(step=1, seed=3), varied(step=1, seed=3))
    assert np.abs(varied(step=1, seed=3) - varied(step=1, seed=4)).max() > 0.01
    assert "/v1/vary" in httpx.get(f"{house.url}/openapi.json").json()["paths"]


def test_the_new_codec_reads_what_it_writes(house: House) -> None:
    """CSV out and in again gives the numbers of JSON; what is no CSV is a 400 that says what to send."""
    csv, x = {"content-type": "text/csv", "accept": "text/csv"}, np.random.default_rng(1).random((2, 784))
    body = "\n".join(",".join(map(str, row)) for row in x)
    found = httpx.post(f"{house.url}/v1/reconstruct", content=body, headers=csv).raise_for_status()
    images = {"images": x.reshape(2, 1, 28, 28).tolist()}
    expected = httpx.post(f"{house.url}/v1/reconstruct", json=images).json()["images"]
    rows = [[float(number) for number in line.split(",")] for line in found.text.splitlines()]
    np.testing.assert_allclose(rows, np.reshape(expected, (2, 784)), atol=1e-6)
    refused = httpx.post(f"{house.url}/v1/reconstruct", content="a,b", headers=csv)
    assert (refused.status_code, refused.json()["code"]) == (400, "unreadable_body")


def test_the_new_likelihood_and_architecture_are_in_the_served_model(house: House) -> None:
    """The model that the page trains names them, and scores images by a density."""
    model = httpx.get(f"{house.url}/v1/models/laplace").json()
    assert model["likelihood"] == "laplace"
    assert model["training"]["settings"]["model"]["network"]["architecture"] == "residual-mlp"
    scored = httpx.post(f"{house.url}/v1/models/laplace/score", json={"images": [[[0.5] * 8] * 8], "seed": 1}).json()
    assert np.isfinite(scored["elbo"]).all()


def test_the_new_likelihood_is_a_density(house: House) -> None:
    """Its integral over one pixel is 1."""
    path = house.folder / "training" / "distributions" / "likelihoods" / "laplace.py"
    spec = spec_from_file_location("laplace", path)
    assert spec is not None
    assert spec.loader is not None
    laplace = module_from_spec(spec)
    sys.modules["laplace"] = laplace  # pydantic looks annotations up there
    spec.loader.exec_module(laplace)
    x = torch.linspace(-20.0, 20.0, 400_001).reshape(-1, 1, 1, 1)
    density = laplace.Laplace((1, 1, 1), 1 / 256).log_prob(torch.zeros_like(x), x).exp().detach()
    assert float(torch.trapezoid(density, x.flatten())) == pytest.approx(1.0, abs=1e-4)
