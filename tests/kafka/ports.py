"""Ports of the loopback interface that are free, and stay free while their server is down."""

from __future__ import annotations

import random
import socket

# Below the ports that a kernel gives to outgoing connections: one of those could be taken while a broker is
# down, or a client that tries the port of a dead broker over and over be connected to itself.
LOWEST, HIGHEST = 20_000, 32_000

_given: set[int] = set()
_random = random.SystemRandom()  # not the seeded one: two test runs beside each other would choose alike


def free_port() -> int:
    """A port that nothing listens on, never given twice by this process."""
    while True:
        port = _random.randrange(LOWEST, HIGHEST)
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port
