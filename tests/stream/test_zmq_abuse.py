"""Producers that misbehave: whoever leaves, floods, stays silent or half says something harms nobody else."""

from __future__ import annotations

import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import zmq

from stream import zmq_connection, zmq_source
from stream.counters import Counters
from stream.zmq_connection import Connection
from stream.zmq_producer import open_producer
from stream.zmq_settings import ZmqSettings
from stream.zmq_source import ZmqSource
from stream.zmtp import Link, Payload, Ping, Plain
from tests.stream.served import drain, exchange, produce, receive, send_all, serve_until

GREETING = b"\xff" + bytes(7) + b"\x01\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x04\x1a\x05READY\x0bSocket-Type\x00\x00\x00\x04PUSH"
PING = b"\x04\x07\x04PING\x00\x00"
# A service whose engine is busy for a while, and takes what there is afterwards.
BUSY = """
import sys, time
from stream.counters import Counters
from stream.zmq_settings import ZmqSettings
from stream.zmq_source import ZmqSource
with ZmqSource(ZmqSettings(endpoint="tcp://127.0.0.1:*", high_water_mark=16), Counters()) as source:
    print(source.address, flush=True)
    source.wait(30)
    print("there", flush=True)
    sys.stdin.readline()
    count, end = 0, time.monotonic() + 2
    while time.monotonic() < end:
        if source.wait(0.1):
            count += source.receive() is not None
    print(count, flush=True)
"""


@pytest.fixture
def source() -> Iterator[ZmqSource]:
    settings = ZmqSettings(endpoint="tcp://127.0.0.1:*", max_message_bytes=1 << 20, high_water_mark=16)
    with ZmqSource(settings, Counters()) as opened:
        yield opened


def raw(source: ZmqSource | str, *said: bytes) -> socket.socket:
    address = source if isinstance(source, str) else source.address
    connection = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])))
    for data in said:
        connection.sendall(data)
    return connection


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def refused(source: ZmqSource, why: str) -> float:
    return source._counters.snapshot().get(f"zmq_refused{{{why}}}", 0.0)


@pytest.mark.parametrize("pings", [False, True])
def test_a_producer_that_leaves_while_its_queue_is_full_harms_nobody(pings: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as service:
        assert service.stdout is not None
        connection = raw(service.stdout.readline().strip(), GREETING, READY)
        assert connection.recv(64)
        for _ in range(400):
            connection.sendall(b"\x00\x64" + bytes(100) + (PING if pings else b""))
        assert service.stdout.readline() == "there\n"
        time.sleep(0.3)
        reset(connection)
        time.sleep(0.3)
        rest, _ = service.communicate("go\n", timeout=60)
    assert service.returncode == 0
    assert int(rest) > 16  # and what it had sent is not lost with it


def test_nothing_is_lost_of_a_producer_that_pings_and_leaves(source: ZmqSource) -> None:
    def leave() -> None:
        with zmq.Context() as context, context.socket(zmq.PUSH) as leaver:
            leaver.heartbeat_ivl, leaver.heartbeat_timeout, leaver.linger = 20, 60_000, 20_000
            leaver.connect(source.address)
            for number in range(2000):
                leaver.send(number.to_bytes(4, "big") + bytes(996))

    found = exchange(source, leave)
    assert [int.from_bytes(data[:4], "big") for data in found] == list(range(2000))


def shaken(source: ZmqSource) -> socket.socket:
    """A connection behind its handshake, of which it has read everything."""
    connection = raw(source, GREETING, READY)
    serve_until(source, lambda: any(known.link.is_ready for known in source._connections))
    left = len(GREETING) + len(READY)
    while left:
        left -= len(connection.recv(left))
    return connection


def test_nobody_is_answered_before_what_came_since_the_last_look_is_read(source: ZmqSource) -> None:
    connection = shaken(source)
    connection.sendall(b"\x00\x01A" + PING + b"\x00\x01B")
    assert source.wait(20)
    message = b"\x02" + (10_000).to_bytes(8, "big") + bytes(10_000)
    connection.setblocking(False)
    whole, sent = 2, len(message)
    while sent == len(message):  # as much as the kernel takes, the last not whole
        sent = 0
        with suppress(BlockingIOError):
            while sent < len(message):
                sent += connection.send(message[sent:])
        whole += sent == len(message)
    connection.close()
    assert len(drain(source)) == whole


def test_a_ping_at_the_very_end_of_what_is_read_at_once_is_answered(
    source: ZmqSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zmq_connection, "_RECV_BYTES", 1024)
    monkeypatch.setattr(Connection, "_scratch", memoryview(bytearray(1024)))
    with shaken(source) as connection:
        size = 1024 - len(PING) - 9
        connection.sendall(b"\x02" + size.to_bytes(8, "big") + bytes(size) + PING)
        connection.setblocking(False)
        assert receive(source) == bytes(size)
        serve_until(source, lambda: bool(select.select([connection], [], [], 0)[0]))
        assert connection.recv(64) == b"\x04\x05\x04PONG"


def test_what_a_lost_connection_took_with_it_is_sent_again(source: ZmqSource) -> None:
    settings = ZmqSettings(endpoint=source.address, high_water_mark=16)
    producer = produce(source, source.address)
    for number in range(100):
        producer.send_bytes(b"%d" % number)
    first = [receive(source) for _ in range(10)]
    source.close()  # and with it, what was not taken
    with ZmqSource(settings, Counters()) as successor:
        found = exchange(successor, producer.close)
    assert first == [b"%d" % number for number in range(10)]
    # From a message that had been taken, perhaps: the service drops what it has had.
    assert found == [b"%d" % number for number in range(int(found[0]), 100)]
    assert int(found[0]) <= 10


def test_silent_connections_give_way_to_those_that_speak(source: ZmqSource) -> None:
    most = zmq_source._MAX_HANDSHAKES
    silent = []
    try:
        for number in range(2 * most):
            silent.append(raw(source, *([GREETING[: number % 64]] if number % 2 else [])))
            if number % 50 == 0:
                source.wait(0)
        assert exchange(source, send_all(source.address, b"hello")) == [b"hello"]
        assert len(source._connections) <= most + 1
        serve_until(source, lambda: refused(source, "silent") >= most)
    finally:
        for connection in silent:
            connection.close()
    serve_until(source, lambda: not source._connections)


def test_without_descriptors_those_who_are_in_go_on_and_others_come_later(source: ZmqSource) -> None:
    first = produce(source, source.address)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    late = socket.socket()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(late.fileno() + 1, 16), limit[1]))
        late.connect(("127.0.0.1", int(source.address.rpartition(":")[2])))
        late.sendall(GREETING + READY + b"\x00\x04late")
        first.send_bytes(b"first")
        assert exchange(source, first.close) == [b"first"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert receive(source) == b"late"
    late.close()


def test_messages_that_never_become_whole_are_bounded_in_all(
    source: ZmqSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zmq_source, "_WAITING_BYTES", 4 << 20)
    size = 2 << 20
    stalled = []
    for _ in range(12):
        stalled.append(raw(source, GREETING, READY, b"\x02" + size.to_bytes(8, "big")))
        source.wait(0.0)
        exchange(source, lambda connection=stalled[-1]: connection.sendall(bytes(size - 1)))
    known = list(source._connections)
    serve_until(source, lambda: refused(source, "memory") >= 3)
    ended = [connection for connection in known if connection.is_closed]
    assert not any(connection.link.buffered for connection in ended), "kept by whoever remembers them"
    assert sum(connection.held_bytes for connection in source._connections) <= 8 << 20
    assert exchange(source, send_all(source.address, b"hello")) == [b"hello"]
    for connection in stalled:
        connection.close()


def test_empty_messages_take_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_source, "_WAITING_BYTES", 1)
    source = ZmqSource(
        ZmqSettings(endpoint="tcp://127.0.0.1:*", max_message_bytes=1024, high_water_mark=10_000), Counters()
    )
    with source, raw(source, GREETING, READY) as flood:
        flood.sendall(b"\x00\x00" * 5_000)
        deadline = time.monotonic() + 20
        while not refused(source, "memory"):  # of which nothing is taken
            assert time.monotonic() < deadline
            source.wait(0.01)
            time.sleep(0.01)


def test_an_answer_counts_although_the_connection_was_reset_behind_it() -> None:
    def serve(listener: socket.socket, most: int) -> list[bytes]:
        connection, _ = listener.accept()
        link = Link("PULL", ("PUSH",), Plain(), 1024)
        found: list[bytes] = []
        while True:
            item = link.next()
            if isinstance(item, Payload):
                found.append(item.first)
            elif isinstance(item, Ping):
                link.pong(item)
            connection.sendall(link.output)
            link.output.clear()
            if isinstance(item, Ping) and len(found) == most:
                reset(connection)
                return found
            if item is None:
                link.feed(connection.recv(4096))

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        first = pool.submit(serve, listener, 4)
        producer = open_producer(f"tcp://127.0.0.1:{listener.getsockname()[1]}", high_water_mark=16)
        for number in range(4):
            producer.send_bytes(b"%d" % number)  # the last one with a ping behind it
        assert first.result(20) == [b"0", b"1", b"2", b"3"]
        second = pool.submit(serve, listener, 4)
        for number in range(4, 8):
            producer.send_bytes(b"%d" % number)
        producer.close()
        assert second.result(20) == [b"4", b"5", b"6", b"7"]


def test_a_service_that_waits_costs_next_to_nothing_whatever_its_peers_do(source: ZmqSource) -> None:
    gone = [raw(source, GREETING, READY, b"\x00\x01a" * 40) for _ in range(20)]
    serve_until(source, lambda: len(source._turns) == 20)
    for number, connection in enumerate(gone):  # hung up, reset, and not read to their end
        reset(connection) if number % 2 else connection.close()
    held = []
    while source.wait(0.1) and (received := source.receive()) is not None:
        source.hold(received)
        held.append(received.connection)
    before = time.process_time()
    assert not source.wait(1.0)
    assert time.process_time() - before < 0.5
    for connection in held:
        source.release(connection)
    assert len(drain(source, 0.2)) >= 20
    assert not source._connections


def test_a_producer_that_is_killed_says_nothing_of_what_it_had_not_sent(source: ZmqSource) -> None:
    script = (
        "import sys; from stream.zmq_producer import open_producer\n"
        "producer = open_producer(sys.argv[1])\n"
        "while True: producer.send_bytes(bytes(1000))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, source.address]) as process:
        serve_until(source, lambda: bool(source._turns), 30)
        process.send_signal(signal.SIGKILL)
    drain(source, 0.3)
    assert not source._connections
    with pytest.raises(Exception, match="nobody answers"):
        open_producer(source.address, connect_timeout=0.3)  # nobody serves it now
