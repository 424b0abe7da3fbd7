"""HTTP/1.1: heads, methods, upgrades, unread bodies, and limits on connections."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from tests.faults.conftest import workers_of
from training.evaluation.served import started

Start = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
ROW = bytes(2 * 4)
IMAGE_BYTES = 28 * 28 * 4
BINARY = b"content-type: application/octet-stream\r\naccept: application/octet-stream\r\n"
HEAD = b"POST /v1/decode HTTP/1.1\r\nhost: x\r\n" + BINARY
CLOSE = b"connection: close\r\n"
NEXT = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"
UPGRADES = [b"h2c", b"websocket", b"TLS/1.0", b"anything", b"h2c, websocket"]


@pytest.fixture(scope="module")
def url(small_models: Path) -> Iterator[str]:
    """A service that accepts every host name."""
    settings = {"VAE_THREADS": "1", "VAE_MAX_BODY_BYTES": str(2**22), "VAE_ALLOWED_HOSTS": "*"}
    with started(VAE_MODELS=str(small_models), **settings) as (_, url):
        yield url


def address(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def said(url: str, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """Everything received until the service closes, after these bytes."""
    with socket.create_connection(address(url), timeout=10) as connection:
        for part in parts:
            with suppress(ConnectionError):  # it has closed
                connection.sendall(part)
            time.sleep(pause_s)
        found = b""
        while more := connection.recv(65536):
            found += more
        return found


def statuses(answers: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", answers)]


def get(target: bytes, host: bytes = b"host: x\r\n", version: bytes = b"1.1", method: bytes = b"GET") -> bytes:
    return b"%b %b HTTP/%b\r\n%b%b\r\n" % (method, target, version, host, CLOSE)


HOSTS = {
    "no host": b"",
    "two hosts": b"host: x\r\nhost: x\r\n",
    "an empty host": b"host: \r\n",
    "a list of hosts": b"host: a, b\r\n",
    "a host with a space": b"host: a b\r\n",
    "a host with a path": b"host: a/b\r\n",
    "a host with a user": b"host: a@b\r\n",
    "a host that is a URL": b"host: http://a\r\n",
    "a port that is none": b"host: a:b\r\n",
    "a port that is too large": b"host: a:70000\r\n",
    "an address without brackets": b"host: ::1\r\n",
    "an address of colons": b"host: [:::::]\r\n",
    "a host in UTF-8": b"host: \xc3\xb6\r\n",
}
MALFORMED = {
    **{name: get(b"/v1/models", host) for name, host in HOSTS.items()},
    "two hosts of HTTP/1.0": get(b"/v1/models", HOSTS["two hosts"], b"1.0"),
    "HTTP/2 without its preface": get(b"/v1/models", version=b"2.0"),
    "HTTP/1.2": get(b"/v1/models", version=b"1.2"),
    "HTTP/0.9": b"GET /v1/models\r\n\r\n",
    "a method in small letters": get(b"/v1/models", method=b"get"),
    "a method that is none": get(b"/v1/models", method=b"DREAM"),
    "CONNECT": get(b"x:80", method=b"CONNECT"),
    "CONNECT with a path": get(b"/v1/models", method=b"CONNECT"),
    "GET of everything": get(b"*"),
    "a path without a slash": get(b"v1/models"),
    "a fragment": get(b"/v1/models#x"),
    "another scheme": get(b"ftp://x/v1/models"),
    "another host": get(b"http://y/v1/models"),
    "a URL with a user": get(b"http://u:p@x/v1/models"),
    "a zero byte in the path": get(b"/v1/\x00"),
    "a query that is not ASCII": get(b"/v1/models?x=\xc3\xb6"),
    "a tab for a space": get(b"/v1/models").replace(b" ", b"\t", 1),
    "a carriage return alone": b"GET /v1/models HTTP/1.1\r\nhost: x\rx: y\r\n\r\n",
    "a header without a colon": b"GET /v1/models HTTP/1.1\r\nhost: x\r\nabc\r\n\r\n",
    "a header without a name": b"GET /v1/models HTTP/1.1\r\nhost: x\r\n: abc\r\n\r\n",
    "codings in two headers": HEAD + b"transfer-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks of HTTP/1.0": HEAD.replace(b"1.1", b"1.0") + b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "an empty length": HEAD + b"content-length: \r\n\r\n",
    "a length in hexadecimal": HEAD + b"content-length: 0x8\r\n\r\n" + ROW,
    "two content types": HEAD + b"content-type: image/png\r\ncontent-length: 8\r\n%b\r\n" % CLOSE + ROW,
}


@pytest.mark.parametrize("request_bytes", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_head_is_400(url: str, request_bytes: bytes) -> None:
    """A malformed head gets a problem with the reason, and nothing after it is answered."""
    answer = said(url, request_bytes + NEXT)
    assert statuses(answer) == [400]
    problem = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert problem["code"] == "malformed_request"
    assert not re.search(r"\\x|b'|0x[0-9a-f]{6}", problem["detail"])


SERVED = {
    "a host with a port": get(b"/v1/models", b"host: a.example:80\r\n"),
    "an IPv6 address": get(b"/v1/models", b"host: [::1]:8000\r\n"),
    "HTTP/1.0 without a host": get(b"/v1/models", b"", b"1.0"),
    "a whole URL": get(b"http://x/v1/models"),
    "a whole URL with the default port": get(b"http://x:80/v1/models"),
    "a whole URL to post to": get(b"http://x/v1/sample?count=1", method=b"POST"),
}


@pytest.mark.parametrize("request_bytes", SERVED.values(), ids=SERVED)
def test_an_unusual_head_is_served(url: str, request_bytes: bytes) -> None:
    """Unusual heads that the standard allows are served."""
    assert statuses(said(url, request_bytes)) == [200]


NOT_SERVED = {
    "a bad escape": (b"GET", b"/v1/%zz", 404),
    "an escaped zero byte": (b"POST", b"/v1/models/%00/encode", 404),
    "escapes that are no UTF-8": (b"POST", b"/v1/models/%ff%ed%a0%80/encode", 404),
    "escapes in the query that are no UTF-8": (b"POST", b"/v1/sample?%ff%ed%a0%80=1", 422),
    "steps up": (b"GET", b"/v1/../../etc/passwd", 404),
    "two slashes": (b"GET", b"//v1/models", 404),
    "two slashes at the end": (b"GET", b"/v1/models//", 404),
    "a long path": (b"GET", b"/" + b"x" * 8000, 404),
    "a long path to post to": (b"POST", b"/v1/models/" + b"x" * 8000 + b"/encode", 404),
    "a URL without a path": (b"POST", b"http://x", 405),
    "TRACE": (b"TRACE", b"/v1/models", 405),
    "PROPFIND": (b"PROPFIND", b"/v1/models", 405),
}


@pytest.mark.parametrize(("method", "target", "status"), NOT_SERVED.values(), ids=NOT_SERVED)
def test_what_is_not_served_is_a_problem(url: str, method: bytes, target: bytes, status: int) -> None:
    """Unknown paths and methods get a problem of bounded length."""
    answer = said(url, get(target, method=method))
    assert statuses(answer) == [status]
    assert len(json.loads(answer.partition(b"\r\n\r\n")[2])["detail"]) < 500


PAGES = [
    "/health/live", "/health/ready", "/v1/models", "/v1/models/mnist-2d", "/v1/models/mnist-2d/versions/1",
    "/v1/models/mnist-2d/ready", "/metrics", "/openapi.json", "/docs", "/docs/swagger-ui.css",
    "/", "/page/access",
]  # fmt: skip


@pytest.mark.parametrize("path", PAGES)
def test_head_answers_where_get_does(url: str, path: str) -> None:
    """HEAD has GET's headers and no body."""
    with httpx.Client(base_url=url) as client:
        full, head = client.get(path), client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        own = {"x-request-id", "date"}
        assert {k: v for k, v in head.headers.items() if k not in own}.keys() == full.headers.keys() - own
        if path != "/metrics":  # whose length may have changed
            assert head.headers["content-length"] == full.headers["content-length"]
    assert said(url, get(path.encode(), method=b"HEAD")).endswith(b"\r\n\r\n")


def test_a_wrong_method_is_told_the_right_ones(url: str) -> None:
    """A 405 lists the allowed methods, also for HEAD and OPTIONS, which run nothing."""
    with httpx.Client(base_url=url) as client:
        for method, path, allowed in (
            ("OPTIONS", "/v1/encode", "POST"),
            ("HEAD", "/v1/encode", "POST"),
            ("OPTIONS", "/v1/models", "GET, HEAD"),
            ("DELETE", "/v1/models", "GET, HEAD"),
        ):
            answer = client.request(method, path)
            assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    whole = said(url, get(b"*", method=b"OPTIONS"))
    assert statuses(whole) == [204]
    assert b"\r\nallow: GET, HEAD, POST, OPTIONS\r\n" in whole


@pytest.mark.parametrize("path", ["/docs/", "/v1/models/", "/v1/models/mnist-2d/", "/v1/sample/?count=1", "/metrics/"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_slash_at_the_end_leads_to_what_is_meant(url: str, path: str, method: str) -> None:
    """The redirect is relative, so the Host header does not choose its target."""
    answer = httpx.request(method, url + path, headers={"host": "evil.example"})
    assert answer.status_code == 307
    assert answer.headers["location"].startswith("../")
    assert httpx.URL(url + path).join(answer.headers["location"]) == url + path.replace("/?", "?").removesuffix("/")


@pytest.mark.parametrize("upgrade", UPGRADES)
@pytest.mark.parametrize("framing", ["length", "chunks", "pieces"])
def test_an_upgrade_is_declined_and_its_body_is_read(url: str, upgrade: bytes, framing: str) -> None:
    """A request for an upgrade is answered over HTTP/1.1, and nothing after its body is parsed as a request."""
    ask = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: %b\r\nhttp2-settings: AAMAAABk\r\n" % upgrade
    more = HEAD + b"content-length: 8\r\n\r\n" + ROW
    length = HEAD + ask + b"content-length: 16\r\n\r\n"
    chunks = HEAD + ask + b"transfer-encoding: chunked\r\n\r\n"
    parts = {
        "length": [length + 2 * ROW + more + NEXT],
        "chunks": [chunks + b"8\r\n" + ROW + b"\r\n8\r\n" + ROW + b"\r\n0\r\nx: y\r\n\r\n" + more + NEXT],
        "pieces": [length[:30], length[30:], ROW[:3], ROW[3:], ROW + more[:10], more[10:], NEXT],
    }[framing]
    answer = said(url, *parts, pause_s=0.05 if framing == "pieces" else 0.0)
    assert statuses(answer) == [200]
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"\r\nconnection: close" in head
    assert len(body) == 2 * IMAGE_BYTES


@pytest.mark.parametrize("upgrade", UPGRADES)
def test_an_upgrade_without_a_body_is_declined_too(url: str, upgrade: bytes) -> None:
    """Bytes in the other protocol are dropped, also if they arrive later."""
    ask = b"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: %b\r\n\r\n" % upgrade
    assert statuses(said(url, ask + NEXT)) == [200]
    assert statuses(said(url, ask, NEXT, pause_s=0.1)) == [200]
    assert statuses(said(url, NEXT + ask + NEXT)) == [200, 200]


def test_a_body_that_looks_like_a_request_stays_a_body(url: str) -> None:
    """A body that looks like a request gets one answer, about the body."""
    head = HEAD + b"content-length: %d\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n" % len(NEXT)
    for parts in ([head + NEXT], [head, NEXT], [head, NEXT, NEXT]):
        answer = said(url, *parts, pause_s=0.05)
        assert statuses(answer) == [422]
        assert b"invalid_shape" in answer


@pytest.mark.parametrize(
    "framing",
    [
        b"content-length: 8\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"content-length: 8\r\ncontent-length: 9\r\n\r\n" + ROW,
        b"transfer-encoding: identity\r\n\r\n" + ROW,
        b"transfer-encoding: chunked\r\n\r\n8\r\n" + ROW + b"X\r\n0\r\n\r\n",
        b"transfer-encoding: chunked\r\n\r\nnonsense\r\n",
    ],
)
def test_an_upgrade_does_not_loosen_how_bodies_are_read(url: str, framing: bytes) -> None:
    """Ambiguous framing is refused with an upgrade too."""
    assert statuses(said(url, HEAD + b"connection: upgrade\r\nupgrade: h2c\r\n" + framing + NEXT)) == [400]


def test_java_is_answered(url: str) -> None:
    """Java's default client works: it asks for HTTP/2 with every request, bodies included."""
    java = shutil.which("java")
    if not java:
        pytest.skip("needs java")
    command = [java, str(HERE / "JavaClient.java"), url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = {
        name: (int(status), version, int(size))
        for name, status, version, size in map(str.split, done.stdout.splitlines())
    }
    rows = {"length": 1, "rows": 1000, "chunked": 1000, "expect": 1, "empty": 1}
    assert {name: answers[name] for name in rows} == {
        name: (200, "HTTP_1_1", n * IMAGE_BYTES) for name, n in rows.items()
    }
    assert answers["get"][:2] == (200, "HTTP_1_1")
    assert answers["unknown"][:2] == (404, "HTTP_1_1")


def test_curl_is_answered(url: str, tmp_path: Path) -> None:
    """curl --http2 works with small bodies, large ones that wait for 100 Continue, and chunks."""
    curl = shutil.which("curl")
    if not curl or "HTTP2" not in subprocess.run([curl, "-V"], capture_output=True, text=True, check=True).stdout:
        pytest.skip("needs curl with HTTP/2")
    (tmp_path / "rows").write_bytes(1000 * ROW)
    for more in ([], ["-H", "Expect: 100-continue"], ["-H", "Transfer-Encoding: chunked"]):
        command = [curl, "-sS", "--http2", "-m", "20", "--data-binary", f"@{tmp_path / 'rows'}", f"{url}/v1/decode"]
        command += ["-H", "content-type: application/octet-stream", "-H", "accept: application/octet-stream", *more]
        done = subprocess.run([*command, "-o", "/dev/null", "-w", "%{http_code} %{http_version} %{size_download}"],
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert done.stdout == f"200 1.1 {1000 * IMAGE_BYTES}", done.stderr


REFUSED = {
    "too large": (HEAD + b"content-length: 99999999\r\n", 413),
    "a path that nobody serves": (b"POST /v1/nothing HTTP/1.1\r\nhost: x\r\ncontent-length: 8\r\n", 404),
    "a model that nobody serves": (HEAD.replace(b"/v1", b"/v1/models/nobody") + b"content-length: 8\r\n", 404),
    "another media type": (HEAD.replace(b"octet-stream", b"pdf", 1) + b"content-length: 8\r\n", 415),
    "another coding": (HEAD + b"content-encoding: br\r\ncontent-length: 8\r\n", 415),
    "an unknown option": (HEAD.replace(b"decode", b"decode?draws=x") + b"content-length: 8\r\n", 422),
}


@pytest.mark.parametrize(("head", "status"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_not_asked_for(url: str, head: bytes, status: int) -> None:
    """A client that waits for 100 Continue gets a refusal at once, and the connection closes."""
    answer = said(url, head + b"expect: 100-continue\r\n\r\n")
    assert statuses(answer) == [status]
    assert b"\r\nconnection: close\r\n" in answer


def test_a_body_that_is_asked_for_keeps_the_connection(url: str) -> None:
    """After 100 Continue and the answer, the connection serves the next request."""
    with socket.create_connection(address(url), timeout=10) as connection:
        connection.sendall(HEAD + b"content-length: 8\r\nexpect: 100-continue\r\n\r\n")
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(ROW + get(b"/health/live"))
        found = b""
        while more := connection.recv(65536):
            found += more
        assert statuses(found) == [200, 200]


@pytest.mark.parametrize("close", [b"", CLOSE])
def test_a_refusal_of_a_body_under_way_is_read(url: str, close: bytes) -> None:
    """The client receives a refusal however much of the body it still had to send."""
    size = 2**21
    ask = b"POST /v1/nothing HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n%b\r\n" % (size, close)
    parts = [ask, *[bytes(2**18)] * (size // 2**18)]
    answers = said(url, *parts, *([] if close else [get(b"/health/live")]), pause_s=0.02)
    assert statuses(answers) == ([404] if close else [404, 200])


def test_health_is_answered_when_the_service_is_full(start_service: Start, small_models: Path) -> None:
    """Health is answered even when all connections are taken; other requests are refused."""
    settings = {
        "VAE_MODELS": str(small_models), "VAE_THREADS": "1", "VAE_MAX_CONNECTIONS": "5", "VAE_ALLOWED_HOSTS": "*",
    }  # fmt: skip
    with start_service(**settings) as (_, url), ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(address(url), timeout=10)) for _ in range(5)]
        for path in ("/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready"):
            assert httpx.get(url + path).status_code == httpx.head(url + path).status_code == 200
        refused = httpx.post(f"{url}/v1/sample")
        assert (refused.status_code, refused.json()["code"]) == (503, "too_many_connections")
        assert "VAE_MAX_CONNECTIONS" in refused.json()["detail"]
        assert statuses(said(url, get(b"/health/live").replace(CLOSE, b"") + NEXT)) == [200]
        more = [stack.enter_context(socket.create_connection(address(url), timeout=10)) for _ in range(50)]
        assert httpx.get(f"{url}/health/live").status_code == 200
        assert [statuses(one.recv(65536)) for one in more] == [[503]] * 50
        held[0].close()
        assert eventually(lambda: httpx.post(f"{url}/v1/sample").status_code == 200)


def eventually(holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + 90
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def served(url: str, source: str) -> tuple[socket.socket, int]:
    """A connection from that address, and how its first request was answered."""
    connection = socket.create_connection(address(url), timeout=60, source_address=(source, 0))
    connection.sendall(b"GET /v1/models/mnist-2d/ready HTTP/1.1\r\nhost: localhost\r\n\r\n")
    return connection, statuses(connection.recv(65536))[0]


def test_an_address_has_no_more_connections_than_it_may(start_service: Start, small_models: Path) -> None:
    """The limit by address holds over all workers; a killed worker's count is dropped."""
    settings = {
        "VAE_MODELS": str(small_models), "VAE_THREADS": "1", "VAE_WORKERS": "2", "VAE_KEEP_ALIVE_S": "60",
        "VAE_MAX_CONNECTIONS_PER_ADDRESS": "6",
    }  # fmt: skip
    with start_service(**settings) as (process, url), ExitStack() as stack:
        held = [served(url, "127.0.0.2") for _ in range(6)]
        for connection, status in held:
            stack.enter_context(connection)
            assert status == 200
        connection, status = served(url, "127.0.0.2")
        assert status == 503
        connection.close()
        assert httpx.get(f"{url}/v1/models").status_code == 200
        held[0][0].close()

        def free() -> bool:
            with suppress(OSError, IndexError):  # nobody serves it yet
                connection, status = served(url, "127.0.0.2")
                stack.enter_context(connection)
                return status == 200
            return False

        assert eventually(free)
        assert not free()
        workers = workers_of(process.pid)
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        assert eventually(free)


def test_a_trusted_proxy_is_not_counted(start_service: Start, small_models: Path) -> None:
    """The limit by address does not apply to a trusted proxy."""
    settings = {
        "VAE_MODELS": str(small_models), "VAE_MAX_CONNECTIONS_PER_ADDRESS": "1", "VAE_TRUSTED_PROXIES": "127.0.0.2",
    }  # fmt: skip
    with start_service(**settings) as (_, url), ExitStack() as stack:
        for source, expected in (("127.0.0.2", [200, 200, 200]), ("127.0.0.3", [200, 503])):
            answers = [served(url, source) for _ in expected]
            for connection, _ in answers:
                stack.enter_context(connection)
            assert [status for _, status in answers] == expected
