"""What reads a stranger's bytes, fuzzed for a few seconds; `make fuzz` goes on for longer."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from service.codecs.payload import Meter, Payload
from service.errors import TooLarge, Unreadable
from tests.fuzz.cost import (
    BASE_BYTES,
    BASE_S,
    MULTIPLE,
    PIXEL_UNITS,
    UNIT_S,
    Costly,
    Ledger,
    check_memory,
    check_result,
    check_time,
)
from tests.fuzz.growing import GROWING, GROWN, growing, grown

ROOT = Path(__file__).parents[2]
SECONDS = 6
RUNS = 1000
"""At least, however slow the machine is."""
SHELL = ("sh", "-c", '"$@"; exit $?', "sh")
"""Between us and the fuzzer, whose peak of memory would begin with that of the process that started it."""


def test_no_bytes_crash_hang_or_fill_the_memory(tmp_path: Path) -> None:
    """Every codec, the options in a query and the manifest: what is not read is refused by name, and at little cost."""
    limits = [f"-max_total_time={SECONDS}", "-seed=1", "-max_len=4096", "-timeout=30", "-rss_limit_mb=512"]
    flags = [*limits, f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(
        [*SHELL, sys.executable, "-m", "tests.fuzz.harness", "all", str(tmp_path), *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    runs = re.search(r"Done (\d+) runs", done.stderr)
    assert runs, done.stderr[-3000:]
    assert int(runs[1]) > RUNS


@pytest.mark.parametrize("target", GROWING)
def test_large_bodies_of_many_parts_cost_little(target: str, tmp_path: Path) -> None:
    """Each of half a MiB; the fuzzer runs its first inputs and no more."""
    flags = ["-runs=0", "-timeout=60", "-rss_limit_mb=512", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(
        [*SHELL, sys.executable, "-m", "tests.fuzz.harness", target, str(tmp_path), *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_crash_would_be_seen(tmp_path: Path) -> None:
    """The harness ends with an error where a reader raises what it does not promise."""
    script = (
        "import sys\nfrom tests.fuzz import harness\n"
        "def broken(data, _):\n if b'latents' in data: raise ZeroDivisionError\n"
        "harness.TARGETS['json'] = broken\nharness.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "json", str(tmp_path), "-runs=1000", f"-artifact_prefix={tmp_path}/"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "ZeroDivisionError" in done.stderr + done.stdout


def test_a_body_that_costs_too_much_would_be_seen(tmp_path: Path) -> None:
    """The harness ends with an error where reading takes memory that the Meter was not asked for."""
    script = (
        "import sys\nfrom tests.fuzz import harness\n"
        "def hungry(data, _):\n list(data)\n bytes(20 * len(data))\n"
        "harness.TARGETS['raw'] = hungry\nharness.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "raw", str(tmp_path), "-runs=1000", f"-artifact_prefix={tmp_path}/"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "Costly" in done.stderr + done.stdout


def busy(seconds: float) -> None:
    """Take so much processor time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_time_is_in_proportion_to_the_body() -> None:
    """Also to the pixels that the Meter allowed, and not to those that it refused."""

    def draw(meter: Meter) -> None:
        meter.picture(512, 512, 4)
        busy(BASE_S + 512 * 512 * PIXEL_UNITS * UNIT_S / 2)

    def draw_too_much(meter: Meter) -> None:
        try:
            meter.picture(2**20, 2**20, 4)
        finally:
            busy(BASE_S + 0.01)

    with pytest.raises(Costly):
        check_time(lambda _: busy(BASE_S + 0.01), 100)
    check_time(lambda _: busy(BASE_S + 0.01), round(0.02 / UNIT_S))
    check_time(draw, 100)
    with pytest.raises(Costly):
        check_time(draw_too_much, 100)


def test_a_suspect_is_measured_again() -> None:
    """What was slow once, because the machine had other work, is no finding; an error is the reader's own."""
    runs: list[float] = [BASE_S + 0.01, 0.0]
    check_time(lambda _: busy(runs.pop(0)), 100)
    assert not runs
    with pytest.raises(Unreadable):
        check_time(refuse, 100)


def refuse(_: Meter) -> None:
    raise Unreadable("not so")


@pytest.mark.parametrize("take", [bytes, lambda size: np.zeros(size // 8)], ids=["Python's", "numpy's"])
def test_memory_is_asked_for(take: Callable[[int], object]) -> None:
    """Beyond a small multiple of the body; a peak counts, whether or not it is left."""

    def read(meter: Meter) -> None:
        meter.reserve(4 * BASE_BYTES)
        take(4 * BASE_BYTES)

    check_memory(read, 100)
    with pytest.raises(Costly):
        check_memory(lambda _: take(4 * BASE_BYTES), 100)
    check_memory(lambda _: take(MULTIPLE * BASE_BYTES), BASE_BYTES)


def test_the_rows_that_were_read_are_weighed() -> None:
    """They and the mask; an axis that is there by broadcasting takes none."""
    rows = np.zeros((BASE_BYTES, 1), np.float32)
    with pytest.raises(Costly):
        check_result(Payload(rows), Ledger(), 100)
    check_result(Payload(rows), Ledger(), BASE_BYTES)
    check_result(Payload(np.broadcast_to(rows[:1], rows.shape)), Ledger(), 100)
    ledger = Ledger()
    ledger.reserve(rows.nbytes)
    check_result(Payload(rows[:1], rows), ledger, 100)


def test_a_ledger_refuses_what_a_meter_refuses() -> None:
    """And adds up what it is asked for."""
    ledger = Ledger()
    ledger.picture(10, 20, 4)
    with pytest.raises(TooLarge):
        ledger.picture(2**20, 2**20, 4)
    assert (ledger.pixels, ledger.pictures, ledger.bytes) == (200, 1, 800)


def test_a_small_input_becomes_a_large_body() -> None:
    """Its part repeated, numbered where it says so; an input without a part is left as it is."""
    assert grown(growing(b"[", b"0,", b"0]")) == b"[" + b"0," * ((GROWN - 5) // 2) + b"0]"
    numbered = grown(growing(b"{", b'"#":0,', b"}"))
    assert numbered.startswith(b'{"0":0,"1":0,')
    assert numbered.endswith(b":0,}")
    assert GROWN / 2 < len(numbered) <= GROWN
    assert grown(b"\xff\xff\0\1abc") == b"abc"
    assert grown(b"") == b""
