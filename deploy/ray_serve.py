"""The service as a Ray Serve application: `serve run deploy.ray_serve:app`.

Settings are the VAE_ variables of the shell that runs `serve run`; paths in them are those of every node.
"""

from __future__ import annotations

import logging.config
import os
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError
from ray import serve
from ray.serve.config import AutoscalingConfig
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from service.api import problems
from service.app import create_app
from service.errors import Forbidden, NotFound, NotReady, StartError
from service.observability.logs import log_config
from service.observability.request_ids import HEADER
from service.security.proxies import PEER
from service.security.startup_checks import check, is_loopback
from service.server.application import Application
from service.settings import Settings, read_settings

# `serve run` imports this before it starts a cluster of its own, which takes over the environment.
for _line in Path(__file__).with_name("ray.env").read_text().splitlines():
    if _line and not _line.startswith("#"):
        os.environ.setdefault(*_line.split("=", 1))

SERVER_S_OWN = {
    "workers": "replicas take the place of workers: serve run deploy.ray_serve:app max_replicas=4",
    "unix_socket": "Ray Serve listens on a port",
    "ops_port": "/health is on the main port, metrics come from Ray",
    "tls_certificate": "name it in http_options of Serve's configuration file, or end TLS in a proxy in front",
    "tls_key": "name it in http_options of Serve's configuration file, or end TLS in a proxy in front",
    "model_control": "a call would reach one replica of many; set VAE_POLL_S, and every replica finds new versions",
}
"""Settings that have no effect here, each with what to use instead."""
OF_ONE_REPLICA = "/metrics"
"""A path whose answer is about a single replica."""
REPORT_S = 1.0
"""Interval at which proxies report the requests under way."""
STOP_S = 3.0
"""How much longer than drain and longest request a replica may take to stop."""


class Scale(BaseModel):
    """Arguments of `serve run deploy.ray_serve:app`, as in `max_replicas=4 cpus=2`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_replicas: PositiveInt = 1
    max_replicas: PositiveInt = 4
    cpus: PositiveFloat = 1.0
    """CPUs that Ray reserves for a replica. They are its threads too, unless VAE_THREADS says otherwise."""
    ongoing: PositiveFloat = 16.0
    """Requests under way that one replica is to have, on average; with more, replicas are added."""
    most_ongoing: PositiveInt = 256
    """Requests that a proxy sends to one replica before others wait."""
    most_waiting: PositiveInt = 1024
    """Requests that wait in one proxy; further ones get 503."""
    window_s: Annotated[float, Field(gt=REPORT_S)] = 10.0
    """Time over which the requests under way are averaged."""
    upscale_delay_s: NonNegativeFloat = 5.0
    downscale_delay_s: NonNegativeFloat = 300.0


def app(arguments: dict[str, str]) -> serve.Application:
    """Build the application; Ray Serve calls it.

    Args:
        arguments: Fields of `Scale`.

    Raises:
        StartError: An argument or a setting cannot be used.
    """
    try:
        scale = Scale.model_validate(arguments)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise StartError(f"{wrong}; the arguments are {', '.join(Scale.model_fields)}") from None
    settings = usable(read_settings(), scale)
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="vae",
        max_ongoing_requests=scale.most_ongoing,
        max_queued_requests=scale.most_waiting,
        ray_actor_options={"num_cpus": scale.cpus},
        logging_config={"enable_access_log": False},  # VAE_ACCESS_LOG is the service's own
        # A blocked event loop answers no check, so this is VAE_LOOP_LIMIT_S; the third failure ends the replica.
        health_check_period_s=1.0,
        health_check_timeout_s=settings.loop_limit_s,
        graceful_shutdown_wait_loop_s=settings.drain_s,
        graceful_shutdown_timeout_s=settings.drain_s + settings.timeout_s + STOP_S,
        autoscaling_config=AutoscalingConfig(
            min_replicas=scale.min_replicas,
            max_replicas=scale.max_replicas,
            target_ongoing_requests=scale.ongoing,
            metrics_interval_s=REPORT_S,
            look_back_period_s=scale.window_s,
            upscale_delay_s=scale.upscale_delay_s,
            downscale_delay_s=scale.downscale_delay_s,
        ),
    )
    return deployment.bind(settings)


def usable(settings: Settings, scale: Scale) -> Settings:
    """Return the settings of a replica.

    Raises:
        StartError: A setting has no effect under Ray Serve; the message names what has.
    """
    defaults = Settings.model_construct()
    for name, instead in SERVER_S_OWN.items():
        if getattr(settings, name) != getattr(defaults, name):
            raise StartError(f"VAE_{name.upper()} has no effect under Ray Serve: {instead}")
    # Which address Serve listens on is known at a request only, so `Behind` checks it there.
    check(settings.model_copy(update={"host": "127.0.0.1"}))
    return settings.model_copy(update={"threads": settings.threads or max(1, int(scale.cpus))})


class Replica:
    """One replica: the application with models, engine and batches of its own.

    Args:
        settings: The settings of the service.
    """

    def __init__(self, settings: Settings) -> None:
        logging.config.dictConfig(log_config(settings.log_format))
        self._settings = settings
        self._app: Application | None = None

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Open the models and make the application around them.

        Raises:
            StartError: The models cannot be opened.
        """
        self._app = create_app(self._settings)
        return Behind(self._app, self._settings)

    def check_health(self) -> None:
        """Ray calls it, and replaces the replica after three failures in a row.

        Raises:
            NotReady: The engine accepts no more work.
        """
        if self._app is not None and not self._app.state.engine.healthy:
            raise NotReady("the engine has stopped")


class Behind:
    """ASGI middleware of a replica, which differs from a service of its own in what stands in front of it.

    Args:
        app: The application of the service.
        settings: Its settings.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app: ASGIApp = app
        if settings.trusted_proxies:
            self._app = ProxyHeadersMiddleware(app, settings.trusted_proxies)  # type: ignore[arg-type,assignment]
        self._is_open = bool(settings.api_keys) or settings.allow_anonymous

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or the lifespan of the application."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if error := self._refusal(scope):
            await problems.respond(error, scope["path"])(scope, receive, send)
            return
        scope["state"] = {**scope.get("state", {}), PEER: scope["client"]}

        def send_without_id(message: Message) -> object:
            """The proxy adds the id to the answer."""
            if message["type"] == "http.response.start":
                message = {**message, "headers": [pair for pair in message["headers"] if pair[0] != HEADER]}
            return send(message)

        await self._app(scope, receive, send_without_id)  # type: ignore[arg-type]

    def _refusal(self, scope: Scope) -> Forbidden | NotFound | None:
        """Return why this request is not for the application; None if it is."""
        if scope["path"] == OF_ONE_REPLICA:
            return NotFound("each replica has its own metrics; ask Ray for those of Serve")
        if not (self._is_open or is_loopback(scope["server"][0])):
            return Forbidden(
                "this address can be reached from other machines and requires no API key: set VAE_API_KEYS, or "
                "VAE_ALLOW_ANONYMOUS=true to serve every caller"
            )
        return None
