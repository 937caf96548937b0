"""The bytes of ZMTP: what a producer says that uses no library, or one that has gone mad."""

from __future__ import annotations

import contextlib
import socket
import struct

_SIGNATURE = b"\xff" + bytes(7) + b"\x01\x7f"
GREETING = _SIGNATURE + b"\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x04PUSH"
PING = b"\x04PING\x00\x00"


def frame(body: bytes, more: bool = False) -> bytes:
    """A part of a message; `more` of them follow."""
    return _framed(body, int(more))


def command(body: bytes) -> bytes:
    """A command: its name's length, its name, and what it carries."""
    return _framed(body, 4)


def _framed(body: bytes, flags: int) -> bytes:
    if len(body) < 256:
        return bytes([flags, len(body)]) + body
    return bytes([flags | 2]) + struct.pack(">Q", len(body)) + body


def shake_hands(connection: socket.socket) -> None:
    """Become a producer, as far as that takes what we say; what the other side says is not looked at."""
    connection.sendall(GREETING + command(READY))
    with contextlib.suppress(TimeoutError):
        connection.recv(4096)


def reset(connection: socket.socket) -> None:
    """Leave without a word: what was not sent is dropped, and the other side gets a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
