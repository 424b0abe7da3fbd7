"""The doors: who may come in, for what, and how often; and which port leads where. ASGI around the application."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api import problems
from service.errors import Forbidden, RateLimited, ServiceError, Unauthenticated, UnknownHost
from service.observability.metrics import SHARED_FOLDER
from service.security.hosts import Hosts
from service.security.keys import CONTROL, INFER, Key, Keyring, Limits, limits_of
from service.security.origins import ORIGIN, SAFE_METHODS, SITE, Origins
from service.security.proxies import Proxies
from service.security.rates import Counts
from service.settings import Settings, split

log = logging.getLogger(__name__)

OPS = re.compile(r"/health(/.*)?|/metrics")
OPEN = re.compile(r"/health(/.*)?|(?P<counted>/docs(/.*)?|/openapi\.json|/metrics)")
"""What needs no key; of that, what is open at a rate only."""
CONTROLS = re.compile(r".*/(un)?load[\s/]*", re.DOTALL)
"""More than the routes match, so that no spelling of a path gets past it."""
NETWORK_BITS = 64
"""Of an IPv6 address, those that are somebody's; the others are the somebody's to choose."""
SHOWN = 100
EXPOSED = [
    "Retry-After", "Server-Timing", "WWW-Authenticate", "X-Binarisation", "X-Fingerprint", "X-Level", "X-Model",
    "X-Model-Version", "X-Note", "X-Outputs", "X-Request-Id", "X-Seed",
]  # fmt: skip
"""Headers of answers that scripts of other origins may read."""


def add_doors(app: FastAPI, settings: Settings, refused: Callable[[str], None]) -> None:
    """Put the doors around the application, as the settings want them.

    refused: told the code of every refusal.
    Raises: StartError for keys that cannot be read, or a shared folder without room.
    """
    origins = split(settings.cors_origins)
    folder = os.environ.get(SHARED_FOLDER) if settings.workers > 1 else None
    app.add_middleware(
        Doors,
        keys=Keyring(Path(settings.api_keys)) if settings.api_keys else None,
        anonymous=limits_of(settings.anonymous_rate, settings.anonymous_concurrency),
        refused=refused,
        unknown=limits_of(settings.open_rate, 0),
        hosts=Hosts(split(settings.allowed_hosts)),
        origins=Origins(origins),
        proxies=Proxies(settings.trusted_proxies),
        counts=Counts(Path(folder) if folder else None),
    )
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"],
            expose_headers=EXPOSED,
        )  # fmt: skip
    if settings.ops_port is not None:
        app.add_middleware(OpsPort, port=settings.ops_port)
    if settings.model_control is True and not settings.api_keys:
        log.warning("VAE_MODEL_CONTROL=true lets nobody in without VAE_API_KEYS; set those, or `anonymous`")


class Doors:
    """Asks for a key where there are keys, refuses web pages of others, and counts calls.

    Whoever is refused has computed and read nothing.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keyring | None,
        anonymous: Limits,
        refused: Callable[[str], None],
        unknown: Limits = Limits(),  # noqa: B008  # a tuple
        hosts: Hosts | None = None,
        origins: Origins | None = None,
        proxies: Proxies | None = None,
        counts: Counts | None = None,
    ) -> None:
        """anonymous: limits of each client address, where there are no keys.

        unknown: limits of each client address without a key, for what is open, and for keys that are not known.
        hosts, origins, proxies, counts: None is what the service has by default.
        """
        self._app = app
        self._keys = keys
        self._anonymous = anonymous if anonymous != Limits() else None
        self._refused = refused
        self._unknown = unknown
        self._hosts = hosts or Hosts()
        self._origins = origins or Origins()
        self._proxies = proxies or Proxies()
        self._counts = counts or Counts()

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """One request, or the application's start and stop. No coroutine of its own, for the sake of speed."""
        if scope["type"] != "http":
            return self._live(scope, receive, send)
        try:
            caller = self._admit(scope)
        except ServiceError as error:
            self._refused(error.code)
            status, _, content, headers = problems.describe(error)
            return Response(content, status, headers, problems.MEDIA_TYPE)(scope, receive, send)
        if caller is None:
            return self._app(scope, receive, send)
        return self._run(caller, scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """From start to stop, keep the keys current, also while nobody calls."""
        watch = asyncio.create_task(self._keys.watch()) if self._keys else None
        try:
            await self._app(scope, receive, send)
        finally:
            if watch:
                watch.cancel()
            self._counts.close()

    async def _run(self, caller: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Count the call for as long as it runs."""
        self._counts.begin(caller)
        try:
            await self._app(scope, receive, send)
        finally:
            self._counts.end(caller)

    def _admit(self, scope: Scope) -> str | None:
        """Who calls, in words, where its running calls are limited.

        Raises: CrossSite, Unauthenticated, Forbidden, UnknownHost, RateLimited.
        """
        headers = dict(scope["headers"])
        if (ORIGIN in headers or SITE in headers) and scope["method"] not in SAFE_METHODS:
            self._origins.check(scope, headers, self._proxies)
        path = route_path(scope) if scope.get("root_path") else scope["path"]
        found = None if path.startswith("/v1/") else OPEN.fullmatch(path)
        if self._keys is not None:
            token = _token(scope)
            key = self._keys.find(token) if token else None
            if key is not None:
                scope["key"] = key.name
                return None if found else self._admit_key(key, needed_right(scope["method"], path))
            if not found:
                self._count(f"the address {address_of(scope)}, without a known API key,", self._unknown)
                given = "the API key is not known" if token else "an API key is needed"
                raise Unauthenticated(f"{given}; send one as `Authorization: Bearer KEY`")
        host = headers.get(b"host")
        if host is not None and not self._hosts.allow(host):
            self._check_host(host, scope)
        if found is None:
            return self._count(f"the address {address_of(scope)}", self._anonymous) if self._anonymous else None
        if found["counted"]:
            self._count(f"the address {address_of(scope)}, asking for documentation or metrics,", self._unknown)
        return None

    def _admit_key(self, key: Key, needed: str | None) -> str | None:
        """Raises: Forbidden, RateLimited."""
        if needed and needed not in key.rights:
            raise Forbidden(f"this needs the right `{needed}`, which the API key {key.name} does not have")
        return self._count(f"the API key {key.name}", key.limits)

    def _check_host(self, host: bytes, scope: Scope) -> None:
        """Let a trusted proxy's be, and the name that the server was told it has.

        Raises: UnknownHost.
        """
        shown = host.decode("latin-1")[:SHOWN]
        if self._proxies.sent(scope) or shown == (scope.get("server") or ("",))[0]:
            return
        key = "send an API key, or " if self._keys else ""
        raise UnknownHost(
            f"this service does not answer to the name {shown}; {key}add the name to VAE_ALLOWED_HOSTS, or the address "
            "of the proxy in front to VAE_TRUSTED_PROXIES"
        )

    def _count(self, caller: str, limits: Limits) -> str | None:
        """Count the call. The caller, where its running calls are limited.

        Raises: RateLimited.
        """
        if limits.concurrency and self._counts.running(caller) >= limits.concurrency:
            raise RateLimited(f"{caller} has {limits.concurrency} calls running, which is its limit", 1.0)
        for rate in limits.rates:
            wait_s = self._counts.hit(rate, caller)
            if wait_s:
                raise RateLimited(f"{caller} is above its limit of {rate}", wait_s)
        return caller if limits.concurrency else None


class OpsPort:
    """Health and metrics on a port of their own, and nothing else there."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app = app
        self._port = port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, by the port that it came to."""
        if scope["type"] == "http" and (scope["server"][1] == self._port) != bool(OPS.fullmatch(route_path(scope))):
            content = problems.problem(404, "not_found", f"nothing is at {scope['path']} on this port")
            await Response(content, 404, media_type=problems.MEDIA_TYPE)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def route_path(scope: Scope) -> str:
    """The path that routes match, which is without the prefix under which a proxy shows the service."""
    path: str = scope["path"]
    prefix = scope.get("root_path")
    return path[len(prefix) :] if prefix and path.startswith(f"{prefix}/") else path


def needed_right(method: str, path: str) -> str | None:
    """The right that a call needs; None is any key's."""
    if method in ("GET", "HEAD"):
        return None
    return INFER if method == "POST" and not CONTROLS.fullmatch(path) else CONTROL


def address_of(scope: Scope) -> str:
    """The client's address, or its network where that is what a client has of IPv6."""
    host = (scope.get("client") or ("unknown",))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return host
    return str(address.ipv4_mapped or ipaddress.ip_network((address, NETWORK_BITS), strict=False))


def _token(scope: Scope) -> bytes:
    """The bearer's token; empty where there is none, or more than one."""
    found = [value for name, value in scope["headers"] if name == b"authorization"]
    scheme, _, token = found[0].partition(b" ") if len(found) == 1 else (b"", b"", b"")
    return token.strip() if scheme.lower() == b"bearer" else b""
