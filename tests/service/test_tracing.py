"""Traces, as a collector receives them: a real HTTP server that reads OTLP."""

from __future__ import annotations

import asyncio
import http.server
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from service.app import create_app
from service.repository.repository import Repository
from service.settings import Settings

ROOT = Path(__file__).parents[2]
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
Serve = Callable[[FastAPI], AbstractContextManager[str]]


class Collector(http.server.BaseHTTPRequestHandler):
    """Server that keeps the spans sent to /v1/traces."""

    spans: list[Span]
    services: set[str]

    def do_POST(self) -> None:
        """One export."""
        request = ExportTraceServiceRequest()
        request.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
        for resource in request.resource_spans:
            self.services.add(attributes(resource.resource)["service.name"])
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        self.send_response(200 if self.path == "/v1/traces" else 404)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def attributes(of: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in of.attributes}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Collector]]:
    """A running collector."""
    kept = type("Kept", (Collector,), {"spans": [], "services": set()})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kept) as server:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield kept
        server.shutdown()


def test_a_request_is_a_span_with_its_queue_and_batch(
    collector: type[Collector], serve: Serve, small: Repository
) -> None:
    """The span is in the client's trace; its children lie within it and name the operation."""
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "r-1"}
    with serve(create_app(Settings(tracing=True), small)) as url, httpx.Client(base_url=url) as client:
        client.post("/v1/models/mnist-2d/sample?count=3", headers=headers).raise_for_status()
        assert client.post("/v1/models/mnist-2d/sample?count=0").status_code == 422
        client.get("/v1/models").raise_for_status()
    spans = {span.name: span for span in collector.spans if span.trace_id.hex() == TRACE}
    server = spans["POST /v1/models/{model}/sample"]
    assert collector.services == {"vae-service"}
    assert server.parent_span_id.hex() == PARENT
    assert server.kind == Span.SPAN_KIND_SERVER
    told = attributes(server)
    assert (told["http.route"], told["http.response.status_code"]) == ("/v1/models/{model}/sample", 200)
    assert (told["vae.request_id"], told["vae.model"], told["vae.rows"]) == ("r-1", "mnist-2d", 3)
    queue, batch, inference = spans["queue"], spans["batch"], spans["inference"]
    assert queue.parent_span_id == batch.parent_span_id == server.span_id
    assert inference.parent_span_id == batch.span_id
    assert server.start_time_unix_nano <= queue.start_time_unix_nano <= queue.end_time_unix_nano
    assert queue.end_time_unix_nano == batch.start_time_unix_nano <= inference.start_time_unix_nano
    assert inference.start_time_unix_nano < inference.end_time_unix_nano <= server.end_time_unix_nano
    assert (attributes(batch)["vae.program"], attributes(batch)["vae.rows"]) == ("sample", 3)
    others = {span.name for span in collector.spans} - spans.keys()
    assert others == {"GET /v1/models"}


def test_a_span_names_the_key(collector: type[Collector], serve: Serve, tmp_path: Path) -> None:
    """A span has the API key's name."""
    keys = tmp_path / "keys"
    keys.write_text("alice alice-0123456789abcdef infer\n")
    with serve(create_app(Settings(tracing=True, api_keys=str(keys)), Repository({}, ""))) as url:
        for headers in ({"authorization": "Bearer alice-0123456789abcdef"}, {}):
            httpx.get(f"{url}/v1/models", headers=headers)
    assert sorted(attributes(span).get("vae.key", "") for span in collector.spans) == ["", "alice"]


def test_a_failed_request_is_an_error_in_its_trace(collector: type[Collector], serve: Serve) -> None:
    """A failed request's span has the problem's code."""
    with serve(create_app(Settings(tracing=True), Repository({}, ""))) as url:
        assert httpx.get(f"{url}/health/ready").status_code == 503
    (span,) = collector.spans
    assert span.status.code == Status.STATUS_CODE_ERROR
    assert attributes(span)["http.response.status_code"] == 503


def test_a_collector_that_is_gone_or_hangs_holds_nobody_up(monkeypatch: pytest.MonkeyPatch, small: Repository) -> None:
    """With a dead or hanging collector requests are as fast as before, and the service ends in time."""

    async def scenario() -> float:
        app = create_app(Settings(tracing=True), small)
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x")
        async with client, app.router.lifespan_context(app):
            for _ in range(20):
                started = time.monotonic()
                (await client.post("/v1/sample")).raise_for_status()
                assert time.monotonic() - started < 1
            ending = time.monotonic()
        return time.monotonic() - ending

    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    with socket.create_server(("127.0.0.1", 0)) as mute:  # takes connections, answers nothing
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{mute.getsockname()[1]}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2")
        assert asyncio.run(scenario()) < 10


def test_without_the_extra_its_name_is_told() -> None:
    """Without the OpenTelemetry SDK the start fails with one line that names the extra."""
    absent = "import sys; sys.modules['opentelemetry.sdk.trace'] = None"
    code = f"{absent}; import service.observability.tracing as t; t.tracer_provider()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "StartError: VAE_TRACING needs the extra: pip install '.[tracing]'" in done.stderr
