"""Limits of a connection: too much, too slow, or ambiguous."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from tests.faults.conftest import connections, eventually
from training.evaluation.served import started

TIMEOUT_S = 0.5
KEEP_ALIVE_S = 3.0  # long enough for a slow machine to come back to a connection
CONNECTIONS = 12
ANSWER_BYTES = 4096 * 28 * 28 * 4
ROW = bytes(2 * 4)
DECODE = b"POST /v1/decode HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/octet-stream\r\n"
CHUNKED = DECODE + b"transfer-encoding: chunked\r\n"
WHOLE = DECODE + b"content-length: 8\r\n\r\n" + ROW


@pytest.fixture(scope="module")
def service(small_models: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process with short timeouts, and health and metrics on a port of their own."""
    settings = {
        "VAE_MODELS": small_models,
        "VAE_THREADS": 1,
        "VAE_OPS_PORT": 0,
        "VAE_HEAD_TIMEOUT_S": TIMEOUT_S,
        "VAE_BODY_TIMEOUT_S": TIMEOUT_S,
        "VAE_ANSWER_TIMEOUT_S": TIMEOUT_S,
        "VAE_KEEP_ALIVE_S": KEEP_ALIVE_S,
        "VAE_MAX_CONNECTIONS": CONNECTIONS,
        "VAE_MAX_BODY_BYTES": 2**20,
        "VAE_TIMEOUT_S": 5,
    }
    with started(**{name: str(value) for name, value in settings.items()}) as running:
        yield running


@pytest.fixture(scope="module")
def url(service: tuple[subprocess.Popen[str], str]) -> str:
    return service[1]


@pytest.fixture(scope="module")
def ops_url(service: tuple[subprocess.Popen[str], str]) -> str:
    assert service[0].stdout is not None
    service[0].stdout.readline()
    found = re.search(r"http://\S+", service[0].stdout.readline())
    assert found
    return found.group()


def connected(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def heard(connection: socket.socket) -> bytes:
    """Everything received until the service closes."""
    found = b""
    while part := connection.recv(65536):
        found += part
    return found


def is_served(connection: socket.socket, request: bytes) -> bool:
    """Whether the answer is 200; reads it to its end."""
    connection.sendall(request)
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += connection.recv(65536)
    head, _, body = answer.partition(b"\r\n\r\n")
    missing = int(head.lower().partition(b"content-length: ")[2].split()[0]) - len(body)
    while missing > 0:
        missing -= len(connection.recv(65536))
    return head.startswith(b"HTTP/1.1 200")


def said(url: str, *parts: bytes, pause_s: float = 0.05) -> bytes:
    """Everything received after these bytes, sent one after the other."""
    with connected(url) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause_s)
        return heard(connection)


def problem_of(answer: bytes) -> tuple[int, str, str]:
    """(status, code, detail) of the one answer, a problem that closes its connection."""
    assert answer.count(b"HTTP/1.1 ") == 1
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head
    assert b"connection: close" in head
    problem = json.loads(body)
    assert int(head.split()[1]) == problem["status"]
    return problem["status"], problem["code"], problem["detail"]


TWO_WAYS = {
    "length and chunks": DECODE + b"content-length: 8\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and length": CHUNKED + b"content-length: 8\r\n\r\n0\r\n\r\n",
    "two lengths": DECODE + b"content-length: 8\r\ncontent-length: 9\r\n\r\n" + ROW,
    "a list of lengths": DECODE + b"content-length: 8, 8\r\n\r\n" + ROW,
    "a sign": DECODE + b"content-length: +8\r\n\r\n" + ROW,
    "a negative length": DECODE + b"content-length: -1\r\n\r\n",
    "a length that overflows": DECODE + b"content-length: 99999999999999999999999\r\n\r\n" + ROW,
    "a space before the colon": DECODE + b"content-length : 8\r\n\r\n" + ROW,
    "a coding after chunked": DECODE + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "a chunk that is too long": CHUNKED + b"\r\n8\r\n" + ROW + b"X\r\n0\r\n\r\n",
    "a bare line feed in a chunk's size": CHUNKED + b"\r\n8;x\n" + ROW + b"\r\n0\r\n\r\n",
    "a bare line feed": b"GET /v1/models HTTP/1.1\nhost: localhost\n\n",
    "a folded header": b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n folded: y\r\n\r\n",
    "a zero byte": b"GET /v1/models HTTP/1.1\r\nhost: a\x00b\r\n\r\n",
    "a path that is not ASCII": b"GET /v1/m\xc3\xb6dels HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a proxy's request": b"CONNECT x:1 HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
}


@pytest.mark.parametrize("request_bytes", TWO_WAYS.values(), ids=TWO_WAYS)
def test_what_may_be_read_in_two_ways_is_read_in_none(url: str, request_bytes: bytes) -> None:
    """An ambiguous request gets one problem and a closed connection; nothing after it is parsed as a request."""
    status, code, _ = problem_of(said(url, request_bytes + WHOLE))
    assert (status, code) == (400, "malformed_request")


def test_a_coded_body_is_refused(url: str) -> None:
    """A body with a content coding is refused, also if Transfer-Encoding names it."""
    body = b"transfer-encoding: gzip, chunked\r\nconnection: close\r\n\r\n8\r\n" + ROW + b"\r\n0\r\n\r\n"
    assert problem_of(said(url, DECODE + body))[:2] == (415, "unsupported_media_type")


def test_requests_sent_at_once_are_answered_in_order(url: str) -> None:
    """A malformed pipelined request is answered after those before it, and ends the connection."""
    answers = said(url, WHOLE + b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n" + WHOLE)
    kinds = re.findall(rb"HTTP/1.1 (\d+)|content-type: (\S+)", answers)
    forms = [form for _, form in kinds if form]
    assert forms == [b"application/octet-stream", b"application/json", b"application/octet-stream"]
    answers = said(url, WHOLE + b"\x00\x01" + WHOLE)
    assert answers.count(b"HTTP/1.1 ") == answers.count(b"HTTP/1.1 200") == 1


MUCH = b"b" * 600_000
TOO_LARGE = {
    "a URL": (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n\r\n", "VAE_MAX_URL_BYTES"),
    "a URL without an end": (b"GET /" + MUCH, "VAE_MAX_HEADER_BYTES"),
    "many headers": (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 101 + b"\r\n", "VAE_MAX_HEADERS"),
    "a header": (b"GET / HTTP/1.1\r\na: " + b"b" * 33000 + b"\r\n\r\n", "VAE_MAX_HEADER_BYTES"),
    "a header without an end": (b"GET / HTTP/1.1\r\na: " + MUCH, "VAE_MAX_HEADER_BYTES"),
    "a trailer without an end": (CHUNKED + b"\r\n0\r\na: " + MUCH, "VAE_MAX_HEADER_BYTES"),
    "a chunk's size without an end": (CHUNKED + b"\r\n8;" + MUCH, "VAE_MAX_HEADER_BYTES"),
}


@pytest.mark.parametrize(("request_bytes", "setting"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_what_is_too_large_names_the_setting(url: str, request_bytes: bytes, setting: str) -> None:
    """A part above the limit is refused at once with the setting's name, even if the rest never arrives."""
    status, code, detail = problem_of(said(url, request_bytes))
    url_alone = setting == "VAE_MAX_URL_BYTES"
    assert (status, code) == ((414, "url_too_long") if url_alone else (431, "headers_too_large"))
    assert setting in detail


@pytest.mark.parametrize("path", [b"/v2/models/m.encode/infer", b"/v2"])
def test_what_the_server_refuses_below_v2_has_its_form(url: str, path: bytes) -> None:
    """`{"error": ...}`, before any application sees the request."""
    answer = said(url, b"POST %b HTTP/1.1\r\na: %b\r\n\r\n" % (path, b"b" * 33000))
    head, _, content = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    assert b"content-type: application/json" in head
    assert json.loads(content).keys() == {"error"}


def test_trailers_are_no_headers(url: str) -> None:
    """Trailers never act as headers, because a proxy has not checked them."""
    trailer = b"\r\n8\r\n" + ROW + b"\r\n0\r\naccept: image/png\r\nx-timeout-ms: nonsense\r\n\r\n"
    answer = said(url, CHUNKED + b"connection: close\r\n" + trailer)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"content-type: application/octet-stream" in answer


def trickled(connection: socket.socket, data: bytes, pause_s: float) -> bytes:
    """Everything received while one byte is sent every `pause_s` seconds."""
    for byte in data:
        connection.sendall(bytes([byte]))
        time.sleep(pause_s)
        connection.setblocking(False)
        try:
            return connection.recv(65536)
        except BlockingIOError:
            continue
        finally:
            connection.settimeout(10)
    raise AssertionError("never cut off")


@pytest.mark.parametrize(
    ("before", "trickle", "setting"),
    [
        (b"", WHOLE[:40], "VAE_HEAD_TIMEOUT_S"),
        (DECODE + b"content-length: 100\r\n\r\n", bytes(40), "VAE_BODY_TIMEOUT_S"),
        (CHUNKED + b"\r\n", b"1\r\nx\r\n" * 8, "VAE_BODY_TIMEOUT_S"),
    ],
    ids=["head", "body", "chunks"],
)
def test_a_request_that_trickles_is_cut_off(url: str, before: bytes, trickle: bytes, setting: str) -> None:
    """A request whose bytes keep coming, but which is not complete in time, is refused."""
    with connected(url) as connection:
        connection.sendall(before)
        status, code, detail = problem_of(trickled(connection, trickle, TIMEOUT_S / 5))
        assert (status, code) == (408, "slow_request")
        assert setting in detail
        assert heard(connection) == b""


def test_an_idle_connection_is_closed_without_a_word(url: str) -> None:
    """An idle connection is closed before its first request and after one; empty lines are no requests."""
    with connected(url) as never, connected(url) as served, connected(url) as restless:
        assert is_served(served, WHOLE)
        assert is_served(restless, WHOLE)
        for _ in range(30):
            time.sleep(TIMEOUT_S / 5)
            try:
                restless.sendall(b"\r\n")
            except ConnectionError:
                break
        else:
            pytest.fail("empty lines keep it open")
        assert heard(never) == b""
        assert heard(served) == b""


def test_a_small_answer_is_one_write(url: str) -> None:
    """Head and body are one write; pipelined answers keep their order, and the last one announces the close."""
    with connected(url) as connection:
        for _ in range(3):
            connection.sendall(WHOLE)
            head, body = connection.recv(65536).split(b"\r\n\r\n", 1)
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b"\r\ncontent-length: %d" % len(body) in head
        closing = DECODE + b"connection: close\r\ncontent-length: 8\r\n\r\n" + ROW
        marked = [b"\r\nx-request-id: %d\r\n\r\n" % number for number in range(3)]
        connection.sendall(
            b"".join(
                each.replace(b"\r\n\r\n", mark) for each, mark in zip((WHOLE, WHOLE, closing), marked, strict=True)
            )
        )
        answers = heard(connection)
    heads = [part.rpartition(b"HTTP/1.1 200 OK")[2].lower() for part in answers.split(b"\r\n\r\n")[:-1]]
    assert [re.findall(rb"x-request-id: (\d)", head) for head in heads] == [[b"0"], [b"1"], [b"2"]]
    assert [b"connection: close" in head for head in heads] == [False, False, True]
    assert answers.split(b"\r\n\r\n")[-1] == body


def test_a_caller_that_does_not_read_is_cut_off(url: str) -> None:
    """The connection of a client that does not read its answer is closed."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = url.removeprefix("http://").split(":")
        connection.connect((host, int(port)))
        connection.sendall(
            b"POST /v1/sample?count=4096&seed=1 HTTP/1.1\r\nhost: localhost\r\naccept: application/octet-stream\r\n\r\n"
        )
        connection.settimeout(10)
        assert connection.recv(1, socket.MSG_PEEK)
        eventually(lambda: connections(int(port)) == 0)
        read = 0
        with suppress(ConnectionResetError, TimeoutError):
            while part := connection.recv(65536):
                read += len(part)
        assert read < ANSWER_BYTES, "all of it was kept"


def test_one_connection_too_many_is_told_so(url: str, ops_url: str) -> None:
    """Above the limit a connection gets 503; open ones and health go on, and a closed one makes room."""
    with ExitStack() as stack:
        held = [stack.enter_context(connected(url)) for _ in range(CONNECTIONS)]
        assert all(is_served(connection, WHOLE) for connection in held)
        status, code, detail = problem_of(said(url))
        assert (status, code) == (503, "too_many_connections")
        assert "VAE_MAX_CONNECTIONS" in detail
        assert httpx.get(f"{ops_url}/health/ready").status_code == 200
        assert is_served(held[0], WHOLE)
    assert httpx.post(f"{url}/v1/sample").status_code == 200


def test_health_and_metrics_have_a_port_of_their_own(url: str, ops_url: str) -> None:
    """Each port serves its own paths and no others."""
    for path in ("/health/live", "/health/ready", "/metrics"):
        assert httpx.get(ops_url + path).status_code == 200
        assert httpx.get(url + path).json()["code"] == "not_found"
    assert httpx.get(f"{url}/v1/models").status_code == 200
    assert httpx.get(f"{ops_url}/v1/models").json()["code"] == "not_found"
    assert httpx.post(f"{ops_url}/v1/sample").json()["code"] == "not_found"


def test_the_refused_body_is_not_kept(url: str) -> None:
    """A body above the limit is refused at once, announced or not, and its client receives the refusal."""
    whole = httpx.post(f"{url}/v1/decode", content=bytes(2**20 + 4))
    parts = httpx.post(f"{url}/v1/decode", content=iter([bytes(2**19)] * 3))
    for answer in (whole, parts):
        assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
        assert "VAE_MAX_BODY_BYTES" in answer.json()["detail"]
