"""Counts of callers: sliding windows, added up over workers, bounded; a dead worker's running calls are void."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from limits import parse

from service.errors import StartError
from service.security.rates import SETS, SIZE, WAYS, CallCounts

ROOT = Path(__file__).parents[2]
TEN = parse("10/minute")
HOLDER = """
import sys, time
from pathlib import Path
from service.security.rates import CallCounts
counts = CallCounts(Path(sys.argv[1]))
for _ in range(3):
    counts.begin("alice")
print("running", flush=True)
time.sleep(60)
"""


class Clock:
    """A clock that is set by hand."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        """As time.monotonic()."""
        return self.now


def hits(counts: CallCounts, calls: int, caller: str = "alice") -> int:
    """How many of so many calls the rate allows."""
    return sum(not counts.hit(TEN, caller) for _ in range(calls))


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Callable[[Clock], CallCounts]]:
    """A function that gives the counts of one worker more of those that share a folder."""
    with ExitStack() as stack:
        yield lambda clock: stack.enter_context(closing(CallCounts(tmp_path, clock)))


@pytest.fixture(params=[1, 3], ids=["one worker", "three workers"])
def workers(
    request: pytest.FixtureRequest, shared: Callable[[Clock], CallCounts]
) -> Callable[[Clock], list[CallCounts]]:
    """A function that gives the counts of one worker, in memory, or of three, in a folder that they share."""
    number = request.param
    return lambda clock: [CallCounts(clock=clock)] if number == 1 else [shared(clock) for _ in range(number)]


def test_a_rate_holds_for_all_workers_together(workers: Callable[[Clock], list[CallCounts]]) -> None:
    """Whichever worker is asked; every caller has its own."""
    counts = workers(Clock(6000.0))
    allowed = [not counts[call % len(counts)].hit(TEN, "alice") for call in range(15)]
    assert allowed == [True] * 10 + [False] * 5
    assert hits(counts[-1], 15, "bob") == 10


@pytest.mark.parametrize("later", [1.0, 30.0, 59.0, 61.0, 90.0])
def test_a_window_slides(workers: Callable[[Clock], list[CallCounts]], later: float) -> None:
    """After the seconds that a refusal names, and not before, a call is allowed again."""
    clock = Clock(6030.0)
    counts = workers(clock)
    assert hits(counts[0], 10) == 10
    clock.now += later
    wait_s = counts[-1].hit(TEN, "alice")
    assert (wait_s > 0.0) == (later <= 30.0)
    if wait_s:
        clock.now += wait_s - 0.01
        assert counts[-1].hit(TEN, "alice") > 0.0
        clock.now += 0.02
        assert counts[-1].hit(TEN, "alice") == 0.0


def test_what_was_long_ago_is_forgotten(workers: Callable[[Clock], list[CallCounts]]) -> None:
    """Two windows on, the whole rate is there again."""
    clock = Clock(6030.0)
    counts = workers(clock)
    assert hits(counts[0], 11) == 10
    clock.now += 120.0
    assert hits(counts[-1], 11) == 10


def test_memory_does_not_grow_with_callers(tmp_path: Path, shared: Callable[[Clock], CallCounts]) -> None:
    """What is full forgets callers whose windows end first, never calls that run."""
    clock = Clock(6000.0)
    for counts in (CallCounts(clock=clock), shared(clock)):
        counts.begin("alice")
        for number in range(3 * SETS * WAYS):
            counts.hit(TEN, str(number))
        assert len(counts._own) == SIZE
        clock.now += 120.0
        assert hits(counts, 11, "carol") == 10
    assert shared(clock).running("alice") == 1
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [SIZE] * 2


def test_running_calls_are_added_up(workers: Callable[[Clock], list[CallCounts]]) -> None:
    """Of all workers; one that ends makes room."""
    counts = workers(Clock(6000.0))
    for one in counts:
        one.begin("alice")
        one.begin("alice")
    assert [one.running("alice") for one in counts] == [2 * len(counts)] * len(counts)
    counts[0].end("alice")
    assert [one.running("alice") for one in counts] == [2 * len(counts) - 1] * len(counts)
    assert [one.running("bob") for one in counts] == [0] * len(counts)


def test_a_killed_workers_running_calls_are_void(tmp_path: Path, shared: Callable[[Clock], CallCounts]) -> None:
    """While nobody is in its place, and when somebody is; until then they count."""
    clock = Clock(6000.0)
    mine = shared(clock)
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "running\n"
        assert mine.running("alice") == 3
        holder.kill()
    assert mine.running("alice") == 0
    successor = shared(clock)
    assert len(list(tmp_path.iterdir())) == 2
    assert (mine.running("alice"), successor.running("alice")) == (0, 0)


def test_the_successor_of_a_worker_goes_on_with_its_counts(
    tmp_path: Path, shared: Callable[[Clock], CallCounts]
) -> None:
    """A caller gains nothing by a worker that dies."""
    clock = Clock(6000.0)
    first, other = shared(clock), shared(clock)
    assert hits(first, 7) == 7
    assert other.hit(TEN, "bob") == 0.0
    first.begin("carol")
    first.close()
    first.end("carol")
    assert first.hit(TEN, "carol") == 0.0
    successor = shared(clock)
    assert len(list(tmp_path.iterdir())) == 2
    assert hits(successor, 5) == 3
    assert other.hit(TEN, "alice") > 0.0


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """Told at the start, with what to set."""
    with pytest.raises(StartError, match="TMPDIR") as caught:
        CallCounts(tmp_path / "missing")
    assert "\n" not in str(caught.value)
