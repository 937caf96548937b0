"""Warnings at a bounded rate: what comes from outside must not be able to fill a disk with log lines."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable


class Throttle:
    """Logs one warning per key every `interval` seconds and says how many it left out.

    Keys come from the program (reasons), never from outside, so that their number is bounded.
    """

    def __init__(
        self, log: logging.Logger, interval: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log, self._interval, self._clock = log, interval, clock
        self._last: dict[str, float] = {}
        self._silent: dict[str, int] = {}

    def warning(self, key: str, message: str) -> None:
        """Log `message`, or count it."""
        now = self._clock()
        last = self._last.get(key)
        if last is not None and now - last < self._interval:
            self._silent[key] = self._silent.get(key, 0) + 1
            return
        self._last[key] = now
        silent = self._silent.pop(key, 0)
        more = f" (and {silent} more like it since the last such line)" if silent else ""
        self._log.warning("%s: %s%s", key, message, more)
