"""Closed-loop load by wrk: each connection waits for an answer before its next request."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

from benchmarks.bodies import Body
from benchmarks.measure import Measure

SCRIPT = """
wrk.method = "POST"
wrk.path = os.getenv("BENCH_PATH")
for line in os.getenv("BENCH_HEADERS"):gmatch("[^\\n]+") do
  local name, value = line:match("^(.-): (.*)$")
  wrk.headers[name] = value
end
local file = assert(io.open(os.getenv("BENCH_BODY"), "rb"))
wrk.body = file:read("*a")
file:close()
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('\\nRESULT {"requests": %d, "us": %d, "p50": %f, "p99": %f, "failures": %d}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    e.status + e.connect + e.read + e.write + e.timeout))
end
"""


def check() -> None:
    """Whether wrk is installed.

    Raises: SystemExit saying how to get it.
    """
    if shutil.which("wrk") is None:
        raise SystemExit("the load comes from wrk, which is not installed: apt-get install wrk")


def run(port: int, body: Body, connections: int, seconds: float) -> Measure:
    """Send `body` repeatedly; only correct answers count as requests a second."""
    with tempfile.TemporaryDirectory() as folder:
        script, content = Path(folder, "load.lua"), Path(folder, "body")
        script.write_text(SCRIPT)
        content.write_bytes(body.content)
        environment = {
            "PATH": "/usr/bin:/usr/local/bin",
            "BENCH_PATH": body.path,
            "BENCH_BODY": str(content),
            "BENCH_HEADERS": "\n".join(f"{name}: {value}" for name, value in body.headers.items()),
        }
        command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "10s"]
        command += ["-s", str(script), f"http://127.0.0.1:{port}"]
        said = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds + 30, check=True
        )
    found = json.loads(said.stdout.split("RESULT ")[1])
    good = found["requests"] - found["failures"]
    return Measure(good * 1e6 / found["us"], found["p50"] / 1e3, found["p99"] / 1e3, found["failures"])
