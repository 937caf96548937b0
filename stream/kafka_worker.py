"""A worker: messages from Kafka in, events to Kafka out, going on where any other worker stopped.

One round: poll, read a slice of what came, run the network until nothing is left to do, commit. A slice ends
by time, so that no round is long whatever the messages hold; what is left of a partition's messages waits for
the next rounds, in which the partition is not polled. Between two rounds nothing is under way, so that
partitions come and go only there. A message of hours is worked on with signs of life, and left to the next
worker when this one is to stop: nothing of it was committed. Whatever fails (a broker, the membership in the
group, a transaction), the worker forgets all and begins anew from the last commit, as its successor would:
there is one way to recover, and it is the way to start.

Here is what waits for brokers, clocks and signals; the partitions and their streams are in
`stream.assignment`.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any

from kafka.errors import KafkaError, RebalanceInProgressError

from engine.errors import ConfigError, DataError, OnsetError, WireError
from engine.session import Session
from stream.assignment import Assignment
from stream.backlog import Backlog
from stream.config import ServiceConfig
from stream.dead_letters import open_dead_letters
from stream.events import Event
from stream.kafka_connection import explain
from stream.kafka_delivery import open_delivery
from stream.kafka_source import KafkaSource, KafkaSourceSettings, Polled
from stream.listening import ListeningClock
from stream.surroundings import Stopped, Surroundings
from stream.throttle import Throttle
from stream.wire import Limits, decode

log = logging.getLogger(__name__)

# How soon a signal is noticed when nothing arrives. Not less: the client joins a group only while it polls,
# and kafka-python 3.0.12 throws away a join that is done between two polls.
_POLL_SECONDS = 1.0
_JOIN_SECONDS = 5.0
_PAUSE_SECONDS = 1.0
# How long a round reads, and polls in between where there is still something to read.
_SLICE_SECONDS = 1.0
_GLANCE_SECONDS = 0.01
# What is read before the network runs: enough to fill some batches.
_BATCHES_AT_ONCE = 2
# A message of more chunks than this is digested by itself.
_LONG_CHUNKS = 8
# A message that takes longer than this is interrupted by a poll.
_AWAY_SECONDS = 3.0
# How long a worker that is to stop goes on with what it has begun, to commit it.
_FINISH_SECONDS = 3.0
_LOG_APPEND_TIME = 1  # a record's timestamp type
# Between two looks at the clocks; what is longer was a pause of this process.
_LONGEST_ROUND_SECONDS = 2 * _POLL_SECONDS


def work(config: ServiceConfig, settings: KafkaSourceSettings, around: Surroundings) -> None:
    """Run until it is to stop. Raises ConfigError, when it starts, for what is wrong with `config`."""
    throttle = Throttle(log)
    session = around.opened()
    identity = str(uuid.uuid4())
    is_new = True
    while not around.stop.is_set():
        worker, why = None, "not in the group"
        try:
            around.beat()
            worker = Worker(config, settings, around, session, identity)
            if is_new:
                log.info("ready: reading topic %s as one of group %s", settings.topic, settings.group)
                around.ready(", ".join(settings.connection.bootstrap))
            is_new = False
            worker.run()
        except Stopped as found:
            log.info("stopped %s", found)
        except (KafkaError, ConfigError, DataError) as problem:
            if is_new and isinstance(problem, OnsetError):
                raise
            around.counters.restarts.inc()
            why = str(problem) if isinstance(problem, OnsetError) else explain(problem, settings.connection)
            throttle.warning("kafka", f"{why}; beginning anew from the last commit")
        finally:
            around.health.set("source", False, why)
            if worker is not None:
                session = worker.session
                worker.close()
        # Not `stop.wait`, which a signal handler that sets it could find locked.
        time.sleep(0.0 if around.stop.is_set() else _PAUSE_SECONDS)


def broker_time(record: Any) -> float | None:
    """When its broker put a record there, seconds; None where its producer says so (CreateTime)."""
    return record.timestamp / 1000 if record.timestamp_type == _LOG_APPEND_TIME else None


class Worker:
    """One life of a worker: from joining the group to leaving it, or to the first failure."""

    def __init__(
        self,
        config: ServiceConfig,
        settings: KafkaSourceSettings,
        around: Surroundings,
        session: Session,
        identity: str,
    ) -> None:
        """Raises ConfigError, KafkaError."""
        self.session = session
        self._config, self._kafka, self._around, self._counters = config, settings, around, around.counters
        self._throttle = Throttle(log)
        self._backlog = Backlog()
        self._polled_at = time.monotonic()
        self._gained: set[int] = set()  # while a message was worked on
        self._committed_at = time.monotonic()
        self._listened = ListeningClock(_LONGEST_ROUND_SECONDS)
        self._assignment = Assignment(session, config, settings.topic, self._counters, self._tell)
        self._source = KafkaSource(settings, self._wait, config.dead_letters.kafka_topic)
        try:
            self._delivery = open_delivery(
                settings, self._source, self._counters, identity, self._keep_waiting
            )
        except BaseException:
            self._source.close()
            raise
        self._letters = open_dead_letters(config.dead_letters, self._counters, self._delivery.send)

    def run(self) -> None:
        """Until it is to stop. Raises KafkaError, DataError."""
        while not self._around.stop.is_set():
            self._round()
            if self._around.replacement.is_there(self.session.manifest):
                self._swap()
        self._commit(at_once=True)

    def close(self) -> None:
        """Leave the group; what was not committed is forgotten."""
        with suppress(KafkaError):
            self._letters.close()
        self._delivery.close()
        with suppress(KafkaError):
            self._source.close()
        runtime = self._assignment.runtime
        runtime.forget(runtime.streams)

    def _round(self) -> None:
        self._around.beat()
        polled = self._poll()
        silence = self._source.silence  # now: what this round takes is no silence of the brokers
        for number in polled.lost & self._assignment.partitions.keys():
            self._assignment.leave(number)
            self._backlog.drop(number)
            with suppress(KeyError):
                self._counters.lag_messages.remove(self._kafka.topic, str(number))
        if polled.lost or polled.gained:
            self._counters.rebalances.inc()
        if gained := (self._gained - polled.lost) | polled.gained:
            self._gained = set()
            self._take_up(gained)
        told = self._read_slice()
        for number, partition in self._assignment.partitions.items():
            if number not in self._backlog:
                self._source.release(number)
                position = self._source.position(number)
                self._check_hole(number, position)
                partition.reach(position)
        self._digest()
        self._look_at_clocks(told)
        self._commit()
        self._report(silence)

    def _poll(self, is_busy: bool = False) -> Polled:
        seconds = _POLL_SECONDS if self._source.has_joined else _JOIN_SECONDS
        if (is_busy or self._backlog) and self._source.has_joined and not self._source.is_rejoining:
            seconds = _GLANCE_SECONDS
        polled = self._source.poll(seconds)
        self._polled_at = time.monotonic()
        for number, records in polled.records.items():
            self._check_hole(number, records[0].offset)
            self._backlog.put(number, records)
            self._source.hold(number)
        return polled

    def _report(self, silence: float) -> None:
        missing = ""
        if silence > self._kafka.patience:
            missing = f"no broker answered for {silence:.0f} s"
        elif (joining := self._source.joining) > 0:
            missing = f"the group {self._kafka.group} is being joined, for {joining:.0f} s by now"
        elif replaying := self._assignment.replaying:
            missing = f"partitions {replaying} are brought back"
        self._around.health.set("source", not missing, missing)
        if max(silence, self._source.joining) > self._kafka.patience:
            self._throttle.warning("kafka", missing)

    def _check_hole(self, number: int, offset: int) -> None:
        """Raises DataError when messages before `offset` were deleted before they were read."""
        expected = self._assignment.partitions[number].position
        # Offsets have holes (the ends of transactions); but what was deleted is another matter.
        if offset > expected and (beginning := self._source.beginning(number)) > expected:
            raise DataError(
                f"{self._kafka.topic}-{number}: messages {expected} to {beginning - 1} were deleted "
                "before they were read; keep them longer (retention.ms)"
            )

    def _read_slice(self) -> set[int]:
        """Work on what was polled, for some time; the partitions whose clock a broker has set."""
        told: set[int] = set()
        until = time.monotonic() + _SLICE_SECONDS
        chunk = self.session.manifest.chunk_samples
        while self._backlog:
            room = _BATCHES_AT_ONCE * self._config.max_batch * chunk
            while room > 0 and (taken := self._backlog.take()) is not None:
                number, record = taken
                samples = self._read(number, record)
                self._backlog.charge(number, samples + 1)
                room -= samples + 1
                if broker_time(record) is not None:
                    told.add(number)
                if samples > _LONG_CHUNKS * chunk:
                    self._digest()
            self._digest()
            if time.monotonic() >= until or self._around.stop.is_set():
                break
        return told

    def _digest(self) -> None:
        """Run the network until nothing is left to do. Raises Stopped where that takes too long by now."""
        while self._assignment.runtime.has_ready:
            self._step()

    def _step(self) -> None:
        self._around.beat()
        if time.monotonic() > self._around.deadline - self._around.grace + _FINISH_SECONDS:
            raise Stopped("within a message, which is left to the next worker")
        if time.monotonic() - self._polled_at > _AWAY_SECONDS:
            # Who does not poll for long is put out of the group, and holds up its changes until then.
            polled = self._poll(is_busy=True)
            if polled.lost & self._assignment.partitions.keys():
                raise RebalanceInProgressError  # what was told of them since the last commit is another's now
            self._gained = (self._gained - polled.lost) | polled.gained
        self._assignment.runtime.run_ready()

    def _read(self, number: int, record: Any) -> int:
        """Take one record; returns how many samples it brought."""
        partition = self._assignment.partitions[number]
        limits = Limits.of(self.session.manifest.frame, self._kafka.max_message_bytes)
        message, timestamp = None, None  # what cannot be read moves no clock either
        try:
            message = decode(record.value or b"", limits)
            timestamp = broker_time(record)
            self._assignment.claim(message.stream, number)
        except WireError as problem:
            message = None
            if not partition.is_replaying:
                self._refuse(number, record, problem)
        if message is not None:
            # Else to take it would be to run for long, unseen.
            while self._assignment.runtime.ready(message.stream):
                self._step()
        partition.take(record.offset, timestamp, message)
        return 0 if message is None else len(message.samples)

    def _refuse(self, number: int, record: Any, problem: WireError) -> None:
        self._counters.refused.labels(problem.reason).inc()
        self._throttle.warning(f"message refused ({problem.reason})", str(problem))
        origin = {"topic": self._kafka.topic, "partition": number, "offset": record.offset}
        self._letters.put(record.value or b"", problem.reason, str(problem), origin)

    def _tell(self, events: Sequence[Event]) -> None:
        if events:
            self._delivery.tell(events)
            self._counters.observe_events(events, time.time())

    def _look_at_clocks(self, told: Collection[int]) -> None:
        """Lose streams that fell silent. `told`: partitions whose clock a broker has just set."""
        seconds = self._listened.caught_up()
        for number, partition in self._assignment.partitions.items():
            if partition.is_replaying:
                continue
            lag = self._source.lag(number)
            if lag is not None:
                self._counters.lag_messages.labels(self._kafka.topic, str(number)).set(
                    lag + self._backlog.count(number)
                )
            partition.tick()
            # Listening means something only if nothing waits, and after a pause of this process much may.
            if (
                number not in told
                and number not in self._backlog
                and lag == 0
                and (not partition.is_silent(seconds) or self._source.is_at_end(number))
            ):
                partition.listen(seconds)

    def _commit(self, at_once: bool = False) -> None:
        now = time.monotonic()
        is_due = at_once or now - self._committed_at >= self._kafka.commit_interval
        if not (is_due or self._delivery.is_waiting):
            return
        self._committed_at = now
        records, offsets = self._assignment.checkpoint()
        if offsets or self._delivery.is_waiting:
            self._delivery.commit(records, offsets)
            self._assignment.committed(offsets)

    def _take_up(self, numbers: set[int]) -> None:
        """Go on with partitions where another worker, or this one, stopped."""
        started = time.monotonic()
        for number, found in self._source.resumption(numbers).items():
            self._backlog.drop(number)
            self._source.seek(number, self._assignment.take_up(number, found))
        log.info("took up %d partitions in %.1f s", len(numbers), time.monotonic() - started)

    def _swap(self) -> None:
        """Go on with the bundle as it is now; the old one, where it cannot be used."""
        self._around.notifier.reloading()
        try:
            try:
                session = self._around.replacement.take()
                successor = self._assignment.successor(session)
            except Exception as problem:
                self._refuse_swap(problem)
                return
            self._hand_over(session, successor)
        finally:
            self._around.notifier.ready()

    def _hand_over(self, session: Session, successor: Assignment) -> None:
        """Commit with the old bundle, bring the streams back with the new. Raises KafkaError, DataError."""
        try:
            self._commit(at_once=True)
        except KafkaError:
            self._around.replacement.request()  # the next life swaps it
            raise
        numbers, previous = set(self._assignment.partitions), self.session
        for number in numbers:
            self._assignment.leave(number)
        self.session, self._assignment = session, successor
        try:
            self._take_up(numbers)
            self._around.notifier.ready()  # how the streams are brought back, /ready tells
            while self._assignment.replaying and not self._around.stop.is_set():
                self._round()
        except (KafkaError, DataError, ConfigError, Stopped):
            self._note_swap(previous)  # the brokers' matter: the next life goes on with the new bundle
            raise
        except Exception as problem:
            self.session = previous  # for the next life: what was told by now must not be committed
            self._refuse_swap(problem)
            raise DataError(f"{session.manifest.id} could not bring the streams back") from problem
        self._note_swap(previous)

    def _note_swap(self, previous: Session) -> None:
        found = self.session.manifest.id
        log.info("bundle %s takes over from %s", found, previous.manifest.id)
        self._counters.bundle_swaps.inc()
        self._around.notifier.status(f"bundle {found}")

    def _refuse_swap(self, problem: Exception) -> None:
        found = self.session.manifest.id
        self._around.replacement.refused(found, problem)
        self._counters.bundle_swaps_failed.inc()
        self._around.notifier.status(f"bundle {found}; another was refused, see the log")

    def _keep_waiting(self) -> None:
        """For the end of a transaction; raises Stopped once there is no time left for it."""
        self._around.beat()
        if time.monotonic() > self._around.deadline - self._around.grace / 2:
            raise Stopped("without an answer to its last commit")

    def _wait(self) -> None:
        """For a broker; raises Stopped when there is no need to."""
        self._around.beat()
        if self._around.stop.is_set():
            raise Stopped("before its partitions were taken up")
