"""Messages from ZeroMQ: PULL or SUB sockets. The one module that receives with zmq.

Queues are bounded: a producer has `high_water_mark` messages here, then its own socket fills. A PUSH
socket's `send` then blocks, and nothing that was queued is dropped; a PUB socket drops (`zmq_loss` counts).
A message above twice `max_message_bytes` never gets this far: its connection is closed while only its header
has been read, and the producer's socket connects again. With `curve`, only producers on the list get in.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from types import TracebackType

import zmq
from zmq.utils.monitor import parse_monitor_message

from engine.errors import ConfigError, WireError
from stream.counters import Counters
from stream.throttle import Throttle
from stream.zmq_admission import ZAP_DOMAIN, Admission
from stream.zmq_endpoint import Endpoint, parse_endpoint
from stream.zmq_keys import KeyPair, read_clients, read_secret
from stream.zmq_settings import MAX_TOPIC_BYTES, ZmqSettings

log = logging.getLogger(__name__)

KINDS = {"pull": zmq.PULL, "sub": zmq.SUB}
# Why a connection was refused, in counters and logs; `Admission` counts strangers: it knows their keys.
_REFUSALS: dict[int, tuple[str, str]] = {
    zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH: (
        "mechanism",
        "one side uses CURVE keys and the other does not; see `curve` here, --server-key and --key there",
    ),
    zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC: (
        "wrong_server_key",
        "the producer holds another server key than this service's; give it the right .public file",
    ),
}
_WATCHED = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
# ZeroMQ comes back by itself, ever more slowly up to this, after every loss of a connection but one: a peer
# that speaks another protocol is given up for good. It may be repaired and start again, so we go there again.
_RECONNECT_MAX_MS = 5_000
_RETRY_SECONDS = 2.0


class ZmqSource:
    """Bound or connected sockets, one an endpoint; a context manager."""

    def __init__(self, settings: ZmqSettings, counters: Counters) -> None:
        """Raises ConfigError when an endpoint is none or cannot be bound, or a key cannot be used."""
        endpoints = [parse_endpoint(uri, tuple(KINDS), bind=True) for uri in settings.endpoint]
        self.kind = endpoints[0].kind
        """`pull`, where nothing is lost, or `sub`, where a `LossCounter` has something to count"""
        if any(endpoint.kind != self.kind for endpoint in endpoints):
            raise ConfigError("endpoint: found pull and sub, expected all of one kind")
        if settings.topics and self.kind != "sub":
            raise ConfigError(f"topics: they belong to sub endpoints, found {self.kind}")
        curve = settings.curve
        keys = None if curve is None else read_secret(curve.secret)
        clients = frozenset() if curve is None else read_clients(curve.clients)
        self._counters, self._throttle = counters, Throttle(log)
        self._context = zmq.Context()
        self._doors: deque[_Door] = deque()
        self._poller = zmq.Poller()
        self._admission = Admission(self._context, clients, counters, self._throttle) if curve else None
        if self._admission:
            self._poller.register(self._admission.socket, zmq.POLLIN)
        try:
            for endpoint in endpoints:
                self._doors.append(_Door(self._context, endpoint, settings, keys))
                self._poller.register(self._doors[-1].socket, zmq.POLLIN)
                self._poller.register(self._doors[-1].monitor, zmq.POLLIN)
        except ConfigError:
            self.close()
            raise
        self.addresses = tuple(door.address for door in self._doors)
        """where the sockets really are: with their ports, where an endpoint left it open"""
        self.address = self.addresses[0]

    def wait(self, seconds: float) -> bool:
        """Wait for a message, at most so long; says whether there is one. Meanwhile, producers are let in."""
        deadline = time.monotonic() + seconds
        while True:
            left = max(0.0, deadline - time.monotonic())
            ready = dict(self._poller.poll(round(left * 1000)))
            if self._admission and self._admission.socket in ready:
                self._admission.answer()
            for door in self._doors:
                if door.monitor in ready:
                    self._note_events(door)
                door.retry()
            if any(door.socket in ready for door in self._doors):
                return True
            if time.monotonic() >= deadline:
                return False

    def receive(self) -> bytes | None:
        """The next message that is already here, or None. Raises WireError for one of too many parts."""
        for _ in range(len(self._doors)):
            door = self._doors[0]
            self._doors.rotate(-1)  # no endpoint waits for another's flood to end
            try:
                return self._payload(door.socket, door.socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                continue
        return None

    def close(self) -> None:
        """Hang up."""
        for door in self._doors:
            door.close()
        if self._admission:
            self._admission.socket.close(linger=0)
        self._context.term()

    def _payload(self, socket: zmq.Socket[bytes], first: bytes) -> bytes:
        data, parts = first, 1
        while socket.getsockopt(zmq.RCVMORE):
            data = socket.recv()
            parts += 1
        if parts > (2 if self.kind == "sub" else 1):
            expected = "one part, or a topic and one part" if self.kind == "sub" else "one part"
            raise WireError("multipart", f"found a ZeroMQ message of {parts} parts, expected {expected}")
        if parts == 2 and len(first) > MAX_TOPIC_BYTES:
            raise WireError(
                "multipart", f"found a topic of {len(first)} bytes, expected {MAX_TOPIC_BYTES} at most"
            )
        return data

    def _note_events(self, door: _Door) -> None:
        while door.monitor.poll(0):
            event = parse_monitor_message(door.monitor.recv_multipart())
            if event["event"] == zmq.EVENT_DISCONNECTED:
                self._counters.peers_disconnected.inc()
                continue
            if event["event"] == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                why, text = "broken_off", "the other side hung up: no ZeroMQ, or without CURVE keys"
            else:
                door.given_up()
                why, text = _REFUSALS.get(
                    event["value"], ("protocol", "the other side does not keep to ZMTP")
                )
            self._counters.zmq_refused.labels(why).inc()
            self._throttle.warning(f"ZeroMQ connection refused ({why})", f"at {door.address}: {text}")

    def __enter__(self) -> ZmqSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Door:
    """One endpoint: its socket, and the monitor that says who came and went."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: Endpoint,
        settings: ZmqSettings,
        keys: KeyPair | None,
    ) -> None:
        self._endpoint = endpoint
        self._retry_at: float | None = None
        self.socket = context.socket(KINDS[endpoint.kind])
        self.socket.setsockopt(zmq.RCVHWM, settings.high_water_mark)
        # Between the limit and twice the limit a message is read whole, so that it can be counted as too
        # large and its producer stays connected. What is larger is never held: ZeroMQ reads its length and
        # hangs up.
        self.socket.setsockopt(zmq.MAXMSGSIZE, 2 * settings.max_message_bytes)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
        self._set_heartbeat(settings)
        if endpoint.kind == "sub":
            for topic in settings.topics or ("",):
                self.socket.setsockopt_string(zmq.SUBSCRIBE, topic)
        if keys is not None:
            self.socket.setsockopt(zmq.CURVE_SERVER, 1)
            self.socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
            self.socket.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        self.monitor = self.socket.get_monitor_socket(_WATCHED)
        try:
            (self.socket.bind if endpoint.bind else self.socket.connect)(endpoint.address)
        except zmq.ZMQError as problem:
            self.close()
            raise ConfigError(
                f"endpoint {endpoint.address!r} cannot be {'bound' if endpoint.bind else 'connected to'}: "
                f"{problem.strerror}; is another service on this port?"
            ) from None
        self.address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def _set_heartbeat(self, settings: ZmqSettings) -> None:
        interval, timeout = settings.heartbeat, settings.heartbeat_timeout
        # Our pings. Their time to live asks every producer, also one that sets no heartbeat of its own, to
        # drop the connection and come again when it has heard nothing from us for so long.
        self.socket.setsockopt(zmq.HEARTBEAT_IVL, round(interval * 1000))
        self.socket.setsockopt(zmq.HEARTBEAT_TTL, round(timeout * 1000))
        # Whoever does not answer them is dead; not so under PULL. While our queue is full ZeroMQ reads
        # nothing, answers included, and would hang up on a producer that we keep waiting, losing what it has
        # sent. There the kernel asks instead, which finds dead hosts and networks; a frozen process keeps its
        # connection, and its streams end by `idle_timeout`.
        self.socket.setsockopt(
            zmq.HEARTBEAT_TIMEOUT, round(timeout * 1000) if self._endpoint.kind == "sub" else 0
        )
        self.socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        # Whole seconds, and at most 127 probes; beyond that the kernel refuses, and ZeroMQ hangs up.
        seconds = max(math.ceil(interval), math.ceil(timeout / 128))
        self.socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, seconds)
        self.socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, seconds)
        self.socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, max(1, math.ceil(timeout / seconds) - 1))

    def given_up(self) -> None:
        """ZeroMQ will not come back to this peer by itself; a bound socket has nowhere to go."""
        if not self._endpoint.bind:
            self._retry_at = time.monotonic() + _RETRY_SECONDS

    def retry(self) -> None:
        """Connect anew, where that is due."""
        if self._retry_at is not None and time.monotonic() >= self._retry_at:
            self._retry_at = None
            self.socket.disconnect(self.address)
            self.socket.connect(self._endpoint.address)

    def close(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.socket.close(linger=0)
