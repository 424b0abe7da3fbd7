"""The doors: who may come in, for what, and how often; and which port leads where. ASGI around the application."""

from __future__ import annotations

import ipaddress
import math
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI, Response
from limits.strategies import SlidingWindowCounterRateLimiter
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from service import problems
from service.config import Settings, split
from service.errors import Forbidden, RateLimited, ServiceError, Unauthenticated
from service.keys import CONTROL, INFER, Keyring, Limits, limits_of
from service.rates import Counts

OPS = re.compile(r"/health(/.*)?|/metrics")
PAGES = {"/docs", "/openapi.json"}
CONTROLS = re.compile(r"/v1/models/.+/(un)?load\s*", re.DOTALL)
"""As the routes match, which let a line's end pass."""
NETWORK_BITS = 64
"""Of an IPv6 address, those that are somebody's; the others are the somebody's to choose."""
EXPOSED = [
    "Retry-After", "Server-Timing", "WWW-Authenticate", "X-Binarisation", "X-Level", "X-Model", "X-Model-Version",
    "X-Note", "X-Outputs", "X-Request-Id", "X-Seed",
]  # fmt: skip
"""Headers of answers that scripts of other origins may read."""


def add_doors(app: FastAPI, settings: Settings, refused: Callable[[str], None]) -> None:
    """Whatever the settings ask for, around the application; nothing where they ask for nothing.

    refused: told the code of every refusal.
    Raises: StartError for keys that cannot be read.
    """
    keys = Keyring(Path(settings.api_keys)) if settings.api_keys else None
    anonymous = limits_of(settings.anonymous_rate, settings.anonymous_concurrency)
    if keys or anonymous != Limits():
        app.add_middleware(Doors, keys=keys, anonymous=anonymous, refused=refused)
    origins = split(settings.cors_origins)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"],
            expose_headers=EXPOSED,
        )  # fmt: skip
    if settings.ops_port is not None:
        app.add_middleware(OpsPort, port=settings.ops_port)


class Doors:
    """Asks for a key where there are keys, and counts calls; whoever is refused has computed and read nothing."""

    def __init__(self, app: ASGIApp, keys: Keyring | None, anonymous: Limits, refused: Callable[[str], None]) -> None:
        """anonymous: limits of each client address, where there are no keys."""
        self._app = app
        self._keys = keys
        self._anonymous = anonymous
        self._refused = refused
        self._rates = SlidingWindowCounterRateLimiter(Counts())
        self._running: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; health, metrics and documentation are open."""
        if scope["type"] != "http" or scope["path"] in PAGES or OPS.fullmatch(scope["path"]):
            await self._app(scope, receive, send)
            return
        try:
            caller, limits = self._caller(scope)
            self._check(caller, limits)
        except ServiceError as error:
            self._refused(error.code)
            status, _, content, headers = problems.describe(error)
            await Response(content, status, headers, problems.MEDIA_TYPE)(scope, receive, send)
            return
        self._running[caller] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running[caller] -= 1
            if not self._running[caller]:
                del self._running[caller]

    def _caller(self, scope: Scope) -> tuple[str, Limits]:
        """Who calls, in words, and how often that one may.

        Raises: Unauthenticated, Forbidden.
        """
        if self._keys is None:
            return f"the address {address_of(scope)}", self._anonymous
        token = _token(scope)
        key = self._keys.find(token) if token else None
        if key is None:
            given = "the API key is not known" if token else "an API key is needed"
            raise Unauthenticated(f"{given}; send one as `Authorization: Bearer KEY`")
        needed = needed_right(scope["method"], scope["path"])
        if needed and needed not in key.rights:
            raise Forbidden(f"this needs the right `{needed}`, which the API key {key.name} does not have")
        return f"the API key {key.name}", key.limits

    def _check(self, caller: str, limits: Limits) -> None:
        """Count the call.

        Raises: RateLimited.
        """
        if limits.concurrency and self._running[caller] >= limits.concurrency:
            raise RateLimited(f"{caller} has {limits.concurrency} calls running, which is its limit", 1.0)
        for rate in limits.rates:
            if not self._rates.hit(rate, caller):
                free = self._rates.get_window_stats(rate, caller).reset_time
                raise RateLimited(f"{caller} is above its limit of {rate}", math.ceil(free - time.time()))


class OpsPort:
    """Health and metrics on a port of their own, and nothing else there."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app = app
        self._port = port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, by the port that it came to."""
        if scope["type"] == "http" and (scope["server"][1] == self._port) != bool(OPS.fullmatch(scope["path"])):
            content = problems.problem(404, "not_found", f"nothing is at {scope['path']} on this port")
            await Response(content, 404, media_type=problems.MEDIA_TYPE)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


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
