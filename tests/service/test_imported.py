"""docs/importing.md: VAEs of others, imported as the page shows, answer over HTTP as their own code does."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, chdir
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI
from numpy.typing import NDArray
from onnx import helper
from torch.nn import functional

from service.app import create_app
from service.settings import Settings
from training.__main__ import main

os.environ["HF_HUB_OFFLINE"] = "1"
diffusers = pytest.importorskip("diffusers", reason="needs the extra `diffusers`")

Rows = NDArray[np.float32]
ROOT = Path(__file__).parents[2]
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [(found[1], found[2]) for found in FENCED.finditer((ROOT / "docs" / "importing.md").read_text())]
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
FILES = {"python": "mine.py", "toml": "mine-restored.toml"}
"""The blocks of the page that are files."""
DOCUMENTED = "http://127.0.0.1:8000"
WEIGHT = np.random.default_rng(5).normal(0.0, 0.3, (8, 3, 2, 2)).astype(np.float32)
BACK = np.random.default_rng(6).normal(0.0, 0.3, (4, 3, 2, 2)).astype(np.float32)


class Imported(NamedTuple):
    """What the page made: a folder with its files, and a service of its models."""

    folder: Path
    client: httpx.Client


def autoencoder_kl(folder: Path) -> None:
    """A small one with random weights in bfloat16."""
    torch.manual_seed(1)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    small = {"block_out_channels": (16, 32), "norm_num_groups": 8, "latent_channels": 4, "layers_per_block": 1}
    diffusers.AutoencoderKL(**small, **blocks, shift_factor=0.25).to(torch.bfloat16).save_pretrained(folder)


def optimums(folder: Path, onnx_file: Callable[..., Path]) -> None:
    """Two graphs, of one convolution each, in files and with tensors as optimum-cli names them."""
    for part, given, channels, made, operator, weight in (
        ("encoder", "sample", 3, "latent_parameters", "Conv", WEIGHT),
        ("decoder", "latent_sample", 4, "sample", "ConvTranspose", BACK),
    ):
        node = helper.make_node(operator, [given, "w"], [made], strides=[2, 2])
        onnx_file(folder / f"vae_{part}" / "model.onnx", given, ["n", channels, "h", "w"], [node], made, w=weight)


def run(commands: list[list[str]], folder: Path) -> None:
    """Run commands of Python in a folder, in this process: each of its own would compile torch's exporter again."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with chdir(folder):
            for command in commands:
                if command[:2] == ["-m", "training"]:
                    assert main(command[2:]) == 0, command
                else:
                    runpy.run_path(command[0], run_name="__main__")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def imported(
    tmp_path_factory: pytest.TempPathFactory,
    serve: Callable[[FastAPI], AbstractContextManager[str]],
    onnx_file: Callable[..., Path],
) -> Iterator[Imported]:
    """The page carried out, but for the installation."""
    folder = tmp_path_factory.mktemp("imported")
    shutil.copytree(ROOT / "examples", folder / "examples")
    autoencoder_kl(folder / "sd-vae-ft-mse")
    optimums(folder, onnx_file)
    for kind, text in BLOCKS:
        if kind in FILES:
            (folder / FILES[kind]).write_text(text)
    run([line.split()[1:] for line in COMMANDS if line.startswith(".venv/bin/python ")], folder)
    app = create_app(Settings(models=folder / "models", default_model="sd-vae", max_rows=8))
    with serve(app) as url, httpx.Client(base_url=url, timeout=60.0) as client:
        yield Imported(folder, client)


def answer(client: httpx.Client, model: str, operation: str, **body: Any) -> dict[str, Any]:
    """The answer in JSON; arrays as lists."""
    sent = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in body.items()}
    return httpx.Response.json(client.post(f"/v1/models/{model}/{operation}", json=sent).raise_for_status())


def pictures(height: int, width: int) -> Rows:
    """Two smooth colour images in [0, 1]."""
    coarse = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(2))
    return functional.interpolate(coarse, (height, width), mode="bilinear").numpy()


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("curl")])
def test_the_commands_of_the_page_run(imported: Imported, command: str) -> None:
    """Every curl command answers with a PNG."""
    here = str(imported.client.base_url).rstrip("/")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command.replace(DOCUMENTED, here)],
        cwd=imported.folder, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (name,) = re.findall(r" -o (\S+)", command)
    assert (imported.folder / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("height", "width"), [(48, 46), (34, 70), (18, 20)])
def test_an_autoencoder_kl_answers_as_diffusers_does(imported: Imported, height: int, width: int) -> None:
    """At the traced size and others: its posterior with quant_conv and clamp, its images after diffusers' scaling."""
    vae = diffusers.AutoencoderKL.from_pretrained(imported.folder / "sd-vae-ft-mse", torch_dtype=torch.float32).eval()
    x = pictures(height, width)
    with torch.no_grad():
        posterior = vae.encode(2.0 * torch.from_numpy(x) - 1.0).latent_dist
        images = (vae.decode(posterior.mean).sample / 2.0 + 0.5).clamp(0.0, 1.0).numpy()
    found = answer(imported.client, "sd-vae", "encode", images=x)
    np.testing.assert_allclose(found["mean"], posterior.mean, atol=1e-4)
    np.testing.assert_allclose(found["log_var"], posterior.logvar, atol=1e-4)
    np.testing.assert_allclose(answer(imported.client, "sd-vae", "reconstruct", images=x)["images"], images, atol=1e-4)
    z = posterior.mean.numpy()
    np.testing.assert_allclose(answer(imported.client, "sd-vae", "decode", latents=z)["images"], images, atol=1e-4)


def test_what_a_latent_diffusion_model_must_know_is_told(imported: Imported) -> None:
    """`GET /v1/models/sd-vae` has the factors of its config.json, the multiple of sizes and the weights' type."""
    told = imported.client.get("/v1/models/sd-vae").raise_for_status().json()
    assert (told["scaling_factor"], told["shift_factor"]) == (0.18215, 0.25)
    assert told["size"]["multiple_of"] == 2
    assert told["training"]["weights"] == ["BF16"]
    assert told["training"]["config"]["block_out_channels"] == [16, 32]


def test_a_pair_of_onnx_answers_as_its_convolutions_do(imported: Imported) -> None:
    """Images over HTTP are in [0, 1]; the graphs, whose images go below 0, get them from -1 to 1."""
    x = pictures(20, 34)
    joined = functional.conv2d(2.0 * torch.from_numpy(x) - 1.0, torch.from_numpy(WEIGHT), stride=2)
    mean, log_var = joined.chunk(2, 1)
    found = answer(imported.client, "pair", "encode", images=x)
    np.testing.assert_allclose(found["mean"], mean, atol=1e-5)
    np.testing.assert_allclose(found["log_var"], log_var, atol=1e-5)
    images = functional.conv_transpose2d(mean, torch.from_numpy(BACK), stride=2) / 2.0 + 0.5
    made = answer(imported.client, "pair", "reconstruct", images=x)["images"]
    np.testing.assert_allclose(made, images.clamp(0.0, 1.0), atol=1e-5)


@pytest.mark.parametrize(
    ("model", "operation"),
    [("sd-vae", "denoise"), ("sd-vae", "sample"), ("pair", "score"), ("mine/versions/1", "denoise")],
)
def test_what_an_imported_model_cannot_do_is_refused(imported: Imported, model: str, operation: str) -> None:
    """With a reason, not with a wrong answer."""
    body = {} if operation == "sample" else {"images": pictures(8, 8)[:, : 1 if "mine" in model else 3].tolist()}
    refused = imported.client.post(f"/v1/models/{model}/{operation}", json=body)
    assert (refused.status_code, refused.json()["code"]) == (422, "unsupported_operation")
