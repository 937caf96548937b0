"""The service: ZeroMQ in, events out, until it is told to stop.

Whatever comes over the socket, the service goes on: a message that cannot be read is counted, logged at a
bounded rate and forgotten. On SIGTERM or SIGINT it processes what has arrived, ends the open streams
("service stopped"), flushes its sinks and returns.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from engine.errors import WireError
from engine.session import OnnxSession, Session
from stream.config import ServiceConfig, overridden
from stream.counters import Counters
from stream.runtime import Runtime
from stream.sinks import open_sinks
from stream.throttle import Throttle
from stream.wire import Limits, decode
from stream.zmq_source import ZmqSource

log = logging.getLogger(__name__)

# Messages taken between two rounds: enough to fill a batch of streams, few enough that a flood from one
# stream does not delay the others by more than some milliseconds.
_RECEIVE_AT_ONCE = 256
# How soon a signal or a silent stream is noticed when nothing arrives.
_POLL_SECONDS = 0.1
# "What has arrived" ends at the first pause of this length, or after so long with a producer that goes on.
# (Unbinding first would be no help: ZeroMQ then hangs up on those who are connected, unread bytes and all.)
_DRAIN_PAUSE_SECONDS = 0.05
_DRAIN_SECONDS = 5.0


def serve(
    config: ServiceConfig, stop: threading.Event, on_ready: Callable[[str], None] | None = None
) -> Counters:
    """Run until `stop` is set; returns what was counted. `on_ready` is told the address.

    Raises BundleError or ConfigError before it is ready; afterwards only what the machine refuses (a full
    disk). The log line that begins with "ready" says that messages are taken, and where.
    """
    counters = Counters()
    session: Session = OnnxSession(config.bundle, slots=config.max_streams, threads=config.threads)
    manifest = session.manifest
    decoding = overridden(manifest.decoding, config.decoding, "decoding")
    settings = config.source.zmq
    limits = Limits.of(manifest.frame, settings.max_message_bytes)
    sinks = open_sinks(config.sinks)
    runtime = Runtime(session, sinks.write, config, counters, decoding)
    throttle = Throttle(log)
    with ZmqSource(settings, counters) as source:
        log.info(
            "ready: listening on %s for %g Hz x %d channels, bundle %s, up to %d streams",
            source.address,
            limits.rate,
            limits.channels,
            manifest.id,
            config.max_streams,
        )
        if on_ready is not None:
            on_ready(source.address)
        while not stop.is_set():
            source.wait(0.0 if runtime.has_ready else _POLL_SECONDS)
            _take(source, runtime, limits, throttle)
            runtime.run_ready()
            runtime.tick()
        log.info("stopping: %d streams are open", len(runtime.streams))
        deadline = time.monotonic() + _DRAIN_SECONDS
        while source.wait(_DRAIN_PAUSE_SECONDS) and time.monotonic() < deadline:
            _take(source, runtime, limits, throttle)
        runtime.stop()
    sinks.close()
    log.info("stopped: %s", counters.summary())
    return counters


def _take(source: ZmqSource, runtime: Runtime, limits: Limits, throttle: Throttle) -> None:
    """Offer what has arrived, up to a bound; refuse what cannot be read."""
    for _ in range(_RECEIVE_AT_ONCE):
        if not _take_one(source, runtime, limits, throttle):
            return


def _take_one(source: ZmqSource, runtime: Runtime, limits: Limits, throttle: Throttle) -> bool:
    try:
        data = source.receive()
        if data is None:
            return False
        message = decode(data, limits)
    except WireError as problem:
        runtime.counters.refused.labels(problem.reason).inc()
        throttle.warning(f"message refused ({problem.reason})", str(problem))
        return True
    runtime.offer(message)
    return True


@contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set. A second signal does what it did before: it kills."""
    stop = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()
        restore()

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        restore()
