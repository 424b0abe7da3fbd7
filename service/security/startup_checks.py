"""Checks of the security settings before the service listens."""

from __future__ import annotations

import ipaddress
import ssl
from pathlib import Path

from service.errors import StartError
from service.security.keys import read_keys
from service.settings import Settings


def check(settings: Settings) -> None:
    """Refuse to start without access control on a public address, or with unusable keys or certificates.

    Raises:
        StartError: A check fails; the message names the fix.
    """
    if settings.api_keys:
        read_keys(Path(settings.api_keys))
    elif not (settings.allow_anonymous or is_loopback(settings.host)):
        raise StartError(
            f"{settings.host or 'every address'} can be reached from other machines and requires no API key: name a "
            "file of keys in VAE_API_KEYS, or set VAE_ALLOW_ANONYMOUS=true to serve every caller"
        )
    if settings.tls_key and not settings.tls_certificate:
        raise StartError("VAE_TLS_KEY without a certificate; set VAE_TLS_CERTIFICATE too")
    if settings.tls_certificate:
        _check_certificate(settings.tls_certificate, settings.tls_key)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address. Names other than localhost count as public."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_certificate(certificate: str, key: str) -> None:
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key or None, password="")  # without a password OpenSSL would ask for one
    except (OSError, ValueError) as error:
        raise StartError(f"cannot use VAE_TLS_CERTIFICATE {certificate} and VAE_TLS_KEY {key}: {error}") from error
