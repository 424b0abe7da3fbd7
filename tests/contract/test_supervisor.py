"""The supervisor: whatever becomes of a worker, of the supervisor itself, or of what they write to."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.conftest import ROOT, answers, connections, eventually, workers_of
from training.evaluation.served import started

CLEAN = {key: value for key, value in os.environ.items() if not key.startswith("VAE_")}
COMMAND = [sys.executable, "-m", "service"]
SERVED = {"VAE_VERSIONS": "mnist-2d:1", "VAE_PORT": "0"}
LIMIT_S = 30.0


@contextmanager
def running(
    stdout: Any = subprocess.PIPE, stderr: Any = subprocess.PIPE, command: list[str] = COMMAND, **settings: str
) -> Iterator[subprocess.Popen[str]]:
    """The command, ended with its workers whatever happens."""
    process = subprocess.Popen(
        command, cwd=ROOT, env={**CLEAN, **SERVED, **settings}, stdout=stdout, stderr=stderr, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def refused(port: int) -> bool:
    """Whether nobody can connect."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except ConnectionRefusedError:
        return True
    return False


def told(url: str, name: str, **labels: str) -> float:
    """A metric's value."""
    wanted = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    lines = httpx.get(f"{url}/metrics", timeout=LIMIT_S).text.splitlines()
    return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{{wanted}}}")), -1.0)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def awaits(pid: int, number: signal.Signals) -> bool:
    """Whether a stopped process has been sent that signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pending = next(int(line.split()[1], 16) for line in lines if line.startswith("ShdPnd"))
    return bool(pending >> (number - 1) & 1)


# Workers


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_worker_whose_loop_stands_still_is_replaced(tmp_path: Path, workers: str) -> None:
    """Also where it is the only one, and whatever holds it up; its stacks are in the log, the metrics count it."""
    log = tmp_path / "log"
    with (
        log.open("w") as errors,
        running(stderr=errors, VAE_WORKERS=workers, VAE_LOOP_LIMIT_S="2", VAE_MODEL_CONTROL="anonymous") as process,
    ):
        assert process.stdout is not None
        url = process.stdout.readline().split(" on ")[1].split()[0]
        order = f"{url}/v1/models/mnist-2d/load"  # every worker that serves follows it
        eventually(lambda: httpx.post(order, timeout=LIMIT_S).json().get("followed") == int(workers), LIMIT_S)
        first = workers_of(process.pid)[0]
        os.kill(first, signal.SIGSTOP)
        eventually(lambda: not lives(first), LIMIT_S)
        eventually(lambda: len(workers_of(process.pid)) == int(workers) and answers(url), LIMIT_S)
        assert told(url, "vae_worker_restarts_total", reason="stuck") >= 1.0
    said = log.read_text()
    assert f"the event loop of worker {first} has stood still for more than VAE_LOOP_LIMIT_S (2)" in said
    assert f"worker {first} was killed by SIGKILL; it is started again" in said


def test_the_stacks_of_a_worker_that_stands_still_are_logged(tmp_path: Path) -> None:
    """As the signal that the supervisor sends makes it do, with no help of its interpreter."""
    log = tmp_path / "log"
    with log.open("w") as errors, running(stderr=errors) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (worker,) = workers_of(process.pid)
        os.kill(worker, signal.SIGQUIT)
        eventually(lambda: "Current thread" in log.read_text())
        assert lives(worker)


def test_how_a_worker_ended_is_said_and_those_that_end_soon_wait_longer(tmp_path: Path) -> None:
    """By the signal's name; 0.1 s, then 0.2 s, then 0.4 s."""
    log = tmp_path / "log"
    with log.open("w") as errors, running(stderr=errors) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split(" on ")[1].split()[0]
        for _ in range(3):
            eventually(lambda: answers(url), LIMIT_S)
            (worker,) = workers_of(process.pid)
            os.kill(worker, signal.SIGBUS)
            eventually(lambda worker=worker: not lives(worker))  # type: ignore[misc]
        eventually(lambda: answers(url), LIMIT_S)
        assert told(url, "vae_worker_restarts_total", reason="killed") == 3.0
    lines = [line for line in log.read_text().splitlines() if "was killed by SIGBUS" in line]
    assert [line.rsplit(" in ", 1)[1] for line in lines] == ["0.1 s", "0.2 s", "0.4 s"]


def test_no_worker_outlives_the_supervisor() -> None:
    """Killed by -9 it leaves nobody on the port."""
    port = free_port()
    with running(VAE_PORT=str(port), VAE_WORKERS="2") as process:
        assert process.stdout is not None
        process.stdout.readline()
        eventually(lambda: len(workers_of(process.pid)) == 2)
        workers = workers_of(process.pid)
        process.kill()
        eventually(lambda: not any(map(lives, workers)))
        with socket.socket() as caller:
            assert caller.connect_ex(("127.0.0.1", port)) != 0


def test_sigterm_ends_it_although_a_worker_hangs() -> None:
    """Within its grace, with 0; a second signal makes that short."""
    with running(VAE_LOOP_LIMIT_S="600", VAE_TIMEOUT_S="600") as process:
        assert process.stdout is not None
        process.stdout.readline()
        (worker,) = workers_of(process.pid)
        os.kill(worker, signal.SIGSTOP)
        process.send_signal(signal.SIGTERM)
        eventually(lambda: awaits(worker, signal.SIGTERM))  # two signals at once are one
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 0
        assert not lives(worker)


def test_every_worker_takes_the_default_model_that_the_first_one_took(flat_models: Path) -> None:
    """A model that comes later under an earlier name changes nothing for a worker that is started later."""
    with started(VAE_MODELS=str(flat_models)) as (process, url):
        eventually(lambda: answers(url))
        (flat_models / "a-model" / "1").mkdir(parents=True)
        (worker,) = workers_of(process.pid)
        os.kill(worker, signal.SIGKILL)
        eventually(lambda: not lives(worker))
        eventually(lambda: answers(url), LIMIT_S)
        assert httpx.post(f"{url}/v1/sample").headers["x-model"] == "mnist-2d"


# The stop


def test_requests_are_taken_for_a_while_after_sigterm() -> None:
    """Readiness turns false at once; new connections are accepted and answered until the drain ends, here by SIGINT."""
    with running(VAE_DRAIN_S="600") as process:
        assert process.stdout is not None
        url = process.stdout.readline().split(" on ")[1].split()[0]
        process.send_signal(signal.SIGTERM)
        eventually(lambda: httpx.get(f"{url}/health/ready").status_code == 503)
        problem = httpx.get(f"{url}/health/ready").json()
        assert problem["code"] == "not_ready"
        assert "stopping" in problem["detail"]
        assert httpx.get(f"{url}/health/live").status_code == 200
        answer = httpx.post(f"{url}/v1/sample")
        assert answer.status_code == 200
        assert answer.headers["connection"] == "close"
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 0
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health/live")


def test_nobody_connects_once_it_is_over() -> None:
    """A caller that is still answered keeps the processes alive; whoever comes then is refused, not left waiting."""
    head = b"POST /v1/reconstruct HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/octet-stream\r\n"
    with running(VAE_DRAIN_S="0", VAE_WORKERS="2") as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().split(" on ")[1].split()[0].rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port), LIMIT_S) as caller:
            caller.sendall(head + b"content-length: 3136\r\n\r\n")
            eventually(lambda: connections(port) == 1)
            process.send_signal(signal.SIGTERM)
            eventually(lambda: refused(port), LIMIT_S)
            assert process.poll() is None
            caller.sendall(bytes(3136))
            assert caller.recv(15) == b"HTTP/1.1 200 OK"
        assert process.wait(LIMIT_S) == 0


def test_an_interrupt_from_the_keyboard_skips_that() -> None:
    """As Ctrl-C does, which every process of the terminal gets."""
    with running(VAE_DRAIN_S="600") as process:
        assert process.stdout is not None
        process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(LIMIT_S) == 0


# What it cannot start with


def line_of(**settings: str) -> str:
    """What it says when it does not start."""
    with running(**settings) as process:
        _, line = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 1
    assert line.count("\n") == 1, line
    return line


def test_two_starts_at_once_on_a_port() -> None:
    """One of them serves, the other says that the port is taken."""
    port = str(free_port())
    with running(VAE_PORT=port) as one, running(VAE_PORT=port) as other:
        eventually(lambda: one.poll() is not None or other.poll() is not None, LIMIT_S)
        lost, won = (one, other) if one.poll() is not None else (other, one)
        assert lost.stderr is not None
        said = [line for line in lost.stderr.read().splitlines() if line.startswith("vae-serve: ")]
        assert lost.returncode == 1
        assert len(said) == 1
        assert f"cannot listen on 127.0.0.1:{port}" in said[0]
        assert won.stdout is not None
        assert f":{port}" in won.stdout.readline()


def test_options_that_are_no_json() -> None:
    """The setting, and an example."""
    assert "VAE_MODELS_OPTIONS" in line_of(VAE_MODELS_OPTIONS="{endpoint_url: x}")


def test_full_standard_output() -> None:
    """No disk has room for one line."""
    with Path("/dev/full").open("w") as full, running(stdout=full) as process:
        _, line = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 1
        assert [said for said in line.splitlines() if said.startswith("vae-serve: cannot write to standard output")]
        assert "Traceback" not in line


def test_a_limit_of_memory_that_cannot_be_raised() -> None:
    """Of whoever starts it: versions are tried within it."""
    with running(command=["prlimit", f"--as={8 * 2**30}", *COMMAND]) as process:
        assert process.stdout is not None
        assert "mnist-2d" in process.stdout.readline()


def test_no_folder_for_several_workers() -> None:
    """Where no file can be written anywhere."""
    process = subprocess.run(
        ["prlimit", "--fsize=0", *COMMAND], cwd=ROOT, env={**CLEAN, **SERVED, "VAE_WORKERS": "2"},
        capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert process.returncode == 1
    assert process.stderr.count("\n") == 1, process.stderr
    assert "TMPDIR" in process.stderr


# What it writes to


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_log_that_nobody_reads_stops_nothing(form: str) -> None:
    """Pipes that are full: requests are answered all the same, and it stops in good order."""
    port = free_port()
    with running(VAE_PORT=str(port), VAE_ACCESS_LOG="true", VAE_LOG_FORMAT=form) as process:
        url = f"http://127.0.0.1:{port}"
        eventually(lambda: answers(url), LIMIT_S)
        with httpx.Client(base_url=url, timeout=LIMIT_S) as client:
            for _ in range(400):
                assert client.get("/v1/models", params={"x": "y" * 1000}).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 0


def test_metrics_need_no_room_on_a_disk() -> None:
    """Where no file can grow, workers count, and an order that cannot be shared is a problem that says so."""
    with started(**SERVED, VAE_WORKERS="2", VAE_MODEL_CONTROL="anonymous") as (process, url):
        order = f"{url}/v1/models/mnist-2d/load"
        eventually(lambda: httpx.post(order, timeout=LIMIT_S).json().get("followed") == 2)  # both are there
        for pid in workers_of(process.pid):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        for _ in range(20):
            assert httpx.post(f"{url}/v1/sample").status_code == 200
        eventually(lambda: told(url, "vae_requests_total", model="mnist-2d", operation="sample", outcome="ok") >= 20)
        refused = httpx.post(order, timeout=LIMIT_S)
        assert (refused.status_code, refused.json()["code"]) == (503, "no_room"), refused.text


# Where it listens


def test_an_ipv6_address_has_brackets() -> None:
    """What is printed can be typed."""
    with running(VAE_HOST="::1") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            pytest.skip("no IPv6 here")
        url = line.split(" on ")[1].split()[0]
        assert url.startswith("http://[::1]:")
        assert answers(url)


def test_a_unix_socket(tmp_path: Path) -> None:
    """In the place of one that a killed process left; its user and group alone may connect; gone at the end."""
    path = tmp_path / "vae.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    settings = {name: value for name, value in SERVED.items() if name != "VAE_PORT"}
    process = subprocess.Popen(
        COMMAND, cwd=ROOT, env={**CLEAN, **settings, "VAE_UNIX_SOCKET": str(path), "VAE_DRAIN_S": "0"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert str(path) in process.stdout.readline()
        assert f"--unix-socket {path}" in process.stdout.readline()
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://localhost", timeout=LIMIT_S) as client:
            assert client.post("/v1/sample").status_code == 200
        assert path.stat().st_mode & 0o777 == 0o660
        second = subprocess.run(
            COMMAND, cwd=ROOT, env={**CLEAN, **settings, "VAE_UNIX_SOCKET": str(path)},
            capture_output=True, text=True, timeout=LIMIT_S, check=False,
        )  # fmt: skip
        assert second.returncode == 1
        assert "another process listens there" in second.stderr
    finally:
        process.terminate()
        process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0
    assert list(tmp_path.iterdir()) == []


KUBERNETES = {
    "VAE_SERVICE_HOST": "10.96.0.7",
    "VAE_SERVICE_PORT": "80",
    "VAE_SERVICE_PORT_HTTP": "80",
    "VAE_PORT": "tcp://10.96.0.7:80",
    "VAE_PORT_80_TCP": "tcp://10.96.0.7:80",
    "VAE_PORT_80_TCP_PROTO": "tcp",
    "VAE_PORT_80_TCP_PORT": "80",
    "VAE_PORT_80_TCP_ADDR": "10.96.0.7",
    "VAE_FRONTEND_SERVICE_HOST": "fd00::7",
    "VAE_FRONTEND_SERVICE_PORT": "80",
    "VAE_FRONTEND_PORT": "tcp://[fd00::7]:80",
}


def test_what_kubernetes_sets_for_services_is_no_setting() -> None:
    """A service named `vae` or `vae-frontend` does not end the pod; the log names what is ignored."""
    environment = {**CLEAN, **SERVED, **KUBERNETES}
    process = subprocess.Popen(
        [*COMMAND, "--port", "0"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert "serving mnist-2d" in process.stdout.readline()
    finally:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=LIMIT_S)
    assert "VAE_FRONTEND_SERVICE_PORT" in said


@pytest.mark.parametrize("name", ["VAE_SERVICE_HOSTS", "VAE_PORTS", "VAE_SERVICE_PORT_"])
def test_what_only_looks_like_it_is_still_a_typing_error(name: str) -> None:
    """Name and value must both have Kubernetes' form."""
    assert name in line_of(**{name: "tcp://10.96.0.7:80"})


def test_a_port_that_is_no_number_is_an_error() -> None:
    """Only Kubernetes' own form is passed over."""
    assert "VAE_PORT" in line_of(VAE_PORT="eight thousand")


def test_the_log_of_a_worker_is_json_too() -> None:
    """Every line of standard output, the supervisor's and the workers'."""
    with running(VAE_LOG_FORMAT="json", VAE_DRAIN_S="0") as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=LIMIT_S)
        lines = [first, *map(json.loads, rest.splitlines())]
    assert any("serving mnist-2d" in line["message"] for line in lines)
    assert all(line["level"] for line in lines)
