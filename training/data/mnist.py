"""MNIST in its original IDX files, gzipped or not."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path
from typing import ClassVar, Literal

import httpx
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from training.data.images import DatasetSettings, ImageSet
from training.errors import DataError

# md5 of the uncompressed original files.
MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
}
MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist"
HEADER = 16


class Mnist(DatasetSettings):
    """60,000 training and 10,000 test images of 28 x 28; the last `validation` training images are for validation."""

    stochastic: ClassVar[bool] = True
    about: ClassVar[str] = (
        "MNIST, 70,000 grey images of handwritten digits by LeCun, Cortes and Burges, made of NIST's Special Databases "
        "1 and 3: <http://yann.lecun.com/exdb/mnist/>."
    )
    licence: ClassVar[str] = (
        "Copyright of Yann LeCun and Corinna Cortes, a work derived from NIST's; made available under CC BY-SA 3.0."
    )
    dataset: Literal["mnist"]
    """MNIST."""
    validation: int = 2000
    """Number of training images for validation, the last ones."""

    def load(self, root: Path) -> ImageSet:
        """Read DIR/*-ubyte[.gz] or DIR/mnist/*-ubyte[.gz].

        Raises:
            DataError: A file is missing or is not the original.
        """
        images = read_images(root, "train-images-idx3-ubyte")
        if not 0 < self.validation < len(images):
            raise DataError(f"validation = {self.validation} must lie between 1 and {len(images) - 1}")
        train, validation = images[: -self.validation], images[-self.validation :]
        return ImageSet(train, validation, read_images(root, "t10k-images-idx3-ubyte"))


def read_images(root: Path, name: str) -> Tensor:
    """Read one IDX file as uint8 (n, 1, 28, 28), checked against the original's md5."""
    for path in (folder / (name + suffix) for folder in (root, root / "mnist") for suffix in ("", ".gz")):
        if path.is_file():
            return _parse(path, MD5[name])
    raise DataError(
        f"no {name}[.gz] in {root} or {root / 'mnist'}; `python -m training download mnist --data {root}` fetches it"
    )


def _parse(path: Path, md5: str) -> Tensor:
    raw = path.read_bytes()
    try:
        content = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked ({error}); fetch it again") from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise DataError(f"{path} is not the original MNIST file (md5 {found}, expected {md5}); fetch it again")
    pixels = np.frombuffer(content, np.uint8, offset=HEADER).copy()
    return torch.from_numpy(pixels).reshape(-1, 1, 28, 28)


def download(root: Path) -> None:
    """Fetch the two image files into root/mnist and check them; whole files that are already there are kept.

    Raises:
        DataError: The mirror cannot be reached or sends something else.
    """
    folder = root / "mnist"
    folder.mkdir(parents=True, exist_ok=True)
    for name, md5 in MD5.items():
        path = folder / f"{name}.gz"
        if path.is_file():
            _parse(path, md5)
            continue
        partial = path.with_suffix(".part.gz")
        _fetch(f"{MIRROR}/{name}.gz", partial)
        _parse(partial, md5)
        partial.replace(path)


def _fetch(url: str, path: Path) -> None:
    try:
        with httpx.stream("GET", url, follow_redirects=True, timeout=30.0) as response, path.open("wb") as file:
            response.raise_for_status()
            total = int(response.headers.get("content-length", 0)) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc=path.name) as bar:
                for chunk in response.iter_bytes():
                    file.write(chunk)
                    bar.update(len(chunk))
    except httpx.HTTPError as error:
        raise DataError(f"cannot fetch {url}: {error}; place the file in {path.parent} by hand") from error
