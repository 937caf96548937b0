"""A clock for the silence of others: it goes on only while somebody listens.

A stream is silent when nothing of it had arrived, not when a service did not look: one that stood still (a
sink that blocked, a slow swap, a stopped process, a machine that slept) finds what came meanwhile only after
it, and producers that were kept waiting come later still. So time counts from one moment at which all that
had arrived was taken to the next one, and a pause between two such moments counts for `longest` at most. No
wall clock has a part in it. No I/O here.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class ListeningClock:
    """Seconds of listening since it was made. `clock`: one that never goes back."""

    def __init__(self, longest: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`longest`: what may lie between two moments without being a pause, seconds."""
        self._longest, self._clock = longest, clock
        self._listened = 0.0
        self._caught_up_at = clock()

    def __call__(self) -> float:
        return self._listened

    def caught_up(self) -> float:
        """All that had arrived has been taken; returns for how long this had been listened for."""
        now = self._clock()
        seconds = min(max(0.0, now - self._caught_up_at), self._longest)
        self._caught_up_at = now
        self._listened += seconds
        return seconds
