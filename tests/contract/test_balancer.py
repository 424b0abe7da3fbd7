"""deploy/nginx.conf in a real nginx, with replicas that break off, hang, refuse or are unreachable."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

CONF = Path(__file__).parents[2] / "deploy" / "nginx.conf"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is missing: apt-get install nginx-light")
BODY = os.urandom(1000)
LARGE = os.urandom(3 * 2**20)
"""More than client_body_buffer_size, so that nginx keeps it in a file."""
PROBLEM = "application/problem+json"
Act = Callable[["Replica"], None]


class Replica(BaseHTTPRequestHandler):
    """One request to a replica: read the body, then act as planned."""

    protocol_version = "HTTP/1.1"
    server: Replicated

    def do_POST(self) -> None:
        """Read the body, write down who got it, and act."""
        stage = self.server.stage
        body = self.rfile.read(int(self.headers["content-length"] or 0))
        with stage.lock:
            act = stage.acts[min(len(stage.asked), len(stage.acts) - 1)]
            stage.asked.append((self.server.server_address[0], body))
        act(self)

    do_GET = do_PUT = do_POST  # noqa: N815  # names that http.server looks for

    def say(self, status: int, content: bytes, **headers: str) -> None:
        """Send an answer."""
        self.send_response(status)
        for name, value in {"content-length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing: pytest's output is for the tests."""


class Replicated(ThreadingHTTPServer):
    """The server of one address."""

    stage: Stage


def answer(replica: Replica) -> None:
    replica.say(200, b"done", content_type="text/plain")


def break_off(replica: Replica) -> None:
    replica.close_connection = True


def hang(replica: Replica) -> None:
    replica.server.stage.over.wait(30)
    replica.close_connection = True


def refuse(replica: Replica) -> None:
    """A 503 as the service sends it, with the replica's name."""
    said = json.dumps({"code": "overloaded", "detail": str(replica.server.server_address[0])}).encode()
    replica.say(503, said, content_type=PROBLEM, retry_after="7")


def give_up(replica: Replica) -> None:
    replica.say(504, b'{"code": "deadline_passed"}', content_type=PROBLEM)


def fail(replica: Replica) -> None:
    replica.say(502, b"a replica's own", content_type="text/plain")


@dataclass
class Stage:
    """Replicas on loopback addresses behind nginx.

    acts: what the first request to any replica meets, the second, and so on; the last one stays.
    asked: address and body of each request that reached a replica.
    """

    url: str = ""
    acts: list[Act] = field(default_factory=list)
    asked: list[tuple[str, bytes]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)

    def post(self, *acts: Act, body: bytes = BODY, path: str = "/v1/encode") -> httpx.Response:
        """One request, and what the replicas do about it."""
        self.acts, self.asked = list(acts), []
        return httpx.post(self.url + path, content=body, timeout=30)

    @property
    def addresses(self) -> list[str]:
        """Replicas that received a request, in order."""
        return [address for address, _ in self.asked]


def name_server(addresses: list[str], stack: ExitStack) -> int:
    """A DNS server on loopback that resolves every name to these addresses; its port."""
    server = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    server.bind(("127.0.0.1", 0))
    port: int = server.getsockname()[1]
    records = b"".join(b"\xc0\x0c\0\x01\0\x01\0\0\0\x01\0\x04" + socket.inet_aton(each) for each in addresses)

    def serve() -> None:
        while True:
            query, sender = server.recvfrom(512)
            if query == b"end":
                return
            head = query[:2] + b"\x81\x80\0\x01" + len(addresses).to_bytes(2, "big") + bytes(4)
            server.sendto(head + query[12:] + records, sender)

    thread = threading.Thread(target=serve)
    thread.start()
    stack.callback(thread.join)
    stack.callback(server.sendto, b"end", ("127.0.0.1", port))
    return port


def replicas(addresses: list[str], stage: Stage, stack: ExitStack) -> None:
    """A server on each of the addresses."""
    for address in addresses:
        server = Replicated((address, stage_port(stage)), Replica)
        server.stage = stage
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        stack.callback(server.server_close)
        stack.callback(thread.join)
        stack.callback(server.shutdown)


def stage_port(stage: Stage) -> int:
    """The replicas' port: the one after nginx's."""
    return int(stage.url.rsplit(":", 1)[1]) + 1


def free_ports() -> int:
    """A port that is free, with the next one, on every loopback address."""
    while True:
        with ExitStack() as stack:
            one = stack.enter_context(socket.create_server(("0.0.0.0", 0)))  # noqa: S104  # every one, to be sure
            port: int = one.getsockname()[1]
            try:
                stack.enter_context(socket.create_server(("0.0.0.0", port + 1)))  # noqa: S104
            except OSError:
                continue
            return port


def start_nginx(stage: Stage, resolver: int, folder: Path, stack: ExitStack) -> None:
    """The released file with other addresses, folders and shorter timeouts."""
    port = int(stage.url.rsplit(":", 1)[1])
    text = CONF.read_text()
    changes = {
        r"resolver 127\.0\.0\.11 ": f"resolver 127.0.0.1:{resolver} ",
        r"listen 8080;": f"listen 127.0.0.1:{port};",
        r"\$replicas:8000;": f"$replicas:{stage_port(stage)};",
        r"/tmp/": f"{folder}/",  # noqa: S108  # what the shipped file says
        r"proxy_read_timeout \d+s;": "proxy_read_timeout 1s;",
    }
    for pattern, replacement in changes.items():
        text, found = re.subn(pattern, replacement, text)
        assert found, pattern
    if os.getuid() == 0:  # its worker would become another user, who may not write here
        text = f"user root;\n{text}"
    file = folder / "nginx.conf"
    file.write_text(text)
    assert NGINX is not None
    log = stack.enter_context((folder / "log").open("w"))
    process = subprocess.Popen([NGINX, "-c", str(file), "-e", "/dev/stderr"], stderr=log)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    for _ in range(500):
        assert process.poll() is None, (folder / "log").read_text()
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    pytest.fail("nginx does not listen")


def staged(folder: Path, living: list[str], dead: list[str], stack: ExitStack) -> Stage:
    """Everything, with replicas on the living addresses alone."""
    stage = Stage(f"http://127.0.0.1:{free_ports()}")
    replicas(living, stage, stack)
    start_nginx(stage, name_server([*dead, *living], stack), folder, stack)
    stack.callback(stage.over.set)
    return stage


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Three replicas that live."""
    with ExitStack() as stack:
        yield staged(tmp_path_factory.mktemp("nginx"), ["127.0.0.2", "127.0.0.3", "127.0.0.4"], [], stack)


@pytest.fixture(scope="module")
def broken_stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One running replica, and two unreachable ones."""
    with ExitStack() as stack:
        yield staged(tmp_path_factory.mktemp("nginx"), ["127.0.0.2"], ["127.0.0.3", "127.0.0.4"], stack)


@pytest.fixture(scope="module")
def lone_stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A single one."""
    with ExitStack() as stack:
        yield staged(tmp_path_factory.mktemp("nginx"), ["127.0.0.2"], [], stack)


@pytest.mark.parametrize("body", [BODY, LARGE], ids=["in memory", "in a file"])
def test_a_broken_connection_is_not_repeated(stage: Stage, body: bytes) -> None:
    """A request that crashes a replica is answered 502 and reaches no other replica."""
    assert stage.post(break_off, answer, body=body).status_code == 502
    assert [seen for _, seen in stage.asked] == [body]


@pytest.mark.parametrize("body", [BODY, LARGE], ids=["in memory", "in a file"])
def test_a_request_that_hangs_is_not_repeated(stage: Stage, body: bytes) -> None:
    """A request that hangs in a replica is answered 504 and reaches no other replica."""
    assert stage.post(hang, answer, body=body).status_code == 504
    assert [seen for _, seen in stage.asked] == [body]


@pytest.mark.parametrize("body", [BODY, LARGE, b""], ids=["in memory", "in a file", "none"])
def test_a_503_is_repeated_once_at_another_replica(stage: Stage, body: bytes) -> None:
    """After a 503 one other replica gets the same body."""
    said = stage.post(refuse, answer, body=body)
    assert (said.status_code, said.content) == (200, b"done")
    assert [seen for _, seen in stage.asked] == [body, body]
    assert len(set(stage.addresses)) == 2


def test_the_second_503_is_passed_on(stage: Stage) -> None:
    """A second 503 is passed on unchanged, and no third replica is tried."""
    said = stage.post(refuse, refuse, answer)
    assert (said.status_code, said.headers["content-type"], said.headers["retry-after"]) == (503, PROBLEM, "7")
    assert said.json()["detail"] == stage.addresses[-1]
    assert len(set(stage.addresses)) == len(stage.asked) == 2


@pytest.mark.parametrize(("act", "status"), [(break_off, 502), (hang, 504)])
def test_a_repeated_request_that_breaks_a_replica_ends_there(stage: Stage, act: Act, status: int) -> None:
    """A request that crashes the second replica after a 503 is not repeated again."""
    assert stage.post(refuse, act, answer).status_code == status
    assert len(stage.asked) == 2


@pytest.mark.parametrize(("act", "status"), [(give_up, 504), (fail, 502)])
def test_other_answers_are_passed_on(stage: Stage, act: Act, status: int) -> None:
    """A replica's own 502 or 504 is passed on as an answer."""
    said = stage.post(act, answer)
    assert said.status_code == status
    assert said.content in (b'{"code": "deadline_passed"}', b"a replica's own")
    assert len(stage.asked) == 1


def test_an_unreachable_replica_costs_nothing(broken_stage: Stage) -> None:
    """Unreachable replicas receive nothing, so the running one answers every request."""
    for _ in range(12):
        assert broken_stage.post(answer, body=LARGE).content == b"done"
        assert [seen for _, seen in broken_stage.asked] == [LARGE]


@pytest.mark.parametrize(("act", "status"), [(break_off, 502), (hang, 504)])
def test_what_breaks_the_second_replica_is_not_repeated_either(broken_stage: Stage, act: Act, status: int) -> None:
    """A request that crashes a replica after an unreachable one is not repeated."""
    for _ in range(4):
        assert broken_stage.post(act, answer).status_code == status
        assert len(broken_stage.asked) == 1


def test_a_503_with_nobody_else_there_is_passed_on(broken_stage: Stage, lone_stage: Stage) -> None:
    """A 503 is passed on where no other replica is reachable or another attempt does not help."""
    said = lone_stage.post(refuse, answer)
    assert (said.status_code, said.headers["retry-after"], len(lone_stage.asked)) == (503, "7", 1)
    for _ in range(6):
        assert broken_stage.post(refuse).headers["retry-after"] == "7"
        assert len(broken_stage.asked) <= 2


def test_one_replicas_own_pages_are_not_there(stage: Stage) -> None:
    """Metrics and model control of a single replica are 404 behind the balancer."""
    for path in ("/metrics", "/v1/models/mnist/load", "/v1/models/mnist/unload"):
        assert stage.post(answer, path=path).status_code == 404
        assert not stage.asked
