"""Proxies in front of the service, whose word about clients is taken."""

from __future__ import annotations

from typing import Any, cast

from starlette.types import Scope
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

PEER = "peer"
"""In the state of a request: (address, port) at the other end of its connection, whoever a proxy says the client is."""


class Proxies:
    """The addresses and networks of VAE_TRUSTED_PROXIES."""

    def __init__(self, addresses: str = "") -> None:
        """addresses: with commas; `*` is every one."""
        # uvicorn's own, so that both agree on who is trusted.
        self._trusted = ProxyHeadersMiddleware(cast("Any", None), addresses).trusted_hosts if addresses else ()

    def sent(self, scope: Scope) -> bool:
        """Whether one of them sent the request."""
        peer = scope.get("state", {}).get(PEER) or scope.get("client")
        return (peer[0] if peer else None) in self._trusted
