"""Closed-loop load by wrk: each connection waits for an answer before its next request."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
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
local bodies = {}
for path in os.getenv("BENCH_BODIES"):gmatch("[^\\n]+") do
  local file = assert(io.open(path, "rb"))
  bodies[#bodies + 1] = file:read("*a")
  file:close()
end
wrk.body = bodies[1]
if #bodies > 1 then
  local requests, turn = {}, 0
  function init(args)
    for k, body in ipairs(bodies) do requests[k] = wrk.format(nil, nil, nil, body) end
  end
  function request() turn = turn % #requests + 1; return requests[turn] end
end
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


def run(port: int, body: Body, connections: int, seconds: float, others: Sequence[bytes] = ()) -> Measure:
    """Send `body` repeatedly, in turn with the contents of other bodies; only correct answers count.

    Args:
        port: Of the server.
        body: The request.
        connections: Connections, each with one request at a time.
        seconds: Duration.
        others: Further contents for the same path and headers.
    """
    with tempfile.TemporaryDirectory() as folder:
        script, contents = Path(folder, "load.lua"), [body.content, *others]
        script.write_text(SCRIPT)
        files = [Path(folder, f"body{k}") for k in range(len(contents))]
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(content)
        environment = {
            "PATH": "/usr/bin:/usr/local/bin",
            "BENCH_PATH": body.path,
            "BENCH_BODIES": "\n".join(map(str, files)),
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
