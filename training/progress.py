"""Lines on standard error that do not break the progress bar."""

from __future__ import annotations

import sys

from tqdm import tqdm


def tell(text: str) -> None:
    """Write one line."""
    tqdm.write(text, file=sys.stderr)


def warn(text: str) -> None:
    """Write one line that names a problem and its fix."""
    tell(f"warning: {text}")
