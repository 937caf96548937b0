"""Messages to ZeroMQ from a PUSH socket, each known to have been taken, or told not to be.

ZeroMQ has no acknowledgement, but ZMTP 3.1 has one that serves: who reads a ping answers it, and reads it
behind all that was sent before it. So a ping goes out every few messages, and what is before an answered one
has been taken: by `onset run` into its queues, by another PULL socket into its own. What is not known to have
been taken when a connection is lost is sent again over the next; the service drops what it has had.
"""

from __future__ import annotations

import logging
import select
import socket
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError, OnsetError, WireError
from stream.producing import Producer
from stream.wire import DtypeName, Message, encode
from stream.zmq_dialer import Dialer
from stream.zmq_endpoint import Endpoint, listen, parse_endpoint
from stream.zmq_keys import ClientKeys
from stream.zmq_publisher import ZmqPublisher
from stream.zmtp import Link, Mechanism, Ping, Plain, Pong

log = logging.getLogger(__name__)

# A full queue is normal while the service works; after this long it is worth a line in the log.
_PATIENCE_SECONDS = 10.0
_LOOK_SECONDS = 0.02
_HANDSHAKE_SECONDS = 10.0
# What may be on its way: `high_water_mark` messages, or so many bytes. Pings come more often.
_MOST_BYTES = 64 * 1024 * 1024
_ASK_BYTES = 1024 * 1024
# What is handed to the kernel at once.
_OUTPUT_BYTES = 256 * 1024
_ANSWER_BYTES = 64 * 1024
_NUMBER_BYTES = 8
_REFUSALS = {
    "peer_refuses": "its public key is not among the service's `curve.clients`",
    "mechanism": "one of the two uses CURVE keys and the other does not (--server-key and --key here, "
    "`curve` there)",
}


def open_producer(
    endpoint: str,
    connect_timeout: float = 10.0,
    linger: float = 60.0,
    high_water_mark: int = 1024,
    curve: ClientKeys | None = None,
) -> ZmqProducer | ZmqPublisher:
    """A `ZmqProducer`, or for pub+bind:URI and pub+connect:URI a `ZmqPublisher`; see there."""
    target = parse_endpoint(endpoint, ("push", "pub"), bind=False)
    kind = ZmqPublisher if target.kind == "pub" else ZmqProducer
    return kind(endpoint, connect_timeout, linger, high_water_mark, curve)


@dataclass(frozen=True, slots=True)
class _Sent:
    """One message; `first` sample and one past the last, for what is told of it."""

    data: bytes
    stream: str | None = None
    first: int = 0
    stop: int = 0
    end: bool = False


class ZmqProducer(Producer):
    """A connected (or bound) PUSH socket; a context manager. One thread owns it."""

    def __init__(
        self,
        endpoint: str,
        connect_timeout: float = 10.0,
        linger: float = 60.0,
        high_water_mark: int = 1024,
        curve: ClientKeys | None = None,
    ) -> None:
        """Connect, and wait up to `connect_timeout` seconds for someone to be there.

        `endpoint`: push+connect:URI, push+bind:URI; a plain URI is the first. `linger`: how many seconds
        `close` waits while nothing more is taken. `high_water_mark`: messages that may be on their way.

        Raises ConfigError when nobody is there, or the one who is refuses us.
        """
        self._name, self._linger, self._most = endpoint, linger, high_water_mark
        target = parse_endpoint(endpoint, ("push",), bind=False)
        self._way: Dialer | _Door = _Door(target) if target.bind else Dialer(target)
        self._mechanism = _mechanism(curve)
        self._socket: socket.socket | None = None
        self._link: Link | None = None
        self._since = 0.0  # when this connection began
        self._is_ready = False
        self._sent: deque[_Sent] = deque()  # not known to have been taken, oldest first
        # Messages are numbered from 0: up to here they were taken, handed to the connection, asked about.
        self._taken = self._fed = self._asked = 0
        self._bytes = self._unasked = 0  # in `_sent`; and since the last question
        deadline = time.monotonic() + connect_timeout
        try:
            while not self._is_ready:
                self._pump(_LOOK_SECONDS, is_first=True)
                if time.monotonic() >= deadline and not self._is_ready:
                    raise ConfigError(
                        f"nobody answers at {endpoint!r} after {connect_timeout:g} s; is `onset run` "
                        "listening there? Its log says whether it refused somebody"
                    )
        except BaseException:
            self._abandon()
            raise

    def send(self, message: Message, dtype: DtypeName = "float32", scale: float | None = None) -> None:
        """See `Producer.send`; blocks while too many are on their way."""
        stop = message.seq + len(message.samples)
        data = encode(message, dtype, scale)
        self._send(_Sent(data, message.stream, message.seq, stop, message.end))

    def send_bytes(self, data: bytes, topic: bytes = b"") -> None:
        """Send what was encoded elsewhere; blocks while too many are on their way."""
        self._send(_Sent(data))

    def close(self) -> None:
        """Wait until everything was taken. Raises OnsetError when nothing more is for `linger` seconds, and
        says what is not known to have arrived."""
        stood, before = time.monotonic(), self._taken
        try:
            while self._sent:
                self._ask()
                self._pump(_LOOK_SECONDS)
                if self._taken != before:
                    stood, before = time.monotonic(), self._taken
                elif time.monotonic() - stood >= self._linger:
                    raise OnsetError(
                        f"{self._name} did not take everything: nothing more within {self._linger:g} s. Not "
                        f"known to have arrived: {_told(self._sent)}"
                    )
        finally:
            self._abandon()

    def _send(self, sent: _Sent) -> None:
        self._sent.append(sent)
        self._bytes += len(sent.data)
        self._pump(0.0)
        stood, before = time.monotonic(), self._taken
        while len(self._sent) >= self._most or self._bytes >= _MOST_BYTES:
            self._ask()
            self._pump(_LOOK_SECONDS)
            if self._taken != before:
                stood, before = time.monotonic(), self._taken
            elif time.monotonic() - stood >= _PATIENCE_SECONDS:
                log.warning("waiting for %s to take more; is it still running?", self._name)
                stood = time.monotonic()

    def _pump(self, seconds: float, is_first: bool = False) -> None:
        """Send and read as far as it goes; wait up to so long for more."""
        if self._link is None and not self._connect(seconds):
            return
        assert self._link is not None
        try:
            self._exchange(self._link, seconds)
            if not self._is_ready and time.monotonic() - self._since > _HANDSHAKE_SECONDS:
                raise WireError("silent", "the other side says nothing")
        except (OSError, WireError) as problem:
            if is_first and isinstance(problem, WireError) and isinstance(self._way, Dialer):
                why = _REFUSALS.get(problem.reason, str(problem))
                raise ConfigError(f"{self._name} refuses this producer: {why}") from None
            self._lose(problem)

    def _connect(self, seconds: float) -> bool:
        plain = self._way.step(time.monotonic())
        if plain is None:
            time.sleep(min(seconds, _LOOK_SECONDS))
            return False
        plain.setblocking(False)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket, self._since = plain, time.monotonic()
        self._link = Link("PUSH", ("PULL",), self._mechanism, _ANSWER_BYTES)
        return True

    def _exchange(self, link: Link, seconds: float) -> None:
        """Raises OSError when the connection is lost, WireError when the other side is none for us."""
        self._feed(link)
        self._write(link)
        self._hear(link, seconds)
        if link.is_ready and not self._is_ready:
            self._is_ready = True
            if not link.knows_pings:
                log.warning("%s speaks ZMTP 3.0, which has no acknowledgement", self._name)
        self._feed(link)
        self._write(link)

    def _hear(self, link: Link, seconds: float) -> None:
        """Read once, and heed what comes. Raises as `_exchange`."""
        self._read(link, seconds)
        while (item := link.next()) is not None:
            if isinstance(item, Ping):
                link.pong(item)
            elif isinstance(item, Pong) and len(item.context) == _NUMBER_BYTES:
                self._acknowledge(int.from_bytes(item.context, "big"))

    def _feed(self, link: Link) -> None:
        """Hand messages to the connection, each once, and ask about them now and then."""
        while (
            self._is_ready and len(link.output) < _OUTPUT_BYTES and self._fed < self._taken + len(self._sent)
        ):
            data = self._sent[self._fed - self._taken].data
            link.send(data)
            self._fed += 1
            self._unasked += len(data)
            if self._fed - self._asked >= max(1, self._most // 4) or self._unasked >= _ASK_BYTES:
                self._ask()

    def _ask(self) -> None:
        """Was everything taken that this connection was given?"""
        if self._is_ready and self._link is not None and self._asked < self._fed:
            self._link.ping(context=self._fed.to_bytes(_NUMBER_BYTES, "big"))
            self._asked, self._unasked = self._fed, 0

    def _acknowledge(self, number: int) -> None:
        """The messages before this one were taken."""
        while self._taken < min(number, self._fed):
            self._bytes -= len(self._sent.popleft().data)
            self._taken += 1

    def _write(self, link: Link) -> None:
        assert self._socket is not None
        try:
            while link.output:
                del link.output[: self._socket.send(link.output)]
        except (BlockingIOError, InterruptedError):
            return
        if self._is_ready and not link.knows_pings:
            self._acknowledge(self._fed)  # the kernel has it, and more will never be known

    def _read(self, link: Link, seconds: float) -> None:
        assert self._socket is not None
        if seconds:
            poller = select.poll()
            poller.register(self._socket, select.POLLIN | (select.POLLOUT if link.output else 0))
            poller.poll(seconds * 1000)
        try:
            data = self._socket.recv(_ANSWER_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        if not data:
            raise ConnectionResetError("the other side hung up")
        link.feed(data)

    def _lose(self, problem: Exception) -> None:
        """Another connection takes over what is not known to have arrived."""
        assert self._socket is not None
        assert self._link is not None
        if isinstance(problem, OSError):
            with suppress(OSError, WireError):  # what could not be sent met an end; answers came before it
                self._hear(self._link, 0.0)
        if self._is_ready or isinstance(problem, WireError):
            log.warning("%s: %s; %d messages are to be sent again", self._name, problem, len(self._sent))
        self._socket.close()
        self._way.lost(time.monotonic(), self._is_ready, refused=isinstance(problem, WireError))
        self._socket = self._link = None
        self._is_ready = False
        self._fed = self._asked = self._taken
        self._unasked = 0

    def _abandon(self) -> None:
        self._way.close()
        if self._socket is not None:
            self._socket.close()


class _Door:
    """As a `Dialer`, for whoever binds: others connect, and one at a time is let in."""

    def __init__(self, endpoint: Endpoint) -> None:
        """Raises ConfigError."""
        self._listener, _ = listen(endpoint)
        self._path = endpoint.path

    def step(self, now: float) -> socket.socket | None:
        """See `Dialer.step`."""
        try:
            return self._listener.accept()[0]
        except OSError:  # nobody yet, or gone again
            return None

    def lost(self, now: float, went_well: bool, refused: bool = False) -> None:
        """See `Dialer.lost`."""

    def close(self) -> None:
        """See `Dialer.close`."""
        self._listener.close()
        if self._path is not None and not self._path.startswith("@"):
            Path(self._path).unlink(missing_ok=True)


def _mechanism(curve: ClientKeys | None) -> Mechanism:
    if curve is None:
        return Plain()
    from stream.zmtp_curve import CurveClient

    return CurveClient(curve)


def _told(messages: Iterable[_Sent]) -> str:
    """Which samples these are, by stream."""
    streams: dict[str | None, tuple[int, int, bool]] = {}
    others = 0
    for sent in messages:
        if sent.stream is None:
            others += 1
            continue
        first, stop, end = streams.get(sent.stream, (sent.first, sent.stop, False))
        streams[sent.stream] = min(first, sent.first), max(stop, sent.stop), end or sent.end
    parts = [
        f"{stream!r} from sample {first} to {stop - 1}{', and its end' if end else ''}"
        for stream, (first, stop, end) in list(streams.items())[:5]
    ]
    if len(streams) > 5:
        parts.append(f"samples of {len(streams) - 5} more streams")
    if others:
        parts.append(f"{others} messages")
    return "; ".join(parts)
