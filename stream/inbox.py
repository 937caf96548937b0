"""Messages that wait for the engine: a queue for each stream, all within one bound.

The engine takes from each stream in turn. A stream may have as much waiting as is still free (dynamic
thresholds: A. K. Choudhury and E. L. Hahne, IEEE/ACM Transactions on Networking 6(2), 1998): one that floods
gets half of the room, two get a third each, and something is always left for the others. What happens to a
message that has no room is the caller's: leave it where it is (`has_room`), or give up the oldest of the
stream that has the most waiting (`make_room`). Pure; belongs to one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from stream.wire import Message

# What a message takes beside its samples, about.
_MESSAGE_BYTES = 512
# A stream that has nothing waiting has room for a message up to this, however full it is.
_ALWAYS_BYTES = 64 * 1024


class Inbox:
    """At most about `limit` bytes of messages; beyond it one small one of each stream."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._queues: dict[str, deque[Message]] = {}
        self._sizes: dict[str, int] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def has_room(self, stream: str, size: int) -> bool:
        """Whether a message with `size` bytes of samples may be put; see the module."""
        free, waiting = self._limit - self._bytes, self._sizes.get(stream, 0)
        if not waiting:
            return free > 0 or size <= _ALWAYS_BYTES
        return waiting + size + _MESSAGE_BYTES <= free

    @property
    def is_full(self) -> bool:
        """No further message has to be taken."""
        return self._bytes >= self._limit

    @property
    def streams(self) -> Sequence[str]:
        """Those that have something waiting."""
        return list(self._queues)

    def put(self, message: Message) -> None:
        """Append to its stream's queue, full or not."""
        size = _size(message)
        self._queues.setdefault(message.stream, deque()).append(message)
        self._sizes[message.stream] = self._sizes.get(message.stream, 0) + size
        self._bytes += size
        self._count += 1

    def take(self, stream: str) -> Message | None:
        """The oldest message of a stream."""
        queue = self._queues.get(stream)
        if queue is None:
            return None
        message = queue.popleft()
        size = _size(message)
        self._bytes -= size
        self._sizes[stream] -= size
        self._count -= 1
        if not queue:
            del self._queues[stream], self._sizes[stream]
        return message

    def make_room(self) -> list[Message]:
        """Give up messages until it is not full: of the stream with the most bytes, its oldest."""
        dropped = []
        while self.is_full:
            message = self.take(max(self._sizes, key=self._sizes.__getitem__))
            assert message is not None
            dropped.append(message)
        return dropped


def _size(message: Message) -> int:
    return message.samples.nbytes + _MESSAGE_BYTES
