"""Fifty producers that do nothing wrong: they send what they measure when they measure it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import zmq

from stream.wire import Message, encode
from tests.kafka.flow import RATE, wave

STREAMS, SOCKETS = 50, 5
_ARRIVAL = 25
_EPOCH, _TIME = 7, 1.7e9
_WAVE = 164 * _ARRIVAL


def messages_of(seconds: float) -> list[Message]:
    """Half seconds of all streams side by side, to their ends; all that a message says is the same always."""
    samples = round(seconds * RATE) // _ARRIVAL * _ARRIVAL
    found = []
    there = [wave(number, _WAVE) for number in range(STREAMS)]
    waves = [np.concatenate([one, one[::-1]]) for one in there]  # there and back, without a jump
    for at in range(0, samples, _ARRIVAL):
        for number, looped in enumerate(waves):
            start = at % (2 * _WAVE)
            piece = looped[start : start + _ARRIVAL]
            found.append(
                Message(
                    f"polite {number}",
                    at,
                    piece,
                    RATE,
                    _EPOCH,
                    _TIME + at / RATE,
                    end=at + _ARRIVAL >= samples,
                )
            )
    return found


class Polite:
    """Sends messages when they are due, over a few sockets, each from a thread of its own."""

    def __init__(self, address: str, messages: Sequence[Message]) -> None:
        self._context = zmq.Context()
        self._address = address
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._threads = []
        for number in range(SOCKETS):
            own = [message for message in messages if int(message.stream.split()[1]) % SOCKETS == number]
            self._threads.append(threading.Thread(target=self._send, args=(own,)))
        for thread in self._threads:
            thread.start()

    def _send(self, messages: Sequence[Message]) -> None:
        with self._context.socket(zmq.PUSH) as producer:
            producer.linger = 0
            producer.connect(f"tcp://{self._address}")
            for _, batch in groupby(messages, key=lambda message: message.seq):
                for message in batch:
                    due = self._started + (message.seq + len(message.samples)) / RATE
                    if self._stop.wait(max(0.0, due - time.monotonic())):
                        return
                    while not producer.poll(200, zmq.POLLOUT):
                        if self._stop.is_set():
                            return
                    producer.send(encode(message))
            self._stop.wait()  # a connection that stays open keeps what is on its way

    def close(self) -> None:
        """Hang up."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._context.destroy(linger=0)
