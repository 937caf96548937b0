"""What all abusers are: somebody who does the same harm again and again, until told to stop."""

from __future__ import annotations

import contextlib
import random
import threading
from abc import ABC, abstractmethod
from typing import ClassVar

import zmq

from tests.stream.abuse.service import Service


class Abuser(ABC):
    """One kind of abuse, in a thread. `every`: seconds between two changes of what surrounds the service."""

    name: ClassVar[str]
    rest: ClassVar[tuple[float, float]] = (0.1, 1.0)
    """seconds from one act to the next"""

    def __init__(self, service: Service, seed: int, every: float) -> None:
        self.service, self.every = service, every
        self.rng = random.Random(f"{self.name} {seed}")
        self.count = 0
        """acts"""
        self.stop = threading.Event()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=self.name)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """It has ended, and left things as they were."""
        self.stop.set()
        self._thread.join()

    @abstractmethod
    def act(self) -> None:
        """Do it once, within some seconds. OSError and ZMQError are the service's good right."""

    def undo(self) -> None:  # noqa: B027
        """Leave things as they were; called once. Most have nothing to undo."""

    def pause(self) -> float:
        """Seconds until the next act."""
        return self.rng.uniform(*self.rest)

    def _run(self) -> None:
        try:
            while not self.stop.is_set():
                with contextlib.suppress(OSError, zmq.ZMQError):
                    self.act()
                self.count += 1
                self.stop.wait(self.pause())
        except Exception as problem:
            self.failure = problem  # a fault of the abuse itself
        finally:
            self.undo()
