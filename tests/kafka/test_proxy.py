"""The network that can be cut: what passes, what is refused, what is only late."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from tests.kafka.ports import free_port
from tests.kafka.proxy import Proxy


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """A proxy before a server that says everything back."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=echo, args=(connection,), daemon=True).start()

        def echo(connection: socket.socket) -> None:
            with connection:
                try:
                    while data := connection.recv(65536):
                        connection.sendall(data)
                except ConnectionError:
                    pass

        threading.Thread(target=serve, daemon=True).start()
        with Proxy(server.getsockname()[1]) as proxy:
            yield proxy
        server.shutdown(socket.SHUT_RDWR)


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=30)


def said_back(connection: socket.socket, data: bytes) -> bytes:
    connection.sendall(data)
    heard = b""
    while len(heard) < len(data) and (more := connection.recv(len(data) - len(heard))):
        heard += more
    return heard


def test_bytes_pass_both_ways(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        assert said_back(connection, b"x" * 100_000) == b"x" * 100_000


def test_a_cut_resets_what_is_connected_and_refuses_what_comes(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        assert said_back(connection, b"a") == b"a"
        proxy.cut()
        with pytest.raises(ConnectionError):
            raise_unless_open(connection)
        with pytest.raises(ConnectionError), connect(proxy) as other:
            raise_unless_open(other)
    proxy.restore()
    with connect(proxy) as connection:
        assert said_back(connection, b"b") == b"b"


def raise_unless_open(connection: socket.socket) -> None:
    if not said_back(connection, b"?"):
        raise ConnectionError("closed")


def test_a_silent_cut_holds_back_and_loses_nothing(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        assert said_back(connection, b"a") == b"a"
        proxy.cut(silently=True)
        connection.sendall(b"b")
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        proxy.restore()
        connection.settimeout(30)
        assert connection.recv(1) == b"b"


def test_a_server_that_is_down_looks_down(proxy: Proxy) -> None:
    with Proxy(free_port()) as proxy, pytest.raises(ConnectionError), connect(proxy) as connection:
        raise_unless_open(connection)
