"""A service whose Kafka is away until its spool is full: it waits, says so, and stops when it is told to."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import zmq

from engine import OnnxSession
from stream.cloudevents import record
from stream.config import RuntimeSettings
from stream.events import Event
from stream.runtime import Runtime
from stream.spool import Spool
from stream.wire import Message, encode
from tests.kafka.broker import Cluster
from tests.kafka.flow import read_events, readiness
from tests.kafka.ports import free_port
from tests.kafka.proxy import Proxy
from tests.stream.test_service import DECODING, RATE, Process, wave, write_config

SPOOL_BYTES = 64 * 1024
# Beyond this a supervisor would kill it (systemd's TimeoutStopSec is 90 s).
STOP_SECONDS = 60


def service_of(folder: Path, bundle: Path, port: int, broker: int, topic: str = "events") -> Process:
    sink = {
        "connection": {"bootstrap": f"127.0.0.1:{broker}"},
        "topic": topic,
        "spool": str(folder / "spool.db"),
        "spool_bytes": SPOOL_BYTES,
    }
    http = {"address": f"127.0.0.1:{port}"}
    return Process(write_config(folder, bundle, sinks=[{"kafka": sink}], http=http, grace=6.0))


def lives() -> list[Message]:
    """A stream that ends and begins again, over and over."""
    samples = wave(1, 500)
    return [Message("one", 0, samples, RATE, epoch, end=True) for epoch in range(40)]


def undisturbed(bundle: Path, messages: Sequence[Message]) -> list[bytes]:
    """What an undisturbed runtime says, as it goes to Kafka."""
    events: list[Event] = []
    session = OnnxSession(bundle, slots=1, threads=1)
    decoding = session.manifest.decoding.model_copy(update=DECODING)
    settings = RuntimeSettings(max_streams=1, reorder=0.2, max_gap=0.4)
    runtime = Runtime(session, events.extend, settings, None, decoding)
    for message in messages:
        runtime.offer(message)
        runtime.drain()
    return [record(event).value for event in events]


def await_readiness(port: int, status: int, seconds: float = 60.0) -> dict[str, str]:
    deadline = time.monotonic() + seconds
    while (found := readiness(port))[0] != status:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found[1]


def spool_depth(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        found = re.search(r"^onset_spool_events ([0-9.]+)$", answer.read().decode(), re.MULTILINE)
    assert found is not None
    return int(float(found[1]))


def test_a_service_with_a_full_spool_is_not_ready_and_stops_without_losing_what_the_spool_holds(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    port = free_port()
    messages = lives()
    service = service_of(tmp_path, tiny_bundle, port, broker=free_port())
    try:
        with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
            socket.linger = 0
            socket.connect(service.address)
            # Its broker is away from the beginning, which the spool makes up for.
            assert readiness(port)[0] == 200
            for message in messages:
                socket.send(encode(message))
            assert "a spool is full" in await_readiness(port, 503)["sinks"]
            kept = spool_depth(port)
            status, _ = service.stop(seconds=STOP_SECONDS)
    finally:
        service.process.kill()
    assert status == 0, service.log
    assert "is full and no broker takes events" in service.log
    spool = Spool(tmp_path / "spool.db", SPOOL_BYTES)
    held = [waiting.value for _, waiting in spool.peek(10_000)]
    spool.close()
    assert kept > 50
    assert held[:kept] == undisturbed(tiny_bundle, messages)[:kept]


def test_a_service_whose_spool_was_full_is_ready_again_when_its_broker_has_taken_every_event(
    kafka: Cluster, topic: Callable[..., str], tiny_bundle: Path, tmp_path: Path
) -> None:
    port, name, messages = free_port(), topic(), lives()
    with closing(Proxy(int(kafka.bootstrap[0].rpartition(":")[2]))) as proxy:
        proxy.cut()
        service = service_of(tmp_path, tiny_bundle, port, proxy.port, name)
        try:
            with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
                socket.connect(service.address)
                for message in messages:
                    socket.send(encode(message))
                await_readiness(port, 503)
                proxy.restore()
                await_readiness(port, 200)
                status, _ = service.stop(seconds=STOP_SECONDS)
        finally:
            service.process.kill()
    assert status == 0, service.log
    assert read_events(kafka, name) == {"one": undisturbed(tiny_bundle, messages)}
