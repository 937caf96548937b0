"""Endpoints as URIs: `pull+bind:tcp://127.0.0.1:5555` says what socket, who waits for whom, and where.

And how a plain socket gets there: `listen`, `resolve`.
"""

from __future__ import annotations

import os
import re
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError

_URI = re.compile(r"(?:(?P<kind>[a-z]+)\+(?P<way>[a-z]+):)?(?P<address>tcp://\S+:(?:\d{1,5}|\*)|ipc://\S+)")
_BACKLOG = 512
_MAX_PATH_BYTES = 107  # of a Unix socket, Linux
Target = tuple[socket.AddressFamily, object]
"""what `socket.connect` takes, and for which kind of socket"""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a socket is, whether it binds there or connects to it, and of which kind it is."""

    address: str
    bind: bool
    kind: str

    @property
    def path(self) -> str | None:
        """The name of a Unix socket; `@` begins one in the abstract namespace. None: it is TCP."""
        return self.address.removeprefix("ipc://") if self.address.startswith("ipc://") else None

    @property
    def host_and_port(self) -> tuple[str, int]:
        """Of TCP: `*` is every interface, and any free port, which is 0."""
        host, _, port = self.address.removeprefix("tcp://").rpartition(":")
        return host.strip("[]"), 0 if port == "*" else int(port)


def parse_endpoint(uri: str, kinds: tuple[str, ...], bind: bool) -> Endpoint:
    """Read `[KIND+bind:|KIND+connect:](tcp|ipc)://...`, KIND one of `kinds`.

    A plain address is of the first kind, and binds if `bind`. Raises ConfigError for anything else.
    """
    match = _URI.fullmatch(uri.strip())
    if match is None or match["kind"] not in (None, *kinds) or match["way"] not in (None, "bind", "connect"):
        known = ", ".join(f"{kind}+bind:ADDRESS, {kind}+connect:ADDRESS" for kind in kinds)
        raise ConfigError(
            f"endpoint {uri!r}: expected {known} or a plain ADDRESS "
            "like tcp://127.0.0.1:5555 or ipc:///run/onset.sock"
        )
    if match["way"] is not None:
        bind = match["way"] == "bind"
    endpoint = Endpoint(match["address"], bind, match["kind"] or kinds[0])
    if (why := _flaw(endpoint)) is not None:
        raise ConfigError(f"endpoint {uri!r}: {why}")
    return endpoint


def _flaw(endpoint: Endpoint) -> str | None:
    """Why no socket can ever get there."""
    if endpoint.path is not None:
        size = len(os.fsencode(endpoint.path))
        if size > _MAX_PATH_BYTES or "\0" in endpoint.path:
            return f"found a path of {size} bytes, expected {_MAX_PATH_BYTES} at most, none of them NUL"
        return None
    host, port = endpoint.host_and_port
    if port > 0xFFFF:
        return f"found the port {port}, expected {0xFFFF} at most"
    if not port and not endpoint.bind:
        return "found no port to connect to; a free one can be had where it is bound only"
    try:
        host.encode("idna")
    except UnicodeError:
        return f"{host!r} is no name of a host"
    return None


def listen(endpoint: Endpoint) -> tuple[socket.socket, str]:
    """A listening socket that does not block, and where it really is. Raises ConfigError."""
    try:
        if endpoint.path is not None:
            return _listen_unix(endpoint.path), endpoint.address
        host, port = endpoint.host_and_port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        where = "0.0.0.0" if host == "*" else host
        listener = socket.create_server((where, port), family=family, backlog=_BACKLOG)
        listener.setblocking(False)
        host, port = listener.getsockname()[:2]
        return listener, f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
    except (OSError, OverflowError) as problem:
        why = getattr(problem, "strerror", None) or problem
        raise ConfigError(
            f"endpoint {endpoint.address!r} cannot be bound: {why}; is another service on this port?"
        ) from None


def resolve(endpoint: Endpoint) -> list[Target]:
    """Where to connect to; asks the name service, which may take its time. Raises OSError."""
    if endpoint.path is not None:
        return [(socket.AF_UNIX, _unix_name(endpoint.path))]
    host, port = endpoint.host_and_port
    found = socket.getaddrinfo("127.0.0.1" if host == "*" else host, port, type=socket.SOCK_STREAM)
    return [(family, address) for family, _, _, _, address in found]


def _listen_unix(path: str) -> socket.socket:
    name = _unix_name(path)
    with suppress(FileNotFoundError):
        # Left by a process that was killed; one that is alive answers.
        if isinstance(name, str) and stat.S_ISSOCK(os.stat(name).st_mode) and not _answers(name):
            Path(name).unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(name)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def _answers(name: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(name) in (0, 11)  # 11, EAGAIN: its backlog is full


def _unix_name(path: str) -> str | bytes:
    return b"\0" + os.fsencode(path[1:]) if path.startswith("@") else path
