"""The metrics as text, rendered for all who ask together.

Rendering holds the interpreter's lock, which the main loop needs, too: it is done at most once a second, and
where it takes long (many classes), for at most a twentieth of the time. Knows no HTTP.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

_SECONDS = 1.0
# A rendering that took so long is good for so many times as long.
_SHARE = 20
_OPENMETRICS = "application/openmetrics-text"
_PREFERENCES = {False: "", True: f"{_OPENMETRICS}; version=1.0.0"}


class Exposition:
    """What a registry held, not longer ago than a second, in the format that is asked for.

    There are two formats, Prometheus' text and OpenMetrics, whatever else a client asks for.
    """

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry, self._clock = registry, clock
        self._kept: dict[bool, tuple[float, str, bytes]] = {}

    def text(self, accept: str) -> tuple[str, bytes]:
        """(content type, body) for an `Accept` header."""
        wanted = _prefers_openmetrics(accept)
        until, kind, body = self._kept.get(wanted, (float("-inf"), "", b""))
        began = self._clock()
        if began >= until:
            encode, kind = choose_encoder(_PREFERENCES[wanted])
            body = encode(self._registry)
            ended = self._clock()
            self._kept[wanted] = ended + max(_SECONDS, _SHARE * (ended - began)), kind, body
        return kind, body


def _prefers_openmetrics(accept: str) -> bool:
    # A version that is no number ends in a TypeError or ValueError there: read as no preference.
    with contextlib.suppress(TypeError, ValueError):
        return choose_encoder(accept)[1].startswith(_OPENMETRICS)
    return False
