"""What signals ask of a service: SIGTERM and SIGINT its end, SIGHUP that it takes its bundle anew.

A handler may interrupt whatever the main thread is doing, also while that holds a lock: so it takes none, and
hands the signal to a thread over a queue that is made for it (`SimpleQueue.put` may interrupt itself).
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from types import FrameType

from stream.reload import Reload

log = logging.getLogger(__name__)

# Beyond `grace`, for what cannot be bounded from within.
_MARGIN_SECONDS = 5.0
_ENDING = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stopped_by_signals(reload: Reload, grace: float) -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set; SIGHUP asks `reload`.

    A second SIGTERM or SIGINT does what it did before: it kills. So does this, where all is not over `grace`
    seconds and some after the first: every wait is bounded, but who would know that of every library.
    """
    stop = threading.Event()
    came: SimpleQueue[int | None] = SimpleQueue()
    before = {number: signal.getsignal(number) for number in (*_ENDING, signal.SIGHUP)}

    def on_signal(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGHUP:
            for ending in _ENDING:
                signal.signal(ending, before[ending])
        came.put(number)

    threading.Thread(target=_heed, args=(came, stop, reload, grace), name="signals", daemon=True).start()
    for number in before:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        # To take a bundle anew is asked in vain now, and is no reason to die of.
        if stop.is_set() and before[signal.SIGHUP] == signal.SIG_DFL:
            before[signal.SIGHUP] = signal.SIG_IGN
        for number, handler in before.items():
            signal.signal(number, handler)
        came.put(None)


def _heed(came: SimpleQueue[int | None], stop: threading.Event, reload: Reload, grace: float) -> None:
    deadline: float | None = None
    while True:
        try:
            number = came.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except Empty:
            log.error(
                "not over %g s after the signal, `grace` is %g; ended at once", grace + _MARGIN_SECONDS, grace
            )
            os._exit(1)
        if number is None:
            return
        if number == signal.SIGHUP:
            reload.request()
            continue
        stop.set()
        deadline = time.monotonic() + grace + _MARGIN_SECONDS
