"""Connections counted by address, over several workers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from service.errors import TooManyConnections
from service.server.connections import SPARE, ConnectionCounts, Connections
from service.settings import Settings

WORKER = """
import sys
from pathlib import Path
from service.server.connections import ConnectionCounts
counts = ConnectionCounts(Path(sys.argv[1]))
for _ in range(3):
    counts.add("192.0.2.1", 1)
counts.add("192.0.2.1", -1)
print("counted", flush=True)
sys.stdin.read()
"""


def test_workers_see_what_the_others_count(tmp_path: Path) -> None:
    """As long as they live: one that is killed takes its counts, and its file, with it."""
    own = ConnectionCounts(tmp_path)
    own.add("192.0.2.1", 1)
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"counted\n"
        assert own.of("192.0.2.1") == 3
        assert own.of("192.0.2.2") == 0
        assert len(list(tmp_path.iterdir())) == 2
    finally:
        worker.kill()
        worker.communicate()
    assert own.of("192.0.2.1") == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_addresses_do_not_share_counts() -> None:
    """Of thousands with connections open, hardly any is taken for another; none is forgotten."""
    counts = ConnectionCounts(None)
    for number in range(2000):
        counts.add(f"10.0.{number // 256}.{number % 256}", 1)
    found = [counts.of(f"10.0.{number // 256}.{number % 256}") for number in range(2000)]
    assert min(found) == 1
    assert sum(found) < 2020
    for number in range(2000):
        counts.add(f"10.0.{number // 256}.{number % 256}", -1)
    assert counts.of("10.0.0.0") == 0


def test_without_room_each_worker_counts_for_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And says so; the service goes on."""
    counts = ConnectionCounts(tmp_path / "missing")
    counts.add("192.0.2.1", 1)
    assert counts.of("192.0.2.1") == 1
    assert "for itself" in caplog.text


def test_networks_of_ipv6_and_proxies() -> None:
    """A /64 is one address; a trusted proxy, or all of them, and a unix socket have no limit."""
    limits = Connections(Settings(max_connections_per_address=1, trusted_proxies="192.0.2.0/24, 2001:db8:5::1"))
    assert limits.over(1, ("2001:db8:1:2::1", 1)) is None
    refused = limits.over(2, ("2001:db8:1:2::2", 1))
    assert isinstance(refused, TooManyConnections)
    assert "2001:db8:1:2::/64 has 1 connections open, VAE_MAX_CONNECTIONS_PER_ADDRESS" in str(refused)
    assert limits.over(2, ("2001:db8:1:3::2", 1)) is None
    for client in (("192.0.2.9", 1), ("2001:db8:5::1", 1), None):
        assert [limits.over(3, client) for _ in range(3)] == [None] * 3
    limits.closed(("2001:db8:1:2::1", 1))
    assert limits.over(2, ("2001:db8:1:2::2", 1)) is None
    behind = Connections(Settings(max_connections_per_address=1, trusted_proxies="*"))
    assert [behind.over(1, ("192.0.2.1", 1)) for _ in range(3)] == [None] * 3


def test_the_newest_connections_above_the_limits_stay() -> None:
    """Whoever holds many does not keep health from being asked for."""
    limits, gone = Connections(Settings()), []
    for number in range(3 * SPARE):
        limits.keep(number, lambda number=number: gone.append(number))  # type: ignore[misc]
    assert gone == list(range(2 * SPARE))
    limits.release(2 * SPARE)
    limits.keep("new", lambda: None)
    assert len(gone) == 2 * SPARE
