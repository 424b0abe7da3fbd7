"""Reading a body may cost neither the worker nor its memory."""

from __future__ import annotations

import asyncio
import gc
import gzip
import io
import json
import logging
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from PIL import Image
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.invoke import Context
from service.api.memory import Memory, Share
from service.api.offload import Offload
from service.api.request import MOST_MEMBERS, Limit, inflated
from service.api.v1.endpoint import LOOP_BYTES, OperationApp
from service.codecs import CODECS, structured
from service.codecs.payload import LOOP_PICTURES, Answer, Intake, Meter
from service.codecs.structured import Parsers
from service.errors import CallerGone, DeadlinePassed, Deferred, InvalidOption, TooLarge, Unreadable
from service.observability.metrics import Telemetry
from service.operations.encode import encode
from service.operations.operation import Operation
from service.repository.repository import Repository
from service.runtime.scheduler import Engine
from service.settings import Settings
from tests.faults.conftest import eventually
from tests.service.conftest import until

RAW = {"content-type": "application/octet-stream"}
NPY = {"content-type": "application/x-npy"}
JSON = {"content-type": "application/json"}
LIMIT = Limit(2**20, "VAE_MAX_BODY_BYTES", "send fewer rows")


def image_intake(**known: Any) -> Intake:
    return Intake("images", (1, 8, 8), Meter(**known))


def never() -> bool:
    return False


# Work in threads


def test_a_deadline_ends_the_wait_but_not_the_hold_on_memory() -> None:
    """The caller is answered; thread and memory count as taken until the work ends."""
    entered, release, memory = threading.Event(), threading.Event(), Memory(100)

    def work() -> None:
        entered.set()
        release.wait(30)

    async def scenario() -> None:
        offload, share = Offload(1), Share(memory)
        share.reserve(60)
        with pytest.raises(DeadlinePassed):
            await offload.run(work, share, time.monotonic() + 0.05, never)
        share.give_back()
        assert entered.is_set()
        assert memory.taken == 60
        with pytest.raises(DeadlinePassed):  # the only thread is taken
            await offload.run(lambda: 1, Share(memory), time.monotonic() + 0.05, never)
        release.set()
        assert await offload.run(lambda: 1, Share(memory), time.monotonic() + 30, never) == 1
        assert memory.taken == 0
        offload.close()

    asyncio.run(scenario())


def test_no_more_runs_at_once_than_there_are_threads() -> None:
    """However many ask; all of them are answered."""
    running, most, lock, pair = 0, 0, threading.Lock(), threading.Barrier(2, timeout=20)

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        pair.wait()
        time.sleep(0.01)
        with lock:
            running -= 1

    async def scenario() -> None:
        offload = Offload(2)
        share = Share(Memory(1))
        await asyncio.gather(*(offload.run(work, share, time.monotonic() + 30, never) for _ in range(12)))
        offload.close()

    asyncio.run(scenario())
    assert most == 2


def test_nothing_is_read_for_a_caller_who_has_gone() -> None:
    """Asked when a thread is free; the thread stays free."""

    async def scenario() -> None:
        offload, share = Offload(1), Share(Memory(1))
        with pytest.raises(CallerGone):
            await offload.run(lambda: pytest.fail("it ran"), share, time.monotonic() + 30, lambda: True)
        assert await offload.run(lambda: 1, share, time.monotonic() + 30, never) == 1
        offload.close()

    asyncio.run(scenario())


def test_an_error_of_the_work_is_raised_where_it_is_awaited() -> None:
    """And the thread goes on."""

    def fail() -> None:
        raise TooLarge("of the work")

    async def scenario() -> None:
        offload, share = Offload(1), Share(Memory(1))
        with pytest.raises(TooLarge, match="of the work"):
            await offload.run(fail, share, time.monotonic() + 30, never)
        assert await offload.run(lambda: 1, share, time.monotonic() + 30, never) == 1
        offload.close()

    asyncio.run(scenario())


# The endpoint


@pytest.fixture
def app_of(digits_models: Path) -> Iterator[Callable[..., tuple[ASGIApp, Context]]]:
    """A function that serves one operation alone, with an offload of the test's own."""

    def app(operation: Operation, offload: Offload, **settings: Any) -> tuple[ASGIApp, Context]:
        repository = Repository.open(digits_models, "", "CPUExecutionProvider", 1, 8)
        known = Settings(models=digits_models, max_rows=8, **settings)
        engine = Engine(max_rows=8, queue_rows=known.queue_rows)
        context = Context(
            known, repository, engine.submit, Telemetry(lambda: (0, 0)), Memory(known.memory_bytes), offload
        )
        served = OperationApp(operation, context)

        async def one(scope: Scope, receive: Receive, send: Send) -> None:
            scope["path_params"] = {}
            scope["request_id"] = b"test"
            await served(scope, receive, send)

        return one, context

    return app


async def post(app: ASGIApp, **request: Any) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x", timeout=60) as client:
        return await client.post("/", **request)


def picture(side: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (side, side), 99).save(file, "PNG")
    return file.getvalue()


def test_what_takes_long_to_read_waits_for_a_thread_and_holds_up_nobody(app_of: Any) -> None:
    """With every thread taken, small bodies are answered, large pictures and large JSON run out of time."""
    release = threading.Event()

    async def scenario() -> tuple[dict[str, int], int]:
        offload = Offload(1)
        app, context = app_of(encode, offload)
        taken = asyncio.create_task(
            offload.run(lambda: release.wait(60), Share(context.memory), time.monotonic() + 60, never)
        )
        await asyncio.sleep(0)
        soon = {"x-timeout-ms": "100"}
        bodies = {
            "raw": (np.zeros(64, "<f4").tobytes(), RAW),
            "a small picture": (picture(8), {"content-type": "image/png"}),
            "a large picture": (picture(600), {"content-type": "image/png", **soon}),
            "large JSON": (b'{"images": [' + b" " * LOOP_BYTES + b"]}", {**JSON, **soon}),
            "compressed": (gzip.compress(np.zeros(64, "<f4").tobytes()), {**RAW, **soon, "content-encoding": "gzip"}),
        }
        found = {
            name: (await post(app, content=body, headers=headers)).status_code
            for name, (body, headers) in bodies.items()
        }
        release.set()
        await taken
        offload.close()
        return found, context.memory.taken

    found, taken = asyncio.run(scenario())
    assert found == {
        "raw": 200,
        "a small picture": 200,
        "a large picture": 504,
        "large JSON": 504,
        "compressed": 504,
    }
    assert taken == 0


def test_a_bug_in_a_reader_is_answered_as_a_bad_body_and_counted_apart(
    app_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """400 to the caller, a traceback in the log, `reader_fault` in the metrics; lack of memory stays 503."""

    def broken(*_: Any) -> None:
        raise ZeroDivisionError("0x7f00")

    def greedy(*_: Any) -> None:
        raise MemoryError

    async def scenario(check: Any, body: bytes) -> tuple[httpx.Response, str]:
        offload = Offload(1)
        app, context = app_of(replace(encode, check=check), offload)
        answer = await post(app, content=body, headers=NPY)
        offload.close()
        return answer, context.telemetry.exposition().decode()

    small, large = saved(np.zeros((1, 8, 8), np.float32)), saved(np.zeros((6000, 8, 8), np.float32))
    for body in (small, large):
        caplog.clear()
        with caplog.at_level(logging.ERROR):
            answer, metrics = asyncio.run(scenario(broken, body))
        assert (answer.status_code, answer.json()["code"]) == (400, "unreadable_body")
        assert "0x7f00" not in answer.text
        assert "ZeroDivisionError" in caplog.text
        assert 'outcome="reader_fault"' in metrics
        answer, metrics = asyncio.run(scenario(greedy, body))
        assert (answer.status_code, answer.json()["code"]) == (503, "overloaded")


def saved(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


# JSON


def test_what_is_no_option_is_not_converted() -> None:
    """A list under an unknown name stays what the parser made of it."""
    body = b'{"images": [[0.5]], "x": [' + b",".join([b"[0]"] * 1000) + b'], "y": {"a": [1]}, "z": 3}'
    payload = structured.read(body, "", image_intake())
    assert payload.options == {"x": [], "y": {}, "z": 3}


def test_the_fields_of_an_object_are_counted_before_they_are_looked_at() -> None:
    """150,000 of them are refused by their number."""
    body = orjson.dumps({f"k{k}": 0 for k in range(150_000)})
    with pytest.raises(InvalidOption, match="150000 fields"):
        structured.read(body, "", image_intake())


@pytest.mark.parametrize("chunked", [False, True])
def test_json_has_a_limit_of_its_own(app_of: Any, chunked: bool) -> None:
    """Above it the answer names the setting and the binary forms, of which a body of the same size is read."""
    rows = np.zeros((1000, 1, 8, 8), np.float32)

    async def scenario() -> tuple[httpx.Response, httpx.Response]:
        app, _ = app_of(encode, Offload(1), max_json_bytes=100_000)

        async def pieces() -> Any:
            for start in range(0, 300_000, 50_000):
                yield text[start : start + 50_000]

        text = orjson.dumps({"images": rows.tolist()})
        assert len(text) > 200_000
        headers = {"content-type": "Application/JSON; charset=utf-8"}
        refused = await post(app, content=pieces() if chunked else text, headers=headers)
        return refused, await post(app, content=rows.tobytes(), headers=RAW)

    refused, binary = asyncio.run(scenario())
    assert (refused.status_code, refused.json()["code"]) == (413, "too_large")
    assert "VAE_MAX_JSON_BYTES" in refused.json()["detail"]
    assert "application/x-npy" in refused.json()["detail"]
    assert binary.status_code == 200


SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "small": {"images": (2, 1, 3, 4)},
    "many rows": {"images": (3000, 1, 8, 8), "latents": (3000, 5)},
    "large rows": {"images": (2, 3, 300, 200)},
    "a vector": {"elbo": (200_000,)},
    "many axes": {"completions": (3, 4, 1, 150, 150), "std": (3, 1, 1, 1)},
    "no rows": {"images": (0, 1, 2, 2), "elbo": (100_000,)},
}


@pytest.mark.parametrize("about", [{}, {"model": "m", "level": np.arange(3, dtype=np.float32)}])
@pytest.mark.parametrize("case", SHAPES)
def test_slices_are_the_text_that_would_be_written_at_once(case: str, about: dict[str, Any]) -> None:
    """Byte for byte, and none above a mebibyte."""
    rng = np.random.default_rng(0)
    outputs = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES[case].items()}
    pieces = list(structured.slices(Answer(outputs, about)))
    assert b"".join(pieces) == orjson.dumps({**outputs, **about}, option=orjson.OPT_SERIALIZE_NUMPY)
    assert max(map(len, pieces)) <= 2**20
    for form in (codec.events for codec in CODECS if codec.events):
        whole = b"".join(form.event("answer", Answer(outputs, about)))
        if about or outputs:
            assert whole == form.frame("answer", b"".join(pieces))


def test_a_large_answer_is_the_same_as_a_small_one(client: httpx.Client) -> None:
    """Written in a thread, row by row what each request alone would get."""
    many = client.post("/v1/sample", params={"count": 2000, "seed": 7}).json()
    few = client.post("/v1/sample", params={"count": 2, "seed": 7}).json()
    assert len(many["images"]) == 2000
    np.testing.assert_array_equal(np.float32(many["images"][:2]), np.float32(few["images"]))
    sheet = client.post("/v1/sample", params={"count": 2000, "seed": 7}, headers={"accept": "image/png"})
    assert Image.open(io.BytesIO(sheet.content)).size == (45 * 8, 45 * 8)


# Compressed bodies


def raw_deflate(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


PACKERS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("X-GZIP", gzip.compress),
    "gzip of two members": ("gzip", lambda body: gzip.compress(body[:50]) + gzip.compress(body[50:])),
    "deflate": ("deflate", zlib.compress),
    "deflate without a header": ("deflate", raw_deflate),
}


@pytest.mark.parametrize("case", PACKERS)
def test_compressed_bodies_are_read(client: httpx.Client, case: str) -> None:
    """In every form, with the answer of the same body as it is."""
    coding, pack = PACKERS[case]
    images = np.random.default_rng(1).random((3, 1, 8, 8)).astype(np.float32)
    for body, headers in (
        (images.tobytes(), RAW),
        (saved(images), NPY),
        (json.dumps({"images": images.tolist()}).encode(), JSON),
        (picture(8), {"content-type": "image/png"}),
    ):
        plain = client.post("/v1/reconstruct", content=body, headers=headers)
        packed = client.post("/v1/reconstruct", content=pack(body), headers={**headers, "content-encoding": coding})
        assert (plain.status_code, packed.status_code) == (200, 200), packed.text
        assert packed.content == plain.content


def test_a_decompressed_body_is_limited_and_charged() -> None:
    """The limit counts decompressed bytes; what is unpacked is taken from the memory budget as it grows."""
    taken: list[int] = []
    bomb = gzip.compress(bytes(50 * 2**20))
    with pytest.raises(TooLarge, match="VAE_MAX_BODY_BYTES"):
        inflated(bomb, b"gzip", LIMIT, Meter(reserve=taken.append))
    assert sum(taken) <= LIMIT.size + 2**20
    share = Share(Memory(2**19))
    with pytest.raises(TooLarge, match="VAE_MEMORY_BYTES"):
        inflated(bomb, b"gzip", LIMIT, Meter(reserve=share.reserve))


def test_decompression_stops_at_the_deadline() -> None:
    """Between pieces."""

    def up() -> None:
        raise DeadlinePassed

    with pytest.raises(DeadlinePassed):
        inflated(gzip.compress(b"0"), b"gzip", LIMIT, Meter(check_time=up))


@pytest.mark.parametrize("case", ["decompressed", "read"])
def test_a_refused_body_is_let_go_of_at_once(app_of: Any, case: str) -> None:
    """No reference cycle keeps it until the garbage collector runs, which is long after the memory account is even."""
    size = 8 * 2**20
    body, headers = {
        "decompressed": (gzip.compress(bytes(size)), {**RAW, "content-encoding": "gzip"}),
        "read": (b'{"' + b"k" * size + b'": 0}', {"content-type": "application/json"}),
    }[case]

    async def scenario() -> None:
        offload = Offload(2)
        app, context = app_of(
            encode, offload, max_json_bytes=2 * size, max_body_bytes=size - 1 if case == "decompressed" else 2 * size
        )
        await post(app, content=body, headers=headers)
        gc.collect()
        gc.disable()
        tracemalloc.start()
        try:
            for _ in range(4):
                answer = await post(app, content=body, headers=headers)
                assert answer.status_code in (413, 422), answer.text
            assert context.memory.taken == 0
            await until(lambda: tracemalloc.get_traced_memory()[0] < size)  # when the thread returns from its function
        finally:
            tracemalloc.stop()
            gc.enable()
            offload.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x1f",
        gzip.compress(b"abc")[:-1],
        gzip.compress(b"abc") + b"rest",
        gzip.compress(b"") * (MOST_MEMBERS + 1),
    ],
    ids=["nothing", "a byte", "cut short", "followed", "in pieces"],
)
def test_what_is_no_whole_gzip_is_refused(body: bytes) -> None:
    """Cut short, followed by something else, or in too many pieces."""
    with pytest.raises(Unreadable):
        inflated(body, b"gzip", LIMIT, Meter())


# The meter


def test_pictures_of_a_request_share_one_limit() -> None:
    """Pixels, memory and, in the event loop, their number."""
    taken: list[int] = []
    meter = Meter(max_pixels=100, reserve=taken.append)
    meter.picture(8, 8, 4)
    assert taken == [256]
    with pytest.raises(TooLarge, match="VAE_MAX_PIXELS"):
        meter.picture(8, 8, 4)
    with pytest.raises(Deferred):
        Meter(in_loop=True).picture(4096, 4096, 4)
    many = Meter(in_loop=True)
    for _ in range(LOOP_PICTURES):
        many.picture(1, 1, 4)
    with pytest.raises(Deferred):
        many.picture(1, 1, 4)


def test_a_whole_share_of_memory_comes_back() -> None:
    """What reading took beyond its rows at once, the rest at the end, also where a thread held it longer."""
    memory = Memory(1000)
    share = Share(memory)
    share.grow(100)
    share.reserve(300)
    share.reserve(300)
    share.keep(50)
    assert memory.taken == 150
    share.keep(400)
    share.need(200)
    assert memory.taken == 350
    share.hold()
    share.give_back()
    assert memory.taken == 350
    share.give_back()
    assert memory.taken == 0


def test_large_texts_are_parsed_one_after_the_other() -> None:
    """The next in the queue gets the parser with its memory; an error, or an empty queue, drops it."""
    parsers, taken, begun, go = Parsers(), [], threading.Event(), threading.Event()

    def take() -> None:
        with parsers.one() as parser:
            taken.append(id(parser))
            begun.set()
            go.wait(10)

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(10)
    eventually(lambda: parsers._waiting == 3)
    assert len(taken) == 1
    go.set()
    for thread in threads:
        thread.join(10)
    assert len(set(taken)) == 1
    assert len(taken) == 3
    assert parsers._parser is None
    with suppress(ValueError), parsers.one():
        raise ValueError
    assert (parsers._waiting, parsers._parser) == (0, None)
    with parsers.one():
        pass
