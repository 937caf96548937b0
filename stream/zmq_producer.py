"""Messages to ZeroMQ: a PUSH socket. The one module that sends with zmq.

Nothing is dropped: a full queue blocks the sender, and closing waits until all has been handed over.
"""

from __future__ import annotations

import logging
import time
from types import TracebackType

import zmq

from engine.errors import ConfigError, OnsetError
from stream.wire import DtypeName, Message, encode
from stream.zmq_endpoint import parse_endpoint

log = logging.getLogger(__name__)

# A full queue is normal while the service works; after this long it is worth a line in the log.
_PATIENCE_MS = 10_000


class ZmqProducer:
    """A connected (or bound) PUSH socket; a context manager."""

    def __init__(
        self, endpoint: str, connect_timeout: float = 10.0, linger: float = 60.0, high_water_mark: int = 256
    ) -> None:
        """Connect, and wait up to `connect_timeout` seconds for someone to be there.

        `linger`: how many seconds `close` waits for what was not handed over.

        Raises ConfigError when nobody is.
        """
        self._name, self._linger = endpoint, linger
        target = parse_endpoint(endpoint, "push", bind=False)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, high_water_mark)
        monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        try:
            if target.bind:
                self._socket.bind(target.address)
            else:
                self._socket.connect(target.address)
            there = monitor.poll(round(connect_timeout * 1000))
        except zmq.ZMQError as problem:
            self._abandon()
            raise ConfigError(f"endpoint {endpoint!r} cannot be used: {problem.strerror}") from None
        finally:
            self._socket.disable_monitor()
            monitor.close(linger=0)
        if not there:
            self._abandon()
            raise ConfigError(
                f"nobody answers at {endpoint!r} after {connect_timeout:g} s; is `onset run` listening there?"
            )

    def send(self, message: Message, dtype: DtypeName = "float32", scale: float | None = None) -> None:
        """Send one message; blocks while the queue is full. Raises WireError if `dtype` cannot hold it."""
        self.send_bytes(encode(message, dtype, scale))

    def send_bytes(self, data: bytes) -> None:
        """Send what was encoded elsewhere; blocks while the queue is full."""
        while not self._socket.poll(_PATIENCE_MS, zmq.POLLOUT):
            log.warning("waiting for %s to take more; is it still running?", self._name)
        self._socket.send(data)

    def close(self) -> None:
        """Wait until everything is handed over. Raises OnsetError when that takes longer than `linger`."""
        started = time.monotonic()
        self._socket.close(linger=round(self._linger * 1000))
        self._context.term()
        if time.monotonic() - started >= self._linger:
            raise OnsetError(
                f"{self._name} did not take everything within {self._linger:g} s; the last messages are lost"
            )

    def _abandon(self) -> None:
        self._socket.close(linger=0)
        self._context.term()

    def __enter__(self) -> ZmqProducer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._abandon()
