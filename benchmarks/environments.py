"""Virtual environment of each peer, rebuilt when its pinned requirements change."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

HOME = Path(".bench")
HERE = Path(__file__).parent


class InstallFailed(Exception):
    """The environment cannot be built; the message is the installer's last line."""


def prepare(name: str, requirements: Path, base: str = sys.executable) -> str:
    """Python executable of .bench/<name>, with these requirements installed.

    Raises: InstallFailed.
    """
    folder, wanted = HOME / name, hashlib.sha256(requirements.read_bytes()).hexdigest()
    python, stamp = folder / "bin/python", folder / ".requirements"
    if not (stamp.exists() and stamp.read_text() == wanted):
        print(f"installing {name} ...", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        _run([base, "-m", "venv", str(folder)])
        _run([str(python), "-m", "pip", "install", "--quiet", "--requirement", str(requirements)])
        stamp.write_text(wanted)
    return str(python.absolute())


def version(requirements: Path, package: str) -> str:
    """Pinned version of a package."""
    found = re.search(rf"^{re.escape(package)}==(\S+)", requirements.read_text(), re.MULTILINE | re.IGNORECASE)
    return found[1] if found else "?"


def ignored_home() -> Path:
    """Folder .bench/, which git ignores."""
    HOME.mkdir(exist_ok=True)
    (HOME / ".gitignore").write_text("*\n")
    return HOME


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise InstallFailed((error.stderr.strip().splitlines() or ["the installer said nothing"])[-1][:200]) from error
    except OSError as error:
        raise InstallFailed(f"{command[0]}: {error.strerror}") from error
