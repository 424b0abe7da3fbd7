"""Signed versions: where VAE_MODEL_PUBLIC_KEYS is set, what none of its keys has signed is refused by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from service.app import create_app
from service.errors import StartError
from service.repository.remote import sync
from service.repository.repository import Repository
from service.repository.trial import run
from service.repository.version import LoadRules, Trial, open_version, start_errors
from service.settings import Settings

Brighter = Callable[..., Path]
OURS, THEIRS = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
PEM, PUBLIC = Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
MANIFEST, SIGNATURE = "manifest.json", "manifest.json.sig"


def public(*keys: Ed25519PrivateKey) -> bytes:
    return b"".join(key.public_key().public_bytes(PEM, PUBLIC) for key in keys)


def sign(folder: Path, key: Ed25519PrivateKey = OURS) -> None:
    (folder / SIGNATURE).write_bytes(key.sign((folder / MANIFEST).read_bytes()))


@pytest.fixture
def keys(tmp_path: Path) -> str:
    """The setting: a file with our public key."""
    path = tmp_path / "ours.pem"
    path.write_bytes(public(OURS))
    return str(path)


@pytest.fixture
def folder(flat_models: Path) -> Path:
    """A version that we have signed."""
    folder = flat_models / "mnist-2d" / "1"
    sign(folder)
    return folder


def read_whole(folder: Path, keys: str) -> None:
    """Every file of a version, as the process that serves it reads them."""
    with open_version(folder, keys) as version, start_errors():
        for view in version.variants:
            for graph in view.graphs.values():
                version.files.read(graph)


def refusals(folder: Path, keys: str) -> set[str]:
    """Why the version is refused, by the serving process and by the one in which it is tried."""
    said = set()
    trial = Trial(str(folder), 1, 8, 2**40, False, keys)
    for read in (lambda: read_whole(folder, keys), lambda: run(trial)):
        with pytest.raises(StartError) as caught:
            read()
        assert str(caught.value).isprintable()
        said.add(str(caught.value))
    return said


def test_a_signed_version_is_served_and_an_unsigned_one_is_named(
    flat_models: Path, folder: Path, keys: str, brighter: Brighter, caplog: pytest.LogCaptureFixture
) -> None:
    """From the opening of the repository; without the setting both are served."""
    brighter(flat_models, "2")
    rules = LoadRules(public_keys=keys)
    opened = Repository.open(flat_models, "", "CPUExecutionProvider", 1, 8, rules=rules)
    assert list(opened.models["mnist-2d"]) == [folder.name]
    why = (
        "mnist-2d/2 is not signed, and VAE_MODEL_PUBLIC_KEYS asks for it; sign it with `python -m training sign FOLDER"
    )
    assert why in opened.refused("mnist-2d")["2"]
    assert why in caplog.text
    every = Repository.open(flat_models, "", "CPUExecutionProvider", 1, 8)
    assert list(every.models["mnist-2d"]) == ["1", "2"]


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


SPOILT: dict[str, Callable[[Path], object]] = {
    "a blank more": lambda folder: (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes() + b" "),
    "a bit of the signature": lambda folder: flip(folder / SIGNATURE, 0),
    "half a signature": lambda folder: (folder / SIGNATURE).write_bytes((folder / SIGNATURE).read_bytes()[:32]),
    "no byte of it": lambda folder: (folder / SIGNATURE).write_bytes(b""),
    "another's": lambda folder: sign(folder, THEIRS),
    "of another file": lambda folder: (folder / SIGNATURE).write_bytes(OURS.sign(b"{}")),
    "no JSON": lambda folder: (folder / MANIFEST).write_bytes(b"{"),
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_what_is_altered_is_refused_before_it_is_parsed(folder: Path, keys: str, spoil: str) -> None:
    """By both processes, in one line that names the version and the fix."""
    SPOILT[spoil](folder)
    (said,) = refusals(folder, keys)
    assert said == (
        f"{folder}/{SIGNATURE} is by no key of VAE_MODEL_PUBLIC_KEYS, or {MANIFEST} was changed after it was signed; "
        "sign it anew with `python -m training sign FOLDER --key PRIVATE.pem`, or add the key's public half"
    )


def test_a_signature_that_is_no_file_of_64_bytes_is_refused(folder: Path, keys: str) -> None:
    """A longer one, a FIFO, a folder: nothing is waited for."""
    path = folder / SIGNATURE
    path.write_bytes(path.read_bytes() + b"x")
    assert "is larger than the 64 bytes that it may have; sign it anew" in refusals(folder, keys).pop()
    for make in (os.mkfifo, os.mkdir):
        path.unlink()
        make(path)
        assert "is not a regular file; sign it anew" in refusals(folder, keys).pop()


def test_signed_files_cannot_change_either(folder: Path, keys: str) -> None:
    """The manifest has their digests; and its name and number are those of its folders, so it cannot take another's."""
    other = folder.with_name("2")
    shutil.copytree(folder, other)
    assert "holds version 1 of mnist-2d; name the folders after them" in refusals(other, keys).pop()
    flip(folder / "decoder.onnx", -1)
    assert "decoder.onnx does not match the SHA-256" in refusals(folder, keys).pop()


def test_any_of_several_keys_will_do(folder: Path, tmp_path: Path) -> None:
    """In several files, or in one: so one key follows another without a gap."""
    for name, held in (("a.pem", (THEIRS,)), ("b.pem", (OURS,)), ("both.pem", (THEIRS, OURS))):
        (tmp_path / name).write_bytes(public(*held))
    for keys in (f"{tmp_path}/a.pem, {tmp_path}/b.pem", f"{tmp_path}/both.pem"):
        for key in (OURS, THEIRS):
            sign(folder, key)
            read_whole(folder, keys)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file or directory; name a PEM file of keys"),
        (b"", "holds no public key; it should be what `openssl pkey -in PRIVATE.pem -pubout"),
        (OURS.private_bytes(PEM, PrivateFormat.PKCS8, NoEncryption()), "holds more than public keys"),
        (generate_private_key(65537, 2048).public_key().public_bytes(PEM, PUBLIC), "holds a key of another kind (RSA"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "holds a public key that cannot be read"),
    ],
)
def test_keys_that_cannot_be_used_refuse_everything(
    folder: Path, tmp_path: Path, content: bytes | None, says: str
) -> None:
    """The line names the setting, the file and the fix; so does the start."""
    path = tmp_path / "public.pem"
    if content is not None:
        path.write_bytes(content)
    for said in refusals(folder, str(path)):
        assert said.startswith(f"VAE_MODEL_PUBLIC_KEYS: {path}")
        assert says in said
    with pytest.raises(StartError, match=r"^VAE_MODEL_PUBLIC_KEYS: "):
        create_app(Settings(models=folder.parents[1], model_public_keys=str(path)))


def test_a_setting_that_names_no_file_lets_nothing_pass(folder: Path) -> None:
    """It is not as if it were empty."""
    assert "is by no key of VAE_MODEL_PUBLIC_KEYS" in refusals(folder, " , ").pop()


def test_a_copy_has_the_signature(flat_models: Path, folder: Path, keys: str, tmp_path: Path) -> None:
    """Of a repository elsewhere: unsigned versions are refused before they are parsed, a new signature is fetched."""
    url, copy = f"file://{flat_models}", tmp_path / "copy"
    copied = copy / "mnist-2d" / "1" / SIGNATURE
    sync(url, copy, public_keys=keys)
    assert copied.read_bytes() == (folder / SIGNATURE).read_bytes()
    (folder / MANIFEST).write_text(json.dumps(json.loads((folder / MANIFEST).read_text())))
    with pytest.raises(StartError, match=rf"^{url}/mnist-2d/1/{SIGNATURE} is by no key"):
        sync(url, copy, public_keys=keys)
    sign(folder)
    sync(url, copy, public_keys=keys)
    assert copied.read_bytes() == (folder / SIGNATURE).read_bytes()
    (folder / SIGNATURE).unlink()
    (folder / MANIFEST).write_bytes(b"{")
    with pytest.raises(StartError, match=rf"^{url}/mnist-2d/1 is not signed, and VAE_MODEL_PUBLIC_KEYS asks for it"):
        sync(url, copy, public_keys=keys)


def test_a_copy_has_no_signature_that_is_gone(flat_models: Path, folder: Path, tmp_path: Path) -> None:
    """Where no keys are set: the copy is what the repository holds, with a signature or without.

    Neither in the copy nor in what an interrupted copy has left.
    """
    url, copy = f"file://{flat_models}", tmp_path / "copy"
    (copy / "mnist-2d" / ".1").mkdir(parents=True)
    for signed in (True, False, True):
        sign(folder) if signed else (folder / SIGNATURE).unlink()
        if not signed:
            shutil.copytree(copy / "mnist-2d" / "1", copy / "mnist-2d" / ".1")
        sync(url, copy)
        assert {path.name for path in (copy / "mnist-2d" / "1").iterdir()} == {path.name for path in folder.iterdir()}
