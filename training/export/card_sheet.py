"""The picture of a model card, made of what the version's folder holds: golden rows and graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from service.contract import manifest as manifests
from service.contract.images import Pixels
from service.contract.manifest import File, Manifest, ManifestError, digest
from training.canvas import small_png
from training.config import CardNotes
from training.errors import ExportError
from training.evaluation.card import SHEET_FILE, colour_of, with_card
from training.export.session import opened
from training.files import write_whole
from training.signing import check_key, write_manifest

MOST_BYTES = 100_000
"""Size of the picture, at most."""
SAMPLES = 8
COLUMNS = 4


def described(manifest: Manifest, folder: Path) -> Manifest:
    """Write the model card of a version: README.md and its picture.

    Args:
        manifest: The manifest, whose own entry of a card does not matter.
        folder: Folder of the version, with its graphs and golden rows.

    Returns:
        The manifest with the card, which the caller writes.

    Raises:
        DiskError: A file cannot be written.
    """
    content = small_png(blocks(manifest, folder), COLUMNS, MOST_BYTES)
    write_whole(folder / SHEET_FILE, content)
    return with_card(manifest, folder, [File(file=SHEET_FILE, sha256=digest(content))])


def describe_again(folder: Path, notes: CardNotes | None = None, key: Ed25519PrivateKey | None = None) -> Path:
    """Write the model card of an existing version, and its manifest with it.

    Args:
        folder: Folder of the version.
        notes: Words that replace those of the manifest; None keeps them.
        key: Signs the version anew.

    Returns:
        The card's path.

    Raises:
        ExportError: The folder holds no readable version.
        SigningError: The version is signed, and there is no key.
        DiskError: A file cannot be written.
    """
    check_key(folder, key)
    try:
        manifest = manifests.read(folder)
    except ManifestError as error:
        raise ExportError(str(error)) from error
    if notes is not None:
        told = {name: value for name, value in manifest.training.items() if name != "card"}
        training = {**told, **({"card": words} if (words := notes.model_dump(exclude_none=True)) else {})}
        manifest = manifest.model_copy(update={"training": training})
    write_manifest(folder, described(manifest, folder), key)
    return folder / manifests.CARD_FILE


def blocks(manifest: Manifest, folder: Path) -> dict[str, Pixels]:
    """Images of the golden rows with what the graphs make of them, and samples, by caption.

    Golden rows are in the folder in any case, so the picture shows no image that the version would keep to itself.

    Args:
        manifest: The manifest.
        folder: Folder of the version.

    Returns:
        Images (n, c, h, w) in [0, 1].
    """
    with np.load(folder / manifest.golden.file) as file:
        golden = dict(file)
    low, high = manifest.value_range
    found: dict[str, Pixels] = {}

    def ran(name: str, *rows: Pixels) -> Any:
        graph = manifest.graphs[name]
        inputs = dict(zip(graph.inputs, rows, strict=True))
        return opened(folder / graph.file).run([*graph.outputs], inputs)[0]

    seen = next((golden[key] for key in ("encoder/x", "posterior/x") if key in golden), None)
    if seen is not None:
        found["images"] = (seen - low) / (high - low)
    if "decoder" in manifest.graphs:
        z = next((golden[key] for key in ("encoder/mean", "posterior/z") if key in golden), golden["decoder/z"])
        found["decoded latents" if seen is None else "reconstructions"] = (ran("decoder", z) - low) / (high - low)
    if "correction" in manifest.graphs:
        found["corrupted"], found["restored"] = golden["correction/y"], golden["correction/restored"]
    for view in manifest.views() if "restoration" in manifest.graphs else ():
        found |= _restored(view, folder)
    if "decoder" in manifest.graphs and manifest.prior:
        shape = golden["prior/eps"].shape[1:] if "prior" in manifest.graphs else z.shape[1:]
        eps = np.random.default_rng(0).standard_normal((SAMPLES, *shape), np.float32)
        drawn = ran("prior", eps) if "prior" in manifest.graphs else eps
        found["samples"] = (ran("decoder", drawn) - low) / (high - low)
    return found


def _restored(manifest: Manifest, folder: Path) -> dict[str, Pixels]:
    """Corrupted golden images of one variant, E[x | y] and one draw of x."""
    with np.load(folder / manifest.golden.file) as file:
        golden = dict(file)
    found = {"corrupted": golden["restoration/y"], "restored": golden["restoration/restored"]}
    if "completion/completion" in golden:
        found["one completion"] = golden["completion/completion"]
    variant = f" ({colour_of(manifest.channels)})" if manifest.variants else ""
    return {f"{caption}{variant}": images for caption, images in found.items()}
