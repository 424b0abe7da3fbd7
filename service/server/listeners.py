"""What the service listens on: ports and a unix socket, bound once by the supervisor and inherited by its workers."""

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
"""Of the unix socket: its user and its group may connect."""


class UnixFile(NamedTuple):
    """The file of a unix socket: bound as `draft`, called `path` once it can be connected to."""

    draft: Path
    path: Path

    def publish(self) -> None:
        """Give it its name, in place of a socket that nobody listens on.

        Raises: OSError.
        """
        try:
            self.path.hardlink_to(self.draft)
        except FileExistsError:
            _check_free(self.path)
            self.path.unlink(missing_ok=True)
            self.path.hardlink_to(self.draft)

    def remove(self) -> None:
        """Remove both names, but not the socket of another process that has taken the place."""
        with suppress(OSError):
            if self.path.samefile(self.draft):
                self.path.unlink()
        with suppress(OSError):
            self.draft.unlink()


@dataclass(frozen=True)
class Listener:
    """A bound socket. Nobody can connect before `listen`.

    name: as messages call it. url: what a person can type; empty for a unix socket. file: of the unix socket.
    """

    socket: socket.socket
    name: str
    url: str = ""
    file: UnixFile | None = None

    def listen(self) -> None:
        """Let callers connect.

        Raises: StartError where another process does so already.
        """
        try:
            self.socket.listen(BACKLOG)
            if self.file is not None:
                self.file.publish()
        except OSError as error:
            raise cannot_listen(self.name, error) from error

    def remove(self) -> None:
        """Close it; the file of a unix socket goes too."""
        if self.file is not None:
            self.file.remove()
        self.socket.close()


def bind(settings: Settings) -> list[Listener]:
    """The main listener first: the unix socket where one is set, else the port; then others.

    Raises: StartError.
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
    """`host:port`, an IPv6 address in brackets."""
    return f"[{host.replace('%', '%25')}]:{port}" if ":" in host else f"{host}:{port}"


def cannot_listen(name: str, error: Exception) -> StartError:
    """In one line."""
    said = getattr(error, "strerror", None) or str(error)
    return StartError(f"cannot listen on {name} ({said}); set VAE_PORT, VAE_OPS_PORT, VAE_HOST or VAE_UNIX_SOCKET")


def _bind_port(settings: Settings, port: int) -> Listener:
    """A port, taken before the models are opened, so that a taken one is told at once."""
    listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, port))
    except (OSError, UnicodeError) as error:  # a name may be none that DNS could have
        listener.close()
        raise cannot_listen(address(settings.host, port), error) from error
    host, port = listener.getsockname()[:2]
    shown = address({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)  # noqa: S104  # compared
    return Listener(listener, address(host, port), f"{'https' if settings.tls_certificate else 'http'}://{shown}")


def _bind_unix(path: Path) -> Listener:
    """A unix socket under a name of this process, until it can be connected to."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    listener = socket.socket(socket.AF_UNIX)
    try:
        _check_free(path)
        draft.unlink(missing_ok=True)  # of a process that had this number before
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
    """Raises: OSError where somebody listens there, or something else than a socket has that name."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(0, "there is a file of that name that is no socket")
    with socket.socket(socket.AF_UNIX) as caller:
        try:
            caller.connect(str(path))
        except ConnectionRefusedError:
            return  # left by a process that was killed
    raise FileExistsError(0, "another process listens there")
