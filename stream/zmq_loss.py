"""What PUB/SUB loses, counted: `seq` counts samples, so a jump within a stream's epoch is what did not come.

For streams that come from one publisher each, hence in order: what is passed by counts as lost, even if it
came later. With a PULL socket use none of this: nothing is dropped there, and the ring counts its gaps.
"""

from __future__ import annotations

import logging
from collections import OrderedDict

from stream.counters import Counters
from stream.throttle import Throttle
from stream.wire import Message

log = logging.getLogger(__name__)


class LossCounter:
    """Remembers, for the `max_streams` streams heard last, which sample comes next."""

    def __init__(self, counters: Counters, max_streams: int = 4096, throttle: Throttle | None = None) -> None:
        self._counters, self._max_streams = counters, max_streams
        self._throttle = throttle or Throttle(log)
        self._next: OrderedDict[str, tuple[int, int]] = OrderedDict()  # stream: its epoch, the next `seq`

    def see(self, message: Message) -> int:
        """Take note of a message, in the order of arrival; returns how many samples are missing before it.

        What a stream sent before it was first heard is not missing: nobody was listening. What is lost at a
        stream's end is known only if its last message, the one with `end`, comes through.
        """
        here = (message.epoch, message.seq)
        after = (message.epoch, message.seq + len(message.samples))
        # A new epoch of a known stream begins at 0: what is missing there was sent while we listened.
        epoch, seq = self._next.get(message.stream, here)
        missing = (
            max(0, message.seq - (seq if message.epoch == epoch else 0)) if message.epoch >= epoch else 0
        )
        self._next[message.stream] = max((epoch, seq), after)
        self._next.move_to_end(message.stream)
        if len(self._next) > self._max_streams:
            self._next.popitem(last=False)
        if missing:
            self._counters.samples_lost.inc(missing)
            self._throttle.warning(
                "samples lost",
                f"{missing} samples of stream {message.stream!r} were lost between its publisher and "
                "here, or refused; larger high-water marks on both sides help with bursts, PULL drops none",
            )
        return missing
