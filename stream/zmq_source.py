"""Messages from ZeroMQ: a PULL socket. The one module that receives with zmq.

Queues are bounded: a producer has `high_water_mark` messages here, then its own socket fills and its `send`
blocks. Nothing that was queued is dropped. A message above twice `max_message_bytes` never gets this far: its
connection is closed while only its header has been read, and the producer's socket connects again.
"""

from __future__ import annotations

import time
from types import TracebackType

import zmq
from zmq.utils.monitor import parse_monitor_message

from engine.errors import ConfigError, WireError
from stream.config import ZmqSettings
from stream.counters import Counters
from stream.zmq_endpoint import parse_endpoint


class ZmqSource:
    """A bound or connected PULL socket; a context manager."""

    def __init__(self, settings: ZmqSettings, counters: Counters) -> None:
        """Raises ConfigError when the endpoint is none, or cannot be bound."""
        self._counters = counters
        self._endpoint = parse_endpoint(settings.endpoint, "pull", bind=True)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, settings.high_water_mark)
        # Between the limit and twice the limit a message is read whole, so that it can be counted as too
        # large and its producer stays connected. What is larger is never held: ZeroMQ reads its length and
        # hangs up.
        self._socket.setsockopt(zmq.MAXMSGSIZE, 2 * settings.max_message_bytes)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        try:
            if self._endpoint.bind:
                self._socket.bind(self._endpoint.address)
            else:
                self._socket.connect(self._endpoint.address)
        except zmq.ZMQError as problem:
            self.close()
            way = "bound" if self._endpoint.bind else "connected to"
            raise ConfigError(
                f"endpoint {settings.endpoint!r} cannot be {way}: {problem.strerror}; "
                "is another service on this port?"
            ) from None
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        """where the socket really is: with its port, where the endpoint left it open"""

    def wait(self, seconds: float) -> bool:
        """Wait for a message, at most so long; says whether there is one."""
        deadline = time.monotonic() + seconds
        while True:
            left = max(0.0, deadline - time.monotonic())
            ready = dict(self._poller.poll(round(left * 1000)))
            if self._monitor in ready:
                self._count_disconnections()
            if self._socket in ready:
                return True
            if time.monotonic() >= deadline:
                return False

    def receive(self) -> bytes | None:
        """The next message that is already here, or None. Raises WireError for one of several parts."""
        try:
            data = self._socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        if not self._socket.getsockopt(zmq.RCVMORE):
            return data
        parts = 1
        while self._socket.getsockopt(zmq.RCVMORE):
            self._socket.recv()
            parts += 1
        raise WireError("multipart", f"found a ZeroMQ message of {parts} parts, expected one part")

    def close(self) -> None:
        """Hang up."""
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)
        self._context.term()

    def _count_disconnections(self) -> None:
        while True:
            try:
                parts = self._monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if parse_monitor_message(parts)["event"] == zmq.EVENT_DISCONNECTED:
                self._counters.peers_disconnected.inc()

    def __enter__(self) -> ZmqSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
