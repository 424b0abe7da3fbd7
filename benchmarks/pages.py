"""Common parts of the result pages: the machine, and the plot."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

from benchmarks.environments import HERE, InstallFailed, prepare


def machine() -> str:
    """Processor and operating system, in one line."""
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    return f"{processor()}, {os.cpu_count()} CPUs; {system}"


def processor() -> str:
    """Processor's name from /proc/cpuinfo."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write(text: str, out: Path, kind: str, raw: Path) -> None:
    """Write the page at `out` and its plot beside it, the latter in an environment with matplotlib."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    try:
        python = prepare("plot", HERE / "plot.txt")
        subprocess.run([python, str(HERE / "plot.py"), kind, str(raw), str(out.with_suffix(".png"))], check=True)
    except (InstallFailed, subprocess.CalledProcessError) as error:
        print(f"no plot: {error}", file=sys.stderr)
    print(f"wrote {out}")
