"""What a service's main loop is given, whatever its source."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from engine.session import Session
from stream.counters import Counters
from stream.health import Health
from stream.notify import Notifier
from stream.reload import Reload


@dataclass
class Surroundings:
    """`engine` opens the bundle as it is now; `ready` is told where messages are taken from; `grace`: seconds
    from `stop` to the end."""

    engine: Callable[[], Session]
    counters: Counters
    health: Health
    notifier: Notifier
    stop: threading.Event
    reload: Reload
    ready: Callable[[str], None]
    grace: float
    _deadline: float | None = None

    def beat(self) -> None:
        """The main loop goes round, or waits for something that is away and will come back."""
        self.health.beat()
        self.notifier.alive()

    @property
    def deadline(self) -> float:
        """When all has to have ended, on the clock of `time.monotonic`; never, before it is to stop."""
        if not self.stop.is_set():
            return math.inf
        if self._deadline is None:
            self._deadline = time.monotonic() + self.grace
        return self._deadline
