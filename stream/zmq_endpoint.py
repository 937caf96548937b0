"""Endpoints as URIs: `pull+bind:tcp://127.0.0.1:5555` says what socket, who waits for whom, and where."""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.errors import ConfigError

_URI = re.compile(r"(?:(?P<kind>[a-z]+)\+(?P<way>[a-z]+):)?(?P<address>(?P<transport>tcp|ipc)://\S+)")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a socket is, and whether it binds there or connects to it."""

    address: str
    bind: bool


def parse_endpoint(uri: str, kind: str, bind: bool) -> Endpoint:
    """Read `[KIND+bind:|KIND+connect:](tcp|ipc)://...`; a plain address binds if `bind`.

    Raises ConfigError for anything else, or another kind of socket than `kind`.
    """
    match = _URI.fullmatch(uri.strip())
    if match is None or match["kind"] not in (None, kind) or match["way"] not in (None, "bind", "connect"):
        raise ConfigError(
            f"endpoint {uri!r}: expected {kind}+bind:ADDRESS, {kind}+connect:ADDRESS or a plain ADDRESS "
            "like tcp://127.0.0.1:5555 or ipc:///run/onset.sock"
        )
    return Endpoint(match["address"], bind if match["way"] is None else match["way"] == "bind")
