"""Messages to ZeroMQ from a PUB socket, which waits for nobody. The one module that sends with libzmq.

What a subscriber's full queue cannot take is dropped, and the service counts it. There are no heartbeats
here: the service's pings carry a time to live, after which this socket connects again.
"""

from __future__ import annotations

import time

import zmq
from zmq.utils.monitor import parse_monitor_message

from engine.errors import ConfigError, OnsetError
from stream.producing import Producer
from stream.wire import DtypeName, Message, encode
from stream.zmq_endpoint import parse_endpoint
from stream.zmq_keys import ClientKeys
from stream.zmq_settings import MAX_TOPIC_BYTES

_REFUSALS: dict[int, str] = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "its public key is not among the service's `curve.clients`",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "one of the two uses CURVE keys and the other does not "
    "(--server-key and --key here, `curve` there)",
}
_RECONNECT_MAX_MS = 5_000


class ZmqPublisher(Producer):
    """A connected (or bound) PUB socket; a context manager."""

    def __init__(
        self,
        endpoint: str,
        connect_timeout: float = 10.0,
        linger: float = 60.0,
        high_water_mark: int = 1024,
        curve: ClientKeys | None = None,
    ) -> None:
        """Connect, and wait up to `connect_timeout` seconds for a subscriber.

        `endpoint`: pub+connect:URI, pub+bind:URI.
        `linger`: how many seconds `close` waits for what was not handed over.

        Raises ConfigError when nobody is there, or the one who is refuses us.
        """
        self._name, self._linger = endpoint, linger
        self._target = parse_endpoint(endpoint, ("pub",), bind=False)
        self._context = zmq.Context()
        # PUB that tells who subscribes: what is sent before the first subscription arrives would be lost.
        self._socket = self._context.socket(zmq.XPUB)
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
        monitor = self._socket.get_monitor_socket(sum(_REFUSALS))
        poller = zmq.Poller()
        poller.register(monitor, zmq.POLLIN)
        poller.register(self._socket, zmq.POLLIN)
        deadline = time.monotonic() + seconds
        try:
            (self._socket.bind if self._target.bind else self._socket.connect)(self._target.address)
            while ready := dict(poller.poll(max(0, round((deadline - time.monotonic()) * 1000)))):
                if self._socket in ready:  # a subscription
                    return
                event = parse_monitor_message(monitor.recv_multipart())["event"]
                if not self._target.bind:  # whoever binds waits for the next one
                    raise ConfigError(f"{self._name} refuses this producer: {_REFUSALS[event]}")
        finally:
            self._socket.disable_monitor()
            monitor.close(linger=0)
        raise ConfigError(
            f"nobody answers at {self._name!r} after {seconds:g} s; is `onset run` listening there? "
            "Its log says whether it refused somebody"
        )

    def send(self, message: Message, dtype: DtypeName = "float32", scale: float | None = None) -> None:
        """See `Producer.send`; the topic is the stream's name."""
        self.send_bytes(encode(message, dtype, scale), message.stream.encode()[:MAX_TOPIC_BYTES])

    def send_bytes(self, data: bytes, topic: bytes = b"") -> None:
        """Send what was encoded elsewhere, behind `topic`."""
        while self._socket.poll(0):
            self._socket.recv()  # subscriptions that came and went: ZeroMQ heeds them, we need not
        self._socket.send_multipart([topic, data])

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
