"""Draws the pictures of the documentation by asking a running service: python docs/pictures.py DATA [URL].

DATA holds MNIST's test images, as for the trainer.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import NormalDist

import httpx
import numpy as np
from numpy.typing import NDArray

from service.contract.images import to_image
from training.data.mnist import read_images

PICTURES = Path(__file__).parent / "pictures"
LEVELS = (0.1, 0.25, 0.5)
COLUMNS = 12
MAP = 20
Rows = NDArray[np.float32]


def main(data: str, url: str = "http://127.0.0.1:8000") -> None:
    """Draw samples, a map of the latent space, and digits before and after denoising."""
    with httpx.Client(base_url=url, headers={"accept": "application/octet-stream"}, timeout=60) as client:
        show("samples.png", ask(client, "/v1/sample?count=144&seed=4"), COLUMNS)
        show("latent-map.png", latent_map(client), MAP)
        images = read_images(Path(data), "t10k-images-idx3-ubyte").numpy()
        show("denoise.png", denoised(client, images[:: len(images) // COLUMNS][:COLUMNS] / np.float32(255)), COLUMNS)


def latent_map(client: httpx.Client) -> Rows:
    """Decode a grid of equal probability over the two-dimensional prior (Kingma and Welling, 2013, figure 4)."""
    axis = [NormalDist().inv_cdf((k + 0.5) / MAP) for k in range(MAP)]
    latents = np.array([[x, -y] for y in axis for x in axis], "<f4")
    return ask(client, "/v1/models/mnist-2d/decode", latents)


def denoised(client: httpx.Client, x: Rows) -> Rows:
    """Rows of noisy and of denoised digits for each level; the last row is the originals."""
    rows = []
    for level in LEVELS:
        y = (x + level * np.random.default_rng(5).standard_normal(x.shape)).astype("<f4")
        rows += [np.clip(y, 0, 1), ask(client, "/v1/models/mnist/denoise", y)]
    return np.concatenate([*rows, x])


def ask(client: httpx.Client, path: str, body: Rows | None = None) -> Rows:
    """Post rows, get images."""
    content = b"" if body is None else body.tobytes()
    kind = {"content-type": "application/octet-stream"} if content else {}
    response = client.post(path, content=content, headers=kind)
    response.raise_for_status()
    return np.frombuffer(response.content, "<f4").reshape(-1, 1, 28, 28)


def show(name: str, images: Rows, columns: int) -> None:
    """Write a sheet, `columns` wide."""
    sheet = images.reshape(-1, columns, 28, 28).transpose(0, 2, 1, 3).reshape(1, 1, -1, columns * 28)
    to_image(np.ascontiguousarray(1.0 - sheet)).save(PICTURES / name, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
