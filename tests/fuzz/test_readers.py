"""What reads a stranger's bytes, fuzzed for a few seconds; `make fuzz` goes on for longer."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 6
RUNS = 1000
"""At least, however slow the machine is."""
SHELL = ("sh", "-c", '"$@"; exit $?', "sh")
"""Between us and the fuzzer, whose peak of memory would begin with that of the process that started it."""


def test_no_bytes_crash_hang_or_fill_the_memory(tmp_path: Path) -> None:
    """Every codec, the options in a query and the manifest: what is not read is refused by name."""
    limits = [f"-max_total_time={SECONDS}", "-seed=1", "-max_len=4096", "-timeout=10", "-rss_limit_mb=512"]
    flags = [*limits, f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(
        [*SHELL, sys.executable, "-m", "tests.fuzz.harness", "all", str(tmp_path), *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    runs = re.search(r"Done (\d+) runs", done.stderr)
    assert runs, done.stderr[-3000:]
    assert int(runs[1]) > RUNS


def test_a_crash_would_be_seen(tmp_path: Path) -> None:
    """The harness ends with an error where a reader raises what it does not promise."""
    script = (
        "import sys\nfrom tests.fuzz import harness\n"
        "def broken(data):\n if b'latents' in data: raise ZeroDivisionError\n"
        "harness.TARGETS['json'] = broken\nharness.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "json", str(tmp_path), "-runs=1000", f"-artifact_prefix={tmp_path}/"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "ZeroDivisionError" in done.stderr + done.stdout
