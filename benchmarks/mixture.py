"""Mixed load at a bounded rate: valid, invalid and hostile calls, and clients that disconnect."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Literal, NamedTuple

import httpx

from benchmarks import bodies, hostile
from benchmarks.bodies import Body

CALLERS = 8
RATE = 20.0
"""Requests a second of all clients together; each client has at most one request running."""
TIMEOUT_S = 30.0
HOSTILE = 0.1
"""Share of hostile calls; every kind is equally frequent."""
HUNG_UP, NO_ANSWER, CHANGED = "hung up", "no answer", "another answer than at first"
BLUR = "{blur}"
"""Placeholder in a path: a blur that no earlier request had."""


class Call(NamedTuple):
    """One kind of call.

    Args:
        title: For the table.
        percent: How many of a hundred calls it is.
        body: The request.
        right: The outcomes that are right.
        leaves: Where the caller hangs up: with half of the request sent, or with all of it, before the answer.
        same: Whether every answer should be the first one's bytes.
        counted: Whether the service counts it among the requests for operations.
    """

    title: str
    percent: float
    body: Body
    right: frozenset[str] = frozenset({"200"})
    leaves: Literal["", "half sent", "unanswered"] = ""
    same: bool = True
    counted: bool = True


def calls() -> list[Call]:
    """Kinds of call with their weights: ordinary ones, and a share `HOSTILE` of hostile ones."""
    attacks = hostile.attacks()
    ordinary = [call._replace(percent=call.percent * (1.0 - HOSTILE)) for call in _ordinary()]
    share = 100.0 * HOSTILE / len(attacks)
    return ordinary + [
        Call(attack.name, share, attack.body(), frozenset(map(str, attack.right)), same=False, counted=attack.counted)
        for attack in attacks
    ]


def _ordinary() -> list[Call]:
    one, many = bodies.images(1), bodies.images(1024)
    sampled, events = {"accept": bodies.JSON}, {"accept": "text/event-stream"}
    json, raw, npy = bodies.json("/v1/reconstruct"), bodies.raw("/v1/reconstruct"), bodies.npy("/v1/reconstruct")
    return [
        Call("reconstruct, JSON", 22, json.ask(one)),
        Call("reconstruct, binary", 18, raw.ask(one)),
        Call("reconstruct, binary, conv", 8, bodies.raw("/v1/models/conv/reconstruct").ask(one)),
        Call("reconstruct, 1,024 rows, npy", 4, npy.ask(many)),
        Call("denoise, PNG", 14, bodies.png("/v1/denoise").ask(one)),
        Call("denoise, a new blur each", 4, bodies.raw(f"/v1/denoise?blur={BLUR}&level=0.1").ask(one)),
        Call("sample, 16 images, JSON", 8, Body("/v1/sample?count=16&seed=7", sampled, b"")),
        Call("sample, as events", 4, Body("/v1/sample?count=2&seed=7", events, b"")),
        Call("an image of another shape", 3, json.ask(one[:, :, :9]), frozenset({"422"})),
        Call("an unknown option", 3, bodies.raw("/v1/reconstruct?drawz=1").ask(one), frozenset({"422"})),
        Call("an unknown model", 2, bodies.raw("/v1/models/nobody/reconstruct").ask(one), frozenset({"404"})),
        Call("too many rows", 2, Body("/v1/sample?count=16385", sampled, b""), frozenset({"413"})),
        Call("1,024 rows, hung up half sent", 4, npy.ask(many), frozenset({HUNG_UP}), "half sent"),
        Call("1,024 rows, hung up unanswered", 4, npy.ask(many), frozenset({HUNG_UP}), "unanswered"),
    ]


class Mixture:
    """The load; `outcomes` counts, by the title of the call: statuses, HUNG_UP, CHANGED, or NO_ANSWER and why."""

    def __init__(self, port: int) -> None:
        self._port, self._calls, self._firsts = port, calls(), dict[str, bytes]()
        self.outcomes: dict[str, Counter[str]] = {call.title: Counter() for call in self._calls}

    async def run(self, seconds: float) -> None:
        """Run the load for `seconds`, and wait for the last answer."""
        end = asyncio.get_running_loop().time() + seconds
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self._port}", timeout=TIMEOUT_S) as client:
            await asyncio.gather(*(self._caller(client, random.Random(seed), end) for seed in range(CALLERS)))  # noqa: S311  # no secret

    async def once(self) -> None:
        """Make every kind of call once, so that the service allocates what it keeps for each."""
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self._port}", timeout=TIMEOUT_S) as client:
            for call in self._calls:
                self.outcomes[call.title][await self._outcome(client, call, random.Random(0))] += 1  # noqa: S311  # no secret

    def answered(self) -> int:
        """Number of calls with a complete answer."""
        return sum(map(self._answered, self._calls))

    def counted(self) -> int:
        """Number of answered calls that the service's metrics count."""
        return sum(self._answered(call) for call in self._calls if call.counted)

    def hung_up(self) -> int:
        """Number of calls that the client broke off."""
        return sum(found[HUNG_UP] for found in self.outcomes.values())

    def wrong(self) -> int:
        """Number of calls with an unexpected outcome."""
        return sum(self.outcomes[call.title].total() - self._right(call) for call in self._calls)

    def summary(self) -> str:
        """Sentence on whether every request was answered."""
        total = sum(found.total() for found in self.outcomes.values())
        return (
            f"{total:,} calls, of which {self.hung_up():,} hung up. Of the other {total - self.hung_up():,}, "
            f"{self.answered():,} were answered; {self.wrong():,} calls ended otherwise than they should. An answer is "
            "right where it is, byte for byte, the first that such a call had; one to a hostile call, where it has a "
            "status that fits."
        )

    def table(self) -> str:
        """Table of the outcomes of every kind of call."""
        lines = ["| | sent | as it should be | otherwise |", "|---|--:|--:|---|"]
        for call in self._calls:
            found = self.outcomes[call.title]
            right = ", ".join(_told(outcome, count) for outcome, count in found.items() if outcome in call.right)
            others = ", ".join(_told(outcome, count) for outcome, count in found.items() if outcome not in call.right)
            lines.append(f"| {call.title} | {found.total():,} | {right or '-'} | {others or '-'} |")
        return "\n".join(lines)

    def _answered(self, call: Call) -> int:
        return sum(
            count
            for outcome, count in self.outcomes[call.title].items()
            if outcome != HUNG_UP and not outcome.startswith(NO_ANSWER)
        )

    def _right(self, call: Call) -> int:
        return sum(self.outcomes[call.title][outcome] for outcome in call.right)

    async def _caller(self, client: httpx.AsyncClient, dice: random.Random, end: float) -> None:
        weights = [call.percent for call in self._calls]
        while True:
            await asyncio.sleep(dice.expovariate(RATE / CALLERS))
            if asyncio.get_running_loop().time() >= end:
                return
            (call,) = dice.choices(self._calls, weights)
            self.outcomes[call.title][await self._outcome(client, call, dice)] += 1

    async def _outcome(self, client: httpx.AsyncClient, call: Call, dice: random.Random) -> str:
        path = call.body.path.replace(BLUR, str(dice.uniform(0.5, 3.0)))
        try:
            if call.leaves:
                await self._hang_up(call, dice.uniform(0.0, 0.02))
                return HUNG_UP
            body = call.body
            answer = await client.request(body.method, path, content=body.content, headers=body.headers)
        except (OSError, httpx.HTTPError) as error:
            return f"{NO_ANSWER}: {type(error).__name__}"
        same = (
            not call.same
            or path != call.body.path
            or self._firsts.setdefault(call.title, answer.content) == answer.content
        )
        return str(answer.status_code) if same else CHANGED

    async def _hang_up(self, call: Call, patience_s: float) -> None:
        """Begin the call on its own connection, wait a little, then reset the connection."""
        wire = call.body.wire()
        _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(wire[: len(wire) // 2] if call.leaves == "half sent" else wire)
            await asyncio.wait_for(writer.drain(), TIMEOUT_S)
            await asyncio.sleep(patience_s)
        finally:
            writer.transport.abort()


def _told(outcome: str, count: int) -> str:
    """One outcome with its count."""
    return f"{count:,} {outcome}" if outcome == HUNG_UP else f"{count:,} x {outcome}"
