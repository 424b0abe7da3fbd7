"""Signatures of versions: detached Ed25519 (RFC 8032) over the exact bytes of a manifest, which cover all of a version.

`openssl pkeyutl -sign -rawin` writes the same 64 bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

SIGNATURE_BYTES = 64
PEM_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----\s.*?-----END \1-----", re.DOTALL)
MAKE_KEY = "openssl genpkey -algorithm ed25519 -out PRIVATE.pem"
TELL_KEY = "openssl pkey -in PRIVATE.pem -pubout -out PUBLIC.pem"


class KeyFileError(ValueError):
    """A file of keys that cannot be used. The message names the file and the fix."""


def is_signed(text: bytes, signature: bytes, keys: Iterable[Ed25519PublicKey]) -> bool:
    """Whether one of the keys has made a signature of a manifest's bytes."""
    for key in keys:
        try:
            key.verify(signature, text)
        except InvalidSignature:
            continue
        return True
    return False


def read_public_keys(path: Path) -> list[Ed25519PublicKey]:
    """The public keys in a PEM file, at least one.

    Raises:
        KeyFileError: The file cannot be read, or holds other things than Ed25519 public keys.
    """
    blocks = list(PEM_BLOCK.finditer(_content(path)))
    if not blocks or any(block[1] != b"PUBLIC KEY" for block in blocks):
        held = "more than public keys" if blocks else "no public key"
        raise KeyFileError(f"{path} holds {held}; it should be what `{TELL_KEY}` writes")
    return [_public_key(path, block[0]) for block in blocks]


def _public_key(path: Path, pem: bytes) -> Ed25519PublicKey:
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyFileError(f"{path} holds a public key that cannot be read; write it with `{TELL_KEY}`") from error
    if not isinstance(key, Ed25519PublicKey):
        raise _other_kind(path, key)
    return key


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """The private key in a PEM file.

    Raises:
        KeyFileError: The file cannot be read, is encrypted, or holds another thing than an Ed25519 private key.
    """
    content = _content(path)
    if b"ENCRYPTED" in content:
        raise KeyFileError(f"{path} is encrypted; pass it decrypted: --key <(openssl pkey -in {path})")
    try:
        key = load_pem_private_key(content, None)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyFileError(f"{path} holds no private key in PEM; make one with `{MAKE_KEY}`") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _other_kind(path, key)
    return key


def _other_kind(path: Path, key: object) -> KeyFileError:
    return KeyFileError(f"{path} holds a key of another kind ({type(key).__name__}); make one with `{MAKE_KEY}`")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}; name a PEM file of keys") from error
