"""OpenTelemetry traces: names the span that FastAPI makes of every request, and adds spans for queue and batch.

The SDK and its exporter are the extra `tracing`; the standard variables OTEL_* configure them.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import __version__
from service.errors import StartError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

EXTRA = "pip install '.[tracing]' in the project's folder"
SERVICE_NAME = "vae-service"
"""Name of the service if OTEL_SERVICE_NAME is not set."""
FLUSH_MS = 3000
"""How long the ending service waits for the collector, in milliseconds."""


def tracer_provider() -> TracerProvider:
    """Make a provider that sends spans by OTLP over HTTP from a thread, and drops them if the collector is gone.

    Raises:
        StartError: The extra is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError as error:
        raise StartError(f"VAE_TRACING needs the extra: {EXTRA}") from error
    resource = Resource.create()
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": SERVICE_NAME, "service.version": __version__}))
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def finish(provider: TracerProvider) -> None:
    """Send the remaining spans, without waiting long for the collector."""
    provider.force_flush(FLUSH_MS)
    provider.shutdown()


def traced(submit: Callable[..., Awaitable[Any]], provider: TracerProvider) -> Callable[..., Awaitable[Any]]:
    """Wrap the engine's `submit` so that it adds spans to each request's trace.

    The spans are `queue`, `batch` and, in the batch, `inference`: the time of the model alone.

    Args:
        submit: (program, arrays, ...) -> Trip.
        provider: Makes the spans.
    """
    tracer = provider.get_tracer(__name__, __version__)

    async def submit_traced(program: Any, arrays: Any, **known: Any) -> Any:
        arrived = time.time_ns()
        trip = await submit(program, arrays, **known)
        if trace.get_current_span().is_recording():
            landed, begun = time.time_ns(), arrived + int(trip.queue_s * 1e9)
            tracer.start_span("queue", start_time=arrived).end(begun)
            attributes = {"vae.program": program.operation, "vae.rows": len(arrays[0])}
            batch = tracer.start_span("batch", start_time=begun, attributes=attributes)
            within = trace.set_span_in_context(batch)
            tracer.start_span("inference", within, start_time=landed - int(trip.inference_s * 1e9)).end(landed)
            batch.end(landed)
        return trip

    return submit_traced


class Named:
    """ASGI middleware that names the span of an operation after its route, and adds what was requested."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or the lifespan of the application."""

        def naming(message: Message) -> Any:
            if message["type"] == "http.response.start":
                _describe(trace.get_current_span(), scope)
            return send(message)

        await self.app(scope, receive, naming)


def _describe(span: trace.Span, scope: Scope) -> None:
    span.set_attribute("vae.request_id", scope["request_id"].decode())
    if "key" in scope:
        span.set_attribute("vae.key", scope["key"])
    served = scope.get("served")
    if served is not None:
        span.set_attributes({f"vae.{name}": value for name, value in served.items()})
        named = "".join(f"/{name}s/{{{name}}}" for name in scope["path_params"])
        route = f"/v1{named}/{served['operation']}"
        span.set_attribute("http.route", route)
        span.update_name(f"POST {route}")
