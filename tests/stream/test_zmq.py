"""The two ends of ZeroMQ, on real sockets: nothing is dropped, sizes are bounded, peers are apart."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import zmq

from engine import ConfigError, OnsetError, WireError
from stream.config import ZmqSettings
from stream.counters import Counters
from stream.wire import Limits, Message, decode
from stream.zmq_endpoint import Endpoint, parse_endpoint
from stream.zmq_producer import open_producer
from stream.zmq_source import ZmqSource
from tests.stream.served import exchange, produce, receive, send_all, serve_until

LOOPBACK = "pull+bind:tcp://127.0.0.1:*"


@pytest.fixture
def source() -> Iterator[ZmqSource]:
    with ZmqSource(
        ZmqSettings(endpoint=LOOPBACK, max_message_bytes=4096, high_water_mark=8), Counters()
    ) as opened:
        yield opened


@pytest.fixture
def push(source: ZmqSource) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.linger = 0
        socket.connect(source.address)
        yield socket


def count(source: ZmqSource, name: str) -> float:
    return source._counters.snapshot()[name]


def test_messages_arrive_whole_and_in_order(source: ZmqSource) -> None:
    samples = np.arange(30, dtype=np.float32).reshape(10, 3)

    def send() -> None:
        with open_producer(source.address) as producer:
            for number in range(5):
                producer.send(Message("a", number * 10, samples, 50.0))

    found = [decode(data, Limits(50.0, 3)) for data in exchange(source, send)]
    assert [message.seq for message in found] == [0, 10, 20, 30, 40]
    for message in found:
        np.testing.assert_array_equal(message.samples, samples)
    assert source.receive() is None


def test_a_slow_receiver_blocks_the_producer_and_loses_nothing(source: ZmqSource) -> None:
    total, size = 4_000, 4000  # more than the queues of both sides hold
    sent = 0

    def produce() -> None:
        nonlocal sent
        with open_producer(source.address, high_water_mark=256) as producer:
            for number in range(total):
                producer.send_bytes(number.to_bytes(4, "big") + bytes(size))
                sent = number + 1

    thread = threading.Thread(target=produce)
    thread.start()
    found = serve_until(source, lambda: sent > 0)
    # The producer has come to a stand when it got nowhere between two looks a while apart.
    before = -1
    while sent != before:
        before = sent
        time.sleep(0.3)
    assert sent < total
    found += serve_until(source, lambda: not thread.is_alive(), 60)
    assert [int.from_bytes(data[:4], "big") for data in found] == list(range(total))
    thread.join(10)
    assert not thread.is_alive()
    assert sent == total


def test_a_message_between_the_limits_is_read_to_be_counted(
    source: ZmqSource, push: zmq.Socket[bytes]
) -> None:
    push.send(bytes(5000))
    data = receive(source)
    assert data is not None
    with pytest.raises(WireError) as problem:
        decode(data, Limits(50.0, 3, max_bytes=4096))
    assert problem.value.reason == "too_large"
    assert count(source, "peers_disconnected") == 0


def test_a_message_above_twice_the_limit_costs_the_connection_and_the_next_arrives(
    source: ZmqSource, push: zmq.Socket[bytes]
) -> None:
    other = push.context.socket(zmq.PUSH)
    other.linger = 0
    other.connect(source.address)
    other.send(b"before")
    assert receive(source) == b"before"
    push.send(bytes(100_000_000))
    push.send(b"after")
    other.send(b"from another")
    assert {receive(source), receive(source)} == {b"after", b"from another"}
    assert count(source, "peers_disconnected") == 1
    other.close()


def test_a_message_of_several_parts_is_refused_as_one(source: ZmqSource, push: zmq.Socket[bytes]) -> None:
    push.send_multipart([b"a"] * 5)
    push.send(b"whole")
    assert source.wait(10)
    with pytest.raises(WireError) as problem:
        source.receive()
    assert problem.value.reason == "multipart"
    assert receive(source) == b"whole"


def test_lost_connections_are_counted(source: ZmqSource) -> None:
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.connect(source.address)
        socket.send(b"a")
        assert receive(source) == b"a"
    deadline = time.monotonic() + 10
    while count(source, "peers_disconnected") == 0 and time.monotonic() < deadline:
        source.wait(0.05)
    assert count(source, "peers_disconnected") == 1


def test_the_source_may_connect_and_the_producer_bind() -> None:
    with ZmqSource(ZmqSettings(endpoint=LOOPBACK), Counters()) as probe:
        address = probe.address  # a port that was free a moment ago
    settings = ZmqSettings(endpoint=f"pull+connect:{address}")
    with ZmqSource(settings, Counters()) as source:
        assert exchange(source, send_all(f"push+bind:{address}", b"hello")) == [b"hello"]


def test_a_taken_port_is_told(source: ZmqSource) -> None:
    with pytest.raises(ConfigError, match="cannot be bound: Address already in use"):
        ZmqSource(ZmqSettings(endpoint=source.address), Counters())


def test_what_nobody_takes_is_told_at_the_end(source: ZmqSource) -> None:
    producer = produce(source, source.address, linger=0.3, high_water_mark=100_000)
    samples = np.zeros((100, 3), np.float32)
    for number in range(15_000):
        producer.send(Message("a", 100 * number, samples, 50.0, end=number == 14_999))
    with pytest.raises(OnsetError, match=r"arrived: 'a' from sample 0 to 1499999, and its end") as problem:
        producer.close()
    assert "nothing more within 0.3 s" in str(problem.value)


def test_nobody_there_is_told() -> None:
    with ZmqSource(ZmqSettings(endpoint=LOOPBACK), Counters()) as probe:
        address = probe.address
    with pytest.raises(ConfigError, match="nobody answers"):
        open_producer(address, connect_timeout=0.3)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("tcp://127.0.0.1:5555", Endpoint("tcp://127.0.0.1:5555", True, "pull")),
        ("pull+bind:tcp://*:5555", Endpoint("tcp://*:5555", True, "pull")),
        ("pull+connect:ipc:///run/a.sock", Endpoint("ipc:///run/a.sock", False, "pull")),
        ("sub+connect:tcp://a:1", Endpoint("tcp://a:1", False, "sub")),
    ],
)
def test_endpoints(uri: str, expected: Endpoint) -> None:
    assert parse_endpoint(uri, ("pull", "sub"), bind=True) == expected


@pytest.mark.parametrize(
    "uri",
    ["", "127.0.0.1:5555", "http://a", "push+bind:tcp://a:1", "pull+listen:tcp://a:1", "pull:tcp://a:1"],
)
def test_what_is_no_endpoint(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"expected pull\+bind:ADDRESS"):
        parse_endpoint(uri, ("pull", "sub"), bind=True)


@pytest.mark.parametrize(
    "address",
    [
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:*",
        "tcp://a..b:5555",
        f"tcp://{'a' * 300}:5555",
        f"ipc:///tmp/{'a' * 120}.sock",
        "ipc:///tmp/a\0b",
    ],
)
def test_where_no_socket_can_ever_get_is_told_at_once(address: str) -> None:
    with pytest.raises(ConfigError, match=r"^endpoint .*(found|no name of a host)"):
        ZmqSource(ZmqSettings(endpoint=f"pull+connect:{address}"), Counters())
