"""One ZeroMQ connection of a source: its socket, and what it has sent that nobody has taken yet.

It is not read while enough of what came before waits to be taken. The kernel's buffers then fill, and the
producer waits; no other does.
"""

from __future__ import annotations

import socket
from collections import deque
from dataclasses import dataclass

from engine.errors import WireError
from stream.zmtp import Link, Payload, Ping

_RECV_BYTES = 256 * 1024
# Beside messages that wait, so much is read ahead; a message that is not whole yet is read to its end.
_AHEAD_BYTES = 64 * 1024
# What an item that waits takes beside its bytes, about.
_ITEM_BYTES = 128
# Where these would be overrun by answers that the other side does not read, it gets no more of them.
_OUTPUT_BYTES = 64 * 1024


@dataclass(slots=True)
class Clocks:
    """When what happened last, on the monotonic clock."""

    opened: float
    heard: float
    pinged: float = 0.0
    asked: float = 0.0
    """our first ping since something came last; 0: there was none"""


class Connection:
    """Bytes in, messages out. `WireError` from `read` and `parse`: it is to be closed."""

    _scratch = memoryview(bytearray(_RECV_BYTES))  # one thread reads, and keeps nothing in it

    def __init__(self, plain: socket.socket, link: Link, most: int, name: str, now: float) -> None:
        """`most`: messages that wait here; `name`: of its peer, for complaints."""
        self.socket, self.link, self.name = plain, link, name
        self.clocks = Clocks(now, now)
        self.is_held = False
        """its next message has not found room: nothing is taken from it, and nothing read"""
        self.is_gone = False
        """the other side has hung up; what it sent before is still to be taken"""
        self.is_closed = False
        self.is_drained = True
        """the kernel had no more when it was asked last"""
        self.has_sent = False
        self._most = most
        self._items: deque[Payload | Ping] = deque()
        self._waiting = 0  # the memory that these take
        self._is_broken = False  # what came last is no ZMTP: nothing behind it is read

    def __hash__(self) -> int:
        return id(self)

    @property
    def wants_to_read(self) -> bool:
        """Whether there is room for more."""
        if self.is_gone or self.is_held:
            return False
        return not self._items or (len(self._items) < self._most and self.link.buffered < _AHEAD_BYTES)

    @property
    def wants_to_write(self) -> bool:
        """Whether something is to be sent, now, as far as it is known without asking the kernel."""
        return bool(self.link.output) and not self.is_gone and (self.is_drained or not self.link.is_ready)

    @property
    def is_over(self) -> bool:
        """Nothing will come of it any more."""
        return self.is_closed and not self._items

    @property
    def held_bytes(self) -> int:
        """Memory that it takes."""
        return self.link.buffered + self._waiting

    def read(self, now: float) -> None:
        """Read once what the kernel has. Raises WireError."""
        try:
            size = self.socket.recv_into(self._scratch)
        except (BlockingIOError, InterruptedError):
            self.is_drained = True
            return
        except OSError:  # reset: what came before was read before
            size = 0
        if not size:
            self.is_gone = self.is_drained = True
            return
        self.is_drained = size < _RECV_BYTES or self._has_no_more()
        self.clocks.heard, self.clocks.asked = now, 0.0
        self.link.feed(self._scratch[:size])
        self.parse()

    def parse(self) -> None:
        """See what messages the bytes are that were read. Raises WireError, once."""
        try:
            while not self._is_broken and len(self._items) < self._most:
                item = self.link.next()
                if item is None:
                    return
                if isinstance(item, Payload) or (isinstance(item, Ping) and self._items):
                    self._items.append(item)
                    self._waiting += _size(item)
                elif isinstance(item, Ping):
                    self._answer(item)
        except WireError:
            self._is_broken = True
            raise

    def settle(self) -> bool:
        """Answer pings before which everything was taken; whether `take` has something to return."""
        while not self.is_held and self._items:
            item = self._items[0]
            if isinstance(item, Payload):
                return True
            self._items.popleft()
            self._waiting -= _size(item)
            self._answer(item)
        return False

    def take(self) -> Payload:
        """The next message; after `settle` only."""
        item = self._items.popleft()
        assert isinstance(item, Payload)
        self._waiting -= _size(item)
        self.has_sent = True
        return item

    def put_back(self, payload: Payload) -> None:
        """What was taken last has found no room."""
        self._items.appendleft(payload)
        self._waiting += _size(payload)

    def write(self) -> None:
        """Send what is to be sent, as far as the kernel takes it, and not before all that has come is read.

        To a side that has hung up, an answer would bring a reset, and the rest of what it had sent would be
        lost on its way. More may have come since it was read last.
        """
        output = self.link.output
        if self.link.is_ready and output:
            self.is_drained = self._has_no_more()
            if not self.is_drained:
                return
        try:
            while output:
                del output[: self.socket.send(output)]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # it is gone; `read` finds out, behind all that came before
            output.clear()

    def close(self, forget: bool = False) -> None:
        """Hang up; what has come can still be taken, unless it is to be forgotten."""
        self.is_gone = self.is_closed = True
        if forget:
            self._items.clear()
            self._waiting = 0
            self._is_broken = True
        if self._is_broken:
            self.link.close()  # whoever still knows this connection keeps nothing that it has sent
        self.socket.close()

    def _has_no_more(self) -> bool:
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:  # it is gone: `read` finds out
            pass
        return False

    def _answer(self, ping: Ping) -> None:
        if len(self.link.output) < _OUTPUT_BYTES:
            self.link.pong(ping)


def _size(item: Payload | Ping) -> int:
    return _ITEM_BYTES + (len(item.first) + len(item.second) if isinstance(item, Payload) else 0)
