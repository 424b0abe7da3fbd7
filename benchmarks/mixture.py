"""A moderate, bounded mixture of calls: right ones, wrong ones, and callers that hang up in the middle."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Literal, NamedTuple

import httpx

from benchmarks import bodies
from benchmarks.bodies import Body

CALLERS = 8
RATE = 40.0
"""Requests a second of all callers together, where the server keeps up; each caller has one under way at most."""
TIMEOUT_S = 30.0
HUNG_UP, NO_ANSWER = "hung up", "no answer"


class Call(NamedTuple):
    """One sort of call, how many of a hundred it is, and the outcome that is right.

    Who leaves does so with half of the request sent, or with all of it, before the answer.
    """

    title: str
    percent: int
    body: Body
    right: str = "200"
    leaves: Literal["", "half sent", "unanswered"] = ""


def calls() -> list[Call]:
    """The mixture."""
    one, many = bodies.images(1), bodies.images(1024)
    json, raw, npy = bodies.json("/v1/reconstruct"), bodies.raw("/v1/reconstruct"), bodies.npy("/v1/reconstruct")
    return [
        Call("reconstruct, JSON", 26, json.ask(one)),
        Call("reconstruct, binary", 22, raw.ask(one)),
        Call("reconstruct, binary, conv", 8, bodies.raw("/v1/models/conv/reconstruct").ask(one)),
        Call("reconstruct, 1,024 rows, npy", 4, npy.ask(many)),
        Call("denoise, PNG", 14, bodies.png("/v1/denoise").ask(one)),
        Call("sample, 16 images, JSON", 10, Body("/v1/sample?count=16", {"accept": bodies.JSON}, b"")),
        Call("an image of another shape", 4, json.ask(one[:, :, :9]), "422"),
        Call("an unknown option", 4, bodies.raw("/v1/reconstruct?drawz=1").ask(one), "422"),
        Call("1,024 rows, hung up half sent", 4, npy.ask(many), HUNG_UP, "half sent"),
        Call("1,024 rows, hung up unanswered", 4, npy.ask(many), HUNG_UP, "unanswered"),
    ]


class Mixture:
    """The load; `outcomes` counts, by the title of the call: statuses, HUNG_UP, or NO_ANSWER and why."""

    def __init__(self, port: int) -> None:
        self._port, self._calls = port, calls()
        self.outcomes: dict[str, Counter[str]] = {call.title: Counter() for call in self._calls}

    async def run(self, seconds: float) -> None:
        """Until then, and until the last answer is there."""
        end = asyncio.get_running_loop().time() + seconds
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self._port}", timeout=TIMEOUT_S) as client:
            await asyncio.gather(*(self._caller(client, random.Random(seed), end) for seed in range(CALLERS)))  # noqa: S311  # no secret

    def wrong(self) -> int:
        """Calls that ended otherwise than they should."""
        return sum(self.outcomes[call.title].total() - self.outcomes[call.title][call.right] for call in self._calls)

    def summary(self) -> str:
        """Whether every request was answered, in a sentence."""
        counts = Counter[str]()
        for found in self.outcomes.values():
            counts.update(found)
        lost = sum(count for outcome, count in counts.items() if outcome.startswith(NO_ANSWER))
        gone, whole = counts[HUNG_UP], counts.total() - counts[HUNG_UP]
        return (
            f"{counts.total():,} calls, of which {gone:,} hung up. Of the other {whole:,}, {whole - lost:,} were "
            f"answered; {self.wrong():,} calls ended otherwise than they should."
        )

    def table(self) -> str:
        """What became of every sort of call."""
        lines = ["| | sent | as it should be | otherwise |", "|---|--:|--:|---|"]
        for call in self._calls:
            found = self.outcomes[call.title]
            others = ", ".join(f"{count:,} x {outcome}" for outcome, count in found.items() if outcome != call.right)
            told = f"{found[call.right]:,} {'x ' + call.right if call.right != HUNG_UP else HUNG_UP}"
            lines.append(f"| {call.title} | {found.total():,} | {told} | {others or '-'} |")
        return "\n".join(lines)

    async def _caller(self, client: httpx.AsyncClient, dice: random.Random, end: float) -> None:
        weights = [call.percent for call in self._calls]
        while True:
            await asyncio.sleep(dice.expovariate(RATE / CALLERS))
            if asyncio.get_running_loop().time() >= end:
                return
            (call,) = dice.choices(self._calls, weights)
            self.outcomes[call.title][await self._outcome(client, call, dice.uniform(0.0, 0.02))] += 1

    async def _outcome(self, client: httpx.AsyncClient, call: Call, patience_s: float) -> str:
        try:
            if call.leaves:
                await self._hang_up(call, patience_s)
                return HUNG_UP
            answer = await client.post(call.body.path, content=call.body.content, headers=call.body.headers)
        except (OSError, httpx.HTTPError) as error:
            return f"{NO_ANSWER}: {type(error).__name__}"
        return str(answer.status_code)

    async def _hang_up(self, call: Call, patience_s: float) -> None:
        """Begin the call on a connection of its own, wait a little, and leave by a reset."""
        wire = call.body.wire()
        _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(wire[: len(wire) // 2] if call.leaves == "half sent" else wire)
            await asyncio.wait_for(writer.drain(), TIMEOUT_S)
            await asyncio.sleep(patience_s)
        finally:
            writer.transport.abort()
