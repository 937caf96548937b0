"""When the bundle is to be taken anew: on request (SIGHUP), or because its files are others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from engine.manifest import MANIFEST

_LOOK_SECONDS = 1.0


class Reload:
    """Asked in each round of the main loop; requested from anywhere."""

    def __init__(self, bundle: Path, watch: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """`watch`: look at the manifest, which is written last, once a second."""
        self._manifest, self._watch, self._clock = bundle / MANIFEST, watch, clock
        self._requested = threading.Event()
        self._known = self._look()
        self._looked = clock()

    def request(self) -> None:
        """Take it anew in the next round. Safe in a signal handler."""
        self._requested.set()

    def is_due(self) -> bool:
        """Whether to take it anew now, as it is now; true once for each reason."""
        is_requested = self._requested.is_set()
        if is_requested:  # else a request that comes just now would be forgotten
            self._requested.clear()
        elif not self._watch or self._clock() - self._looked < _LOOK_SECONDS:
            return False
        self._looked = self._clock()
        found = self._look()
        # Absent: it is just being written.
        is_changed = found is not None and found != self._known
        self._known = found or self._known
        return is_requested or is_changed

    def _look(self) -> tuple[int, int, int] | None:
        try:
            found = self._manifest.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size
