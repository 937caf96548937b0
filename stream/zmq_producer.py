"""Messages to ZeroMQ: a PUSH or a PUB socket. The one module that sends with zmq.

PUSH drops nothing: a full queue blocks the sender, and closing waits until all has been handed over. PUB
never waits: what a subscriber's full queue cannot take is dropped, and the service counts it. There are no
heartbeats here: the service's pings carry a time to live, after which this socket connects again.
"""

from __future__ import annotations

import logging
import time
from types import TracebackType

import zmq
from zmq.utils.monitor import parse_monitor_message

from engine.errors import ConfigError, OnsetError
from stream.wire import DtypeName, Message, encode
from stream.zmq_endpoint import parse_endpoint
from stream.zmq_keys import ClientKeys
from stream.zmq_settings import MAX_TOPIC_BYTES

log = logging.getLogger(__name__)

# XPUB is PUB that tells who subscribes: what is sent before the first subscription arrives would be lost.
_KINDS = {"push": zmq.PUSH, "pub": zmq.XPUB}
_REFUSALS: dict[int, str] = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "its public key is not among the service's `curve.clients`",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "one of the two uses CURVE keys and the other does not "
    "(--server-key and --key here, `curve` there)",
}
# A full queue is normal while the service works; after this long it is worth a line in the log.
_PATIENCE_MS = 10_000
_RECONNECT_MAX_MS = 5_000


class ZmqProducer:
    """A connected (or bound) PUSH or PUB socket; a context manager."""

    def __init__(
        self,
        endpoint: str,
        connect_timeout: float = 10.0,
        linger: float = 60.0,
        high_water_mark: int = 256,
        curve: ClientKeys | None = None,
    ) -> None:
        """Connect, and wait up to `connect_timeout` seconds for someone to be there.

        `endpoint`: push+connect:URI, push+bind:URI, pub+connect:URI, pub+bind:URI; a plain URI is the first.
        `linger`: how many seconds `close` waits for what was not handed over.

        Raises ConfigError when nobody is there, or the one who is refuses us.
        """
        self._name, self._linger = endpoint, linger
        self._target = parse_endpoint(endpoint, tuple(_KINDS), bind=False)
        self._publishes = self._target.kind == "pub"
        self._context = zmq.Context()
        self._socket = self._context.socket(_KINDS[self._target.kind])
        self._socket.setsockopt(zmq.SNDHWM, high_water_mark)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
        if curve is not None:
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, curve.server)
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, curve.own.public)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, curve.own.secret)
        try:
            self._find_peer(connect_timeout)
        except zmq.ZMQError as problem:
            self._abandon()
            raise ConfigError(f"endpoint {endpoint!r} cannot be used: {problem.strerror}") from None
        except ConfigError:
            self._abandon()
            raise

    def _find_peer(self, seconds: float) -> None:
        """Bind or connect, and return once a message would reach somebody; ConfigError when nobody comes."""
        monitor = self._socket.get_monitor_socket(sum(_REFUSALS) | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        poller = zmq.Poller()
        poller.register(monitor, zmq.POLLIN)
        poller.register(self._socket, zmq.POLLIN if self._publishes else 0)
        deadline = time.monotonic() + seconds
        try:
            (self._socket.bind if self._target.bind else self._socket.connect)(self._target.address)
            while ready := dict(poller.poll(max(0, round((deadline - time.monotonic()) * 1000)))):
                if self._socket in ready:  # a subscription
                    return
                event = parse_monitor_message(monitor.recv_multipart())["event"]
                if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    if not self._publishes:
                        return
                elif not self._target.bind:  # whoever binds waits for the next one
                    raise ConfigError(f"{self._name} refuses this producer: {_REFUSALS[event]}")
        finally:
            self._socket.disable_monitor()
            monitor.close(linger=0)
        raise ConfigError(
            f"nobody answers at {self._name!r} after {seconds:g} s; is `onset run` listening there? "
            "Its log says whether it refused somebody"
        )

    def send(self, message: Message, dtype: DtypeName = "float32", scale: float | None = None) -> None:
        """Send one message; PUSH blocks while the queue is full. Raises WireError if `dtype` cannot hold it.

        The topic of PUB is the stream's name.
        """
        self.send_bytes(encode(message, dtype, scale), message.stream.encode()[:MAX_TOPIC_BYTES])

    def send_bytes(self, data: bytes, topic: bytes = b"") -> None:
        """Send what was encoded elsewhere, behind `topic` under PUB; PUSH blocks while the queue is full."""
        if self._publishes:
            while self._socket.poll(0):
                self._socket.recv()  # subscriptions that came and went: ZeroMQ heeds them, we need not
            self._socket.send_multipart([topic, data])
            return
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
