"""Signatures of written versions, by which a service knows who made them; see `service.contract.signature`."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from service.contract import manifest as manifests
from service.contract.files import check_files
from service.contract.manifest import SIGNATURE_FILE, ManifestError
from service.contract.signature import KeyFileError, read_private_key
from training.errors import DiskError, SigningError


def private_key(path: Path | None) -> Ed25519PrivateKey | None:
    """Read a private key, before the work whose result it signs; None where none is given.

    Raises:
        SigningError: The file is no Ed25519 private key.
    """
    try:
        return None if path is None else read_private_key(path)
    except KeyFileError as error:
        raise SigningError(str(error)) from error


def write_signature(folder: Path, text: bytes, key: Ed25519PrivateKey) -> Path:
    """Write the signature of a manifest's bytes beside it, and return its path.

    Raises:
        OSError: It cannot be written.
    """
    path, partial = folder / SIGNATURE_FILE, folder / f".{SIGNATURE_FILE}"
    partial.write_bytes(key.sign(text))
    return partial.replace(path)


def sign(folder: Path, key: Ed25519PrivateKey) -> Path:
    """Sign a version whose files are what its manifest says, and whose folders are named as it is.

    Args:
        folder: Folder of the version.
        key: The private key.

    Returns:
        Path of the signature.

    Raises:
        SigningError: The version is not one that a service would read.
        DiskError: The signature cannot be written.
    """
    try:
        text = manifests.read_text(folder)
        manifest = manifests.parse_file(folder, text)
        check_files(folder, manifest)
    except ManifestError as error:
        raise SigningError(f"{error}; nothing is signed") from error
    place = folder.absolute()
    if (manifest.name, manifest.version) != (place.parent.name, place.name):
        raise SigningError(f"{folder} holds version {manifest.version} of {manifest.name}; name the folders after them")
    try:
        return write_signature(folder, text, key)
    except OSError as error:
        raise DiskError(f"cannot write into {folder} ({error.strerror}); sign on a machine that may") from error
