"""The protocol of ZeroMQ without a socket: it means the same however it was cut, and garbage is one error."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import WireError
from stream.zmq_keys import ClientKeys, read_public, read_secret, write_keys
from stream.zmtp import Item, Link, Mechanism, Payload, Ping, Plain, Pong
from stream.zmtp_curve import CurveClient, CurveServer

MAX_PART = 4096


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> tuple[CurveServer, Callable[[], CurveClient]]:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("service", "camera"):
        write_keys(folder, name)
    client = ClientKeys(read_public(folder / "service.public"), read_secret(folder / "camera.secret"))
    known = read_public(folder / "camera.public")
    return CurveServer(read_secret(folder / "service.secret"), {known}.__contains__), lambda: CurveClient(
        client
    )


def talk(one: Link, other: Link) -> list[Item]:
    """Carry bytes between two until both are silent; returns what the first heard."""
    heard: list[Item] = []
    while True:
        for link in (one, other):
            while (item := link.next()) is not None:
                if link is one:
                    heard.append(item)
        if not one.output and not other.output:
            return heard
        for source, target in ((one, other), (other, one)):
            target.feed(bytes(source.output))
            source.output.clear()


def pair(server: Mechanism | None = None, client: Mechanism | None = None) -> tuple[Link, Link]:
    service = Link("PULL", ("PUSH",), server or Plain(), MAX_PART)
    producer = Link("PUSH", ("PULL",), client or Plain(), MAX_PART)
    assert talk(service, producer) == []
    assert service.is_ready
    assert producer.is_ready
    return service, producer


@pytest.mark.parametrize("is_encrypted", [False, True])
def test_what_is_sent_is_heard(
    is_encrypted: bool, curve: tuple[CurveServer, Callable[[], CurveClient]]
) -> None:
    service, producer = pair(curve[0], curve[1]()) if is_encrypted else pair()
    for size in (0, 1, 255, 256, MAX_PART):
        producer.send(bytes(size))
    producer.send(b"topic", more=True)
    producer.send(b"body")
    producer.ping(context=b"so far")
    heard = talk(service, producer)
    assert heard[:5] == [Payload(bytes(size), b"", 1) for size in (0, 1, 255, 256, MAX_PART)]
    assert heard[5:] == [Payload(b"topic", b"body", 2), Ping(b"so far")]
    service.pong(Ping(b"so far"))
    assert talk(producer, service) == [Pong(b"so far")]
    producer.send(bytes(MAX_PART + 1))
    with pytest.raises(WireError, match="are read at most") as problem:
        talk(service, producer)
    assert problem.value.reason == "oversized"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_it_means_the_same_however_it_was_cut(data: st.DataObject) -> None:
    producer = Link("PUSH", ("PULL",), Plain(), MAX_PART)
    reference = Link("PULL", ("PUSH",), Plain(), MAX_PART)
    talk(reference, producer)
    spoken = bytearray()
    for part in data.draw(st.lists(st.tuples(st.binary(max_size=400), st.booleans()), max_size=12)):
        producer.send(*part)
        if not part[1] and data.draw(st.booleans()):
            producer.ping(context=part[0][:16])
    spoken += producer.output
    reference.feed(bytes(spoken))
    expected = []
    while (item := reference.next()) is not None:
        expected.append(item)
    other = Link("PULL", ("PUSH",), Plain(), MAX_PART)
    talk(other, Link("PUSH", ("PULL",), Plain(), MAX_PART))
    found = []
    while spoken:
        size = data.draw(st.integers(1, len(spoken)))
        other.feed(bytes(spoken[:size]))
        del spoken[:size]
        while (item := other.next()) is not None:
            found.append(item)
    assert found == expected


@pytest.mark.parametrize("is_encrypted", [False, True])
def test_whatever_comes_is_heard_or_refused_and_takes_no_more_memory_than_it_may(
    is_encrypted: bool, curve: tuple[CurveServer, Callable[[], CurveClient]]
) -> None:
    draw = random.Random(7)
    reasons = set()
    for _ in range(1500):
        mechanism: Mechanism = curve[0] if is_encrypted else Plain()
        service = Link("PULL", ("PUSH",), mechanism, MAX_PART)
        producer = Link("PUSH", ("PULL",), curve[1]() if is_encrypted else Plain(), MAX_PART)
        try:
            for _ in range(draw.randrange(4)):  # somewhere in the handshake, or behind it
                for link in (service, producer):
                    link.next()
                service.feed(bytes(producer.output))
                producer.feed(bytes(service.output))
                producer.output.clear()
                service.output.clear()
            producer.next()
            if producer.is_ready:
                producer.send(draw.randbytes(draw.randrange(300)), more=draw.random() < 0.3)
                producer.ping(context=draw.randbytes(draw.randrange(30)))
            said = bytearray(producer.output) + draw.randbytes(draw.choice((0, 3, 64, 5000)))
            for _ in range(draw.choice((0, 1, 1, 3))):
                if said:
                    said[draw.randrange(len(said))] = draw.randrange(256)
            service.feed(bytes(said))
            while (item := service.next()) is not None:
                assert not isinstance(item, Payload) or len(item.first) <= MAX_PART
            assert service.buffered <= len(said)
        except WireError as problem:
            reasons.add(problem.reason)
    assert reasons >= {"protocol", "oversized", "mechanism"} - ({"oversized"} if is_encrypted else set())


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"GET / HTTP/1.1\r\n", "protocol"),
        (b"\x16\x03\x01\x02\x00\x01", "protocol"),
        (b"\xff" + bytes(7) + b"\x01\x7f\x01\x08", "protocol"),  # ZMTP 2.0
        (b"\x01\x00", "protocol"),  # ZMTP 1.0
        (b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32), "mechanism"),
    ],
)
def test_what_is_none_of_ours_is_refused_as_soon_as_it_shows(said: bytes, reason: str) -> None:
    service = Link("PULL", ("PUSH",), Plain(), MAX_PART)

    def hear() -> None:
        for byte in said:
            service.feed(bytes((byte,)))
            service.next()

    with pytest.raises(WireError) as problem:
        hear()
    assert problem.value.reason == reason


def test_another_kind_of_socket_is_named() -> None:
    service, other = Link("PULL", ("PUSH",), Plain(), MAX_PART), Link("PUB", ("PULL",), Plain(), MAX_PART)
    with pytest.raises(WireError, match="'PUB' socket, expected PUSH") as problem:
        talk(service, other)
    assert problem.value.reason == "socket_type"


def test_a_message_without_end_takes_the_memory_of_two_parts() -> None:
    service, producer = pair()
    for _ in range(1000):
        producer.send(bytes(MAX_PART), more=True)
        assert talk(service, producer) == []
        assert service.buffered == 0
    producer.send(b"")
    (item,) = talk(service, producer)
    assert isinstance(item, Payload)
    assert (item.parts, len(item.first), len(item.second)) == (1001, MAX_PART, MAX_PART)


def test_nothing_holds_on_to_a_message_that_was_taken() -> None:
    service, producer = (
        Link(*kinds, Plain(), 2_000_000) for kinds in (("PULL", ("PUSH",)), ("PUSH", ("PULL",)))
    )
    talk(service, producer)
    for size in (1_000_000, 2_000_000):
        producer.send(bytes(size))
        tracemalloc.start()
        try:
            (item,) = talk(service, producer)
            assert isinstance(item, Payload)
            del item
            producer.output = bytearray()
            assert tracemalloc.get_traced_memory()[0] < size // 4
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("body", [b"\x04PING", b"\x04PING\x00", b"\x04PING\x00\x00" + bytes(17)])
def test_a_ping_that_is_cut_short_or_too_long_is_refused(body: bytes) -> None:
    service, _ = pair()
    service.feed(bytes((4, len(body))) + body)
    with pytest.raises(WireError, match="expected 7 to 23"):
        service.next()


def test_encrypted_messages_cannot_be_repeated_or_changed(
    curve: tuple[CurveServer, Callable[[], CurveClient]], tmp_path: Path
) -> None:
    changes: list[Callable[[bytes], bytes]] = [
        lambda said: said + said,
        lambda said: said[:-1] + bytes((said[-1] ^ 1,)),
    ]
    for change in changes:
        service, producer = pair(curve[0], curve[1]())
        producer.send(b"once")
        said = bytes(producer.output)
        producer.output.clear()
        service.feed(change(said))
        with pytest.raises(WireError, match=r"repeated|changed"):
            talk(service, producer)
