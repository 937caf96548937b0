"""Messages from ZeroMQ: a PULL or SUB socket, as its producers see it, on sockets of the kernel.

Producers take turns: one message of each, then one of the next. Who has no room for a message holds its
connection (`hold`), which is then not read: under PULL the producer waits, and nobody else does; a publisher
drops, which `zmq_loss` counts. A message above twice `max_message_bytes` is not read: its connection is
closed behind the header, and the producer's socket connects again. With `curve`, only producers on the list
get in.

Under PULL nothing is sent but the handshake and answers to pings, and those only behind all that has come:
what is sent to a producer that has hung up makes the kernel drop what is still on its way from there.

Bounded: connections, handshakes under way, and the bytes that wait here. What is above gives way: handshakes
by their age, connections by what they hold. One thread owns a source; the network is read in `wait` alone.
"""

from __future__ import annotations

import logging
import math
import resource
import selectors
import socket
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from engine.errors import ConfigError, WireError
from stream.counters import Counters
from stream.throttle import Throttle
from stream.zmq_connection import Connection
from stream.zmq_dialer import Dialer
from stream.zmq_endpoint import Endpoint, listen, parse_endpoint
from stream.zmq_keys import read_clients, read_secret
from stream.zmq_settings import MAX_TOPIC_BYTES, ZmqSettings
from stream.zmtp import Link, Mechanism, Payload, Plain

log = logging.getLogger(__name__)

# Of each kind of socket: whom it talks to.
_PEERS = {"pull": ("PUSH",), "sub": ("PUB", "XPUB")}
# A handshake takes milliseconds; so many may be under way, of which the oldest gives way to one more.
_HANDSHAKE_SECONDS = 10.0
_MAX_HANDSHAKES = 128
_MAX_CONNECTIONS = 8192
# What may wait in all connections together, of messages that are not whole and of those that find no room.
_WAITING_BYTES = 64 * 1024 * 1024
# Descriptors that are left to all else: files, sinks, brokers, HTTP.
_OTHER_DESCRIPTORS = 256
_ACCEPT_AT_ONCE = 64
# How often deadlines are looked at.
_LOOK_SECONDS = 0.05
# Without descriptors for a new connection, nobody is let in for so long.
_FULL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Received:
    """A message, and the connection that it came by."""

    data: bytes
    connection: Connection
    payload: Payload


@dataclass(frozen=True, slots=True)
class _Listener:
    socket: socket.socket
    address: str
    path: str | None  # of a Unix socket


class ZmqSource:
    """Bound or connected endpoints; a context manager."""

    def __init__(self, settings: ZmqSettings, counters: Counters) -> None:
        """Raises ConfigError when an endpoint is none or cannot be bound, or a key cannot be used."""
        endpoints = [parse_endpoint(uri, tuple(_PEERS), bind=True) for uri in settings.endpoint]
        self.kind = endpoints[0].kind
        """`pull`, where nothing is lost, or `sub`, where a `LossCounter` has something to count"""
        if any(endpoint.kind != self.kind for endpoint in endpoints):
            raise ConfigError("endpoint: found pull and sub, expected all of one kind")
        if settings.topics and self.kind != "sub":
            raise ConfigError(f"topics: they belong to sub endpoints, found {self.kind}")
        self._settings, self._counters, self._throttle = settings, counters, Throttle(log)
        self._mechanism = _mechanism(settings)
        self._selector = selectors.DefaultSelector()
        self._connections: OrderedDict[Connection, None] = OrderedDict()  # oldest first
        self._handshakes: OrderedDict[Connection, None] = OrderedDict()
        self._turns: OrderedDict[Connection, None] = OrderedDict()  # whoever has a message, next first
        self._changed: set[Connection] = set()  # of which it has to be seen anew what they wait for
        self._listeners: list[_Listener] = []
        self._dialing: list[Dialer] = []
        self._dialed: dict[Connection, Dialer] = {}
        self._looked, self._full_until = 0.0, 0.0
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = _MAX_CONNECTIONS
        if limit != resource.RLIM_INFINITY:
            self._most = min(self._most, max(limit // 2, limit - _OTHER_DESCRIPTORS))
        try:
            addresses = [self._open(endpoint) for endpoint in endpoints]
        except ConfigError:
            self.close()
            raise
        self.addresses = tuple(addresses)
        """where the sockets really are: with their ports, where an endpoint left it open"""
        self.address = self.addresses[0]

    def wait(self, seconds: float) -> bool:
        """Wait for a message, at most so long; says whether there is one. Meanwhile, producers are served."""
        deadline = time.monotonic() + seconds
        while True:
            self._see_changes()
            now = time.monotonic()
            self._look_at_clock(now)
            left = 0.0 if self._turns else min(max(0.0, deadline - now), _LOOK_SECONDS)
            for key, events in self._selector.select(left):
                self._serve(key, events)
            self._see_changes()
            if self._turns:
                return True
            if time.monotonic() >= deadline:
                return False

    def receive(self) -> Received | None:
        """The next message that is already here, or None. Raises WireError for one of too many parts."""
        while self._turns:
            connection, _ = self._turns.popitem(last=False)
            if not connection.settle():
                self._changed.add(connection)
                continue
            payload = connection.take()
            self._turns[connection] = None  # behind the others
            self._changed.add(connection)
            most = 2 if self.kind == "sub" else 1
            if payload.parts > most:
                expected = "one part, or a topic and one part" if most == 2 else "one part"
                raise WireError(
                    "multipart", f"found a ZeroMQ message of {payload.parts} parts, expected {expected}"
                )
            if payload.parts == 2 and len(payload.first) > MAX_TOPIC_BYTES:
                raise WireError(
                    "multipart",
                    f"found a topic of {len(payload.first)} bytes, expected {MAX_TOPIC_BYTES} at most",
                )
            return Received(payload.second if payload.parts == 2 else payload.first, connection, payload)
        return None

    def hold(self, received: Received) -> None:
        """There is no room for it: `receive` returns it again after `release`, and until then nothing else of
        its connection."""
        connection = received.connection
        connection.put_back(received.payload)
        connection.is_held = True
        self._turns.pop(connection, None)
        self._changed.add(connection)

    def release(self, connection: Connection) -> None:
        """There is room again."""
        connection.is_held = False
        self._changed.add(connection)

    def is_behind(self, connection: Connection | None) -> bool:
        """Whether something of it waits here, or may wait in the kernel."""
        if connection is None or connection not in self._connections:
            return False
        return connection in self._turns or connection.is_held or not connection.is_drained

    def close(self) -> None:
        """Hang up."""
        for dialer in self._dialing:
            dialer.close()
        for connection in self._connections:
            connection.close(forget=True)
        self._connections.clear()
        self._turns.clear()
        for listener in self._listeners:
            listener.socket.close()
            if listener.path is not None and not listener.path.startswith("@"):
                Path(listener.path).unlink(missing_ok=True)
        self._selector.close()

    def _open(self, endpoint: Endpoint) -> str:
        """Listen, or begin to connect; returns the address."""
        if not endpoint.bind:
            self._dialing.append(Dialer(endpoint))
            return endpoint.address
        listener, address = listen(endpoint)
        self._listeners.append(_Listener(listener, address, endpoint.path))
        self._selector.register(listener, selectors.EVENT_READ, self._listeners[-1])
        return address

    # What the selector tells

    def _serve(self, key: selectors.SelectorKey, events: int) -> None:
        if isinstance(key.data, _Listener):
            self._accept(key.data.socket, key.data.address)
            return
        if events & selectors.EVENT_READ:
            self._read(key.data)
        self._changed.add(key.data)

    def _accept(self, listener: socket.socket, address: str) -> None:
        for _ in range(_ACCEPT_AT_ONCE):
            try:
                plain, peer = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionError):
                return
            except OSError as problem:  # no descriptors, no memory: those that are let in go on
                self._throttle.warning("ZeroMQ", f"nobody is let in at {address}: {problem.strerror}")
                self._let_in(False)
                return
            name = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "a local process"
            if len(self._connections) >= self._most and not self._make_room():
                self._counters.zmq_refused.labels("too_many").inc()
                self._throttle.warning(
                    "ZeroMQ connection refused (too_many)",
                    f"{name} at {address}: {self._most} connections are open; the limit of descriptors "
                    "(ulimit -n) bounds them",
                )
                plain.close()
                continue
            self._begin(plain, f"{name} at {address}")

    def _make_room(self) -> bool:
        """Give up a connection by which nothing ever came, or, where each has brought something, the one that
        has been silent the longest, if that is long enough to be dead."""
        unheard = next((one for one in self._connections if not one.has_sent), None)
        found = unheard or min(self._connections, key=lambda one: (one.is_held, one.clocks.heard))
        silent = time.monotonic() - found.clocks.heard
        if found.is_held or (unheard is None and silent <= self._settings.heartbeat_timeout):
            return False
        self._hang_up(
            found, "idle", f"it has sent nothing for {silent:.0f} s, and another asks for its place"
        )
        return True

    def _begin(self, plain: socket.socket, name: str, dialer: Dialer | None = None) -> None:
        plain.setblocking(False)
        self._set_up(plain)
        link = Link(
            self.kind.upper(), _PEERS[self.kind], self._mechanism, 2 * self._settings.max_message_bytes
        )
        now = time.monotonic()
        connection = Connection(plain, link, self._settings.high_water_mark, name, now)
        self._connections[connection] = self._handshakes[connection] = None
        if dialer is not None:
            self._dialed[connection] = dialer
        self._parse(connection)  # which says the greeting
        connection.write()
        # At once: who has said something already is not displaced by those who say nothing.
        self._read(connection)
        self._changed.add(connection)
        while len(self._handshakes) > _MAX_HANDSHAKES:
            self._hang_up(next(iter(self._handshakes)), "silent", "too many others are in their handshake")

    def _set_up(self, plain: socket.socket) -> None:
        """Let the kernel find dead hosts and networks; a frozen process keeps its connection."""
        if plain.family == socket.AF_UNIX:
            return
        settings = self._settings
        # Whole seconds, and at most 127 probes; beyond that the kernel refuses.
        seconds = max(math.ceil(settings.heartbeat), math.ceil(settings.heartbeat_timeout / 128))
        probes = max(1, math.ceil(settings.heartbeat_timeout / seconds) - 1)
        with suppress(OSError):  # it has hung up already
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, seconds)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, probes)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _read(self, connection: Connection) -> None:
        try:
            connection.read(time.monotonic())
        except WireError as problem:
            self._hang_up(connection, problem.reason, str(problem))
        self._see(connection)

    def _parse(self, connection: Connection) -> None:
        try:
            connection.parse()
        except WireError as problem:
            self._hang_up(connection, problem.reason, str(problem))

    def _see(self, connection: Connection) -> None:
        """What became of it: let in, gone, or with something to take."""
        if connection in self._handshakes and connection.link.is_ready:
            del self._handshakes[connection]
            if self.kind == "sub":
                for topic in self._settings.topics or ("",):
                    connection.link.subscribe(topic.encode("utf-8"))
        if connection.is_gone and not connection.is_closed:
            if connection in self._handshakes:
                why = "the other side hung up: no ZeroMQ, or without CURVE keys"
                self._hang_up(connection, "broken_off", why)
            else:
                self._hang_up(connection)
        if connection.settle():
            self._turns.setdefault(connection, None)
            return
        self._turns.pop(connection, None)
        if connection.is_over:
            self._connections.pop(connection, None)
            connection.link.close()

    def _hang_up(
        self, connection: Connection, why: str | None = None, text: str = "", forget: bool = False
    ) -> None:
        """Close it. `why`, a counter's label, and `text`: where it was refused."""
        if connection.is_closed:
            return
        if why is not None:
            self._counters.zmq_refused.labels(why).inc()
            self._throttle.warning(f"ZeroMQ connection refused ({why})", f"{connection.name}: {text}")
            connection.write()  # an error, perhaps, that says why
        self._counters.peers_disconnected.inc()
        self._handshakes.pop(connection, None)
        with suppress(KeyError):
            self._selector.unregister(connection.socket)
        connection.close(forget)
        dialer = self._dialed.pop(connection, None)
        if dialer is not None:
            dialer.lost(time.monotonic(), connection.link.is_ready, refused=why is not None)
            self._dialing.append(dialer)
        self._changed.add(connection)

    # Between two looks at the selector

    def _see_changes(self) -> None:
        """Wait of each connection for what it can do now, and for nothing else."""
        while self._changed:
            connection = self._changed.pop()
            if connection not in self._connections:
                continue
            self._parse(connection)
            self._see(connection)
            if connection.is_closed:
                continue
            if not connection.is_gone:
                connection.write()
            wanted = selectors.EVENT_READ if connection.wants_to_read else 0
            wanted |= selectors.EVENT_WRITE if connection.wants_to_write else 0
            self._watch(connection, wanted)

    def _watch(self, connection: Connection, wanted: int) -> None:
        known = self._selector.get_map().get(connection.socket)
        # Of a connection that is not to be read nothing is asked: that its other side has gone would be told
        # again and again.
        if known is None:
            if wanted:
                self._selector.register(connection.socket, wanted, connection)
        elif not wanted:
            self._selector.unregister(connection.socket)
        elif known.events != wanted:
            self._selector.modify(connection.socket, wanted, connection)

    def _look_at_clock(self, now: float) -> None:
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        if self._full_until and now >= self._full_until:
            self._let_in(True)
        while self._handshakes:
            oldest = next(iter(self._handshakes))
            if now - oldest.clocks.opened <= _HANDSHAKE_SECONDS:
                break
            self._hang_up(oldest, "silent", f"no handshake within {_HANDSHAKE_SECONDS:g} s")
        for dialer in list(self._dialing):
            plain = dialer.step(now)
            if plain is not None:
                self._dialing.remove(dialer)
                self._begin(plain, dialer.endpoint.address, dialer)
        if self.kind == "sub":
            for connection in list(self._connections):
                self._ask(connection, now)
        self._bound_memory()

    def _bound_memory(self) -> None:
        held = {connection: connection.held_bytes for connection in self._connections}
        total = sum(held.values())
        most = max(_WAITING_BYTES, 8 * self._settings.max_message_bytes)
        while total > most:
            largest = max(held, key=held.__getitem__)
            total -= held.pop(largest)
            text = f"more than {most} bytes wait to be taken, of which it has the most"
            self._hang_up(largest, "memory", text, forget=True)
            largest.close(forget=True)  # it may have hung up itself
            self._changed.add(largest)

    def _ask(self, connection: Connection, now: float) -> None:
        """A publisher that answers no ping is dead. Our pings ask it to come again when it hears none."""
        settings, clocks = self._settings, connection.clocks
        if connection.is_held or connection.is_gone or not connection.link.knows_pings:
            return
        if clocks.asked and now - clocks.asked > settings.heartbeat_timeout:
            self._hang_up(connection)
        elif now - max(clocks.heard, clocks.pinged) > settings.heartbeat and connection.link.is_ready:
            connection.link.ping(settings.heartbeat_timeout)
            clocks.pinged, clocks.asked = now, clocks.asked or now
            self._changed.add(connection)

    def _let_in(self, let_in: bool) -> None:
        """Take new connections, or leave them in the kernel's queue for a moment."""
        self._full_until = 0.0 if let_in else time.monotonic() + _FULL_SECONDS
        for listener in self._listeners:
            is_known = listener.socket in self._selector.get_map()
            if let_in and not is_known:
                self._selector.register(listener.socket, selectors.EVENT_READ, listener)
            elif not let_in and is_known:
                self._selector.unregister(listener.socket)

    def __enter__(self) -> ZmqSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _mechanism(settings: ZmqSettings) -> Mechanism:
    if settings.curve is None:
        return Plain()
    from stream.zmtp_curve import CurveServer

    clients = read_clients(settings.curve.clients)
    return CurveServer(read_secret(settings.curve.secret), clients.__contains__)
