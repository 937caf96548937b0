"""The main loop with ZeroMQ: messages in, a queue for each stream, rounds of the network, events to sinks.

Whatever comes over the socket, the service goes on: a message that cannot be read is counted, logged at a
bounded rate and put aside. On SIGTERM or SIGINT it processes what has arrived, ends the open streams
("service stopped"), flushes its sinks and returns.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from engine.errors import WireError
from stream.config import ServiceConfig, overridden
from stream.dead_letters import open_dead_letters
from stream.events import Event
from stream.inbox import Inbox
from stream.listening import ListeningClock
from stream.runtime import Runtime
from stream.sinks import open_sinks
from stream.surroundings import Surroundings
from stream.throttle import Throttle
from stream.wire import Limits, decode
from stream.zmq_connection import Connection
from stream.zmq_loss import LossCounter
from stream.zmq_settings import ZmqSettings
from stream.zmq_source import ZmqSource

log = logging.getLogger(__name__)

# Messages taken between two rounds: enough to fill a batch of streams, few enough that a flood does not keep
# the network waiting.
_RECEIVE_AT_ONCE = 256
_RECEIVE_BYTES = 4 * 1024 * 1024
# How soon a signal or a silent stream is noticed when nothing arrives.
_POLL_SECONDS = 0.1
# Between two moments at which all that arrived was taken; what is longer was a pause of the service itself.
_LONGEST_ROUND_SECONDS = 1.0
# Names of streams beyond those that are open, whose connections are remembered.
_REMEMBERED = 1024
# "What has arrived" ends at the first pause of this length, or after so long with a producer that goes on.
_DRAIN_PAUSE_SECONDS = 0.05
_DRAIN_SECONDS = 5.0


def work(config: ServiceConfig, settings: ZmqSettings, around: Surroundings) -> None:
    """Run until it is to stop. Raises BundleError or ConfigError before it is ready."""
    worker = Worker(config, settings, around)
    try:
        source = ZmqSource(settings, around.counters)
    except BaseException:
        worker.close()
        raise
    with source:
        try:
            worker.run(source)
        finally:
            worker.close()  # first: whatever becomes of the network, events leave


class Worker:
    """All but the socket."""

    def __init__(self, config: ServiceConfig, settings: ZmqSettings, around: Surroundings) -> None:
        """Raises BundleError, ConfigError."""
        self._config, self._around, self._counters = config, around, around.counters
        session = around.opened()
        self._sinks = open_sinks(config.sinks, around.counters, self._has_patience)
        self._letters = open_dead_letters(config.dead_letters, around.counters)
        decoding = overridden(session.manifest.decoding, config.decoding, "decoding")
        self._listened = ListeningClock(min(_LONGEST_ROUND_SECONDS, config.idle_timeout / 4))
        self._runtime = Runtime(session, self._hear, config, around.counters, decoding, clock=self._listened)
        self._bundle = session.manifest.id
        self._limits = Limits.of(session.manifest.frame, settings.max_message_bytes)
        self._inbox = Inbox(config.queue_bytes)
        self._throttle = Throttle(log)
        self._losses = LossCounter(around.counters)
        self._held: dict[Connection, tuple[str, int]] = {}  # producers that wait, each for a stream's room
        self._came_by: dict[str, Connection] = {}  # by which a stream came last

    def run(self, source: ZmqSource) -> None:
        """Until it is to stop; then what has arrived, to its end."""
        around, runtime = self._around, self._runtime
        around.health.set("source", True)  # first: who reads that it is ready may ask at once
        log.info(
            "ready: listening on %s for %g Hz x %d channels, bundle %s, up to %d streams",
            ", ".join(source.addresses),
            self._limits.rate,
            self._limits.channels,
            self._bundle,
            self._config.max_streams,
        )
        around.ready(source.address)
        while not around.stop.is_set():
            around.beat()
            self._look_at_sinks()
            self._sinks.check()
            busy = runtime.has_ready or len(self._inbox)
            source.wait(0.0 if busy else _POLL_SECONDS)
            self._receive(source)
            self._advance()
            self._look_for_silence(source)
            if around.replacement.is_there(runtime.manifest):
                self._swap()
        log.info("stopping: %d streams are open", len(runtime.streams))
        until = min(time.monotonic() + _DRAIN_SECONDS, self._work_until)
        while (source.wait(_DRAIN_PAUSE_SECONDS) or self._held) and time.monotonic() < until:
            self._receive(source)
            self._advance()
        while len(self._inbox) and self._may_go_on():
            self._advance()
        if left := len(self._inbox):
            self._counters.dropped_messages.labels("stopped").inc(left)
            log.error("%d messages had arrived and were not processed in time; raise `grace`", left)
        self._counters.queued_messages.set(0)
        if not runtime.stop(may_go_on=self._may_go_on):
            log.error("%d streams did not end in time; raise `grace`", len(runtime.streams))

    def close(self) -> None:
        """Hand over what the sinks still hold."""
        self._letters.close()
        self._sinks.close(min(self._around.deadline, time.monotonic() + self._around.grace))

    def _receive(self, source: ZmqSource) -> None:
        """Queue what has arrived, up to a bound; refuse what cannot be read."""
        for connection, (stream, size) in list(self._held.items()):
            if self._inbox.has_room(stream, size):
                del self._held[connection]
                source.release(connection)
        size = 0
        for _ in range(_RECEIVE_AT_ONCE):
            if (received := self._receive_one(source)) is None or (size := size + received) > _RECEIVE_BYTES:
                break
        self._counters.queued_messages.set(len(self._inbox))

    def _receive_one(self, source: ZmqSource) -> int | None:
        """Its bytes; None: there is nothing."""
        data = b""
        try:
            received = source.receive()
            if received is None:
                return None
            data = received.data
            message = decode(data, self._limits)
        except WireError as problem:
            self._counters.refused.labels(problem.reason).inc()
            self._throttle.warning(f"message refused ({problem.reason})", str(problem))
            self._letters.put(data, problem.reason, str(problem), {"source": source.address})
            return len(data)
        self._came_by[message.stream] = received.connection  # also if it is held there: it is not silent
        if not self._inbox.has_room(message.stream, message.samples.nbytes):
            if self._config.overload == "block":
                self._held[received.connection] = (message.stream, message.samples.nbytes)
                source.hold(received)
                return len(data)
            self._drop()
        if source.kind == "sub":
            self._losses.see(message)
        self._inbox.put(message)
        return len(data)

    def _drop(self) -> None:
        for message in self._inbox.make_room():
            self._counters.dropped_messages.labels("overload").inc()
            self._runtime.dropped(message.stream, len(message.samples))
            self._throttle.warning(
                "overload", f"a message of {message.stream!r} is dropped, the engine is behind"
            )

    def _advance(self) -> None:
        """One round of the network; each stream is first given what it takes to have something to do."""
        for stream in self._inbox.streams:
            while not self._runtime.ready(stream) and (message := self._inbox.take(stream)) is not None:
                self._runtime.offer(message)
        self._runtime.run_ready()

    def _look_for_silence(self, source: ZmqSource) -> None:
        """Lose streams that sent nothing: not one of which something waits, here or in its producer's
        connection, whatever the others do meanwhile."""
        self._listened.caught_up()
        streams, waiting = self._runtime.streams, set(self._inbox.streams)
        if len(self._came_by) > 2 * len(streams) + _REMEMBERED:
            self._came_by = {name: self._came_by[name] for name in streams if name in self._came_by}
        self._runtime.tick(
            streams=[
                name
                for name in streams
                if name not in waiting and not source.is_behind(self._came_by.get(name))
            ]
        )

    def _hear(self, events: Sequence[Event]) -> None:
        self._sinks.write(events)
        self._counters.observe_events(events, time.time())

    def _look_at_sinks(self) -> None:
        trouble = self._sinks.trouble()
        self._around.health.set("sinks", not trouble, trouble)

    def _has_patience(self) -> bool:
        """Whether a full sink may make this wait: not for ever, once it is to stop."""
        self._look_at_sinks()
        return self._may_go_on()

    def _may_go_on(self) -> bool:
        self._around.beat()
        return time.monotonic() < self._work_until

    @property
    def _work_until(self) -> float:
        """The other half of the grace is for the sinks."""
        return self._around.deadline - self._around.grace / 2

    def _swap(self) -> None:
        """Go on with the bundle as it is now; with the old one, where the new cannot be used."""
        around = self._around
        around.notifier.reloading()
        try:
            try:
                session = around.replacement.take()
                decoding = overridden(session.manifest.decoding, self._config.decoding, "decoding")
            except Exception as problem:
                self._refuse_swap(problem)
                return
            self._runtime.settle()  # what fails here is no fault of the new bundle
            try:
                self._runtime.swap(session, decoding, around.beat)
            except Exception as problem:
                self._refuse_swap(problem)
                return
            log.info("bundle %s takes over from %s", session.manifest.id, self._bundle)
            self._bundle = session.manifest.id
            around.notifier.status(f"bundle {self._bundle}")
        finally:
            around.notifier.ready()

    def _refuse_swap(self, problem: Exception) -> None:
        self._around.replacement.refused(self._bundle, problem)
        self._counters.bundle_swaps_failed.inc()
        self._around.notifier.status(f"bundle {self._bundle}; another was refused, see the log")
