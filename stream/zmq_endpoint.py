"""Endpoints as URIs: `pull+bind:tcp://127.0.0.1:5555` says what socket, who waits for whom, and where."""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.errors import ConfigError

_URI = re.compile(r"(?:(?P<kind>[a-z]+)\+(?P<way>[a-z]+):)?(?P<address>tcp://\S+:(?:\d{1,5}|\*)|ipc://\S+)")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a socket is, whether it binds there or connects to it, and of which kind it is."""

    address: str
    bind: bool
    kind: str


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
    return Endpoint(match["address"], bind, match["kind"] or kinds[0])
