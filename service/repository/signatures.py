"""Signatures of versions: who must have signed what is served, as VAE_MODEL_PUBLIC_KEYS says."""

from __future__ import annotations

from pathlib import Path

from service.contract import manifest as manifests
from service.contract.manifest import SIGNATURE_FILE
from service.contract.signature import SIGNATURE_BYTES, KeyFileError, is_signed, read_public_keys
from service.errors import StartError
from service.settings import split

SIGN = "python -m training sign FOLDER --key PRIVATE.pem"


def check_signature(version: Path | str, text: bytes, signature: bytes | None, public_keys: str) -> None:
    """Refuse a version that none of the keys has signed. Reads the keys anew, so that they can be changed.

    Args:
        version: Folder or URL of the version, for the message.
        text: The bytes of its manifest, not parsed yet.
        signature: The content of the file beside it; None where there is none.
        public_keys: PEM files, separated by commas; empty asks for no signature.

    Raises:
        StartError: The version is not signed or was altered, or the keys cannot be read.
    """
    if not public_keys:
        return
    try:
        keys = [key for name in split(public_keys) for key in read_public_keys(Path(name))]
    except KeyFileError as error:
        raise StartError(f"VAE_MODEL_PUBLIC_KEYS: {error}") from error
    if signature is None:
        raise StartError(f"{version} is not signed, and VAE_MODEL_PUBLIC_KEYS asks for it; sign it with `{SIGN}`")
    if not is_signed(text, signature, keys):
        raise StartError(
            f"{version}/{SIGNATURE_FILE} is by no key of VAE_MODEL_PUBLIC_KEYS, or {manifests.FILE_NAME} was changed "
            f"after it was signed; sign it anew with `{SIGN}`, or add the key's public half"
        )


def read_signature(folder: Path) -> bytes | None:
    """The signature in the folder of a version; None where there is none.

    Raises:
        ManifestError: It cannot be read, or is larger than a signature.
    """
    try:
        return manifests.read_file(folder, SIGNATURE_FILE, SIGNATURE_BYTES, f"sign it anew with `{SIGN}`")
    except manifests.ManifestError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
