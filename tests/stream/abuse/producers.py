"""Producers that leave when they should not, and some that speak ZMTP badly, or not at all."""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import subprocess
import sys
import time

import zmq

from stream.wire import Message, encode
from tests.kafka.flow import RATE, wave
from tests.stream.abuse import zmtp
from tests.stream.abuse.abuser import Abuser

_LARGEST = 87_000  # samples of 3 channels: as much as one message may hold
_SAMPLES = wave(99, _LARGEST)
SIZES = 100, 6_500, _LARGEST  # the messages have 1 KB, 78 KB, 1 MB


def large(stream: str, seq: int, size: int, time: float | None = None, epoch: int = 0) -> bytes:
    """A message that can be read."""
    return encode(Message(stream, seq, _SAMPLES[:size], RATE, epoch, time))


class Leavers(Abuser):
    """A queue is filled; then its producer is gone, after a while, politely or not."""

    name = "leavers"
    rest = (0.0, 0.5)
    options: tuple[tuple[int, int], ...] = ()

    def act(self) -> None:
        rng = self.rng
        data = large(f"{self.name} {rng.randrange(5)}", rng.randrange(2**40), rng.choice(SIZES))
        with zmq.Context() as context, context.socket(zmq.PUSH) as producer:
            producer.sndhwm, producer.linger = rng.choice((1, 10, 100)), 0
            for option, value in self.options:
                producer.setsockopt(option, value)
            producer.connect(f"tcp://{self.service.address}")
            until = time.monotonic() + 3.0
            full_since = 0.0
            patience = rng.uniform(0.2, 2.0)
            while (now := time.monotonic()) < until and not self.stop.is_set():
                if producer.poll(50, zmq.POLLOUT):
                    producer.send(data)
                    full_since = 0.0
                elif not full_since:
                    full_since = now
                elif now - full_since > patience:
                    break


class Heartbeats(Leavers):
    """The same, and they want to hear a sign of life five times a second."""

    name = "heartbeats"
    options = (
        (zmq.HEARTBEAT_IVL, 200),
        (zmq.HEARTBEAT_TTL, 300),
        (zmq.HEARTBEAT_TIMEOUT, 300),
    )


class Killed(Abuser):
    """A process that floods; it is frozen for a while, some of the time, then killed."""

    name = "killed"
    rest = (0.0, 1.0)
    _PROGRAM = (
        "import sys, zmq; s = zmq.Context().socket(zmq.PUSH); s.sndhwm = 50; s.connect(sys.argv[1])\n"
        "while True: s.send(bytes.fromhex(sys.argv[2]) * int(sys.argv[3]))"
    )

    def act(self) -> None:
        size = self.rng.choice((1, 800, 10_000))
        noise = self.rng.randbytes(100).hex()
        process = subprocess.Popen(
            [sys.executable, "-c", self._PROGRAM, f"tcp://{self.service.address}", noise, str(size)]
        )
        try:
            self.stop.wait(self.rng.uniform(0.5, 3.0))
            if self.rng.random() < 0.5:
                process.send_signal(signal.SIGSTOP)
                self.stop.wait(self.rng.uniform(0.5, 3.0))
        finally:
            process.kill()
            process.wait()


class Pingers(Abuser):
    """While the service has more than it can take: pings between messages in a full queue, then a reset."""

    name = "pingers"
    rest = (0.0, 0.5)
    _seq = 0

    def act(self) -> None:
        with self.service.connect() as stuffing, self.service.connect() as producer:
            zmtp.shake_hands(stuffing)
            self._fill(stuffing, 40, SIZES[-1])
            zmtp.shake_hands(producer)
            self._fill(producer, 600, self.rng.choice(SIZES[:2]), zmtp.command(zmtp.PING))
            self.stop.wait(self.rng.uniform(0.0, 1.0))
            zmtp.reset(producer)

    def _fill(self, connection: socket.socket, count: int, size: int, behind: bytes = b"") -> None:
        """Send messages, each with something behind it, until they are no longer taken."""
        connection.settimeout(self.rng.uniform(0.2, 0.6))
        with contextlib.suppress(TimeoutError):
            for _ in range(count):
                connection.sendall(zmtp.frame(large("pingers", self._seq, size)) + behind)
                self._seq += size


class Liars(Abuser):
    """Whoever does not keep to the protocol, in one of the many ways of that."""

    name = "liars"
    rest = (0.0, 0.1)

    def act(self) -> None:
        with self.service.connect() as connection:
            kind = self.rng.choice(_LIES)
            kind(self, connection)
            if self.rng.random() < 0.5:
                zmtp.reset(connection)

    def ping_that_is_short(self, connection: socket.socket) -> None:
        zmtp.shake_hands(connection)
        connection.sendall(zmtp.command(zmtp.PING[: self.rng.randrange(5, 7)]))
        connection.sendall(zmtp.command(zmtp.PING + bytes(self.rng.randrange(17, 250))))

    def command_that_is_none(self, connection: socket.socket) -> None:
        zmtp.shake_hands(connection)
        for body in (b"", b"\x00", b"\x09NONSENSE!", b"\xffx", b"\x05READY", b"\x05ERROR\x03bad", bytes(300)):
            connection.sendall(zmtp.command(body))

    def greeting_that_is_none(self, connection: socket.socket) -> None:
        greeting = bytearray(zmtp.GREETING)
        for _ in range(self.rng.randrange(1, 6)):
            greeting[self.rng.randrange(len(greeting))] = self.rng.randrange(256)
        connection.sendall(bytes(greeting) + zmtp.command(zmtp.READY) + zmtp.frame(b"x"))

    def ready_that_is_none(self, connection: socket.socket) -> None:
        body = bytearray(zmtp.READY)
        body[self.rng.randrange(len(body))] = self.rng.randrange(256)
        body = body[: self.rng.randrange(len(body) + 1)]
        connection.sendall(zmtp.GREETING + zmtp.command(bytes(body)) + zmtp.frame(b"x"))

    def frame_that_is_too_large(self, connection: socket.socket) -> None:
        zmtp.shake_hands(connection)
        size = self.rng.choice((2**22, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1))
        connection.sendall(bytes([self.rng.choice((2, 3, 6, 0xFF))]) + struct.pack(">Q", size) + bytes(2**16))

    def message_without_end(self, connection: socket.socket) -> None:
        zmtp.shake_hands(connection)
        part = zmtp.frame(self.rng.randbytes(self.rng.choice((0, 1, 1000))), more=True)
        connection.settimeout(0.5)
        for _ in range(self.rng.randrange(1, 300)):
            connection.sendall(part * 100)

    def old_version(self, connection: socket.socket) -> None:
        kind = self.rng.randrange(3)
        if kind == 0:  # 1.0: a length, flags, an identity
            connection.sendall(b"\x01\x00" + b"\x05\x00junk")
        elif kind == 1:  # 2.0: revision, socket type, identity
            connection.sendall(zmtp.GREETING[:10] + b"\x01\x08" + b"\x00\x00" + zmtp.frame(b"junk"))
        else:
            connection.sendall(zmtp.GREETING[:10] + b"\x01\x08" + b"\x00\xff" + bytes(200))

    def other_protocol(self, connection: socket.socket) -> None:
        hello = bytes.fromhex("16030100a5010000a10303") + self.rng.randbytes(162)
        request = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
        connection.sendall(self.rng.choice((hello, request, b"SSH-2.0-x\r\n", self.rng.randbytes(4000))))

    def not_a_word(self, connection: socket.socket) -> None:
        connection.sendall(zmtp.GREETING[: self.rng.randrange(64)])


_LIES = (
    Liars.ping_that_is_short,
    Liars.command_that_is_none,
    Liars.greeting_that_is_none,
    Liars.ready_that_is_none,
    Liars.frame_that_is_too_large,
    Liars.message_without_end,
    Liars.old_version,
    Liars.other_protocol,
    Liars.not_a_word,
)

PRODUCERS: tuple[type[Abuser], ...] = (Leavers, Heartbeats, Killed, Pingers, Liars)
