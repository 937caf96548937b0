"""A source that is served while producers work beside it: between two waits nobody is let in or answered."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from stream.zmq_producer import ZmqProducer, open_producer
from stream.zmq_publisher import ZmqPublisher
from stream.zmq_source import ZmqSource


def receive(source: ZmqSource, seconds: float = 10.0) -> bytes | None:
    """The next message, or None after so long."""
    received = source.receive() if source.wait(seconds) else None
    return None if received is None else received.data


def drain(source: ZmqSource, pause: float = 0.5) -> list[bytes]:
    """All that comes, up to a pause."""
    found = []
    while (data := receive(source, pause)) is not None:
        found.append(data)
    return found


def serve_until(source: ZmqSource, condition: Callable[[], bool], seconds: float = 20.0) -> list[bytes]:
    """Serve the source until something is so; returns what came."""
    deadline, found = time.monotonic() + seconds, []
    while not condition():
        assert time.monotonic() < deadline, source._counters.summary()
        data = receive(source, 0.02)
        found += [] if data is None else [data]
    return found


def exchange(source: ZmqSource, *work: Callable[[], object], seconds: float = 60.0) -> list[bytes]:
    """Do all of `work` at once, each in a thread; returns what came meanwhile, and behind it."""
    with ThreadPoolExecutor(len(work)) as pool:
        done = [pool.submit(job) for job in work]
        found = serve_until(source, lambda: all(job.done() for job in done), seconds)
        for job in done:
            job.result()
    return found + drain(source, 0.1)


def send_all(endpoint: str, *messages: bytes) -> Callable[[], None]:
    """Work for `exchange`: connect, send these, and wait until they were taken."""

    def work() -> None:
        with open_producer(endpoint) as producer:
            for data in messages:
                producer.send_bytes(data)

    return work


def produce(source: ZmqSource, endpoint: str, **options: object) -> ZmqProducer | ZmqPublisher:
    """A producer that was let in, or its complaint."""
    with ThreadPoolExecutor(1) as pool:
        producer = pool.submit(lambda: open_producer(endpoint, **options))  # type: ignore[arg-type]
        serve_until(source, producer.done)
        return producer.result()
