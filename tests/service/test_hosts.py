"""What web pages of others can do to a service on this machine: nothing, neither across sites nor by DNS rebinding."""

from __future__ import annotations

import asyncio
import http.client
import re
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from service.api.problems import respond
from service.app import create_app
from service.errors import StartError
from service.repository.repository import Repository
from service.security.hosts import Hosts
from service.server.listeners import bind
from service.server.worker import server_config
from service.settings import Settings, read_settings

KEY = "ops-0123456789abcdef"
OWN = "http://localhost:8000"
UNLOAD = "/v1/models/m/unload"
NAME = socket.gethostname()
FOREIGN = [
    b"evil.example",
    b"evil.example:8000",
    b"vae",
    b"localhost.evil.example",
    b"localhost.evil.example.",
    b"127.0.0.1.evil.example",
    b"evillocalhost",
    b"localhost@evil.example",
    b"evil.example#localhost",
    b"localhost evil.example",
    b"localhost,evil.example",
    b"127.0.0.1/evil.example",
    b"[evil.example]",
    b"[::1].evil.example",
    b"[::1",
    b"::1",
    b"localhost:80:80",
    b"localhost:port",
    b"\xff.example",
    b"xn--e1awd7f.example",
    b"1.2.3.4.5",
    b"",
]
NEAR = [
    "localhost",
    "localhost:8000",
    "LocalHost.",
    "vae.localhost:80",
    "127.0.0.1:8000",
    "127.8.8.8",
    "192.0.2.7",
    "[::1]",
    "[::1]:8000",
    "[2001:db8::7]:80",
    NAME,
    f"{NAME.upper()}:8000",
    f"{NAME}.",
]


def empty(**settings: Any) -> FastAPI:
    """The service without a model."""
    return create_app(Settings(**settings), Repository({}, ""))


def asked(
    app: FastAPI, scenario: Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]], address: str = "127.0.0.1"
) -> None:
    """Run a scenario with a client that calls the application by its URL on this machine."""

    async def run() -> None:
        transport = httpx.ASGITransport(app, client=(address, 1))
        async with httpx.AsyncClient(transport=transport, base_url=OWN) as client:
            await scenario(client)

    asyncio.run(run())


@contextmanager
def served(**settings: Any) -> Iterator[tuple[str, int]]:
    """The service without a model, served as `python -m service` does; its address and port."""
    chosen = Settings(**settings)
    (listener,) = bind(chosen.model_copy(update={"port": 0}))
    listener.listen()
    server = uvicorn.Server(server_config(chosen, create_app(chosen, Repository({}, "")), respond))
    thread = threading.Thread(target=server.run, args=([listener.socket],))
    thread.start()
    try:
        url = httpx.URL(listener.url)
        yield url.host, url.port or 80
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def unlocked() -> FastAPI:
    """The service as an operator has it who lets everybody control it."""
    return empty(model_control="anonymous")


@pytest.mark.parametrize("host", NEAR)
def test_the_machines_own_names_are_answered(unlocked: FastAPI, host: str) -> None:
    """And every address, since no page can have one for its name."""

    async def scenario(client: httpx.AsyncClient) -> None:
        assert (await client.get("/v1/models", headers={"host": host})).status_code == 200

    asked(unlocked, scenario)


@pytest.mark.parametrize("host", FOREIGN)
def test_a_page_that_makes_its_name_mean_this_machine_gets_nothing(unlocked: FastAPI, host: bytes) -> None:
    """Whatever it asks, also as same-origin as rebinding makes it; the refusal names the setting."""
    page = {b"host": host, b"origin": b"http://" + host, b"sec-fetch-site": b"same-origin"}

    async def scenario(client: httpx.AsyncClient) -> None:
        for path in ("/v1/models", "/health/live", "/metrics", "/openapi.json", "/nowhere"):
            refused = await client.get(path, headers={b"host": host})
            assert (refused.status_code, refused.json()["code"]) == (421, "unknown_host")
            assert "VAE_ALLOWED_HOSTS" in refused.json()["detail"]
        for path in (UNLOAD, "/v1/encode"):
            assert (await client.post(path, headers=page)).json()["code"] in ("unknown_host", "cross_site")
        assert 'vae_refused_total{code="unknown_host"}' in (await client.get("/metrics")).text

    asked(unlocked, scenario)


@pytest.mark.parametrize(
    ("allowed", "host", "answered"),
    [
        ("vae.example", "vae.example", True),
        ("vae.example", "VAE.example.:8000", True),
        ("vae.example", "www.vae.example", False),
        ("VAE.example, vae", "vae:8000", True),
        ("*.example", "a.b.example", True),
        ("*.example", "example", False),
        ("*.example", "evilexample", False),
        ("*", "anything.at.all", True),
        ("vae.example", "localhost", True),
        ("vae.example", "evil.example", False),
    ],
)
def test_names_that_are_allowed_are_answered(allowed: str, host: str, answered: bool) -> None:
    """Below a star, or as they are."""

    async def scenario(client: httpx.AsyncClient) -> None:
        status = (await client.get("/v1/models", headers={"host": host})).status_code
        assert status == (200 if answered else 421)

    asked(empty(allowed_hosts=allowed), scenario)


@pytest.mark.parametrize("name", ["http://vae.example", "vae.example:8000", "vae example", "*vae.example", "a..b"])
def test_a_name_that_is_none_is_told_at_the_start(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """In one line."""
    monkeypatch.setenv("VAE_ALLOWED_HOSTS", name)
    with pytest.raises(StartError, match=r"VAE_ALLOWED_HOSTS.*is not a host name"):
        read_settings()


def test_the_machines_full_name_is_its_own() -> None:
    """Where the machine has a domain; a name server that gives it another name is not believed."""
    hosts = Hosts()
    for full, allowed in ((f"{NAME}.lan.example".lower(), True), ("evil.example", False)):
        hosts.allow(full.encode())
        hosts._add_full_name(NAME.lower(), full)
        assert hosts.allow(full.encode()) is allowed


def test_a_key_or_a_trusted_proxy_lets_any_name_pass(tmp_path: Path) -> None:
    """A page knows no key; what is open without one stays closed to it."""
    keys = tmp_path / "keys"
    keys.write_text(f"ops {KEY} control\n")
    keys.chmod(0o600)
    evil = {"host": "evil.example"}

    async def by_key(client: httpx.AsyncClient) -> None:
        with_key = evil | {"authorization": f"Bearer {KEY}"}
        assert (await client.get("/v1/models", headers=with_key)).status_code == 200
        assert (await client.get("/metrics", headers=with_key)).status_code == 200
        assert (await client.get("/v1/models", headers=evil)).status_code == 401
        assert (await client.get("/metrics", headers=evil)).status_code == 421

    async def by_proxy(client: httpx.AsyncClient) -> None:
        assert (await client.get("/v1/models", headers=evil)).status_code == 200

    async def not_by_proxy(client: httpx.AsyncClient) -> None:
        assert (await client.get("/v1/models", headers=evil)).status_code == 421

    asked(empty(api_keys=str(keys)), by_key)
    proxied = empty(trusted_proxies="10.0.0.0/8, 192.0.2.7")
    asked(proxied, by_proxy, "192.0.2.7")
    asked(proxied, not_by_proxy, "192.0.2.8")


@pytest.mark.parametrize(("trusted", "status"), [("127.0.0.0/8", 404), ("192.0.2.7", 421), ("", 421)])
def test_what_counts_is_who_is_connected(trusted: str, status: int) -> None:
    """Not who a forwarded header says is; of a real server, where that header has taken the client's place."""
    with served(trusted_proxies=trusted) as at:
        for forwarded in ({}, {"X-Forwarded-For": "192.0.2.7:80"}, {"X-Forwarded-Host": "localhost"}):
            connection = http.client.HTTPConnection(*at, timeout=10)
            connection.request("GET", "/nowhere", headers={"Host": "evil.example", **forwarded})
            assert connection.getresponse().status == status
            connection.close()


PAGES = [
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "nonsense"},
    {"sec-fetch-site": ""},
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": ""},
    {"origin": "http://localhost:3000"},
    {"origin": "http://localhost"},
    {"origin": "https://localhost:8000"},
    {"origin": "http://127.0.0.1:8000"},
    {"origin": "http://localhost:8000.evil.example"},
    {"origin": "http://evil.example/http://localhost:8000"},
    {"origin": "file://"},
    {"origin": "chrome-extension://abcdefgh"},
    {"origin": "https://evil.example", "sec-fetch-site": "same-origin"},
    {"origin": OWN, "sec-fetch-site": "cross-site"},
    {"origin": "https://evil.example", "x-forwarded-host": "evil.example", "x-forwarded-proto": "https"},
]
FORMS = [
    {"content-type": "text/plain"},
    {"content-type": "application/x-www-form-urlencoded"},
    {"content-type": "multipart/form-data; boundary=x"},
]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_page_of_another_origin_can_change_and_compute_nothing(unlocked: FastAPI, page: dict[str, str]) -> None:
    """By fetch without a preflight or by a form, with any method and path; what only reads is not the matter here."""

    async def scenario(client: httpx.AsyncClient) -> None:
        for form in FORMS:
            for path in (UNLOAD, "/v1/models/m/versions/1/load", "/v1/encode", "/health/live", "/nowhere"):
                refused = await client.post(path, headers=page | form, content=b"{}")
                assert (refused.status_code, refused.json()["code"]) == (403, "cross_site"), path
                assert "VAE_CORS_ORIGINS" in refused.json()["detail"]
        for method in ("PUT", "DELETE", "PATCH", "TRACE"):
            assert (await client.request(method, UNLOAD, headers=page)).status_code == 403
        for method in ("GET", "HEAD", "OPTIONS"):
            assert (await client.request(method, UNLOAD, headers=page)).status_code == 405
        assert (await client.get("/health/live", headers=page)).status_code == 200

    asked(unlocked, scenario)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"sec-fetch-site": "none"},
        {"sec-fetch-site": "same-origin"},
        {"origin": OWN},
        {"origin": OWN, "sec-fetch-site": "same-origin"},
        {"origin": "http://localhost", "host": "localhost"},
        {"origin": "http://localhost", "host": "localhost:80"},
        {"origin": "http://[::1]:8000", "host": "[::1]:8000"},
    ],
    ids=str,
)
def test_programs_and_the_services_own_pages_pass(unlocked: FastAPI, headers: dict[str, str]) -> None:
    """Programs send neither header; the page at /docs is of the service's own origin."""

    async def scenario(client: httpx.AsyncClient) -> None:
        assert (await client.post("/v1/encode", headers=headers)).json()["code"] == "unknown_model"

    asked(unlocked, scenario)


@pytest.mark.parametrize(
    ("named", "headers", "passes"),
    [
        ("https://app.example", {"origin": "https://app.example", "sec-fetch-site": "cross-site"}, True),
        ("https://app.example", {"origin": "https://app.example"}, True),
        ("https://app.example", {"origin": "https://www.app.example", "sec-fetch-site": "cross-site"}, False),
        ("https://app.example", {"sec-fetch-site": "cross-site"}, False),
        ("https://app.example", {"origin": "null"}, False),
        ("*", {"origin": "https://evil.example", "sec-fetch-site": "cross-site"}, True),
    ],
)
def test_pages_of_named_origins_pass(named: str, headers: dict[str, str], passes: bool) -> None:
    """Those alone, and their preflights are answered."""

    async def scenario(client: httpx.AsyncClient) -> None:
        code = (await client.post("/v1/encode", headers=headers)).json()["code"]
        assert code == ("unknown_model" if passes else "cross_site")
        wish = {**headers, "access-control-request-method": "POST"}
        if "origin" in headers:
            assert ((await client.options(UNLOAD, headers=wish)).status_code == 200) == passes

    asked(empty(cors_origins=named, model_control="anonymous"), scenario)


PROXIED = {"origin": "https://vae.example", "x-forwarded-proto": "https"}


@pytest.mark.parametrize(
    ("trusted", "headers", "status"),
    [
        ("127.0.0.1", {**PROXIED, "host": "vae.example"}, 404),
        ("127.0.0.1", {**PROXIED, "host": "localhost", "x-forwarded-host": "vae.example"}, 404),
        ("127.0.0.1", {**PROXIED, "host": "localhost", "x-forwarded-host": "evil.example"}, 403),
        ("127.0.0.1", {**PROXIED, "host": "vae.example", "x-forwarded-proto": "http"}, 403),
        ("", {**PROXIED, "host": "localhost", "x-forwarded-host": "vae.example"}, 403),
        ("192.0.2.7", {**PROXIED, "host": "localhost", "x-forwarded-host": "vae.example"}, 403),
    ],
)
def test_behind_a_trusted_proxy_the_origin_is_the_one_that_the_client_saw(
    trusted: str, headers: dict[str, str], status: int
) -> None:
    """Others cannot say what it was; of a real server."""
    with served(trusted_proxies=trusted) as at:
        connection = http.client.HTTPConnection(*at, timeout=10)
        connection.request("POST", "/nowhere", headers={**headers, "X-Forwarded-For": "198.51.100.7"})
        assert connection.getresponse().status == status
        connection.close()


@pytest.mark.parametrize("header", ["host", "origin"])
def test_a_refusal_says_little_of_what_was_sent(unlocked: FastAPI, header: str) -> None:
    """However long it is."""

    async def scenario(client: httpx.AsyncClient) -> None:
        refused = await client.post(UNLOAD, headers={header: "a" * 5000})
        assert re.search("a{100}[^a]", refused.text)
        assert len(refused.content) < 600

    asked(unlocked, scenario)
