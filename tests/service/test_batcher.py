"""The batcher's promises."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.errors import CallerGone, DeadlinePassed, InferenceFailed, NotReady, Overloaded
from service.runtime.batcher import Batcher
from service.runtime.jobs import PROBE_AFTER_S
from service.runtime.program import Arrays, Trip
from tests.service.conftest import until

IN_LOOP, IN_THREAD = 0.0, 1.0


@dataclass(eq=False)
class Doubler:
    """Doubles its rows, remembers its batches, and does what `during` says while it computes."""

    cost: float = IN_LOOP
    weight: int = 1
    rounds: int = 1
    free: None = None
    during: Callable[[Arrays], None] = lambda _: None
    batches: list[list[float]] = field(default_factory=list)

    def run(self, *arrays: NDArray[Any]) -> Arrays:
        """Twice the rows."""
        self.batches.append(arrays[0][:, 0].tolist())
        self.during(arrays)
        return (2 * arrays[0],)

    def batch_rows(self, max_rows: int) -> int:
        """As many as weigh what max_rows do."""
        return max(1, max_rows // self.weight)

    def cost_s(self, _rows: int) -> float:
        """As told."""
        return self.cost


def rows(*values: float) -> Arrays:
    return (np.array(values, np.float32)[:, None],)


def batcher(**changes: Any) -> Batcher:
    return Batcher(**{"max_rows": 8, "queue_rows": 64, "inline_s": 0.5, **changes})


def values(trip: Trip) -> list[float]:
    return [float(value) for value in trip.arrays[0][:, 0]]


async def gather(engine: Batcher, program: Doubler, *requests: Arrays) -> list[Any]:
    return await asyncio.gather(*(engine.submit(program, r) for r in requests), return_exceptions=True)


@pytest.mark.parametrize("cost", [IN_LOOP, IN_THREAD])
def test_what_arrives_together_travels_together_and_in_order(cost: float) -> None:
    """Rows of one turn of the loop make one batch, first come first; everybody gets their own rows."""

    async def scenario() -> None:
        program = Doubler(cost)
        answers = await gather(batcher(), program, rows(1), rows(2, 3), rows(4))
        assert program.batches == [[1, 2, 3, 4]]
        assert [values(trip) for trip in answers] == [[2], [4, 6], [8]]

    asyncio.run(scenario())


def test_a_batch_forms_while_the_last_one_runs() -> None:
    """No timer: the first goes alone, the others together when it is back."""

    async def scenario() -> None:
        gate = threading.Event()
        program = Doubler(IN_THREAD, during=lambda _: gate.wait(5) and None)
        engine = batcher()
        first = asyncio.create_task(engine.submit(program, rows(1)))
        await until(lambda: bool(program.batches))
        others = [asyncio.create_task(engine.submit(program, rows(k))) for k in (2, 3)]
        await until(lambda: engine.queued_rows == 2)
        gate.set()
        await asyncio.gather(first, *others)
        assert program.batches == [[1], [2, 3]]

    asyncio.run(scenario())


def test_rows_are_counted_not_requests() -> None:
    """Batches hold at most max_rows; a program whose rows weigh more gets fewer."""

    async def scenario() -> None:
        light, heavy = Doubler(), Doubler(weight=4)
        await gather(batcher(), light, rows(1, 1, 1), rows(2, 2, 2), rows(3, 3, 3))
        await gather(batcher(), heavy, rows(1), rows(2), rows(3))
        assert [len(batch) for batch in light.batches] == [8, 1]
        assert [len(batch) for batch in heavy.batches] == [2, 1]

    asyncio.run(scenario())


def test_a_large_request_delays_others_by_one_batch() -> None:
    """A request of many batches goes to the end of its lane after each; a single row is in the second batch."""

    async def scenario() -> None:
        program = Doubler()
        large, single = await gather(batcher(), program, rows(*range(100)), rows(-1))
        assert values(large) == [2.0 * k for k in range(100)]
        assert values(single) == [-2]
        assert -1 in program.batches[1]
        assert max(map(len, program.batches)) == 8

    asyncio.run(scenario())


def test_programs_take_turns() -> None:
    """A flood on one does not starve another."""

    async def scenario() -> None:
        order: list[str] = []
        flood = Doubler(during=lambda _: order.append("flood"))
        other = Doubler(during=lambda _: order.append("other"))
        engine = batcher()
        floods = [engine.submit(flood, rows(*range(8))) for _ in range(6)]
        await asyncio.gather(*floods, engine.submit(other, rows(1)))
        assert order.index("other") == 1

    asyncio.run(scenario())


def test_a_full_queue_refuses_at_once_and_computes_nothing() -> None:
    """What is above queue_rows is refused with a time to come back; what waits is answered."""

    async def scenario() -> None:
        program = Doubler()
        answers = await gather(batcher(queue_rows=4), program, rows(1, 2, 3), rows(4, 5), rows(6))
        assert isinstance(answers[1], Overloaded)
        assert answers[1].retry_after_s > 0
        assert [values(answers[k]) for k in (0, 2)] == [[2, 4, 6], [12]]
        assert program.batches == [[1, 2, 3, 6]]

    asyncio.run(scenario())


def test_a_lone_caller_is_served_at_once_and_a_crowd_together() -> None:
    """After a lone request the next does not wait for the loop's next turn, unless another came in this one."""

    async def scenario() -> None:
        program, engine = Doubler(), batcher()
        await engine.submit(program, rows(1))
        lone = engine.submit(program, rows(2))
        with pytest.raises(StopIteration):
            lone.send(None)
        await asyncio.sleep(0)
        crowd = await gather(engine, program, rows(3), rows(4), rows(5))
        assert program.batches == [[1], [2], [3], [4, 5]]
        await gather(engine, program, rows(6), rows(7))
        assert program.batches[4:] == [[6, 7]]
        assert [values(trip) for trip in crowd] == [[6], [8], [10]]

    asyncio.run(scenario())


def test_a_failure_at_once_fails_only_itself() -> None:
    """As in a queue."""

    async def scenario() -> None:
        def fail_on_two(arrays: Arrays) -> None:
            if arrays[0][0, 0] == 2:
                raise RuntimeError("secret")

        program, engine = Doubler(during=fail_on_two), batcher()
        await engine.submit(program, rows(1))
        with pytest.raises(InferenceFailed, match="log"):
            await engine.submit(program, rows(2))
        assert values(await engine.submit(program, rows(3))) == [6]

    asyncio.run(scenario())


def test_a_large_request_keeps_the_thread_until_somebody_comes() -> None:
    """Alone, it runs batch after batch in one go; a newcomer is in the next batch."""

    async def scenario() -> None:
        gate = threading.Event()
        program = Doubler(IN_THREAD)
        program.during = lambda _: len(program.batches) == 3 and gate.wait(5) and None
        engine = batcher()
        large = asyncio.create_task(engine.submit(program, rows(*range(100))))
        await until(lambda: len(program.batches) == 3)
        newcomer = asyncio.create_task(engine.submit(program, rows(-1)))
        await until(lambda: engine.queued_rows == 8 + 1)
        gate.set()
        assert values(await newcomer) == [-2]
        assert -1 in program.batches[3]
        assert values(await large) == [2.0 * k for k in range(100)]
        assert max(map(len, program.batches)) == 8

    asyncio.run(scenario())


def test_a_caller_that_leaves_is_not_computed_and_harms_nobody() -> None:
    """Its queued rows are dropped, its room in the queue is free again, the others are answered."""

    async def scenario() -> None:
        program = Doubler()
        engine = batcher()
        leaver = asyncio.create_task(engine.submit(program, rows(1)))
        stayer = asyncio.create_task(engine.submit(program, rows(2)))
        engine._scheduled = asyncio.get_running_loop().call_later(0.05, engine._turn)  # hold the batch back
        await asyncio.sleep(0)
        leaver.cancel()
        assert values(await stayer) == [4]
        assert program.batches == [[2]]
        assert engine.queued_rows == 0

    asyncio.run(scenario())


def test_a_passed_deadline_is_not_computed() -> None:
    """By the clock that was passed in; the others of the batch are."""

    async def scenario() -> None:
        program = Doubler()
        engine = batcher(clock=lambda: 100.0)
        late = engine.submit(program, rows(1), deadline=99.0)
        answers = await asyncio.gather(late, engine.submit(program, rows(2), deadline=101.0), return_exceptions=True)
        assert isinstance(answers[0], DeadlinePassed)
        assert program.batches == [[2]]

    asyncio.run(scenario())


def test_a_caller_that_hung_up_is_not_computed() -> None:
    """Work that waited behind a batch is dropped when its caller is gone; who is still there is served."""

    async def scenario() -> None:
        now, gate = [0.0], threading.Event()
        program = Doubler(IN_THREAD, during=lambda _: gate.wait(5) and now.__setitem__(0, now[0] + 2 * PROBE_AFTER_S))
        engine = batcher(clock=lambda: now[0])
        first = asyncio.create_task(engine.submit(program, rows(1)))
        await until(lambda: bool(program.batches))
        asyncio.get_running_loop().call_later(0.01, gate.set)
        gone = engine.submit(program, rows(2), gone=lambda: True)
        here = engine.submit(program, rows(3), gone=lambda: False)
        answers = await asyncio.gather(first, gone, here, return_exceptions=True)
        assert isinstance(answers[1], CallerGone)
        assert program.batches == [[1], [3]]

    asyncio.run(scenario())


@pytest.mark.parametrize("cost", [IN_LOOP, IN_THREAD])
def test_a_failing_batch_fails_only_itself(cost: float) -> None:
    """Its callers get an error that tells nothing of the cause, and the next batch runs."""

    async def scenario() -> None:
        def fail_on_one(arrays: Arrays) -> None:
            if arrays[0][0, 0] == 1:
                raise RuntimeError("secret")

        program = Doubler(cost, during=fail_on_one)
        engine = batcher(max_rows=2)
        answers = await gather(engine, program, rows(1), rows(2), rows(3))
        assert [type(answer) for answer in answers[:2]] == [InferenceFailed, InferenceFailed]
        assert "secret" not in str(answers[0])
        assert values(answers[2]) == [6]
        assert engine.healthy

    asyncio.run(scenario())


def test_a_program_that_loses_a_row_is_an_error() -> None:
    """As many rows out as in, or nobody gets an answer."""

    class Loser(Doubler):
        def run(self, *arrays: NDArray[Any]) -> Arrays:
            return (arrays[0][1:],)

    async def scenario() -> None:
        (answer,) = await gather(batcher(), Loser(), rows(1, 2))
        assert isinstance(answer, InferenceFailed)

    asyncio.run(scenario())


def test_closing_answers_or_refuses_everyone() -> None:
    """The running batch is finished, what waits is refused, and so is what comes later."""

    async def scenario() -> None:
        gate = threading.Event()
        program = Doubler(IN_THREAD, during=lambda _: gate.wait(5) and None)
        engine = batcher()
        running = asyncio.create_task(engine.submit(program, rows(1)))
        await until(lambda: bool(program.batches))
        waiting = asyncio.create_task(engine.submit(program, rows(2)))
        await asyncio.sleep(0)
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0)
        assert not closing.done()
        gate.set()
        assert values(await running) == [2]
        with pytest.raises(NotReady):
            await waiting
        await closing
        with pytest.raises(NotReady):
            await engine.submit(program, rows(3))
        assert not engine.healthy

    asyncio.run(scenario())


def test_a_bug_in_the_batcher_leaves_nobody_waiting() -> None:
    """If the engine itself breaks, callers get an error and readiness turns false."""

    class Broken(Doubler):
        def cost_s(self, _rows: int) -> float:
            raise ZeroDivisionError

    async def scenario() -> None:
        engine = batcher()
        waiting, broken = Doubler(), Broken()
        answers = await asyncio.gather(
            engine.submit(broken, rows(1)), engine.submit(waiting, rows(2)), return_exceptions=True
        )
        assert [type(answer) for answer in answers] == [InferenceFailed, NotReady]
        assert not engine.healthy

    asyncio.run(scenario())


def test_lingering_waits_for_company() -> None:
    """With linger_ms, rows that come a little later share the batch."""

    async def scenario() -> None:
        program = Doubler()
        engine = batcher(linger_ms=100.0)
        first = asyncio.create_task(engine.submit(program, rows(1)))
        for _ in range(5):  # turns of the loop, of which the first would be enough
            await asyncio.sleep(0)
        await asyncio.gather(first, engine.submit(program, rows(2)))
        assert program.batches == [[1, 2]]

    asyncio.run(scenario())


def test_an_idle_batcher_has_nothing_scheduled() -> None:
    """No timer, no task: it costs nothing until somebody comes."""

    async def scenario() -> None:
        engine = batcher()
        await gather(engine, Doubler(), rows(1))
        assert engine._scheduled is None
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 16), st.sampled_from([IN_LOOP, IN_THREAD]))
def test_every_request_gets_its_own_rows(sizes: list[int], max_rows: int, cost: float) -> None:
    """However requests are split and merged, each gets exactly its rows, in order, and all are computed once."""

    async def scenario() -> None:
        program, engine = Doubler(cost), batcher(max_rows=max_rows, queue_rows=10**6)
        starts = np.cumsum([0, *sizes])
        requests = [rows(*range(a, b)) for a, b in itertools.pairwise(starts)]
        answers = await gather(engine, program, *requests)
        assert [values(trip) for trip in answers] == [[2.0 * v for v in r[0][:, 0]] for r in requests]
        assert sorted(v for batch in program.batches for v in batch) == list(range(sum(sizes)))
        assert max(map(len, program.batches)) <= max_rows
        await engine.close()

    asyncio.run(scenario())


def test_long_work_is_refused_when_what_waits_would_outlast_it() -> None:
    """What counts is how many slices the others still need; further slices of what has begun are taken."""

    async def scenario() -> None:
        now = [0.0]
        long = Doubler(IN_THREAD, weight=8, rounds=100, during=lambda _: now.__setitem__(0, now[0] + 1.0))
        engine = batcher(queue_rows=1000, clock=lambda: now[0])
        await asyncio.gather(*(engine.submit(long, rows(k)) for k in range(8)))
        begun = [asyncio.create_task(engine.submit(long, rows(k))) for k in range(3)]
        await asyncio.sleep(0)
        soon = now[0] + 20.0
        with pytest.raises(Overloaded) as refused:
            await engine.submit(long, rows(4), deadline=soon)
        assert refused.value.retry_after_s > 20.0
        assert values(await engine.submit(long, rows(6), deadline=soon, begun=True)) == [12]
        await asyncio.gather(*begun)

    asyncio.run(scenario())


def test_the_thread_of_long_work_gives_way() -> None:
    """Its niceness is the highest; that of the event loop and of the other engine's thread is as it was."""

    async def scenario() -> None:
        found: list[int] = []
        program = Doubler(IN_THREAD, during=lambda _: found.append(os.getpriority(os.PRIO_PROCESS, 0)))
        for background in (True, False):
            await batcher(background=background).submit(program, rows(1))
        assert found == [19, os.getpriority(os.PRIO_PROCESS, 0)]

    asyncio.run(scenario())
