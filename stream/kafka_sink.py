"""Events to a Kafka topic, each once and a stream's in order, whatever befalls the broker and this process.

`write` puts events into a spool on disk and returns; a thread sends what is in it, oldest first. Each batch
is one transaction, in which the position that it reaches in the spool is committed as well, as the offset of
a consumer group that has no consumers. Whoever opens the spool next, this process after a failure or another
one after a crash, first makes the broker settle the transaction that was under way, then asks it for that
position: what was sent is known, not guessed. Consumers that read with `isolation_level=read_committed` see
every event once; others see those of aborted transactions too, and can tell them by their `ce_id`.

The transactional id and the group are both `onset-spool-ID`, with the spool's own id: two sinks never meet.
A user who may not do everything needs Describe and Write (transactional id) and Read (group) on that prefix,
and Describe, Write and Read on the topic (offsets are committed for it).

This is the sink for frames that come over ZeroMQ: what reaches it is not lost; what comes before it can be.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal

from kafka import KafkaConsumer, OffsetAndMetadata, TopicPartition
from kafka.errors import UnknownTopicOrPartitionError
from pydantic import Field

from engine.errors import ConfigError, OnsetError
from engine.schema import Strict
from stream.cloudevents import record
from stream.counters import Counters
from stream.events import Event
from stream.kafka_connection import KafkaConnection, explain
from stream.kafka_producer import TransactionalProducer
from stream.spool import Spool, SpoolFull
from stream.throttle import Throttle

log = logging.getLogger(__name__)

# Events in one transaction at most: its round trips are shared by many, and repeating it is cheap.
_BATCH = 500
# How long one question about the spool's position may take; how long a failure is slept over.
_ANSWER_SECONDS = 10.0
_PAUSE_SECONDS = 1.0
# So long after the last wait for room the spool has some again; one that drains slowly has it now and then.
_CALM_SECONDS = 5.0


class KafkaSinkSettings(Strict):
    """Where events go, and where they wait. Times are seconds."""

    connection: KafkaConnection
    topic: str = Field(pattern=r"^[A-Za-z0-9._-]{1,249}$", description="it must exist; keyed by stream")
    spool: Path = Field(description="file on a local disk, of this service alone")
    spool_bytes: int = Field(
        default=256 * 1024**2, ge=64 * 1024, le=1024**4, description="what may wait; some 600 bytes an event"
    )
    when_full: Literal["block", "drop-oldest"] = Field(
        default="block", description="a full spool makes the service wait, or its oldest events are lost"
    )
    linger: float = Field(
        default=0.01, ge=0, le=60, description="how long events wait for others to share a transaction"
    )
    compression: Literal["gzip", "none"] = "none"

    def relative_to(self, folder: Path) -> KafkaSinkSettings:
        """The same, with relative paths relative to `folder`."""
        return self.model_copy(
            update={"connection": self.connection.relative_to(folder), "spool": folder / self.spool}
        )


class KafkaSink:
    """An `EventWriter`; sends until it is closed. `write` and `close` belong to one thread."""

    def __init__(
        self,
        settings: KafkaSinkSettings,
        counters: Counters | None = None,
        patience: Callable[[], bool] = lambda: True,
    ) -> None:
        """`patience` is asked, about once a second, whether to go on waiting for room in the spool.

        Raises ConfigError for a spool or a secret that cannot be had; a broker need not be there.
        """
        self._patience = patience
        self._settings, self._counters = settings, counters or Counters()
        self._throttle = Throttle(log)
        settings.connection.client_options()  # complains now, not later in a log
        self._spool = Spool(settings.spool, settings.spool_bytes)
        self._identity = f"onset-spool-{self._spool.id}"
        self._place = TopicPartition(settings.topic, 0)
        self._work, self._closing, self._stop = threading.Event(), threading.Event(), threading.Event()
        self._producer: TransactionalProducer | None = None
        self._waited_at = -math.inf  # for room in the spool
        self._sending: str | None = None  # what is wrong with the spool's disk
        self.unwritten = 0
        if self.depth:
            log.info("%s: %d events of an earlier run are sent first", settings.spool, self.depth)
        self._thread = threading.Thread(target=self._run, name="kafka-sink", daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        """How many events wait in the spool."""
        return len(self._spool)

    def write(self, events: Sequence[Event]) -> None:
        """See `EventWriter.write`: the events are on the disk when this returns.

        Waits while the spool is full, unless it may drop the oldest. Raises OnsetError when the disk refuses:
        then nothing of them was kept.
        """
        if not events:
            return
        records = [record(event) for event in events]
        drop = self._settings.when_full == "drop-oldest"
        self.unwritten = len(events)
        while True:
            try:
                dropped = self._spool.append(records, drop_oldest=drop)
            except SpoolFull as problem:
                self._waited_at = time.monotonic()
                if not self._patience():
                    self._counters.events_dropped.inc(len(events))
                    log.error(
                        "%s is full and no broker takes events: %d are lost",
                        self._settings.spool,
                        len(events),
                    )
                    return
                self._throttle.warning("waiting", f"{problem}; the service waits for the broker")
                self._spool.wait_for_room(_PAUSE_SECONDS)
                continue
            if dropped:
                self._counters.events_dropped.inc(dropped)
                self._throttle.warning(
                    "events lost", f"{self._settings.spool} is full, the oldest are dropped"
                )
            self._counters.spool_events.set(self.depth)
            self._work.set()
            return

    @property
    def trouble(self) -> str | None:
        """What is wrong with the spool, in a sentence. A broker that is away is nothing, while it holds."""
        if time.monotonic() - self._waited_at < _CALM_SECONDS:
            return "a spool is full: its broker takes events too slowly, or none at all"
        return self._sending

    def close(self, timeout: float = 10.0) -> None:
        """Send what waits, for so many seconds; what is left stays in the spool for the next run."""
        self._closing.set()
        self._work.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._stop.set()
            self._hang_up()
            self._thread.join(_PAUSE_SECONDS)
        if self.depth:
            log.warning(
                "%s: %d events were not sent; they wait there for the next run",
                self._settings.spool,
                self.depth,
            )
        self._spool.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._deliver()
                return
            except Exception as problem:
                if self._stop.is_set():
                    return
                if isinstance(problem, OnsetError) and not isinstance(problem, ConfigError):
                    self._sending = str(problem)  # the spool's disk, which may have room again
                told = (
                    str(problem)
                    if isinstance(problem, OnsetError)
                    else explain(problem, self._settings.connection)
                )
                self._throttle.warning("kafka", f"{told}; {self.depth} events wait in {self._settings.spool}")
            finally:
                self._hang_up()
            self._stop.wait(_PAUSE_SECONDS)

    def _deliver(self) -> None:
        """Connect, settle what was under way, and send until there is an end. Raises whatever fails."""
        settings = self._settings
        compression = None if settings.compression == "none" else settings.compression
        self._producer = producer = TransactionalProducer(settings.connection, self._identity, compression)
        if not producer.has_topic(settings.topic):
            raise UnknownTopicOrPartitionError()
        self._forget_what_was_sent()
        log.info("events go to topic %s; %d wait", settings.topic, self.depth)
        while self._has_work():
            batch = self._spool.peek(_BATCH)
            last, newest = batch[-1]
            producer.begin()
            for _, waiting in batch:
                producer.send(settings.topic, waiting.key, waiting.value, waiting.headers)
            producer.commit({self._place: OffsetAndMetadata(last, newest.id, -1)}, self._identity)
            self._spool.remove(last)
            self._sending = None
            self._counters.events_delivered.inc(len(batch))
            self._counters.spool_events.set(self.depth)

    def _forget_what_was_sent(self) -> None:
        """Remove from the spool what the last transaction had committed before its end was known here.

        The position counts only together with the id of the event there: a spool that was restored from a
        copy has the same positions for other events.
        """
        options = self._settings.connection.client_options()
        with closing(
            KafkaConsumer(
                **options,
                group_id=self._identity,
                enable_auto_commit=False,
                isolation_level="read_committed",
                bootstrap_timeout_ms=round(1000 * _ANSWER_SECONDS),
            )
        ) as consumer:
            committed = consumer.committed(
                self._place, metadata=True, timeout_ms=round(1000 * _ANSWER_SECONDS)
            )
        if committed is None:
            return
        for position, waiting in self._spool.peek(_BATCH):
            if (position, waiting.id) == (committed.offset, committed.metadata):
                self._spool.remove(position)
                return

    def _has_work(self) -> bool:
        """Wait for events; False: there are none, and none will come."""
        while not self._stop.is_set():
            self._work.clear()
            if self.depth:
                self._closing.wait(self._settings.linger)
                return True
            if self._closing.is_set():
                return False
            self._work.wait()
        return False

    def _hang_up(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.close()
