"""Access control: which callers may send which requests, how often, and to which port. ASGI middleware."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Forbidden, NotFound, RateLimited, ServiceError, Unauthenticated, UnknownHost
from service.security.hosts import Hosts
from service.security.keys import CONTROL, INFER, Key, Keyring, Limits, limits_of
from service.security.origins import ORIGIN, SAFE_METHODS, SITE, Origins
from service.security.proxies import Proxies
from service.security.rates import CallCounts
from service.settings import Settings, split

log = logging.getLogger(__name__)

Respond = Callable[[ServiceError, str], ASGIApp]
"""Gives the response for an error in a request for a path."""

OPS = re.compile(r"/health(/.*)?|/metrics")
OPEN = re.compile(r"(/v2)?/health(/.*)?|/page/[0-9a-f]+/[a-z.-]+|(?P<counted>/|/docs(/.*)?|/openapi\.json|/metrics)")
"""Paths that need no key; `counted` are those with a rate limit. Not the files of the page: it asks for all at once."""
OPERATIONS = ("/v1/", "/v2/models/", "/diffusers/")
"""Beginnings of paths that are never open, which saves most requests the pattern above."""
INDEX = "/v2/repository/index"
"""A list that is asked for with POST; any key will do, as for the list of `/v1/models`."""
CONTROLS = re.compile(r".*/(un)?load[\s/]*", re.DOTALL)
"""Paths that need the right `control`. Wider than the routes, so that no spelling of a path evades the check."""
NETWORK_BITS = 64
"""Length of the prefix of an IPv6 address that one client owns; it can choose the other bits freely."""
MAX_QUOTED = 100
EXPOSED = [
    "Dtype", "Inference-Header-Content-Length", "Retry-After", "Server-Timing", "Shape", "WWW-Authenticate",
    "X-Binarisation", "X-Fingerprint", "X-Level", "X-Model", "X-Model-Version", "X-Note", "X-Outputs", "X-Request-Id",
    "X-Seed",
]  # fmt: skip
"""Response headers that scripts of other origins may read."""


def add_access_control(
    app: FastAPI,
    settings: Settings,
    respond: Respond,
    refused: Callable[[str], None],
    shared_folder: Path | None = None,
) -> None:
    """Add the middleware for access control that the settings ask for.

    Args:
        app: Gets the middleware.
        settings: The settings of the service.
        respond: Gives the response for an error.
        refused: Called with the code of every refusal.
        shared_folder: Folder of all workers; None where there is one worker.

    Raises:
        StartError: The keys cannot be read, or the shared folder has no room.
    """
    origins = split(settings.cors_origins)
    app.add_middleware(
        AccessControl,
        respond=respond,
        refused=refused,
        keys=Keyring(Path(settings.api_keys)) if settings.api_keys else None,
        anonymous=limits_of(settings.anonymous_rate, settings.anonymous_concurrency),
        unknown=limits_of(settings.open_rate, 0),
        hosts=Hosts(split(settings.allowed_hosts)),
        origins=Origins(origins),
        proxies=Proxies(settings.trusted_proxies),
        counts=CallCounts(shared_folder),
    )
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"],
            expose_headers=EXPOSED,
        )  # fmt: skip
    if settings.ops_port is not None:
        app.add_middleware(OpsPort, respond=respond, port=settings.ops_port)
    if settings.model_control is True and not settings.api_keys:
        log.warning("VAE_MODEL_CONTROL=true lets nobody in without VAE_API_KEYS; set those, or `anonymous`")


class AccessControl:
    """ASGI middleware that checks API keys, Host and Origin headers, and rate limits before a request is read.

    Args:
        app: Handles the requests that pass.
        respond: Gives the response for an error.
        refused: Called with the code of every refusal.
        keys: None where no API keys are needed.
        anonymous: Limits of each client address, where there are no keys.
        unknown: Limits of each client address without a known key, for open paths and for refused keys.
        hosts: Host names that are answered.
        origins: Origins whose pages may send requests.
        proxies: Trusted proxies.
        counts: Counts of calls, shared with the other workers.
    """

    def __init__(
        self,
        app: ASGIApp,
        respond: Respond,
        refused: Callable[[str], None],
        keys: Keyring | None = None,
        anonymous: Limits = Limits(),  # noqa: B008  # a tuple
        unknown: Limits = Limits(),  # noqa: B008  # a tuple
        hosts: Hosts | None = None,
        origins: Origins | None = None,
        proxies: Proxies | None = None,
        counts: CallCounts | None = None,
    ) -> None:
        self._app = app
        self._respond = respond
        self._refused = refused
        self._keys = keys
        self._anonymous = anonymous if anonymous != Limits() else None
        self._unknown = unknown
        self._hosts = hosts or Hosts()
        self._origins = origins or Origins()
        self._proxies = proxies or Proxies()
        self._counts = counts or CallCounts()

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Handle one request, or the lifespan of the application. Not a coroutine itself, which saves time."""
        if scope["type"] != "http":
            return self._live(scope, receive, send)
        try:
            caller = self._admit(scope)
        except ServiceError as error:
            self._refused(error.code)
            return self._respond(error, route_path(scope))(scope, receive, send)
        if caller is None:
            return self._app(scope, receive, send)
        return self._run(caller, scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reread the file of keys for as long as the application runs, even without requests."""
        watch = asyncio.create_task(self._keys.watch()) if self._keys else None
        try:
            await self._app(scope, receive, send)
        finally:
            if watch:
                watch.cancel()
            self._counts.close()

    async def _run(self, caller: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request and count it as running meanwhile."""
        self._counts.begin(caller)
        try:
            await self._app(scope, receive, send)
        finally:
            self._counts.end(caller)

    def _admit(self, scope: Scope) -> str | None:
        """Check a request.

        Returns:
            The caller, where the number of its running calls is limited; else None.

        Raises:
            CrossSite: A page of another origin sent it.
            Unauthenticated: It has no known API key.
            Forbidden: Its API key lacks a right.
            UnknownHost: Its Host header names another service.
            RateLimited: The caller is above a limit.
        """
        headers = dict(scope["headers"])
        if (ORIGIN in headers or SITE in headers) and scope["method"] not in SAFE_METHODS:
            self._origins.check(scope, headers, self._proxies)
        path = route_path(scope) if scope.get("root_path") else scope["path"]
        found = None if path.startswith(OPERATIONS) else OPEN.fullmatch(path)
        if self._keys is not None:
            token = _token(scope)
            key = self._keys.find(token) if token else None
            if key is not None:
                scope["key"], scope["rights"] = key.name, key.rights
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
            self._count(f"the address {address_of(scope)}, asking for pages or metrics,", self._unknown)
        return None

    def _admit_key(self, key: Key, needed: str | None) -> str | None:
        """Check the rights and limits of a key; as `_admit`."""
        if needed and needed not in key.rights:
            raise Forbidden(f"this needs the right `{needed}`, which the API key {key.name} does not have")
        return self._count(f"the API key {key.name}", key.limits)

    def _check_host(self, host: bytes, scope: Scope) -> None:
        """Allow any host from a trusted proxy, and the address that the server listens on.

        Raises: UnknownHost.
        """
        quoted = host.decode("latin-1")[:MAX_QUOTED]
        if self._proxies.sent(scope) or quoted == (scope.get("server") or ("",))[0]:
            return
        key = "send an API key, or " if self._keys else ""
        raise UnknownHost(
            f"this service does not answer to the name {quoted}; {key}add the name to VAE_ALLOWED_HOSTS, or the "
            "address of the proxy in front to VAE_TRUSTED_PROXIES"
        )

    def _count(self, caller: str, limits: Limits) -> str | None:
        """Count a call. Returns the caller where the number of its running calls is limited.

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
    """ASGI middleware that answers health and metrics on a port of their own, and everything else on the others."""

    def __init__(self, app: ASGIApp, respond: Respond, port: int) -> None:
        self._app = app
        self._respond = respond
        self._port = port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request by the port that it came to."""
        if scope["type"] == "http" and (scope["server"][1] == self._port) != bool(OPS.fullmatch(route_path(scope))):
            error = NotFound(f"nothing is at {scope['path']} on this port")
            await self._respond(error, route_path(scope))(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def route_path(scope: Scope) -> str:
    """Return the path that routes match: without the prefix under which a proxy serves the service."""
    path: str = scope["path"]
    prefix = scope.get("root_path")
    return path[len(prefix) :] if prefix and path.startswith(f"{prefix}/") else path


def needed_right(method: str, path: str) -> str | None:
    """Return the right that a call needs; None where any key will do."""
    if method in ("GET", "HEAD") or path == INDEX:
        return None
    return INFER if method == "POST" and not CONTROLS.fullmatch(path) else CONTROL


def address_of(scope: Scope) -> str:
    """Return the client's address by which calls are counted: of IPv6 the network, which is what one client owns."""
    host = (scope.get("client") or ("unknown",))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return host
    return str(address.ipv4_mapped or ipaddress.ip_network((address, NETWORK_BITS), strict=False))


def _token(scope: Scope) -> bytes:
    """Return the bearer token; empty where there is none, or more than one."""
    found = [value for name, value in scope["headers"] if name == b"authorization"]
    scheme, _, token = found[0].partition(b" ") if len(found) == 1 else (b"", b"", b"")
    return token.strip() if scheme.lower() == b"bearer" else b""
