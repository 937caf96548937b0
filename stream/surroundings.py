"""What a service's main loop is given, whatever its source."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from engine.session import Session
from stream.counters import Counters
from stream.health import Health
from stream.notify import Notifier
from stream.reload import Reload


@dataclass(frozen=True)
class Surroundings:
    """`engine` opens the bundle as it is now; `ready` is told where messages are taken from."""

    engine: Callable[[], Session]
    counters: Counters
    health: Health
    notifier: Notifier
    stop: threading.Event
    reload: Reload
    ready: Callable[[str], None]

    def beat(self) -> None:
        """The main loop goes round, or waits for something that is away and will come back."""
        self.health.beat()
        self.notifier.alive()
