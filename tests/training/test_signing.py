"""Signatures of versions as the trainer writes them: of what is there, with keys that openssl makes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from training.__main__ import main

pytestmark = pytest.mark.usefixtures("own_signals")


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with private.pem, as the documentation makes it, its public half, and keys that will not do."""
    folder = tmp_path_factory.mktemp("keys")
    private = folder / "private.pem"
    openssl("genpkey", "-algorithm", "ed25519", "-out", private)
    openssl("pkey", "-in", private, "-pubout", "-out", folder / "public.pem")
    openssl("pkey", "-in", private, "-aes256", "-passout", "pass:secret", "-out", folder / "encrypted.pem")
    openssl("genpkey", "-algorithm", "x25519", "-out", folder / "x25519.pem")
    (folder / "garbage.pem").write_text("no key\n")
    return folder


def test_what_is_signed_openssl_verifies(flat_models: Path, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The signature is of the manifest's exact bytes; signing again writes the same."""
    folder = flat_models / "mnist-2d" / "1"
    signature = folder / "manifest.json.sig"
    for _ in range(2):
        assert main(["sign", str(folder), "--key", str(keys / "private.pem")]) == 0
        assert f"wrote {signature}" in capsys.readouterr().out
    verify = ("pkeyutl", "-verify", "-pubin", "-inkey", keys / "public.pem", "-rawin")
    openssl(*verify, "-in", folder / "manifest.json", "-sigfile", signature)
    with pytest.raises(subprocess.CalledProcessError):
        openssl(*verify, "-in", folder / "golden.npz", "-sigfile", signature)
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("absent.pem", "absent.pem: No such file or directory; name a PEM file of keys"),
        ("public.pem", "public.pem holds no private key in PEM; make one with `openssl genpkey -algorithm ed25519"),
        ("garbage.pem", "garbage.pem holds no private key in PEM"),
        ("encrypted.pem", "encrypted.pem is encrypted; pass it decrypted: --key <(openssl pkey -in "),
        ("x25519.pem", "x25519.pem holds a key of another kind (X25519PrivateKey); make one with"),
    ],
)
def test_a_key_that_cannot_sign_is_one_line(
    keys: Path, key: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything else is looked at; `fit` and `export` do not even look at their configuration."""
    for command in ("sign", "fit", "export"):
        assert main([command, "nowhere", "--key", str(keys / key)]) == 1
        assert says in capsys.readouterr().err


def test_a_version_that_is_not_whole_is_not_signed(
    flat_models: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of another digest, a manifest that cannot be read, and folders of other names: each is one line."""
    folder = flat_models / "mnist-2d" / "1"
    shutil.copytree(folder, flat_models / "mnist-2d" / "2")
    (flat_models / "other" / "1").mkdir(parents=True)
    whole = json.loads((folder / "manifest.json").read_text())
    (flat_models / "other" / "1" / "manifest.json").write_text(json.dumps({**whole, "name": 1}))
    (folder / "decoder.onnx").write_bytes(b"x")
    for version, says in (
        ("mnist-2d/1", "decoder.onnx does not match the SHA-256 in its manifest"),
        ("mnist-2d/2", "holds version 1 of mnist-2d; name the folders after them"),
        ("other/1", "manifest.json: name must be"),
        ("nowhere/1", "a model version is a folder with a manifest.json"),
    ):
        assert main(["sign", str(flat_models / version), "--key", str(keys / "private.pem")]) == 1
        said = capsys.readouterr().err
        assert says in said
        assert said.count("\n") == 1
    assert not list(flat_models.rglob("*.sig"))
