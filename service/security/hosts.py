"""Which names the service answers to: the protection against DNS rebinding.

A web page can make its own name mean this machine's address. Its requests then count as same-origin in the browser, and
only their Host header tells: it holds the page's name.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
from collections.abc import Iterable
from functools import cache, lru_cache

HOST = re.compile(rb"(?:\[([0-9A-Fa-f:.]+)\]|([\w.-]+?)\.?)(?::\d*)?")
"""An IPv6 address in brackets or a name, without the dot that may end it; then perhaps a port."""
REMEMBERED = 1024


class Hosts:
    """Loopback names, IP addresses, the machine's own name, and the names that are allowed besides."""

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        """allowed: `vae.example`, `*.example` for every name below it, `*` for every name."""
        names = {name.lower() for name in allowed}
        self._any = "*" in names
        self._suffixes = (".localhost", *(name[1:] for name in names if name.startswith("*.")))
        own = socket.gethostname().lower().rstrip(".")
        self._names = names | {"localhost", own, own.split(".")[0]}
        self.allow = lru_cache(REMEMBERED)(self._allow)
        # In a thread, because a name server that does not answer would hold up the start.
        threading.Thread(target=lambda: self._add_full_name(own, _full_name()), daemon=True).start()

    def _allow(self, host: bytes) -> bool:
        """Whether the value of a Host header is one of the names."""
        found = HOST.fullmatch(host)
        if self._any or not found:
            return self._any
        if found[1] is not None:
            return _is_address(found[1].decode())
        name = found[2].decode().lower()
        return name in self._names or name.endswith(self._suffixes) or _is_address(name)

    def _add_full_name(self, own: str, full: str) -> None:
        """Add the machine's name with its domain.

        It must begin with the machine's name: the network that the machine is in chooses the rest.
        """
        if full.startswith(f"{own}."):
            self._names |= {full}
            self.allow.cache_clear()


@cache
def _full_name() -> str:
    return socket.getfqdn().lower().rstrip(".")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
