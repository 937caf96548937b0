"""ZMTP 3.1, the protocol of ZeroMQ on the wire (its RFCs 23 and 37): one connection, without a socket.

`feed` takes the bytes that came, `next` says what they mean, and `output` holds the bytes to be sent. What
breaks the protocol raises WireError, whose `reason` is a counter's label: the connection is to be closed.

Why not libzmq, which producers use: it ends the whole process when a producer that pings leaves while its
queue is full (an assertion in its I/O thread, which whoever reaches the port can provoke; seen with 4.3.5),
and a PULL socket can keep no single producer waiting. Here no native code parses what the network sends, and
each connection is read, or left waiting, by itself.

Memory: what was fed and not read yet, and two parts of a message; `max_part` bounds each. Of a message with
more parts the rest is counted and thrown away.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from engine.errors import WireError

T = TypeVar("T")
Reading = Generator[None, None, T]
"""Yields whenever it lacks bytes; returns what it read."""

# Bits of a frame's first byte.
_MORE, _LONG, _COMMAND = 1, 2, 4
_SIGNATURE_BYTES, _GREETING_BYTES = 10, 64
_VERSION = bytes((3, 1))
# A handshake's commands carry some names and keys.
_MAX_HANDSHAKE_BYTES = 8 * 1024
# A ping's context, which its answer repeats.
MAX_CONTEXT_BYTES = 16


@dataclass(frozen=True, slots=True)
class Payload:
    """A message: its first two parts, and how many it had."""

    first: bytes
    second: bytes
    parts: int


@dataclass(frozen=True, slots=True)
class Ping:
    """The other side asks for a sign of life; `pong` gives it."""

    context: bytes


@dataclass(frozen=True, slots=True)
class Pong:
    """The other side has read everything before the ping with this context."""

    context: bytes


Item = Payload | Ping | Pong


class Boxes(Protocol):
    """Encryption between two sides that know each other's keys."""

    overhead: int
    """bytes by which a part grows"""

    def seal(self, flags: int, body: bytes) -> bytes:
        """What travels in place of a part. `flags`: 1 more parts follow, 2 it is a command."""
        ...

    def open(self, body: bytes) -> tuple[int, bytes]:
        """(flags, part). Raises WireError."""
        ...


class Mechanism(Protocol):
    """How two sides get to know each other."""

    name: bytes
    is_server: bool

    def shake_hands(self, link: Link) -> Reading[tuple[Mapping[str, bytes], Boxes | None]]:
        """The handshake behind the greeting; returns the peer's properties, and boxes. Raises WireError."""
        ...


class Plain:
    """The NULL mechanism: no keys."""

    name, is_server = b"NULL", False

    def shake_hands(self, link: Link) -> Reading[tuple[Mapping[str, bytes], Boxes | None]]:
        """See `Mechanism.shake_hands`."""
        link.send_command(b"READY", link.properties())
        command = yield from link.read_command()
        return read_properties(expect(command, b"READY")), None


class Link:
    """One connection, from its greeting on."""

    def __init__(self, kind: str, peers: tuple[str, ...], mechanism: Mechanism, max_part: int) -> None:
        """`kind`: the type of our socket (PULL, SUB, PUSH); `peers`: those that it talks to."""
        self._kind, self._peers, self._mechanism, self._max_part = kind, peers, mechanism, max_part
        self._input = bytearray()
        self.output = bytearray()
        """bytes to be sent; whoever sends them deletes them"""
        self.is_ready = False
        """the handshake is over"""
        self._minor = 0
        self._boxes: Boxes | None = None
        self._heard: Item | None = None
        self._steps = self._run()

    @property
    def buffered(self) -> int:
        """Bytes that were fed and not read yet."""
        return len(self._input)

    def feed(self, data: bytes | memoryview) -> None:
        """Bytes that came."""
        self._input += data

    def next(self) -> Item | None:
        """What comes next; None: that takes more bytes. Raises WireError; then nothing comes any more."""
        next(self._steps, None)
        item, self._heard = self._heard, None  # nothing else here holds on to a message that was taken
        return item

    def close(self) -> None:
        """Nothing more is said or heard: hold on to no memory."""
        self._steps.close()
        self._heard = None
        self._input, self.output = bytearray(), bytearray()

    def send(self, body: bytes, more: bool = False) -> None:
        """Enqueue one part of a message."""
        self._send(0, body, more)

    def subscribe(self, topic: bytes) -> None:
        """Ask a publisher for messages that begin so."""
        if self._minor:
            self._send(_COMMAND, b"\x09SUBSCRIBE" + topic, False)
        else:
            self._send(0, b"\x01" + topic, False)

    def ping(self, ttl: float = 0.0, context: bytes = b"") -> None:
        """Ask for a sign of life, where the peer knows pings (ZMTP 3.1); it answers in turn.

        `ttl`: seconds after which the peer is to hang up if it hears nothing more; 0: never.
        """
        if self._minor:
            self._send(
                _COMMAND, b"\x04PING" + min(0xFFFF, round(ttl * 10)).to_bytes(2, "big") + context, False
            )

    def pong(self, ping: Ping) -> None:
        """Answer a ping."""
        self._send(_COMMAND, b"\x04PONG" + ping.context, False)

    @property
    def knows_pings(self) -> bool:
        """Whether the peer speaks ZMTP 3.1."""
        return self._minor > 0

    # For mechanisms

    def properties(self) -> bytes:
        """What the peer has to know of us."""
        kind = self._kind.encode("ascii")
        return b"\x0bSocket-Type" + len(kind).to_bytes(4, "big") + kind

    def send_command(self, name: bytes, data: bytes) -> None:
        """Enqueue a command of the handshake."""
        self._frame(_COMMAND, bytes((len(name),)) + name + data)

    def read_command(self) -> Reading[bytes]:
        """The next command of the handshake."""
        flags, body = yield from self._read_frame(_MAX_HANDSHAKE_BYTES)
        if not flags & _COMMAND:
            raise WireError("protocol", "a message came before the end of the handshake")
        if body.startswith(b"\x05ERROR"):
            reason = body[7:47].decode("ascii", "replace")
            raise WireError("peer_refuses", f"the other side refuses this one: {reason!r}")
        return body

    # From here on private

    def _run(self) -> Reading[None]:
        """Stops at each item, which it leaves in `_heard`, and where it lacks bytes."""
        self.output += _greeting(self._mechanism)
        yield from self._read_greeting()
        properties, self._boxes = yield from self._mechanism.shake_hands(self)
        self._check(properties)
        self.is_ready = True
        limit = self._max_part + (0 if self._boxes is None else self._boxes.overhead)
        first, second, parts = b"", b"", 0
        while True:
            flags, body = yield from self._read_frame(limit)
            if self._boxes is not None:
                inner, body = self._boxes.open(body)
                flags = (inner & _MORE) | (_COMMAND if inner & 2 else 0)
            if flags & _COMMAND:
                self._heard = _control(body)
                if self._heard is not None:
                    yield
                continue
            parts += 1
            if parts == 1:
                first = body
            elif parts == 2:
                second = body
            body = b""
            if not flags & _MORE:
                self._heard = Payload(first, second, parts)
                first, second, parts = b"", b"", 0
                yield

    def _read_greeting(self) -> Reading[None]:
        _check_opening(self._input)
        while len(self._input) <= _SIGNATURE_BYTES:
            yield
            _check_opening(self._input)
        head = yield from self._read(_SIGNATURE_BYTES + 1)
        if head[-1] < 3:
            raise WireError("protocol", "the other side speaks ZMTP 2 or older, expected 3 (libzmq 4)")
        rest = yield from self._read(_GREETING_BYTES - len(head))
        self._minor = rest[0] if head[-1] == 3 else 1
        name = rest[1:21].rstrip(b"\0")
        if name != self._mechanism.name:
            raise WireError(
                "mechanism",
                "one side uses CURVE keys and the other does not; see `curve` of the service, --server-key "
                "and --key of the producer",
            )
        if name != b"NULL" and bool(rest[21]) == self._mechanism.is_server:
            raise WireError("mechanism", "both sides have the same role in CURVE; the service is its server")

    def _check(self, properties: Mapping[str, bytes]) -> None:
        kind = properties.get("socket-type", b"").decode("ascii", "replace")
        if kind not in self._peers:
            raise WireError(
                "socket_type",
                f"the other side is a {kind[:16]!r} socket, expected {' or '.join(self._peers)} for our "
                f"{self._kind}",
            )

    def _read_frame(self, limit: int) -> Reading[tuple[int, bytes]]:
        flags = (yield from self._read(1))[0]
        if flags > 7 or (flags & _COMMAND and flags & _MORE):
            raise WireError("protocol", f"a frame has the flags {flags:#04x}, which ZMTP 3 does not know")
        size = int.from_bytes((yield from self._read(8 if flags & _LONG else 1)), "big")
        if size > limit:
            raise WireError("oversized", f"a message of {size} bytes, {limit} are read at most")
        body = yield from self._read(size)
        return flags, body

    def _read(self, size: int) -> Reading[bytes]:
        while len(self._input) < size:
            yield
        with memoryview(self._input) as view:
            data = bytes(view[:size])
        del self._input[:size]
        return data

    def _send(self, kind: int, body: bytes, more: bool) -> None:
        if self._boxes is None:
            self._frame(kind | (_MORE if more else 0), body)
        else:
            self._frame(0, self._boxes.seal((2 if kind else 0) | (1 if more else 0), body))

    def _frame(self, flags: int, body: bytes) -> None:
        if len(body) < 256:
            self.output += bytes((flags, len(body)))
        else:
            self.output += bytes((flags | _LONG,)) + len(body).to_bytes(8, "big")
        self.output += body


def expect(command: bytes, name: bytes) -> bytes:
    """What a command of this name carries. Raises WireError for another."""
    head = bytes((len(name),)) + name
    if not command.startswith(head):
        raise WireError("protocol", f"another command than {name.decode()} came in the handshake")
    return command[len(head) :]


def read_properties(data: bytes) -> dict[str, bytes]:
    """Names (in lower case) and values. Raises WireError."""
    found: dict[str, bytes] = {}
    at = 0
    while at < len(data):
        name_end = at + 1 + data[at]
        value_at = name_end + 4
        end = value_at + int.from_bytes(data[name_end:value_at], "big")
        if value_at > len(data) or end > len(data):
            raise WireError("protocol", "properties in the handshake are cut short")
        found[data[at + 1 : name_end].decode("ascii", "replace").lower()] = data[value_at:end]
        at = end
    return found


def _control(body: bytes) -> Ping | Pong | None:
    """A command behind the handshake; None for those that are of no concern here."""
    if body.startswith(b"\x04PING"):
        context = body[7:]
        if len(body) < 7 or len(context) > MAX_CONTEXT_BYTES:
            raise WireError("protocol", f"a ping of {len(body)} bytes, expected 7 to {7 + MAX_CONTEXT_BYTES}")
        return Ping(context)
    return Pong(body[5:]) if body.startswith(b"\x04PONG") else None


def _greeting(mechanism: Mechanism) -> bytes:
    signature = b"\xff" + bytes(7) + b"\x01\x7f"
    head = signature + _VERSION + mechanism.name.ljust(20, b"\0") + bytes((mechanism.is_server,))
    return head.ljust(_GREETING_BYTES, b"\0")


def _check_opening(data: bytearray) -> None:
    """Raises WireError as soon as it shows that this is no ZeroMQ."""
    if data and (data[0] != 0xFF or (len(data) >= _SIGNATURE_BYTES and data[9] != 0x7F)):
        raise WireError("protocol", "what the other side says first is no ZMTP 3 greeting: is it ZeroMQ?")
