"""The service on Ray Serve, on a real cluster of a head and two nodes: answers, limits, scaling, and what is killed."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import pytest

from service.app import create_app
from service.settings import Settings
from tests.support.load import HEADERS, Load, check_failures

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
MODELS = ROOT / "models"
REPLICA = "ray::ServeReplica:default:vae"
WORK = (("/v1/sample?count=256&seed=7", b""),)
CALLERS = 6
SCALE = ("max_replicas=2", "ongoing=2", "window_s=2", "upscale_delay_s=1", "downscale_delay_s=2")
SETTINGS = {
    "VAE_MODELS": str(MODELS), "VAE_VERSIONS": "mnist:all", "VAE_DEFAULT_MODEL": "mnist", "VAE_BODY_TIMEOUT_S": "2",
    "VAE_MAX_BODY_BYTES": "1000000", "VAE_MAX_URL_BYTES": "1000", "VAE_MAX_HEADERS": "50",
}  # fmt: skip
PATIENCE_S = 90.0
"""Longest wait for something that must come; a busy machine needs much of it."""
TRIES = 3


class Process(NamedTuple):
    """A running process of the cluster."""

    pid: int
    parent: int
    title: str


class Cluster:
    """A head without replicas and two nodes of one CPU, each started with `ray start`, and `serve run`.

    Args:
        programs: Folder with `ray` and `serve`.
    """

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self._folder = Path(tempfile.mkdtemp(prefix="ray"))  # short: names of sockets have at most 107 characters
        self._mark = f"RAY_TMPDIR={self._folder}"
        lines = (ROOT / "deploy" / "ray.env").read_text().splitlines()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("VAE_", "RAY_"))}
        self.environment = {
            **kept,
            **dict(line.split("=", 1) for line in lines if line and not line.startswith("#")),
            **SETTINGS,
            "RAY_AUTH_TOKEN": os.urandom(32).hex(),
            "RAY_TMPDIR": str(self._folder),
            "PYTHONPATH": str(ROOT),
        }
        self.address, self.port = f"127.0.0.1:{free_port()}", free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start everything; returns when the first replica is ready."""
        port = self.address.partition(":")[2]
        head = ("--head", f"--port={port}", f"--temp-dir={self._folder}", "--num-cpus=0", "--include-dashboard=false")
        self._join("head", *head, f"--ray-client-server-port={free_port()}")
        for node in ("node1", "node2"):
            # Both are on this machine, so that their proxies need different ports.
            worker = ("--address", self.address, "--num-cpus=1")
            self._join(node, *worker, RAY_SERVE_WORKER_PROXY_HTTP_PORT=str(free_port()))
        self._run("start", "serve", "start", "--address", self.address, "--http-port", str(self.port)).wait(PATIENCE_S)
        self._run("serve", "serve", "run", "--address", self.address, "deploy.ray_serve:app", *SCALE)
        until(lambda: ready(self.url), 2 * PATIENCE_S)

    def processes(self) -> dict[int, Process]:
        """Every process that this cluster has started, by its id."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, IndexError):
                if self._mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                    title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                    found[int(folder.name)] = Process(int(folder.name), parent, title)
        return found

    def replicas(self) -> list[Process]:
        """The processes of the replicas."""
        return [one for one in self.processes().values() if one.title.startswith(REPLICA)]

    def kill_node_of(self, replica: Process) -> None:
        """Kill a replica's whole node, without notice."""
        known = self.processes()
        dying = [known[replica.parent].parent]  # `ray start`, above raylet
        for parent in dying:
            dying += [one.pid for one in known.values() if one.parent == parent]
        for pid in dying:
            kill(pid)

    def log(self) -> str:
        """The ends of all logs."""
        return "\n".join(f"{path.name}: {path.read_text()[-4000:]}" for path in sorted(self._folder.glob("*.log")))

    def stop(self) -> None:
        """Kill every process, and remove the files."""
        while running := self.processes():
            for pid in running:
                kill(pid)
            for process in self._started:
                process.wait(PATIENCE_S)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _join(self, name: str, *arguments: str, **variables: str) -> None:
        """Start a node. Ray gives up after 30 s, which a busy machine may need, so it is tried again."""
        for _ in range(TRIES):
            process = self._run(
                name, "ray", "start", *arguments, "--object-store-memory=80000000", "--block", **variables
            )
            until(lambda: self._started_in(name) or process.poll() is not None)  # noqa: B023  # called at once
            if process.poll() is None:
                return
        raise AssertionError(f"{name} does not start")

    def _started_in(self, name: str) -> bool:
        return "Ray runtime started" in (self._folder / f"{name}.log").read_text()

    def _run(self, name: str, program: str, *arguments: str, **variables: str) -> subprocess.Popen[bytes]:
        with (self._folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [self._programs / program, *arguments], cwd=ROOT, env={**self.environment, **variables},
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self._started.append(process)
        return process


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def ready(url: str) -> bool:
    """Whether a replica answers."""
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/health/ready", timeout=5).status_code == httpx.codes.OK
    return False


def until(true: Callable[[], bool], seconds: float = PATIENCE_S) -> float:
    """Wait until it is true; gives the seconds that it took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() < began + seconds, f"not within {seconds} s"
        time.sleep(0.1)
    return time.monotonic() - began


REFUSALS = """
import asyncio, os
from deploy.ray_serve import Behind, app
from service.errors import StartError
from service.settings import Settings

for variable, arguments in (
    ("VAE_WORKERS=2", {}), ("VAE_TLS_KEY=key.pem", {}), ("VAE_MODEL_CONTROL=true", {}), ("VAE_MODLES=x", {}),
    ("VAE_API_KEYS=/nowhere", {}), ("VAE_THREADS=1", {"replicas": "3"}), ("VAE_THREADS=1", {"cpus": "none"}),
):
    name, _, value = variable.partition("=")
    os.environ[name] = value
    try:
        app(arguments)
    except StartError as error:
        print(error)
    del os.environ[name]

async def status(host, **settings):
    sent = []
    async def served(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
    async def send(message):
        sent.append(message)
    scope = {"type": "http", "path": "/v1/models", "server": (host, 8000), "client": ("10.0.0.7", 5), "headers": []}
    await Behind(served, Settings(**settings))(scope, None, send)
    return sent[0]["status"]

for host, settings in (
    ("127.0.0.1", {}), ("10.0.0.1", {}), ("10.0.0.1", {"allow_anonymous": True}), ("10.0.0.1", {"api_keys": "keys"}),
):
    print(asyncio.run(status(host, **settings)))
"""


def test_what_cannot_be_meant_is_refused(ray_python: str) -> None:
    """Settings without effect, misspelt names and arguments, each with the fix; strangers where no key is required."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VAE_")}
    done = subprocess.run(
        [ray_python, "-c", REFUSALS], env={**environment, "PYTHONPATH": str(ROOT)}, cwd=ROOT,
        capture_output=True, text=True, timeout=PATIENCE_S, check=True,
    )  # fmt: skip
    *lines, loopback, stranger, anonymous, keys = done.stdout.splitlines()
    for line, says in zip(
        lines,
        (
            "max_replicas=4",
            "http_options",
            "VAE_POLL_S",
            "did you mean VAE_MODELS?",
            "/nowhere",
            "min_replicas",
            "cpus",
        ),
        strict=True,
    ):
        assert says in line
    assert (loopback, stranger, anonymous, keys) == ("200", "403", "200", "200")


@pytest.fixture(scope="module")
def cluster(ray_python: str) -> Iterator[Cluster]:
    """The cluster, with one replica ready."""
    cluster = Cluster(Path(ray_python).parent)
    try:
        try:
            cluster.start()
        except AssertionError as error:
            raise AssertionError(f"{error}\n{cluster.log()}") from error
        yield cluster
    finally:
        cluster.stop()


def test_it_answers_with_the_bytes_of_the_service(cluster: Cluster) -> None:
    """The same request gives the same bytes as a service without Ray, and its problems are the same."""
    pixels = np.random.default_rng(3).random((2, 1, 28, 28), np.float32).tobytes()
    requests = [("/v1/sample?count=4&seed=7", b""), ("/v1/denoise?level=0.1", pixels), ("/v1/encode", b"123")]
    settings = Settings(models=MODELS, versions="mnist:all", default_model="mnist")

    async def alone() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_app(settings))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=HEADERS) as client:
            return [await client.post(path, content=body, timeout=60) for path, body in requests]

    with httpx.Client(base_url=cluster.url, headers=HEADERS, timeout=60) as client:
        for (path, body), one in zip(requests, asyncio.run(alone()), strict=True):
            answer = client.post(path, content=body)
            assert (answer.status_code, answer.content) == (one.status_code, one.content), path
            assert answer.headers["content-type"] == one.headers["content-type"]


@pytest.mark.parametrize("sent", ["mine-1", None, "not valid!"])
@pytest.mark.parametrize("path", ["/health/ready", "/metrics", f"/{'x' * 1000}"])
def test_an_answer_has_one_request_id(cluster: Cluster, path: str, sent: str | None) -> None:
    """The caller's where it is valid, else a new one; whether the replica answers, or what stands before it."""
    answer = httpx.get(f"{cluster.url}{path}", headers={"x-request-id": sent} if sent else {}, timeout=30)
    (found,) = answer.headers.get_list("x-request-id")
    assert found == sent if sent == "mine-1" else found not in ("", sent)


def chunks(seconds: float, number: int) -> Iterator[bytes]:
    """A body of many parts, with a pause before each."""
    for _ in range(number):
        time.sleep(seconds)
        yield bytes(100_000)


def refused(cluster: Cluster, path: str = "/v1/encode", **more: object) -> tuple[int, str]:
    """Status and code of a refusal."""
    answer = httpx.post(f"{cluster.url}{path}", headers=HEADERS | more.pop("headers", {}), timeout=30, **more)  # type: ignore[operator,arg-type]
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    return answer.status_code, answer.json()["code"]


def test_the_limits_of_the_service_hold(cluster: Cluster) -> None:
    """On bodies, announced or in chunks, on URLs, on headers, and on the time of a body; metrics are Ray's."""
    assert refused(cluster, content=bytes(1_000_001)) == (413, "too_large")
    assert refused(cluster, content=chunks(0, 11)) == (413, "too_large")
    assert refused(cluster, f"/v1/encode?{'x' * 1000}") == (414, "url_too_long")
    assert refused(cluster, headers={f"x-{number}": "y" for number in range(50)}) == (431, "headers_too_large")
    assert refused(cluster, headers={"host": "evil.example"}) == (421, "unknown_host")
    assert httpx.get(f"{cluster.url}/metrics", timeout=30).json()["code"] == "not_found"
    began = time.monotonic()
    assert refused(cluster, content=chunks(1.5, 3)) == (408, "slow_request")
    assert time.monotonic() - began < 10


def test_a_driver_without_the_token_is_refused(cluster: Cluster, ray_python: str) -> None:
    """Who reaches Ray's ports but has no token, or another, runs nothing."""
    script = f"import ray; ray.init('{cluster.address}'); print('let in')"
    tried = [
        subprocess.Popen(
            [ray_python, "-c", script], env={**cluster.environment, "RAY_AUTH_TOKEN": token, "HOME": "/nonexistent"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for token in ("0" * 64, "")
    ]  # fmt: skip
    for driver in tried:
        said, _ = driver.communicate(timeout=PATIENCE_S)
        assert driver.returncode != 0
        assert "let in" not in said
        assert "oken" in said


def serving(cluster: Cluster) -> bool:
    """Whether two replicas have opened their models; until then the title of a process says so."""
    return len([one for one in cluster.replicas() if "initialize" not in one.title]) == 2


def test_replicas_come_and_go_with_the_load(cluster: Cluster, figure: Callable[[str], None]) -> None:
    """From 1 to 2 under load and back when it ends, and no request fails."""
    assert len(cluster.replicas()) == 1
    with Load(cluster.url, WORK, CALLERS) as load:
        up_s = until(lambda: len(cluster.replicas()) == 2)
        until(lambda: serving(cluster))
    with Load(cluster.url, WORK, 1, pause_s=0.2) as light:
        down_s = until(lambda: len(cluster.replicas()) == 1)
    figure(f"Ray Serve: a second replica after {up_s:.1f} s of load, gone {down_s:.1f} s after it")
    assert list(load.outcomes) == list(light.outcomes) == ["ok"]


def test_a_killed_replica_costs_its_own_requests_alone(cluster: Cluster, figure: Callable[[str], None]) -> None:
    """They fail within 5 s with 503 or a closed connection, and succeed when sent again; a new replica comes."""
    with Load(cluster.url, WORK, CALLERS) as load:
        until(lambda: serving(cluster))
        time.sleep(3)  # until the proxies know both
        victim = cluster.replicas()[0]
        killed = time.monotonic()
        kill(victim.pid)
        until(lambda: serving(cluster) and victim not in cluster.replicas())
    figure(f"a Ray Serve replica killed: {check_failures(load, killed)}")


def test_a_killed_node_costs_its_own_requests_alone(cluster: Cluster, figure: Callable[[str], None]) -> None:
    """The same for a node with its replica and its proxy; the other one carries on."""
    with Load(cluster.url, WORK, CALLERS) as load:
        until(lambda: serving(cluster))
        time.sleep(3)  # until the proxies know both
        killed = time.monotonic()
        cluster.kill_node_of(cluster.replicas()[0])
        time.sleep(10)  # twice as long as its requests may take to fail
    figure(f"a Ray Serve node killed: {check_failures(load, killed)}")
    assert ready(cluster.url)
