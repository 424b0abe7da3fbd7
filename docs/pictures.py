"""Draws the pictures of the documentation by asking a running service: python docs/pictures.py DATA [URL].

DATA holds MNIST's test images, as for the trainer. The photograph is scikit-image's astronaut (NASA, public domain);
its noisy copy in examples/ is made here too.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from statistics import NormalDist

import httpx
import matplotlib as mpl
import numpy as np
import skimage.data
from numpy.typing import NDArray
from PIL import Image

from service.contract.images import to_image
from training.canvas import png, sheet
from training.data.mnist import read_images

PICTURES = Path(__file__).parent / "pictures"
LEVELS = (0.1, 0.25, 0.5)
COLUMNS = 12
MAP = 20
PHOTOGRAPH = Path(__file__).parents[1] / "examples" / "astronaut.png"
CUT, DETAIL = np.s_[:256, 96:352], np.s_[..., 24:152, 72:200]
"""Part of the astronaut that is sent, and the part of that which a sheet shows."""
SIGMA = 25.0
DRAWS = 3
Rows = NDArray[np.float32]


def main(data: str, url: str = "http://127.0.0.1:8000") -> None:
    """Draw samples, a map of the latent space, and digits before and after denoising."""
    with httpx.Client(base_url=url, headers={"accept": "application/octet-stream"}, timeout=60) as client:
        show("samples.png", ask(client, "/v1/sample?count=144&seed=4"), COLUMNS)
        show("latent-map.png", latent_map(client), MAP)
        images = read_images(Path(data), "t10k-images-idx3-ubyte").numpy()
        show("denoise.png", denoised(client, images[:: len(images) // COLUMNS][:COLUMNS] / np.float32(255)), COLUMNS)
        photographs(client)


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


def photographs(client: httpx.Client, model: str = "photo") -> None:
    """Write the noisy photograph, then draw it beside its restoration, and a detail with deviations and draws."""
    levels = skimage.data.astronaut()[CUT]
    noise = SIGMA * np.random.default_rng(0).standard_normal(levels.shape)
    Image.fromarray(np.clip(np.rint(levels + noise), 0, 255).astype(np.uint8)).save(PHOTOGRAPH, optimize=True)
    sent = np.asarray(Image.open(PHOTOGRAPH), np.float32).transpose(2, 0, 1)[None] / np.float32(255.0)
    path = f"/v1/models/{model}/denoise"
    restored, std = photograph(client, f"{path}?uncertainty=true").swapaxes(0, 1)
    draws = np.concatenate([photograph(client, f"{path}?draws=1&seed={seed}") for seed in range(DRAWS)])
    pair = np.concatenate([sent, restored.clip(0.0, 1.0)])
    (PICTURES / "photograph.png").write_bytes(png(sheet({"sent, restored": pair}, 2, 256)))
    blocks = {
        "sent, restored, standard deviation": np.concatenate([pair, heat(std)]),
        "three draws of what the photograph may have been": draws.clip(0.0, 1.0),
        "the draws less the restored photograph, fourfold, on grey": (0.5 + 4.0 * (draws - restored)).clip(0.0, 1.0),
    }
    details = {caption: np.ascontiguousarray(images[DETAIL]) for caption, images in blocks.items()}
    (PICTURES / "completions.png").write_bytes(png(sheet(details, 3, 256)))


def photograph(client: httpx.Client, path: str) -> Rows:
    """Post the noisy photograph, get an array."""
    headers = {"content-type": "image/png", "accept": "application/x-npy"}
    response = client.post(path, content=PHOTOGRAPH.read_bytes(), headers=headers)
    response.raise_for_status()
    return np.load(io.BytesIO(response.content))


def heat(std: Rows) -> Rows:
    """Colours of standard deviations (1, 3, h, w): the mean over the channels, black to yellow at its largest."""
    plane = std.mean((0, 1))
    return mpl.colormaps["inferno"](plane / plane.max())[..., :3].astype(np.float32).transpose(2, 0, 1)[None]


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
