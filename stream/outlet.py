"""A sink's own queue and thread: whatever befalls the sink, the main loop and the other sinks go on.

Events leave in order. A sink that fails is tried again every second with what it did not take, and what
comes meanwhile waits in the queue; what a full queue cannot hold is lost or waited for, as the sink is told
to. That it fails, that it takes events again and how many it missed is in the log, in counters, in `trouble`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from engine.errors import OnsetError
from stream.counters import Counters
from stream.events import Event
from stream.throttle import Throttle

log = logging.getLogger(__name__)

# Of one write: a spool makes one transaction of it.
_BATCH = 64
_RETRY_SECONDS = 1.0
# A sink that has not taken what it was given for so long is in trouble.
_SLOW_SECONDS = 5.0
# Of what is left for closing, what `writer.close` may have; the rest is for writing.
_CLOSING_PART = 0.5
# What hanging up takes beyond the time that `writer.close` is given.
_HANG_UP_SECONDS = 2.5


class SinkGone(OnsetError):
    """Nothing will ever be taken again."""


class Writer(Protocol):
    """What an outlet writes to; all of it is called in the outlet's thread, but `trouble`."""

    @property
    def trouble(self) -> str | None:
        """What is wrong, beside what it raises."""
        ...

    @property
    def unwritten(self) -> int:
        """How many events of the batch that failed were not taken."""
        ...

    def write(self, events: Sequence[Event]) -> None:
        """Take a batch, the same again after it has raised OnsetError."""
        ...

    def close(self, timeout: float) -> None:
        """Nothing more comes; may take so many seconds."""
        ...


class Outlet:
    """One sink. `put` and `close` belong to one thread."""

    def __init__(
        self,
        name: str,
        make: Callable[[Callable[[], bool]], Writer],
        counters: Counters,
        limit: int,
        drop_oldest: bool,
        stop_on_error: bool = False,
    ) -> None:
        """`make`: the writer, given what to ask whether to go on waiting; `limit`: events that may wait.

        Raises what `make` raises.
        """
        self.name, self._limit, self._drop_oldest = name, limit, drop_oldest
        self._stop_on_error = stop_on_error
        self._counters, self._throttle = counters, Throttle(log)
        self._lock = threading.Condition()
        self._queue: deque[Event] = deque()
        self._in_flight = 0
        self._since: float | None = None  # when what is in flight was first given
        self._why: str | None = None  # it fails, and why
        self._missed = 0  # events lost since it began to fail
        self._is_gone = False
        self._closing = threading.Event()
        self._write_until = self._close_until = float("inf")
        self._writer = make(self._has_patience)
        self._thread = threading.Thread(target=self._run, name=f"sink {name}", daemon=True)
        self._thread.start()

    def put(self, events: Sequence[Event], timeout: float) -> bool:
        """Take `events`, in order; False: there was no room for them within `timeout` seconds."""
        with self._lock:
            if not self._has_room(len(events)):
                if not self._drop_oldest:
                    if not self._lock.wait_for(lambda: self._has_room(len(events)), timeout):
                        return False
                else:
                    excess = min(len(self._queue), len(self._queue) + len(events) - self._limit)
                    for _ in range(excess):
                        self._queue.popleft()
                    self._lose(excess)
            if self._is_gone:  # by now: it may have gone while it was waited for
                self._lose(len(events))
                return True
            self._queue.extend(events)
            self._lock.notify_all()
        return True

    def lose(self, events: Sequence[Event]) -> None:
        """These are not waited for any longer."""
        with self._lock:
            self._lose(len(events))

    @property
    def is_gone(self) -> bool:
        """Nothing will ever be taken again."""
        return self._is_gone

    @property
    def failure(self) -> str | None:
        """Why the service is to end, where this sink's errors are to end it."""
        return self._why if self._stop_on_error else None

    @property
    def trouble(self) -> str | None:
        """What is wrong with it, in a sentence."""
        since, why = self._since, self._why or self._writer.trouble
        if why is not None:
            return why
        if since is not None and (seconds := time.monotonic() - since) > _SLOW_SECONDS:
            return f"{self.name} has taken nothing for {seconds:.0f} s; {len(self._queue)} events wait"
        return None

    def finish(self, deadline: float) -> None:
        """Nothing more comes; the rest has to have left at `deadline` (of `time.monotonic`)."""
        left = max(0.0, deadline - time.monotonic())
        self._close_until, self._write_until = deadline, deadline - left * _CLOSING_PART
        with self._lock:
            self._closing.set()
            self._lock.notify_all()

    def join(self) -> None:
        """Until what was told to `finish` has, or its deadline."""
        self._thread.join(max(0.0, self._close_until - time.monotonic()))
        if self._thread.is_alive():
            with self._lock:
                lost = len(self._queue) + self._in_flight
                self._lose(lost)
            log.error("%s: did not end in time; %d events are lost", self.name, lost)

    def _has_room(self, count: int) -> bool:
        return self._is_gone or not self._queue or len(self._queue) + count <= self._limit

    def _has_patience(self) -> bool:
        return not self._closing.is_set() or time.monotonic() < self._write_until

    def _run(self) -> None:
        while (batch := self._next()) and self._deliver(batch):
            pass
        self._writer.close(max(0.0, self._close_until - _HANG_UP_SECONDS - time.monotonic()))

    def _next(self) -> list[Event]:
        """What is next in line; nothing, once nothing more comes."""
        with self._lock:
            self._in_flight, self._since = 0, None
            self._lock.notify_all()
            self._lock.wait_for(lambda: self._queue or self._closing.is_set())
            batch = [self._queue.popleft() for _ in range(min(_BATCH, len(self._queue)))]
            self._in_flight, self._since = len(batch), time.monotonic()
        return batch

    def _deliver(self, batch: Sequence[Event]) -> bool:
        """Until the batch was taken; False: nothing more will be."""
        while True:
            try:
                self._writer.write(batch)
            except Exception as problem:  # noqa: PERF203
                if not isinstance(problem, OnsetError):
                    log.exception("%s", self.name)
                self._fail(problem)
                if isinstance(problem, SinkGone) or self._closing.is_set():
                    self._end(self._writer.unwritten)
                    return False
                self._closing.wait(_RETRY_SECONDS)
            else:
                self._recover()
                return True

    def _fail(self, problem: Exception) -> None:
        self._counters.sink_errors.labels(self.name).inc()
        if self._why is None:
            log.error("%s; the other sinks go on", problem)
            with self._lock:
                self._missed = 0
        self._why = str(problem)

    def _recover(self) -> None:
        if self._why is not None:
            with self._lock:
                missed, self._missed = self._missed, 0
            log.warning("%s takes events again; %d were lost meanwhile", self.name, missed)
            self._why = None

    def _end(self, unwritten: int) -> None:
        with self._lock:
            self._is_gone = True
            lost = unwritten + len(self._queue)
            self._lose(lost)
            self._queue.clear()
            self._in_flight, self._since = 0, None
            self._lock.notify_all()
        log.error("%s takes no events any more; %d that waited are lost", self.name, lost)

    def _lose(self, count: int) -> None:
        if count:
            self._missed += count
            self._counters.sink_events_lost.labels(self.name).inc(count)
            self._throttle.warning("events lost", f"{self.name}: {self._why or 'it is too slow'}")
