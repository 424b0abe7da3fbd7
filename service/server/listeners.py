"""Listening sockets: ports and a unix socket, bound once by the supervisor and inherited by its workers."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from service.errors import StartError
from service.settings import Settings

BACKLOG = 2048
UNIX_MODE = 0o660
"""Mode of the unix socket: its user and its group may connect."""


class UnixFile(NamedTuple):
    """The file of a unix socket: bound as `draft`, linked to `path` once it accepts connections."""

    draft: Path
    path: Path

    def publish(self) -> None:
        """Link `path` to the socket, in place of an unused one.

        Raises:
            OSError: Another process listens there, or the folder cannot be written.
        """
        try:
            self.path.hardlink_to(self.draft)
        except FileExistsError:
            _check_free(self.path)
            self.path.unlink(missing_ok=True)
            self.path.hardlink_to(self.draft)

    def remove(self) -> None:
        """Remove both names, unless `path` is by now the socket of another process."""
        with suppress(OSError):
            if self.path.samefile(self.draft):
                self.path.unlink()
        with suppress(OSError):
            self.draft.unlink()


@dataclass(frozen=True)
class Listener:
    """A bound socket. It accepts connections after `listen`.

    Attributes:
        socket: The socket.
        name: Its name in messages.
        url: Its URL; empty for a unix socket.
        file: The file of a unix socket.
    """

    socket: socket.socket
    name: str
    url: str = ""
    file: UnixFile | None = None

    def listen(self) -> None:
        """Accept connections.

        Raises:
            StartError: Another process listens there.
        """
        try:
            self.socket.listen(BACKLOG)
            if self.file is not None:
                self.file.publish()
        except OSError as error:
            raise cannot_listen(self.name, error) from error

    def remove(self) -> None:
        """Close the socket and remove its file."""
        if self.file is not None:
            self.file.remove()
        self.socket.close()


def bind(settings: Settings) -> list[Listener]:
    """Bind the sockets of the settings.

    Returns:
        The main listener first: the unix socket where one is set, else the port. Then the others.

    Raises:
        StartError: An address cannot be bound.
    """
    listeners: list[Listener] = []
    try:
        if settings.unix_socket:
            listeners.append(_bind_unix(Path(settings.unix_socket)))
        if settings.binds_port:
            listeners.append(_bind_port(settings, settings.port))
        if settings.ops_port is not None:
            listeners.append(_bind_port(settings, settings.ops_port))
    except BaseException:
        for listener in listeners:
            listener.remove()
        raise
    return listeners


def address(host: str, port: int) -> str:
    """Return `host:port`, with an IPv6 address in brackets."""
    return f"[{host.replace('%', '%25')}]:{port}" if ":" in host else f"{host}:{port}"


def cannot_listen(name: str, error: Exception) -> StartError:
    """Return the error for an address that cannot be bound, in one line."""
    reason = getattr(error, "strerror", None) or str(error)
    return StartError(f"cannot listen on {name} ({reason}); set VAE_PORT, VAE_OPS_PORT, VAE_HOST or VAE_UNIX_SOCKET")


def _bind_port(settings: Settings, port: int) -> Listener:
    """Bind a port. This comes before the models are opened, so that a port in use is reported at once."""
    listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, port))
    except (OSError, UnicodeError) as error:  # UnicodeError: the host is not a valid DNS name
        listener.close()
        raise cannot_listen(address(settings.host, port), error) from error
    host, port = listener.getsockname()[:2]
    shown = address({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)  # noqa: S104  # compared
    return Listener(listener, address(host, port), f"{'https' if settings.tls_certificate else 'http'}://{shown}")


def _bind_unix(path: Path) -> Listener:
    """Bind a unix socket under a temporary name."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    listener = socket.socket(socket.AF_UNIX)
    try:
        _check_free(path)
        draft.unlink(missing_ok=True)  # left by a process that had the same id
        before = os.umask(0o777 & ~UNIX_MODE)
        try:
            listener.bind(str(draft))
        finally:
            os.umask(before)
    except OSError as error:
        listener.close()
        raise cannot_listen(str(path), error) from error
    return Listener(listener, str(path), file=UnixFile(draft, path))


def _check_free(path: Path) -> None:
    """Raise OSError if a process listens on the path, or if it is not a socket."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(0, "the path exists and is not a socket")
    with socket.socket(socket.AF_UNIX) as caller:
        try:
            caller.connect(str(path))
        except ConnectionRefusedError:
            return  # left by a process that was killed
    raise FileExistsError(0, "another process listens there")
