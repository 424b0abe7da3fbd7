"""Pictures far larger than a tile, through a model that looks at whole images: an AutoencoderKL in tiles.

The service runs as a process of its own, whose peak of memory is that of one picture.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from training.evaluation.served import started
from training.importing.autoencoder_kl import import_diffusers

os.environ["HF_HUB_OFFLINE"] = "1"
diffusers = pytest.importorskip("diffusers", reason="needs the extra `diffusers`")

SIDE, TILE = 4096, 256
MIB = 2**20
MOST_BYTES = 400 * MIB
"""The picture has 48 MiB as levels and 192 MiB as float32; its first activation as a whole would have 256 MiB."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with an AutoencoderKL of four and eight channels."""
    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(3)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    small = {"block_out_channels": (4, 8), "norm_num_groups": 4, "latent_channels": 2, "layers_per_block": 1}
    vae = diffusers.AutoencoderKL(**small, **blocks, sample_size=TILE, mid_block_add_attention=False)
    vae.save_pretrained(folder / "vae")
    import_diffusers(folder / "vae", folder / "models", "vae", "1")
    return folder / "models"


@pytest.fixture(scope="module")
def service(models: Path) -> Iterator[tuple[int, httpx.Client]]:
    """Its process id, and a client."""
    with (
        started(VAE_MODELS=str(models), VAE_THREADS="1", VAE_TIMEOUT_S="300", VAE_TILE_PIXELS=str(TILE**2)) as (
            process,
            url,
        ),
        httpx.Client(base_url=url, timeout=300.0) as client,
    ):
        yield process.pid, client


def picture(height: int, width: int) -> bytes:
    """A smooth colour picture in PNG."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    waves = (np.sin(x / 37), np.cos(y / 53), np.sin((x + y) / 91))
    levels = np.stack([127.5 + 127.5 * wave for wave in waves], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def peak_bytes(pid: int) -> int:
    """The largest peak of memory of a process and its descendants."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return max([int(status["VmHWM"].split()[0]) * 1024, *(peak_bytes(int(child)) for child in children)])


def reconstructed(client: httpx.Client, content: bytes) -> httpx.Response:
    head = {"content-type": "image/png", "accept": "image/png"}
    return client.post("/v1/reconstruct", content=content, headers=head).raise_for_status()


def test_a_large_picture_takes_memory_of_its_pixels_and_of_a_tile(service: tuple[int, httpx.Client]) -> None:
    """4096 x 4096 comes back whole, and never lies in memory as float32."""
    pid, client = service
    reconstructed(client, picture(TILE, TILE))
    content, before = picture(SIDE, SIDE), peak_bytes(pid)
    answer = reconstructed(client, content)
    with Image.open(io.BytesIO(answer.content)) as image:
        assert (image.size, image.mode) == ((SIDE, SIDE), "RGB")
    assert "tiled" in answer.headers["x-note"]
    assert peak_bytes(pid) - before < MOST_BYTES


def test_an_odd_picture_is_tiled_as_diffusers_does(service: tuple[int, httpx.Client], models: Path) -> None:
    """517 x 389, padded by reflection to a multiple, against `enable_tiling` of the module itself, both ways."""
    _, client = service
    vae = diffusers.AutoencoderKL.from_pretrained(models.parent / "vae").eval()
    vae.enable_tiling()
    content = picture(517, 389)
    with Image.open(io.BytesIO(content)) as sent:
        levels = np.asarray(sent)
    padded = np.pad(levels, ((0, 1), (0, 1), (0, 0)), mode="reflect").astype(np.float32) / 255.0
    with torch.no_grad():
        mean = vae.encode(2.0 * torch.from_numpy(padded).permute(2, 0, 1)[None] - 1.0).latent_dist.mean
        images = (vae.decode(mean).sample / 2.0 + 0.5).clamp(0.0, 1.0).numpy()
    npy = {"accept": "application/x-npy", "content-type": "image/png"}
    found = client.post("/v1/encode", content=content, headers=npy).raise_for_status()
    np.testing.assert_allclose(np.load(io.BytesIO(found.content))[:, 0], mean, atol=1e-4)
    file = io.BytesIO()
    np.save(file, mean.numpy())
    decoded = client.post("/v1/decode", content=file.getvalue(), headers={**npy, "content-type": npy["accept"]})
    np.testing.assert_allclose(np.load(io.BytesIO(decoded.raise_for_status().content)), images, atol=1e-4)
    head = {"content-type": "image/png", "accept": "image/png"}
    answer = client.post("/v1/reconstruct", content=content, headers=head).raise_for_status()
    with Image.open(io.BytesIO(answer.content)) as image:
        assert image.size == (389, 517)
