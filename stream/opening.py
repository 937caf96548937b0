"""A bundle is opened in a thread of its own: a plan for a GPU takes minutes, and life goes on meanwhile.

At the start the main loop has nothing else to do, and says that it lives; under way it goes on with the
bundle that it has. A session is made in one thread and used in another, which it allows (see `engine.gpu`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from engine.manifest import Manifest
from engine.session import Session
from stream.reload import Reload

log = logging.getLogger(__name__)


class Opening:
    """One session, on its way."""

    def __init__(self, engine: Callable[[], Session]) -> None:
        self._engine = engine
        self._session: Session | None = None
        self._problem: BaseException | None = None
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="opening", daemon=True)
        self._thread.start()

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.monotonic() - self._began

    def wait(self, timeout: float) -> bool:
        """Whether it is over, after so many seconds at most."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def manifest(self) -> Manifest | None:
        """Of what was opened; None where that failed, or is not over."""
        return None if self._session is None else self._session.manifest

    def result(self) -> Session:
        """The session, once it is over. Raises what opening it raised."""
        if self._problem is not None:
            raise self._problem
        assert self._session is not None
        return self._session

    def _run(self) -> None:
        try:
            self._session = self._engine()
        except BaseException as problem:
            self._problem = problem


class Replacement:
    """The session that is to take over, opened when the bundle is to be taken anew. Belongs to one thread."""

    def __init__(self, engine: Callable[[], Session], reload: Reload) -> None:
        self._engine, self._reload = engine, reload
        self._opening: Opening | None = None

    def request(self) -> None:
        """Take the bundle anew."""
        self._reload.request()

    def refused(self, bundle: str, problem: Exception) -> None:
        """What was taken cannot be used, and `bundle` goes on; see `Reload.refused`."""
        self._reload.refused(bundle, problem)

    def is_there(self, current: Manifest) -> bool:
        """Whether `take` has something to give; to be asked in each round of the main loop.

        A bundle that is what it was, as `current` says, takes over nothing: no stream would be the better
        for it, and their grids and actions would begin anew.
        """
        if self._opening is None and self._reload.is_due():
            self._opening = Opening(self._engine)
        if self._opening is None or not self._opening.wait(0.0):
            return False
        if self._opening.manifest == current:
            log.info("the bundle is what it was, %s: all goes on", current.id)
            self._opening = None
        return self._opening is not None

    def take(self) -> Session:
        """The session; once. Raises what opening it raised."""
        opening, self._opening = self._opening, None
        assert opening is not None
        return opening.result()
