"""Health over HTTP: `/live`, `/ready` and `/metrics`, from a thread of its own.

Knows no stream and no source: the main loop says that it goes round (`Health.beat`) and which of its
conditions hold (`Health.set`); the metrics are those of a registry. One event loop answers everybody, one
request a connection: a connection costs no thread, has so many seconds in all (a byte a second does not keep
it open), and the oldest gives way to one too many. Nothing a client does is logged. What all of them together
take from the main loop, which runs in the same interpreter, is bounded: so many connections are taken up in a
second, others wait in the kernel, and metrics are rendered for all at once (`stream.exposition`).
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from email.utils import formatdate
from http import HTTPStatus
from types import TracebackType

from prometheus_client import CollectorRegistry
from pydantic import Field, field_validator

from engine.errors import ConfigError
from engine.redaction import redacted
from engine.schema import Strict
from stream.exposition import Exposition

_MAX_REQUEST_BYTES = 16 * 1024
_MAX_CONNECTIONS = 64
# From the connection to the last byte of the answer: a scrape takes milliseconds.
_DEADLINE_SECONDS = 5.0
# Connections taken up in a second, and at once after a pause: a probe costs some 0.2 ms of the interpreter.
_RATE, _BURST = 200, 100
# Those that wait meanwhile; one more is let in by the kernel when it tries again.
_BACKLOG = 128

_TEXT = "text/plain; charset=utf-8"
_Answer = tuple[HTTPStatus, str, bytes]  # with the content's type


class HttpSettings(Strict):
    """Where health and metrics are served. Whoever reaches the port may read them; nothing can be changed."""

    address: str = Field(
        default="127.0.0.1:9464",
        description="HOST:PORT; 0.0.0.0 is every interface, IPv6 goes in brackets, port 0 picks a free one",
    )

    stalled_after: float = Field(
        default=30.0, gt=0, le=3600, description="seconds without a round of the main loop: not alive"
    )

    @field_validator("address")
    @classmethod
    def _readable(cls, address: str) -> str:
        _split(address)
        return address


class Health:
    """What the main loop says about itself; may be asked from any thread."""

    def __init__(
        self,
        needs: Iterable[str],
        stalled_after: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`needs`: the conditions of being ready, none of which holds yet. `stalled_after`: seconds."""
        self._stalled_after, self._clock = stalled_after, clock
        self._beat = clock()
        self._lock = threading.Lock()
        self._missing = dict.fromkeys(needs, "not yet")

    def beat(self) -> None:
        """The main loop has gone round once more."""
        self._beat = self._clock()

    def set(self, name: str, ok: bool, why: str = "") -> None:
        """Whether the condition `name` holds; `why` not, for whoever reads `/ready`."""
        with self._lock:
            if ok:
                self._missing.pop(name, None)
            else:
                self._missing[name] = why

    def stalled(self) -> str | None:
        """A sentence when the main loop has not gone round for too long, else None."""
        silent = self._clock() - self._beat
        if silent <= self._stalled_after:
            return None
        return (
            f"the main loop has not gone round for {silent:.1f} s, "
            f"expected at least every {self._stalled_after:g} s"
        )

    def missing(self) -> Mapping[str, str]:
        """The conditions that do not hold, and why; empty when all is ready. A loop that stands is one."""
        with self._lock:
            missing = dict(self._missing)
        stalled = self.stalled()
        return missing if stalled is None else missing | {"live": stalled}


class HealthServer:
    """Answers HTTP until it is closed; a context manager."""

    def __init__(self, settings: HttpSettings, health: Health, registry: CollectorRegistry) -> None:
        """Raises ConfigError when the address cannot be bound."""
        self._health, self._exposition = health, Exposition(registry)
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}  # oldest first
        listener = _listen(settings.address)
        host, port = listener.getsockname()[:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        """where it really listens: with its port, where the settings left it open"""
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(
            target=self._loop.run_until_complete, args=(self._serve(listener),), name="health", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Hang up on everybody, and stop to listen."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    async def _serve(self, listener: socket.socket) -> None:
        accepting = asyncio.create_task(self._accept(listener))
        await self._stop.wait()
        accepting.cancel()
        for writer in self._open.values():
            writer.transport.abort()
        await asyncio.gather(accepting, *self._open, return_exceptions=True)
        listener.close()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        credit, counted = float(_BURST), loop.time()
        while True:
            now = loop.time()
            credit, counted = min(float(_BURST), credit + _RATE * (now - counted)), now
            if credit < 1.0:
                await asyncio.sleep((1.0 - credit) / _RATE)
                continue
            try:
                client, _ = await loop.sock_accept(listener)
            except OSError:  # gone again already, or this process has no descriptor left: later, perhaps
                await asyncio.sleep(1.0 / _RATE)
                continue
            credit -= 1.0
            try:
                await loop.connect_accepted_socket(self._protocol, client)
            except OSError:
                client.close()

    def _protocol(self) -> asyncio.StreamReaderProtocol:
        return asyncio.StreamReaderProtocol(asyncio.StreamReader(limit=_MAX_REQUEST_BYTES), self._connected)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._open) >= _MAX_CONNECTIONS:
            # Not its task is cancelled, which asyncio would log: without a connection it ends by itself.
            self._open.pop(next(iter(self._open))).transport.abort()
        self._open[task] = writer
        try:
            await asyncio.wait_for(self._exchange(reader, writer), _DEADLINE_SECONDS)
        except (asyncio.TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
            pass  # too slow, too large, or gone: nobody is left to be told
        finally:
            self._open.pop(task, None)
            writer.transport.abort()  # what was drained is the kernel's, which delivers it

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request, one answer."""
        writer.transport.set_write_buffer_limits(0)  # `drain` then returns when nothing is left in here
        request, _, fields = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").partition("\r\n")
        words = request.split(" ")
        if len(words) == 3 and words[2].startswith("HTTP/1."):
            status, kind, body = self._answer(words[0], words[1].partition("?")[0], fields)
        else:
            status, kind, body = HTTPStatus.BAD_REQUEST, _TEXT, b"expected an HTTP/1 request\n"
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\nDate: {formatdate(usegmt=True)}\r\n"
            f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\nCache-Control: no-store\r\n"
            f"{'Allow: GET, HEAD' if status == HTTPStatus.METHOD_NOT_ALLOWED else 'Vary: Accept'}\r\n"
            "Connection: close\r\n\r\n"
        )
        writer.write(head.encode("latin-1") + (b"" if words[0] == "HEAD" else body))
        await writer.drain()

    def _answer(self, method: str, path: str, fields: str) -> _Answer:
        if path not in ("/live", "/ready", "/metrics"):
            return HTTPStatus.NOT_FOUND, _TEXT, b"expected /live, /ready or /metrics\n"
        if method not in ("GET", "HEAD"):
            return HTTPStatus.METHOD_NOT_ALLOWED, _TEXT, b"expected GET or HEAD\n"
        if path == "/metrics":
            return self._metrics(fields)
        if path == "/live":
            stalled = self._health.stalled()
            return _status(stalled is None), _TEXT, f"{stalled or 'alive'}\n".encode()
        missing = self._health.missing()
        told = {name: redacted(why) for name, why in missing.items()}
        body = json.dumps({"ready": not missing, "missing": told}) + "\n"
        return _status(not missing), "application/json", body.encode()

    def _metrics(self, fields: str) -> _Answer:
        pairs = (line.partition(":") for line in fields.split("\r\n"))
        accept = ",".join(value for name, _, value in pairs if name.lower() == "accept")
        kind, body = self._exposition.text(accept if accept.isprintable() else "")
        return HTTPStatus.OK, kind, body

    def __enter__(self) -> HealthServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _status(ok: bool) -> HTTPStatus:
    return HTTPStatus.OK if ok else HTTPStatus.SERVICE_UNAVAILABLE


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not bare or (":" in bare and bare == host) or not (port.isascii() and port.isdigit()):
        raise ValueError("expected HOST:PORT, e.g. 127.0.0.1:9464 or [::1]:9464")
    if int(port) > 65535:
        raise ValueError(f"port {port} is above 65535")
    return bare, int(port)


def _listen(address: str) -> socket.socket:
    try:
        host, port = _split(address)
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, resolved = found[0]
        listener = socket.create_server(resolved[:2], family=family, backlog=_BACKLOG)
        listener.setblocking(False)
        return listener
    except (OSError, UnicodeError) as problem:
        why = getattr(problem, "strerror", None) or str(problem)
        raise ConfigError(
            f"HTTP address {address!r} cannot be bound: {why}; is another service on this port?"
        ) from None
