"""Which web pages may send requests that change something or compute: the protection against cross-site requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from starlette.types import Scope

from service.errors import CrossSite
from service.security.proxies import Proxies

ORIGIN = b"origin"
SITE = b"sec-fetch-site"
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
OWN_SITES = (None, b"same-origin", b"none")
"""What Sec-Fetch-Site says of a page of this service, or of no page; a same-site page is another origin."""
PORTS = {"http": ":80", "https": ":443"}
"""Which browsers leave out."""
SHOWN = 100


class Origins:
    """The service's own origin, and those that are named besides."""

    def __init__(self, named: Iterable[str] = ()) -> None:
        """named: `https://app.example`; `*` is every one."""
        self._named = {name.encode() for name in named}
        self._any = b"*" in self._named

    def check(self, scope: Scope, headers: Mapping[bytes, bytes], proxies: Proxies) -> None:
        """Refuse what a page of another origin sends. Programs that are no browsers send neither header, and pass.

        headers: those of the scope. proxies: whose X-Forwarded-Host counts.
        Raises: CrossSite.
        """
        site, origin = headers.get(SITE), headers.get(ORIGIN)
        if self._any or origin in self._named:
            return
        if site in OWN_SITES and (origin is None or origin.lower() in _own(scope, headers, proxies)):
            return
        page = f"a page of {origin.decode('latin-1')[:SHOWN]}" if origin else "a page of another site"
        raise CrossSite(
            f"{page} sent this {scope['method']}; to allow it, name the page's origin in VAE_CORS_ORIGINS, or the "
            "proxy that changed Host or the scheme in VAE_TRUSTED_PROXIES"
        )


def _own(scope: Scope, headers: Mapping[bytes, bytes], proxies: Proxies) -> set[bytes]:
    """The origin of the service as the client addressed it; more than one where a proxy says so."""
    hosts = [headers.get(b"host", b"")]
    if proxies.sent(scope):
        hosts += headers.get(b"x-forwarded-host", b"").split(b",")
    scheme = scope["scheme"]
    port = PORTS.get(scheme, "").encode()
    return {f"{scheme}://".encode() + host.strip().lower().removesuffix(port) for host in hosts if host.strip()}
