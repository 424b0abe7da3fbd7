"""Access control: API keys, rights, rates, proxies, TLS and security headers."""

from __future__ import annotations

import asyncio
import re
import ssl
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import FastAPI
from starlette.types import Message, Scope
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from service.__main__ import welcome
from service.api.face import Face
from service.api.problems import respond
from service.app import create_app
from service.errors import StartError
from service.observability.request_ids import RequestIds
from service.repository.repository import Repository
from service.security.keys import CONTROL, INFER, Limits, limits_of
from service.security.middleware import INDEX, AccessControl, address_of, needed_right
from service.security.proxies import Proxies
from service.security.startup_checks import check
from service.server.listeners import bind
from service.server.worker import server_config
from service.settings import Settings

ALICE, OPS = "alice-0123456789abcdef", "ops-0123456789abcdef"
BOB = "bob-0123456789abcdef"
KEYS = f"alice {ALICE} infer\nbob {BOB} infer rate=3/day\nops {OPS} control\n"
ORIGIN = "https://app.example"
CONTROL_PATHS = ["/v1/models/m/load", "/v1/models/m/versions/1/unload"]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("secrets") / "keys"
    path.write_text(KEYS)
    return str(path)


@pytest.fixture(scope="module")
def locked(keys: str) -> FastAPI:
    """The service with keys, and pages elsewhere that may call it."""
    return empty(api_keys=keys, cors_origins=f"{ORIGIN}, https://two.example")


@pytest.fixture(scope="module")
def unlocked() -> FastAPI:
    """The service as it is by default."""
    return empty()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def asked(
    app: FastAPI, scenario: Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]], address: str = "192.0.2.1"
) -> None:
    """Run a scenario with a client of the application."""

    async def run() -> None:
        transport = httpx.ASGITransport(app, client=(address, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            await scenario(client)

    asyncio.run(run())


def empty(**settings: Any) -> FastAPI:
    """The service without a model: what passes access control is answered 404."""
    return create_app(Settings(**settings), Repository({}, ""))


def test_nobody_comes_in_without_a_key(locked: FastAPI) -> None:
    """401 with what to send, whichever path; health, metrics and documentation are open."""

    async def scenario(client: httpx.AsyncClient) -> None:
        for headers in ({}, bearer("guessed-0123456789"), {"authorization": f"Basic {OPS}"}, bearer("")):
            for method, path in (("POST", "/v1/encode"), ("GET", "/v1/models"), ("GET", "/nowhere")):
                answer = await client.request(method, path, headers=headers)
                assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
                assert answer.headers["content-type"] == "application/problem+json"
                assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/health/live", "/metrics", "/docs", "/docs/swagger-ui.css", "/openapi.json"):
            assert (await client.get(path)).status_code == 200
        assert 'vae_refused_total{code="unauthenticated"} 12.0' in (await client.get("/metrics")).text
        assert (await client.get("/v1/models", headers=bearer(OPS))).json() == {"models": []}

    asked(locked, scenario)


def test_two_keys_are_none(locked: FastAPI) -> None:
    """What is looked at here is what anybody else would look at."""

    async def scenario(client: httpx.AsyncClient) -> None:
        both = [("authorization", f"Bearer {OPS}"), ("authorization", f"Bearer {ALICE}")]
        assert (await client.get("/v1/models", headers=both)).status_code == 401

    asked(locked, scenario)


def test_a_prefix_changes_no_right(keys: str) -> None:
    """Where a proxy shows the service below a path, the same is open, and the same needs a key."""

    async def scenario(client: httpx.AsyncClient) -> None:
        for prefix in ("", "/vae"):
            assert (await client.get(f"{prefix}/health/live")).status_code == 200
            assert (await client.get(f"{prefix}/v1/models")).status_code == 401
            refused = await client.post(f"{prefix}/v1/models/m/load", headers=bearer(ALICE))
            assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")

    async def run() -> None:
        transport = httpx.ASGITransport(empty(api_keys=keys), root_path="/vae")
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            await scenario(client)

    asyncio.run(run())


def test_a_key_opens_what_it_has_the_right_to(locked: FastAPI) -> None:
    """403 names the right; with it the call goes on to what is behind the door."""

    async def scenario(client: httpx.AsyncClient) -> None:
        refused = await client.post("/v1/encode", headers=bearer(OPS))
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
        assert "`infer`, which the API key ops" in refused.json()["detail"]
        assert (await client.post("/v1/encode", headers=bearer(ALICE))).json()["code"] == "unknown_model"
        for path in CONTROL_PATHS:
            assert "`control`" in (await client.post(path, headers=bearer(ALICE))).json()["detail"]
            assert (await client.post(path, headers=bearer(OPS))).json()["code"] == "control_off"

    asked(locked, scenario)


def test_whatever_is_no_operation_wants_the_right_to_control(unlocked: FastAPI) -> None:
    """Every route that changes anything, however its path is written."""
    posts = [route for route in unlocked.routes if "POST" in getattr(route, "methods", ())]
    assert posts
    for route in posts:
        path = re.sub(r"\{\w+\}", "m", route.path)  # type: ignore[attr-defined]
        right = INFER if isinstance(route.app, Face) else None if path == INDEX else CONTROL
        assert needed_right("POST", path) == right
    spelled = ["\n", "/", "//", " ", "\r\n/"]
    for path in [*(path + end for path in CONTROL_PATHS for end in ("", *spelled)), "/v1/models/a\nb/load"]:
        assert needed_right("POST", path) == CONTROL
    assert needed_right("DELETE", "/v1/models/m") == CONTROL
    assert needed_right("POST", "/vae/v1/models/m/unload") == needed_right("POST", "//v1//models/m/load") == CONTROL
    assert needed_right("POST", "/v1/models/load/encode") == INFER
    assert needed_right("GET", "/v1/models/m/load") is None


def test_a_key_that_calls_too_often_waits(locked: FastAPI) -> None:
    """429 with Retry-After and the limit; other keys go on."""

    async def scenario(client: httpx.AsyncClient) -> None:
        for _ in range(3):
            assert (await client.get("/v1/models", headers=bearer(BOB))).status_code == 200
        refused = await client.get("/v1/models", headers=bearer(BOB))
        assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
        assert "bob is above its limit of 3 per 1 day" in refused.json()["detail"]
        assert 1 <= int(refused.headers["retry-after"]) <= 24 * 3600
        assert (await client.get("/v1/models", headers=bearer(OPS))).status_code == 200

    asked(locked, scenario)


def test_anonymous_callers_are_counted_by_address() -> None:
    """One that calls too often keeps nobody else out; health is not counted."""
    app = empty(anonymous_rate="2/day")

    async def often(client: httpx.AsyncClient) -> None:
        statuses = [(await client.get("/v1/models")).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]
        assert [(await client.get("/health/live")).status_code for _ in range(3)] == [200] * 3

    asked(app, often, "192.0.2.1")
    asked(app, often, "192.0.2.2")


OPENED = ("/openapi.json", "/metrics", "/docs")


def test_what_is_open_is_open_at_a_rate() -> None:
    """For each address without a key; never health, the page's files, nor operations."""
    app = empty(open_rate="3/day")

    async def often(client: httpx.AsyncClient) -> None:
        assert [(await client.get(path)).status_code for path in (*OPENED, *OPENED)] == [200] * 3 + [429] * 3
        refused = await client.head("/metrics")
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        for path, status in (("/health/live", 200), ("/page/01ab/app.js", 404), ("/v1/models", 200), ("/no", 404)):
            assert [(await client.get(path)).status_code for _ in range(5)] == [status] * 5

    asked(app, often, "192.0.2.1")
    asked(app, often, "192.0.2.2")


def test_a_key_opens_what_is_open_at_any_rate_and_guesses_are_counted(keys: str) -> None:
    """Guesses keep neither the address's key out nor what is open."""
    app = empty(open_rate="3/day", api_keys=keys)

    async def scenario(client: httpx.AsyncClient) -> None:
        guesses = [(await client.get("/v1/models", headers=bearer(f"guess-{n}-0123456789"))) for n in range(5)]
        assert [guess.status_code for guess in guesses] == [401] * 3 + [429] * 2
        assert [(await client.get("/metrics", headers=bearer(OPS))).status_code for _ in range(5)] == [200] * 5
        assert [(await client.get("/metrics")).status_code for _ in range(4)] == [200] * 3 + [429]
        assert (await client.get("/v1/models", headers=bearer(OPS))).status_code == 200

    asked(app, scenario)


@pytest.mark.parametrize(
    ("host", "counted"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("nowhere", "nowhere"),
    ],
)
def test_an_address_is_what_a_caller_cannot_choose(host: str, counted: str) -> None:
    """Of IPv6, the network."""
    assert address_of({"client": (host, 1)}) == counted


def test_calls_at_the_same_time_are_limited_and_refused_unread() -> None:
    """Who is above the limit is refused before a byte of the body is read; a call that ends makes room."""

    async def scenario() -> None:
        going_on, served = asyncio.Event(), 0

        async def app(_scope: Scope, _receive: Any, send: Any) -> None:
            nonlocal served
            await going_on.wait()
            served += 1
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body"})

        async def unread() -> Message:
            raise AssertionError("the body was read")

        async def call() -> int:
            sent: list[Message] = []
            scope = {"type": "http", "method": "POST", "path": "/v1/encode", "headers": [], "client": ("192.0.2.1", 1)}

            async def send(message: Message) -> None:
                sent.append(message)

            await control(scope, unread, send)
            return int(sent[0]["status"])

        codes: list[str] = []
        control = AccessControl(app, respond, codes.append, anonymous=limits_of("", 2))
        running = [asyncio.create_task(call()) for _ in range(2)]
        await asyncio.sleep(0)
        assert await call() == 429
        going_on.set()
        assert await asyncio.gather(*running) == [200, 200]
        assert await call() == 200
        assert (served, codes) == (3, ["rate_limited"])

    asyncio.run(scenario())


def test_middleware_that_no_setting_asks_for_is_absent(unlocked: FastAPI) -> None:
    """By default only request ids and access control run before an operation, and no call is counted."""
    assert [added.cls for added in unlocked.user_middleware] == [RequestIds, AccessControl]
    assert Limits() == limits_of("", 0)


def test_pages_of_named_origins_may_call(locked: FastAPI) -> None:
    """Preflights need no key, refusals can be read, and other origins get nothing."""

    async def scenario(client: httpx.AsyncClient) -> None:
        wish = {"origin": ORIGIN, "access-control-request-method": "POST"}
        wish["access-control-request-headers"] = "authorization, content-type"
        allowed = await client.options("/v1/encode", headers=wish)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == ORIGIN
        assert "authorization" in allowed.headers["access-control-allow-headers"]
        refused = await client.post("/v1/encode", headers={"origin": ORIGIN})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == ORIGIN
        assert "X-Model" in refused.headers["access-control-expose-headers"]
        other = await client.post("/v1/encode", headers={"origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers

    asked(locked, scenario)


def test_the_page_is_told_what_it_may_do(unlocked: FastAPI) -> None:
    """Nothing but what it is made of: every script and style it names is allowed, frames and other origins are not."""

    async def scenario(client: httpx.AsyncClient) -> None:
        page = await client.get("/docs")
        policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
        for kind, pattern in (
            ("script-src", r'<script src="([^"]+)"'),
            ("style-src", r'rel="stylesheet" href="([^"]+)"'),
            ("img-src", r'rel="shortcut icon" href="([^"]+)"'),
        ):
            (source,) = re.findall(pattern, page.text)
            assert "//" not in source
            assert "'self'" in policy[kind].split()
        assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
        assert policy["connect-src"] == "'self'"
        assert page.headers["x-frame-options"] == "DENY"
        assert page.headers["referrer-policy"] == "no-referrer"
        for path in ("/docs", "/openapi.json", "/v1/models", "/nowhere"):
            assert (await client.get(path)).headers["x-content-type-options"] == "nosniff"

    asked(unlocked, scenario)


def test_the_documentation_can_be_closed_and_tells_of_keys(locked: FastAPI) -> None:
    """Closed, it is nowhere; where keys are needed, it says so."""

    async def closed(client: httpx.AsyncClient) -> None:
        assert [
            (await client.get(path)).status_code for path in ("/docs", "/openapi.json", "/docs/swagger-ui.css")
        ] == [404] * 3

    async def told(client: httpx.AsyncClient) -> None:
        document = (await client.get("/openapi.json")).json()
        assert document["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
        assert {"401", "403", "408", "414", "429", "431"} <= set(document["paths"]["/v1/encode"]["post"]["responses"])

    asked(empty(docs=False), closed)
    asked(locked, told)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "somewhere.example", ""])  # noqa: S104
def test_a_public_address_without_keys_is_refused(host: str, keys: str) -> None:
    """In one line that names both ways out, each of which is one."""
    with pytest.raises(StartError) as caught:
        check(Settings(host=host))
    assert "VAE_API_KEYS" in str(caught.value)
    assert "VAE_ALLOW_ANONYMOUS=true" in str(caught.value)
    check(Settings(host=host, api_keys=keys))
    check(Settings(host=host, allow_anonymous=True))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_is_open(host: str) -> None:
    """Without a word."""
    check(Settings(host=host))


class Certificate:
    """A self-signed certificate for 127.0.0.1."""

    def __init__(self, folder: Path) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
        now = datetime.now(UTC)
        alternative = x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))])
        builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
        certificate = builder.add_extension(alternative, critical=False).sign(key, hashes.SHA256())
        self.path, self.key = folder / "tls.crt", folder / "tls.key"
        pem = serialization.Encoding.PEM
        self.path.write_bytes(certificate.public_bytes(pem))
        plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        self.key.write_bytes(key.private_bytes(pem, *plain))


async def mirror(scope: Scope, _receive: Any, send: Any) -> None:
    """An application that tells how it sees its caller."""
    seen = f"{scope['scheme']} {scope['client'][0]}".encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(seen))]})
    await send({"type": "http.response.body", "body": seen})


@contextmanager
def served(settings: Settings) -> Iterator[str]:
    """The mirror, as `python -m service` serves an application, in a thread."""
    (listener,) = bind(settings.model_copy(update={"port": 0}))
    listener.listen()
    server = uvicorn.Server(server_config(settings, mirror, respond, lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listener.socket],))
    thread.start()
    try:
        yield listener.url
    finally:
        server.should_exit = True
        thread.join()


def test_it_speaks_tls(tmp_path: Path) -> None:
    """With the certificate it is given, and nothing else on that port; limits hold there too."""
    certificate = Certificate(tmp_path)
    settings = Settings(tls_certificate=str(certificate.path), tls_key=str(certificate.key))
    check(settings)
    trusted = ssl.create_default_context(cafile=str(certificate.path))
    with served(settings) as url, httpx.Client(base_url=url, verify=trusted) as client:
        assert url.startswith("https://")
        assert client.get("/").text == "https 127.0.0.1"
        assert client.get("/" + "x" * 9000).json()["code"] == "url_too_long"
        with pytest.raises(httpx.TransportError):
            httpx.get(url.replace("https", "http"))
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)


@pytest.mark.parametrize(("keys", "sent"), [("", False), ("api_keys", True)])
def test_the_command_to_try_first_sends_a_key_where_one_is_needed(keys: str, sent: bool) -> None:
    """From the variable of the documentation; otherwise the service would refuse its own advice."""
    settings = Settings(api_keys=keys, port=0)
    listeners = bind(settings)
    said = welcome(["mnist"], settings, listeners)
    for listener in listeners:
        listener.socket.close()
    assert ('-H "Authorization: Bearer $KEY"' in said) is sent


@pytest.mark.parametrize("broken", ["certificate", "key", "no certificate"])
def test_a_certificate_that_cannot_be_used_is_one_line(tmp_path: Path, broken: str) -> None:
    """Told before anything is listened on."""
    certificate = Certificate(tmp_path)
    settings = Settings(tls_certificate=str(certificate.path), tls_key=str(certificate.key))
    if broken == "no certificate":
        settings = Settings(tls_key=str(certificate.key))
    else:
        Path(settings.tls_certificate if broken == "certificate" else settings.tls_key).write_text("nonsense")
    with pytest.raises(StartError, match="VAE_TLS_CERTIFICATE") as caught:
        check(settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("trusted", "seen"),
    [("", "http 127.0.0.1"), ("192.0.2.0/24", "http 127.0.0.1"), ("192.0.2.1, 127.0.0.0/8", "https 198.51.100.7")],
)
def test_a_named_proxy_alone_is_believed(trusted: str, seen: str) -> None:
    """What others say of themselves changes nothing, and `Forwarded` is nobody's word."""
    headers = {"x-forwarded-for": "203.0.113.9, 198.51.100.7", "x-forwarded-proto": "https", "forwarded": "for=1.1.1.1"}
    with served(Settings(trusted_proxies=trusted)) as url:
        assert httpx.get(url, headers=headers).text == seen


@pytest.mark.parametrize("trusted", ["", "*", "10.0.0.1", "10.0.0.1,*", "10.0.0.0/8, 2001:db8::/32", "::1"])
def test_uvicorn_trusts_the_same_proxies(trusted: str) -> None:
    """Who may name a client to uvicorn may name host and prefix here, and nobody else."""
    theirs = ProxyHeadersMiddleware(mirror, trusted or []).trusted_hosts  # type: ignore[arg-type]
    ours = Proxies(Settings(trusted_proxies=trusted).trusted_proxies)
    for host in ("10.0.0.1", "10.0.0.2", "192.0.2.1", "2001:db8::7", "::1", "::ffff:10.0.0.1", "nowhere", ""):
        assert ours.sent({"client": (host, 1)}) == (host in theirs), host
