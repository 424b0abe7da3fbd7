"""Accepted origins of web pages: protection against cross-site requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from starlette.types import Scope

from service.errors import CrossSite
from service.security.proxies import Proxies

ORIGIN = b"origin"
SITE = b"sec-fetch-site"
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
OWN_SITES = (None, b"same-origin", b"none")
"""Values of Sec-Fetch-Site for a page of this service, or for no page. A same-site page has another origin."""
PORTS = {"http": ":80", "https": ":443"}
"""Default ports, which browsers omit."""
MAX_QUOTED = 100


class Origins:
    """Accepted origins: the service's own, and further ones.

    Args:
        named: Further origins, such as `https://app.example`; `*` is every origin.
    """

    def __init__(self, named: Iterable[str] = ()) -> None:
        self._named = {name.encode() for name in named}
        self._any = b"*" in self._named

    def check(self, scope: Scope, headers: Mapping[bytes, bytes], proxies: Proxies) -> None:
        """Refuse a request from a page of another origin. Programs other than browsers send neither header, and pass.

        Args:
            scope: The request.
            headers: Its headers.
            proxies: Trusted proxies, whose X-Forwarded-Host is believed.

        Raises:
            CrossSite: The page has another origin.
        """
        site, origin = headers.get(SITE), headers.get(ORIGIN)
        if self._any or origin in self._named:
            return
        if site in OWN_SITES and (origin is None or origin.lower() in _own(scope, headers, proxies)):
            return
        page = f"a page of {origin.decode('latin-1')[:MAX_QUOTED]}" if origin else "a page of another site"
        raise CrossSite(
            f"{page} sent this {scope['method']}; to allow it, name the page's origin in VAE_CORS_ORIGINS, or the "
            "proxy that changed Host or the scheme in VAE_TRUSTED_PROXIES"
        )


def _own(scope: Scope, headers: Mapping[bytes, bytes], proxies: Proxies) -> set[bytes]:
    """Return the origins under which the client addressed the service; several if a proxy names more."""
    hosts = [headers.get(b"host", b"")]
    if proxies.sent(scope):
        hosts += headers.get(b"x-forwarded-host", b"").split(b",")
    scheme = scope["scheme"]
    port = PORTS.get(scheme, "").encode()
    return {f"{scheme}://".encode() + host.strip().lower().removesuffix(port) for host in hosts if host.strip()}
