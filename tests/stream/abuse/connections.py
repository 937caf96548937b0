"""Connections that say nothing, or too slowly, and readers that do not read."""

from __future__ import annotations

import contextlib
import socket
from abc import abstractmethod

from tests.stream.abuse import zmtp
from tests.stream.abuse.abuser import Abuser


class Silent(Abuser):
    """Fifteen hundred connections at once that never say a word."""

    name = "silent"
    rest = (0.5, 2.0)
    _CONNECTIONS = 1500

    def act(self) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(self._CONNECTIONS):
                if self.stop.is_set():
                    return
                connection = stack.enter_context(self.service.connect(seconds=1.0))
                if self.rng.random() < 0.5:
                    stack.callback(zmtp.reset, connection)
            self.stop.wait(self.rng.uniform(0.0, 5.0))


class HalfShaken(Abuser):
    """Connections that stop somewhere between hello and the first message."""

    name = "half-shaken"

    def act(self) -> None:
        words = zmtp.GREETING + zmtp.command(zmtp.READY) + zmtp.frame(bytes(300))
        with contextlib.ExitStack() as stack:
            for _ in range(100):
                connection = stack.enter_context(self.service.connect())
                connection.sendall(words[: self.rng.randrange(1, len(words))])
            self.stop.wait(self.rng.uniform(0.0, 5.0))


class _SlowBytes(Abuser):
    """A byte now and then, on many connections, for as long as that goes."""

    rest = (0.05, 0.3)
    _CONNECTIONS = 100

    def __init__(self, *values: object) -> None:
        super().__init__(*values)  # type: ignore[arg-type]
        self._open: list[tuple[socket.socket, bytes]] = []

    @abstractmethod
    def place(self) -> tuple[str, int]:
        """Where to."""

    @abstractmethod
    def words(self) -> bytes:
        """What it says, slowly."""

    def act(self) -> None:
        if len(self._open) < self._CONNECTIONS:
            self._open.append((self.service.connect(self.place()), self.words()))
        still: list[tuple[socket.socket, bytes]] = []
        for connection, words in self._open:
            try:
                connection.sendall(words[:1])
            except OSError:
                connection.close()
                continue
            if len(words) > 1:
                still.append((connection, words[1:]))
            else:
                connection.close()
        self._open = still

    def undo(self) -> None:
        for connection, _ in self._open:
            connection.close()


class SlowProducers(_SlowBytes):
    """To the ZeroMQ socket."""

    name = "slow-producers"

    def place(self) -> tuple[str, int]:
        return self.service.place()

    def words(self) -> bytes:
        return zmtp.GREETING + zmtp.command(zmtp.READY) + zmtp.frame(bytes(200))


class SlowClients(_SlowBytes):
    """To health and metrics."""

    name = "slow-clients"

    def place(self) -> tuple[str, int]:
        return self.service.http_place()

    def words(self) -> bytes:
        return b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 200


class Scrapers(Abuser):
    """Clients that want all the metrics, all the time, and most of whom do not read them."""

    name = "scrapers"
    rest = (0.0, 0.1)

    def act(self) -> None:
        path = self.rng.choice(("/metrics", "/metrics", "/ready", "/live", "/" + "x" * 20_000))
        with contextlib.ExitStack() as stack:
            for _ in range(self.rng.randrange(1, 20)):
                client = stack.enter_context(socket.socket())
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
                client.settimeout(2.0)
                client.connect(self.service.http_place())
                client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            if self.rng.random() < 0.2:
                client.recv(2**16)
            self.stop.wait(self.rng.uniform(0.0, 0.5))


CONNECTIONS: tuple[type[Abuser], ...] = (Silent, HalfShaken, SlowProducers, SlowClients, Scrapers)
