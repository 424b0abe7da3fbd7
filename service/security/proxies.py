"""Trusted proxies: those whose headers about the client are believed."""

from __future__ import annotations

from functools import lru_cache
from ipaddress import ip_address, ip_network

from starlette.types import Scope

from service.settings import split

PEER = "peer"
"""Key in a request's state: (address, port) at the other end of the connection, whatever a proxy says of the client."""


class Proxies:
    """The addresses and networks of VAE_TRUSTED_PROXIES. uvicorn trusts the same ones to name client and scheme."""

    def __init__(self, addresses: str = "") -> None:
        """addresses: addresses or networks, separated by commas; `*` alone is every one."""
        names = split(addresses)
        self._networks = [ip_network(name) for name in names if name != "*"]
        self._any = addresses == "*"
        self._trusts = lru_cache(1024)(self._within)

    def sent(self, scope: Scope) -> bool:
        """Return whether a trusted proxy sent the request."""
        if self._any:
            return True
        peer = scope.get("state", {}).get(PEER) or scope.get("client")
        return peer is not None and self._trusts(peer[0])

    def _within(self, host: str) -> bool:
        try:
            address = ip_address(host)
        except ValueError:  # the peer of a unix socket
            return False
        return any(address in network for network in self._networks)
