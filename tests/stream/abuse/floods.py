"""Producers that send more than anybody can take."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator

import zmq

from stream.wire import Limits
from tests.kafka.flow import RATE
from tests.stream.abuse.abuser import Abuser
from tests.stream.abuse.polite import STREAMS
from tests.stream.abuse.producers import SIZES, large
from tests.stream.abuse.service import MAX_MESSAGE_BYTES
from tests.stream.fuzzer import Fuzzer


class _Flood(Abuser):
    """A connection that stays, and always has something to send."""

    rest = (0.0, 0.0)
    _producer: zmq.Socket[bytes] | None = None

    def act(self) -> None:
        if self._producer is None:
            self._context = zmq.Context()
            self._producer = self._context.socket(zmq.PUSH)
            self._producer.sndhwm = 20
            self._producer.connect(f"tcp://{self.service.address}")
            self._messages = self.messages()
        if self._producer.poll(200, zmq.POLLOUT):
            self._producer.send(next(self._messages))

    def undo(self) -> None:
        if self._producer is not None:
            self._context.destroy(linger=0)

    @abstractmethod
    def messages(self) -> Iterator[bytes]:
        """Without end."""


class Flood(_Flood):
    """One stream at full speed, in large messages."""

    name = "flood"

    def messages(self) -> Iterator[bytes]:
        size, seq = SIZES[-1], 0
        while True:
            yield large("flood", seq, size)
            seq += size


class Names(_Flood):
    """More streams than have a place, each new one a little."""

    name = "names"
    rest = (0.0, 0.02)

    def messages(self) -> Iterator[bytes]:
        number = 0
        while True:
            number += 1
            yield large(f"name {number}", 0, 10)


class Garbage(_Flood):
    """What cannot be read, and what should not have been said."""

    name = "garbage"
    rest = (0.0, 0.01)

    def messages(self) -> Iterator[bytes]:
        protected = [f"polite {number}" for number in range(STREAMS)]
        fuzzer = Fuzzer(self.rng.randrange(2**32), Limits(RATE, 3, MAX_MESSAGE_BYTES), protected, epoch=1)
        for shot in fuzzer:
            yield shot.data


class Jumpers(_Flood):
    """Producers whose clocks are set, forth and back, and who start again with them."""

    name = "jumpers"
    rest = (0.0, 0.1)

    def messages(self) -> Iterator[bytes]:
        seqs = [0, 0, 0]
        epochs = [1, 1, 1]
        while True:
            at = self.rng.randrange(len(seqs))
            if self.rng.random() < 0.02:
                epochs[at], seqs[at] = epochs[at] + self.rng.choice((1, 10**15)), 0
            moment = self.rng.choice((0.0, 1e9, time.time(), time.time() + 1e8, 9.9e10))
            yield large(f"jumper {at}", seqs[at], 25, moment, epochs[at])
            seqs[at] += 25 * self.rng.choice((1, 1, 1, 1, 100))


FLOODS: tuple[type[Abuser], ...] = (Flood, Names, Garbage, Jumpers)
