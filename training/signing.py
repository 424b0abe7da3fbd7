"""Signatures of written versions, by which a service knows who made them; see `service.contract.signature`."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from service.contract import manifest as manifests
from service.contract.files import check_files
from service.contract.manifest import FILE_NAME, SIGNATURE_FILE, Manifest, ManifestError
from service.contract.signature import KeyFileError, read_private_key
from training.errors import SigningError
from training.files import write_whole


def private_key(path: Path | None) -> Ed25519PrivateKey | None:
    """Read a private key, before the work whose result it signs; None where none is given.

    Raises:
        SigningError: The file is no Ed25519 private key.
    """
    try:
        return None if path is None else read_private_key(path)
    except KeyFileError as error:
        raise SigningError(str(error)) from error


def check_key(folder: Path, key: Ed25519PrivateKey | None) -> None:
    """Refuse to alter a signed version without a key to sign it anew.

    Raises:
        SigningError: The version is signed, and there is no key.
    """
    if key is None and (folder / SIGNATURE_FILE).exists():
        raise SigningError(f"{folder} is signed; pass --key, which signs it anew, or remove {SIGNATURE_FILE}")


def write_manifest(folder: Path, manifest: Manifest, key: Ed25519PrivateKey | None) -> None:
    """Write the manifest of a version, and its signature.

    Args:
        folder: Folder of the version.
        manifest: The manifest.
        key: The private key; None writes no signature.

    Raises:
        SigningError: The version is signed, and there is no key.
        DiskError: A file cannot be written.
    """
    check_key(folder, key)
    text = manifest.to_json().encode()
    write_whole(folder / FILE_NAME, text)
    if key is not None:
        write_whole(folder / SIGNATURE_FILE, key.sign(text))


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
    path = folder / SIGNATURE_FILE
    write_whole(path, key.sign(text))
    return path
