"""This service: BENCH_WORKERS workers of one thread each."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    folder, port = Path(sys.argv[1]), sys.argv[2]
    settings = {
        "VAE_PORT": port,
        "VAE_MODELS": str(folder.parent.parent),
        "VAE_DEFAULT_MODEL": folder.parent.name,
        "VAE_THREADS": "1",
        "VAE_WORKERS": os.environ["BENCH_WORKERS"],
    }
    os.execve(sys.executable, [sys.executable, "-m", "service"], os.environ | settings)  # noqa: S606  # no shell wanted
