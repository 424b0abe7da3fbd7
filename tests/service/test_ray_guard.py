"""The middleware of Ray Serve's proxies, around applications that behave as a proxy's does. It needs no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.ray_guard import Guard, middleware
from service.app import create_app
from service.repository.repository import Repository
from service.settings import Settings

START: Message = {"type": "http.response.start", "status": 200, "headers": [(b"X-Request-ID", b"of-the-proxy")]}
END: Message = {"type": "http.response.body", "body": b"done"}


async def whole(receive: Receive) -> int:
    """Bytes of the body, or -1 where the client has left before its end."""
    size = 0
    while (message := await receive())["type"] == "http.request":
        size += len(message["body"])
        if not message.get("more_body"):
            return size
    return -1


async def answering(_scope: Scope, receive: Receive, send: Send) -> None:
    """A replica that answers."""
    await whole(receive)
    await send(START)
    await send(END)


async def dying(_scope: Scope, receive: Receive, _send: Send) -> None:
    """A replica that ends: Serve's proxy then returns without an answer."""
    await whole(receive)


async def waiting(_scope: Scope, receive: Receive, _send: Send) -> None:
    """No replica: Serve's proxy waits until the client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass


def ask(
    app: ASGIApp, question: Callable[[httpx.AsyncClient], Awaitable[Any]], grace_s: float = 2.0, **settings: Any
) -> Any:
    """What a question to the guarded application gives."""

    async def run() -> Any:
        transport = httpx.ASGITransport(Guard(app, Settings(**settings), grace_s))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await question(client)

    return asyncio.run(run())


def guarded() -> ASGIApp:
    """What Serve hands to the server of a proxy."""
    app: ASGIApp = answering
    for added in middleware():
        app = added.cls(app, *added.args, **added.kwargs)
    return app


def service() -> ASGIApp:
    """What is handed to a server that is not the service's own."""
    return create_app(Settings(), Repository({}, ""))


@pytest.mark.parametrize("build", [guarded, service])
def test_another_server_takes_it_for_asgi_3(build: Callable[[], ASGIApp]) -> None:
    """uvicorn calls one of ASGI 2 with the scope alone, which here fails: every request would get 500."""
    config = uvicorn.Config(build(), log_config=None)
    config.load()
    assert config.interface == "asgi3"


def test_an_answer_passes_with_one_id() -> None:
    """The caller's id alone, though the proxy adds its own."""
    answer = ask(answering, lambda client: client.post("/", content=b"x", headers={"x-request-id": "mine"}))
    assert (answer.status_code, answer.content) == (200, b"done")
    assert answer.headers.get_list("x-request-id") == ["mine"]


def test_a_request_without_a_replica_s_answer_is_503() -> None:
    """With the reason, and not the 500 that uvicorn would send."""
    answer = ask(dying, lambda client: client.post("/v1/encode", content=b"x"))
    assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
    assert len(answer.headers.get_list("x-request-id")) == 1


def test_nothing_is_sent_to_a_client_that_has_left() -> None:
    """The application learns that it has left, and no answer follows."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    async def run() -> None:
        scope = {"type": "http", "path": "/", "raw_path": b"/", "query_string": b"", "headers": [], "request_id": b"1"}
        await Guard(waiting, Settings())(scope, receive, send)

    asyncio.run(run())
    assert sent == []


def test_a_request_waits_for_a_replica_no_longer_than_for_an_answer() -> None:
    """It ends with 504 a little after VAE_TIMEOUT_S."""
    answer = ask(waiting, lambda client: client.post("/v1/encode", content=b"x"), 0.1, timeout_s=0.1)
    assert (answer.status_code, answer.json()["code"]) == (504, "deadline_passed")


def test_an_answer_that_has_begun_has_no_such_deadline() -> None:
    """It may stream for longer, as far as the replica lets it."""

    async def streaming(_scope: Scope, receive: Receive, send: Send) -> None:
        await whole(receive)
        listening = asyncio.create_task(receive())
        await send(START)
        await asyncio.sleep(0.3)
        assert not listening.done()
        await send(END)
        listening.cancel()

    answer = ask(streaming, lambda client: client.post("/", content=b"x"), 0.0, timeout_s=0.1)
    assert (answer.status_code, answer.content) == (200, b"done")


def test_a_body_above_a_limit_ends_the_request() -> None:
    """That of one body, also without an announced length, and that of all bodies of the proxy together."""

    async def parts(count: int) -> Any:
        for _ in range(count):
            yield bytes(1000)

    for app in (answering, waiting):
        answer = ask(app, lambda client: client.post("/", content=parts(3)), max_body_bytes=2048)
        assert (answer.status_code, answer.json()["code"]) == (413, "too_large")

    async def together(client: httpx.AsyncClient) -> list[int]:
        first = asyncio.create_task(client.post("/", content=bytes(2**20)))
        await asyncio.sleep(0.1)
        second = await client.post("/", content=bytes(2**10))
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        third = asyncio.create_task(client.post("/", content=bytes(2**10)))
        await asyncio.sleep(0.1)
        waits = not third.done()
        third.cancel()
        return [second.status_code, int(waits)]

    assert ask(waiting, together, memory_bytes=2**20) == [503, 1]


def test_headers_that_steer_serve_are_removed() -> None:
    """A client can neither switch off its own disconnection nor Serve's timeout; other headers pass."""
    seen: list[bytes] = []

    async def looking(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(name for name, _ in scope["headers"])
        await answering(scope, receive, send)

    steering = (
        "X-Request-Disconnect-Disabled",
        "x-request-timeout-seconds",
        "serve_multiplexed_model_id",
        "X-Session-Id",
    )
    ask(looking, lambda client: client.get("/", headers={**dict.fromkeys(steering, "1"), "x-timeout-ms": "5"}))
    assert b"x-timeout-ms" in seen
    assert not {name.lower().encode() for name in steering} & set(seen)


def test_a_web_socket_is_refused() -> None:
    """The service has none."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    asyncio.run(Guard(answering, Settings())({"type": "websocket"}, receive, send))
    assert sent == [{"type": "websocket.close"}]
