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
from stream.opening import Opening, Replacement

# How often the start says that it lives, and for how long: a plan takes minutes, and what takes longer than
# this does not come to an end. Whoever watches may end it then.
_LOOK_SECONDS = 0.5
_LONGEST_OPENING_SECONDS = 3600.0


class Stopped(Exception):
    """The service is to stop while it waits for something."""


@dataclass
class Surroundings:
    """`engine` opens the bundle as it is now; `replacement` has the session that is to take over from it;
    `ready` is told where messages are taken from; `grace`: seconds from `stop` to the end."""

    engine: Callable[[], Session]
    counters: Counters
    health: Health
    notifier: Notifier
    stop: threading.Event
    replacement: Replacement
    ready: Callable[[str], None]
    grace: float
    _deadline: float | None = None

    def beat(self) -> None:
        """The main loop goes round, or waits for something that is away and will come back."""
        self.health.beat()
        self.notifier.alive()

    def opened(self) -> Session:
        """The first session. Says meanwhile that the service lives, and starts.

        Raises what opening it raises; Stopped, once there is no time left for it.
        """
        opening = Opening(self.engine)
        while not opening.wait(_LOOK_SECONDS):
            if opening.seconds < _LONGEST_OPENING_SECONDS:
                self.beat()
                self.notifier.starting()
            self.health.set(
                "engine",
                False,
                f"starting: the bundle is opened, for {opening.seconds:.0f} s by now; a plan for a GPU takes "
                "minutes",
            )
            if time.monotonic() > self.deadline - self.grace / 2:
                raise Stopped("while the bundle was being opened")
        session = opening.result()
        self.health.set("engine", True)
        return session

    @property
    def deadline(self) -> float:
        """When all has to have ended, on the clock of `time.monotonic`; never, before it is to stop."""
        if not self.stop.is_set():
            return math.inf
        if self._deadline is None:
            self._deadline = time.monotonic() + self.grace
        return self._deadline
