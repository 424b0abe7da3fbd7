"""Accepted host names: protection against DNS rebinding.

The owner of a web page can make the page's name resolve to this machine. The browser then treats requests to this
service as same-origin. Only their Host header, which holds the page's name, gives them away.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
from collections.abc import Iterable
from functools import cache, lru_cache

HOST = re.compile(rb"(?:\[([0-9A-Fa-f:.]+)\]|([\w.-]+?)\.?)(?::\d*)?")
"""An IPv6 address in brackets, or a name without its final dot; then an optional port."""
MAX_CACHED = 1024


class Hosts:
    """Accepted host names: localhost, IP addresses, the machine's own name, and further ones.

    Args:
        allowed: Further names: `vae.example`, `*.example` for every name below it, `*` for every name.
    """

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        names = {name.lower() for name in allowed}
        self._any = "*" in names
        self._suffixes = (".localhost", *(name[1:] for name in names if name.startswith("*.")))
        own = socket.gethostname().lower().rstrip(".")
        self._names = names | {"localhost", own, own.split(".")[0]}
        self.allow = lru_cache(MAX_CACHED)(self._allow)
        # In a thread, because a name server that does not answer would delay the start.
        threading.Thread(target=lambda: self._add_full_name(own, _full_name()), daemon=True).start()

    def _allow(self, host: bytes) -> bool:
        """Return whether the value of a Host header is accepted."""
        found = HOST.fullmatch(host)
        if self._any or not found:
            return self._any
        if found[1] is not None:
            return _is_address(found[1].decode())
        name = found[2].decode().lower()
        return name in self._names or name.endswith(self._suffixes) or _is_address(name)

    def _add_full_name(self, own: str, full: str) -> None:
        """Accept the machine's name with its domain.

        The network chooses the full name, so it counts only if it begins with the machine's own name.
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
