"""Lines on standard error, beside any progress bar."""

from __future__ import annotations

import sys

from tqdm import tqdm


def tell(text: str) -> None:
    """Write one line."""
    tqdm.write(text, file=sys.stderr)


def warn(text: str) -> None:
    """Write one line that asks for something to be done."""
    tell(f"warning: {text}")
