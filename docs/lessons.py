"""Draws the figure of docs/tutorial.md: four small models of digits, one good, three bad: python docs/lessons.py.

Each is trained in seconds, in a temporary folder, on scikit-learn's digits of 8 x 8 pixels.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from training.canvas import GAP, png, sheet
from training.config import Run
from training.loop.pictures import vae_blocks
from training.loop.processes import Processes
from training.pipeline import Workshop

PICTURE = Path(__file__).parent / "pictures" / "lessons.png"
COLUMNS, CELL = 6, 40
FEW = 60
"""Digits of the model that overfits."""
NETWORK = {"architecture": "mlp", "hidden": [64], "activation": "tanh"}
LARGE = {"architecture": "mlp", "hidden": [512, 512], "activation": "silu"}
DIGITS = {"dataset": "digits"}
FOLDER = {"dataset": "folder", "height": 8, "width": 8}
NARROW, WIDE = {"likelihood": "gaussian"}, {"likelihood": "gaussian", "least_std": 0.9}


class Lesson(NamedTuple):
    """A run, and what to call it."""

    name: str
    data: dict[str, Any]
    likelihood: dict[str, Any]
    network: dict[str, Any] = NETWORK
    epochs: int = 60
    binarise: bool = False

    def run(self) -> Run:
        """The run as of a TOML."""
        return Run.model_validate(
            {
                "name": self.name.replace(" ", "-"),
                "seed": 1,
                "data": self.data,
                "binarise": self.binarise,
                "model": {"latent_dim": 8, "likelihood": self.likelihood, "network": self.network},
                "train": {"epochs": self.epochs, "batch_size": 50, "learning_rate": 3e-3, "ema_decay": 0.99},
            }
        )


LESSONS = (
    Lesson("good", DIGITS, {"likelihood": "bernoulli"}, epochs=200, binarise=True),
    Lesson("collapsed", DIGITS, WIDE),
    Lesson("overfitted", FOLDER, NARROW, LARGE, 600),
    Lesson("wrong likelihood", DIGITS, {"likelihood": "bernoulli"}),
)


def main() -> None:
    """Train the models, print their figures, and draw what they make of held-out digits."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "digits"
        pictures.mkdir()
        for k, digit in enumerate(load_digits().images[:FEW]):
            Image.fromarray(np.rint(digit * 255 / 16).astype(np.uint8)).save(pictures / f"{k}.png")
        sheets = [drawn(lesson, pictures, Path(folder) / lesson.name) for lesson in LESSONS]
    width = sum(one.width for one in sheets) + 3 * GAP * len(sheets)
    whole = Image.new("L", (width, max(one.height for one in sheets)), 255)
    left = 0
    for one in sheets:
        whole.paste(one, (left, 0))
        left += one.width + 3 * GAP
    PICTURE.write_bytes(png(whole))


def drawn(lesson: Lesson, pictures: Path, folder: Path) -> Image.Image:
    """A sheet of the trained model, as `sheet.png` of a run."""
    workshop = Workshop.open(lesson.run(), pictures, folder, torch.device("cpu"), Processes())
    workshop.train()
    x = torch.cat([workshop.images.validation, workshop.images.test])[:COLUMNS] / 255
    with torch.no_grad():
        (first, originals), *others = vae_blocks(workshop.vae(), x, 1).items()
    blocks = {f"{lesson.name}: {first}": originals, **dict(others)}
    shown = {caption: np.ascontiguousarray(images[: 2 * COLUMNS].numpy()) for caption, images in blocks.items()}
    return sheet(shown, COLUMNS, CELL)


if __name__ == "__main__":
    main()
