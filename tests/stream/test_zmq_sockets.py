"""ZeroMQ in the wild, on real sockets: both patterns, both directions, peers that are many, die or freeze."""

from __future__ import annotations

import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import zmq

from engine import ConfigError, WireError
from engine.schema import parse
from stream.counters import Counters
from stream.wire import Limits, Message, decode, encode
from stream.zmq_loss import LossCounter
from stream.zmq_producer import open_producer
from stream.zmq_settings import ZmqSettings
from stream.zmq_source import ZmqSource
from tests.stream.served import drain, exchange, produce, receive, send_all, serve_until

LIMITS = Limits(50.0, 3)
# Sends its name and a number, until it is killed; what it says is that somebody is there.
CHATTER = """
import sys, time
from stream.zmq_producer import open_producer
with open_producer(sys.argv[1]) as producer:
    print("connected", flush=True)
    while True:
        producer.send_bytes(sys.argv[2].encode())
        time.sleep(0.02)
"""


def open_source(*endpoints: str, **settings: object) -> ZmqSource:
    return ZmqSource(ZmqSettings(endpoint=endpoints, **settings), Counters())


def free_address() -> str:
    with open_source("tcp://127.0.0.1:*") as probe:
        return probe.address  # a port that was free a moment ago


def message(seq: int, stream: str = "a", n: int = 10, epoch: int = 0) -> Message:
    return Message(stream, seq, np.full((n, 3), seq, np.float32), 50.0, epoch)


def count(source: ZmqSource, name: str) -> float:
    return source._counters.snapshot().get(name, 0.0)


@pytest.fixture
def chatter() -> Iterator[Callable[[str, str], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(endpoint: str, name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CHATTER, endpoint, name]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("kinds", [("pull", "push"), ("sub", "pub")])
@pytest.mark.parametrize("source_binds", [True, False])
def test_either_side_may_bind_in_both_patterns(kinds: tuple[str, str], source_binds: bool) -> None:
    here, there = ("bind", "connect") if source_binds else ("connect", "bind")
    address = free_address()

    # Under PUB the first message counts too: the producer waits until somebody has subscribed.
    def send() -> None:
        with open_producer(f"{kinds[1]}+{there}:{address}") as producer:
            for seq in range(0, 50, 10):
                producer.send(message(seq))

    with open_source(f"{kinds[0]}+{here}:{address}") as source:
        assert [decode(data, LIMITS).seq for data in exchange(source, send)] == [0, 10, 20, 30, 40]


def test_several_producers_at_several_endpoints_all_come_through() -> None:
    connected = free_address()
    with (
        open_source(
            "tcp://127.0.0.1:*", "pull+bind:tcp://127.0.0.1:*", f"pull+connect:{connected}"
        ) as source,
    ):
        assert source.address == source.addresses[0]
        assert len(set(source.addresses)) == 3
        first, second, third = source.addresses
        targets = [first, first, second, second, f"push+bind:{third}"]
        work = [
            send_all(target, *(encode(message(seq, f"stream {number}")) for seq in range(0, 100, 10)))
            for number, target in enumerate(targets)
        ]
        found = [decode(data, LIMITS) for data in exchange(source, *work)]
    for number in range(len(targets)):
        assert [m.seq for m in found if m.stream == f"stream {number}"] == list(range(0, 100, 10))
    assert len(found) == 10 * len(targets)


def test_producers_take_turns_whatever_one_of_them_sends() -> None:
    with open_source("tcp://127.0.0.1:*", "tcp://127.0.0.1:*") as source, zmq.Context() as context:
        flood, other = (context.socket(zmq.PUSH) for _ in range(2))
        for socket, address in zip((flood, other), source.addresses, strict=True):
            socket.linger = 0
            socket.connect(address)
        for _ in range(200):
            flood.send(b"flood")
        other.send(b"first")
        found = [receive(source)]
        while b"first" not in found:
            found.append(receive(source))
        other.send(b"other")
        time.sleep(0.2)  # the kernel has it
        assert b"other" in [receive(source) for _ in range(3)]
        flood.close()
        other.close()


def test_a_producer_that_is_held_waits_alone_and_loses_nothing() -> None:
    with open_source("tcp://127.0.0.1:*", high_water_mark=4) as source, zmq.Context() as context:
        held, other = (context.socket(zmq.PUSH) for _ in range(2))
        for socket, name in ((held, b"held"), (other, b"other")):
            socket.linger = 0
            socket.connect(source.address)
            for number in range(100):
                socket.send(name + b" %d" % number)
        while True:
            assert source.wait(10)
            received = source.receive()
            assert received is not None
            if received.data == b"held 7":
                source.hold(received)
                break
        rest = drain(source)
        assert rest
        assert not any(data.startswith(b"held") for data in rest)
        assert rest[-1] == b"other 99"
        source.release(received.connection)
        assert drain(source) == [b"held %d" % number for number in range(7, 100)]
        held.close()
        other.close()


def test_what_a_publisher_drops_is_counted_to_the_sample(caplog: pytest.LogCaptureFixture) -> None:
    total = 20_000
    with open_source("sub+bind:tcp://127.0.0.1:*", high_water_mark=2) as source:
        losses = LossCounter(source._counters)
        came = 0
        with produce(source, f"pub+connect:{source.address}", high_water_mark=2) as producer:
            producer.send(message(0))
            data = receive(source)
            assert data is not None
            assert losses.see(decode(data, LIMITS)) == 0
            for number in range(1, total):
                producer.send(message(10 * number))  # never waits, though nobody reads
            for data in drain(source):
                losses.see(decode(data, LIMITS))
                came += 1
            producer.send(message(10 * total))
            data = receive(source)
            assert data is not None
            losses.see(decode(data, LIMITS))
        assert 0 < came < total - 1
        assert count(source, "samples_lost") == 10 * (total - 1 - came)
    assert "samples of stream 'a' were lost between its publisher and here" in caplog.text
    assert len([line for line in caplog.text.splitlines() if "were lost" in line]) == 1


def test_losses_are_told_from_restarts_repeats_and_beginnings() -> None:
    losses = LossCounter(Counters(), max_streams=2)
    assert losses.see(message(500)) == 0  # nobody was listening before
    assert losses.see(message(510)) == 0
    assert losses.see(message(530)) == 10
    assert losses.see(message(520)) == 0  # late, or a repeat
    assert losses.see(message(540)) == 0
    assert losses.see(message(30, epoch=1)) == 30  # a restart that was listened to
    assert losses.see(message(900)) == 0  # of the epoch before
    assert losses.see(message(40, epoch=1)) == 0
    assert losses.see(Message("a", 70, np.zeros((0, 3), np.float32), 50.0, 1, end=True)) == 20
    for stream in ("b", "c"):
        losses.see(message(0, stream))
    assert len(losses._next) == 2
    assert losses.see(message(1000, "a", epoch=1)) == 0  # forgotten: there is room for two


def test_topics_choose_streams_by_the_beginning_of_their_name() -> None:
    with (
        open_source("sub+bind:tcp://127.0.0.1:*", topics=("wrist-", "hip")) as source,
        produce(source, f"pub+connect:{source.address}") as producer,
    ):
        for stream in ("ankle-1", "wrist-1", "wrist-2", "wris", "hip"):
            producer.send(message(0, stream))
        found = [decode(data, LIMITS).stream for data in drain(source)]
    assert found == ["wrist-1", "wrist-2", "hip"]


def test_a_subscriber_takes_messages_with_and_without_a_topic_and_nothing_longer() -> None:
    with (
        open_source("sub+bind:tcp://127.0.0.1:*") as source,
        zmq.Context() as context,
        context.socket(zmq.XPUB) as socket,
    ):
        socket.connect(source.address)
        serve_until(source, lambda: bool(socket.poll(0)))
        for parts in ([b"alone"], [b"t" * 256, b"paired"], [b"a", b"b", b"c"], [b"t" * 257, b"x"], [b"last"]):
            socket.send_multipart(parts)
        assert [receive(source), receive(source)] == [b"alone", b"paired"]
        for words in ("3 parts, expected one part, or a topic and one part", "topic of 257 bytes"):
            assert source.wait(10)
            with pytest.raises(WireError, match=words) as problem:
                source.receive()
            assert problem.value.reason == "multipart"
        assert receive(source) == b"last"


def test_settings_that_do_not_fit_together_are_told() -> None:
    for settings, words in [
        (
            {"endpoint": ["pull+bind:tcp://127.0.0.1:*", "sub+bind:tcp://127.0.0.1:*"]},
            "expected all of one kind",
        ),
        ({"endpoint": "pull+bind:tcp://127.0.0.1:*", "topics": ["a"]}, "they belong to sub endpoints"),
        ({"endpoint": []}, "endpoint"),
        ({"heartbeat": 10, "heartbeat_timeout": 15}, "at least twice `heartbeat`"),
    ]:
        with pytest.raises(ConfigError, match=words):
            ZmqSource(parse(ZmqSettings, settings, "test"), Counters())


def test_a_taken_second_port_leaves_the_first_one_free() -> None:
    first = free_address()
    with open_source("tcp://127.0.0.1:*") as taken, pytest.raises(ConfigError, match="cannot be bound"):
        open_source(first, taken.address)
    with open_source(first) as source:
        assert source.address == first


def test_a_killed_producer_is_noticed_and_its_successor_goes_on(
    chatter: Callable[[str, str], subprocess.Popen[str]],
) -> None:
    with open_source("tcp://127.0.0.1:*") as source:
        first = chatter(source.address, "first")
        assert receive(source, 30) == b"first"
        first.send_signal(signal.SIGKILL)
        serve_until(source, lambda: count(source, "peers_disconnected") == 1)
        drain(source)
        chatter(source.address, "second")
        assert receive(source, 30) == b"second"


def test_a_source_that_connects_finds_the_successor_of_a_killed_producer(
    chatter: Callable[[str, str], subprocess.Popen[str]],
) -> None:
    address = free_address()
    with open_source(f"sub+connect:{address}") as source:
        first = chatter(f"pub+bind:{address}", "first")
        assert receive(source, 30) == b"first"
        first.send_signal(signal.SIGKILL)
        first.wait(10)
        drain(source)
        chatter(f"pub+bind:{address}", "second")
        assert receive(source, 30) == b"second"


def test_a_frozen_publisher_is_noticed_and_comes_back(
    chatter: Callable[[str, str], subprocess.Popen[str]],
) -> None:
    with open_source("sub+bind:tcp://127.0.0.1:*", heartbeat=0.3, heartbeat_timeout=1.0) as source:
        process = chatter(f"pub+connect:{source.address}", "here")
        assert receive(source, 30) == b"here"
        process.send_signal(signal.SIGSTOP)
        serve_until(source, lambda: count(source, "peers_disconnected") == 1)
        assert drain(source) == []
        process.send_signal(signal.SIGCONT)
        assert receive(source, 30) == b"here"


def test_a_publisher_hears_that_the_service_is_frozen_and_connects_again() -> None:
    listen = (
        "import time; from stream.zmq_source import ZmqSource; from stream.zmq_settings import ZmqSettings\n"
        "from stream.counters import Counters\n"
        "settings = dict(endpoint='sub+bind:tcp://127.0.0.1:*', heartbeat=0.3, heartbeat_timeout=1.0)\n"
        "with ZmqSource(ZmqSettings(**settings), Counters()) as source:\n"
        "    print(source.address, flush=True)\n"
        "    while True:\n        if source.wait(1.0): print(source.receive().data.decode(), flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", listen], stdout=subprocess.PIPE, text=True) as service:
        try:
            assert service.stdout is not None
            with zmq.Context() as context, context.socket(zmq.XPUB) as socket:
                socket.linger = 0
                monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
                socket.connect(service.stdout.readline().strip())
                assert monitor.poll(10_000)
                monitor.recv_multipart()
                assert socket.poll(10_000)  # somebody subscribes
                socket.recv()
                socket.send(b"before")
                assert service.stdout.readline() == "before\n"
                time.sleep(0.5)  # a ping has come, and with it the time that it is good for
                service.send_signal(signal.SIGSTOP)
                assert monitor.poll(20_000)  # no heartbeat of its own, and yet it noticed
                service.send_signal(signal.SIGCONT)
                deadline = time.monotonic() + 20
                while not select.select([service.stdout], [], [], 0.1)[0]:  # until it has subscribed again
                    assert time.monotonic() < deadline
                    socket.send(b"after")
                assert service.stdout.readline() == "after\n"
                socket.disable_monitor()
                monitor.close()
        finally:
            service.kill()


@pytest.mark.parametrize(("heartbeat", "timeout"), [(0.1, 0.2), (0.1, 3600.0), (600.0, 3600.0)])
def test_the_bounds_of_the_signs_of_life_are_taken(heartbeat: float, timeout: float) -> None:
    with open_source("tcp://127.0.0.1:*", heartbeat=heartbeat, heartbeat_timeout=timeout) as source:
        assert exchange(source, send_all(source.address, b"hello")) == [b"hello"]


def test_a_service_that_is_slower_than_its_heartbeats_loses_nothing_under_pull() -> None:
    settings = {"high_water_mark": 8, "heartbeat": 0.1, "heartbeat_timeout": 0.3}
    total = 0
    with open_source("tcp://127.0.0.1:*", **settings) as source:
        with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
            socket.sndhwm = 8
            socket.connect(source.address)
            socket.send(b"hello")
            assert receive(source) == b"hello"
            # Until the queues of both sides and the kernel's buffers are full: nothing fits for a while.
            while total < 60_000 and socket.poll(1000, zmq.POLLOUT):
                socket.send(total.to_bytes(4, "big") + bytes(1000))
                total += 1
            found = [int.from_bytes(data[:4], "big") for data in drain(source)]
            assert count(source, "peers_disconnected") == 0
        assert 100 < total < 60_000
        assert found == list(range(total))
