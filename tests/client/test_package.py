"""The package in an environment of its own, as users install it. `make client-test` runs this."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.client.conftest import NOISY, ROOT, SHIPPED, environment

pytestmark = pytest.mark.clients
PIP = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
PARTS = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "service", "training", "experiments", "models", "client")
"""What the two packages are made of."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, because pip leaves files where it builds."""
    place = tmp_path_factory.mktemp("tree")
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
            )
        else:
            shutil.copy(ROOT / name, place)
    return place


def ran(*words: str | Path, **variables: str) -> str:
    """What a command says that must succeed."""
    clean = {name: value for name, value in environment(**variables).items() if name != "PYTHONPATH"}
    done = subprocess.run(words, env=clean, cwd="/", capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def made(place: Path) -> Path:
    """A fresh environment; returns its folder of commands."""
    ran(sys.executable, "-m", "venv", place)
    return place / "bin"


def test_from_nothing_to_a_clean_picture(
    address: str, tree: Path, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    """`pip install ./client` and `vae denoise`, without any extra; what needs one says which."""
    commands = made(tmp_path / "venv")
    begin = time.monotonic()
    ran(commands / "python", *PIP, tree / "client")
    ran(commands / "vae", "denoise", NOISY, "-o", tmp_path / "clean.png", VAE_CLIENT_URL=address)
    figure(f"a clean picture {time.monotonic() - begin:.0f} s after `pip install ./client` began")
    with Image.open(tmp_path / "clean.png") as file:
        assert file.size == (28, 28)
    ran(commands / "vae", "denoise", ROOT / "examples", "-o", tmp_path / "z", "--fit", "resize", VAE_CLIENT_URL=address)
    for words, extra in (
        (["encode", ROOT / "examples", "-o", tmp_path / "z.parquet"], "parquet"),
        (["compare", NOISY, NOISY], "pictures"),
        (["--print-completion", "bash"], "completion"),
    ):
        done = subprocess.run(
            [commands / "vae", *words], env=environment(VAE_CLIENT_URL=address, PYTHONPATH=""), capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert f"vae-client[{extra}]" in done.stderr
    assert "shape" in ran(
        commands / "python",
        "-c",
        "from vae_client import Client; print(Client().sample().images.shape, 'shape')",
        VAE_CLIENT_URL=address,
    )


def test_service_and_client_together_need_no_address(tree: Path, tmp_path: Path) -> None:
    """`pip install . ./client` brings the models, which `vae --local` serves. Dependencies are this environment's."""
    commands = made(tmp_path / "venv")
    packages = next((tmp_path / "venv").glob("lib/*/site-packages"))
    paths = [path for path in sys.path if path.endswith("site-packages")] or [sysconfig.get_path("purelib")]
    ran(commands / "python", *PIP, "--no-deps", tree, tree / "client")
    (packages / "others.pth").write_text("\n".join(paths) + "\n")
    ran(commands / "vae", "denoise", NOISY, "-o", tmp_path / "clean.png", "--local", VAE_THREADS="1")
    with Image.open(tmp_path / "clean.png") as file:
        assert file.size == (28, 28)
    told = ran(commands / "vae", "models", "--local", "--json")
    assert set(re.findall(r'"model": "([^"]+)"', told)) == SHIPPED
