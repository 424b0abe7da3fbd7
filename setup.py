"""The included models as data of the wheel, for `vae --local`; pyproject.toml has everything else.

An editable installation has no copy of them, which would become stale: there they are in the working tree.
"""

import sys
from pathlib import Path

from setuptools import setup

FOLDERS = [path for path in (Path("models"), *sorted(Path("models").glob("**/*"))) if path.is_dir()]


def files_in(folder: Path) -> list[str]:
    """The files of a folder of models, without those of an export that was cut off."""
    return [str(path) for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]


setup(
    data_files=[]
    if "editable_wheel" in sys.argv
    else [
        (f"share/vae-service/{folder.as_posix()}", files_in(folder))
        for folder in FOLDERS
        if not any(part.startswith(".") for part in folder.parts)
    ]
)
