"""When the bundle is to be taken anew: on request (SIGHUP), or because its files are others."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from engine.errors import OnsetError
from engine.manifest import GRAPH, MANIFEST, NMS

_LOOK_SECONDS = 1.0

log = logging.getLogger(__name__)


class Reload:
    """Asked in each round of the main loop; requested from anywhere."""

    def __init__(self, bundle: Path, watch: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """`watch`: look once a second at the manifest, which is written last; after a bundle was refused, at
        all of its files, since they may have come in another order."""
        self._files = [bundle / name for name in (MANIFEST, GRAPH, NMS)]
        self._watch, self._clock = watch, clock
        self._requested = threading.Event()
        self._known = self._seen = self._look()
        self._is_refused = False
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
        found, seen = self._look(), self._seen
        self._seen = found
        manifest = found[0]
        if self._is_refused:  # a copy under way is another each time
            is_changed = manifest is not None and found == seen and found != self._known
        else:  # absent: it is just being written
            is_changed = manifest is not None and manifest[:-1] != (self._known[0] or ())[:-1]
        if is_requested or is_changed:
            self._known, self._is_refused = found if manifest is not None else self._known, False
        return is_requested or is_changed

    def refused(self, bundle: str, problem: Exception) -> None:
        """It could not be taken, `bundle` goes on: say why; look again once any of its files is another."""
        self._is_refused = True
        if isinstance(problem, OnsetError):
            log.error("the bundle stays %s: %s", bundle, problem)
        else:
            log.error("the bundle stays %s, since taking it anew failed", bundle, exc_info=problem)

    def _look(self) -> tuple[tuple[int, ...] | None, ...]:
        return tuple(_stat(path) for path in self._files)


def _stat(path: Path) -> tuple[int, ...] | None:
    """What tells a file from another, at last when its owner or rights were changed; None where none is."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size, found.st_ctime_ns
