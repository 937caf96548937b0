"""What a worker writes to Kafka: events, dead letters, state, and how far it has read.

`Transactions`: all of it at once or nothing (exactly once). `Sends`: events at once, the rest later, so that
a crash in between says some events again (at least once). What either raises, or leaves undone, ends with
`close`: the worker begins anew.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from kafka import KafkaProducer
from kafka.errors import KafkaError

from stream.checkpoint import MAX_RECORD_BYTES
from stream.cloudevents import record
from stream.counters import Counters
from stream.dead_letters import Headers
from stream.events import Event
from stream.kafka_producer import TransactionalProducer
from stream.kafka_source import CONNECT_SECONDS, REQUEST_SECONDS, KafkaSource, KafkaSourceSettings

State = tuple[int, bytes, bytes | None]
"""(partition, key, value) of the compacted topic"""
Offsets = Mapping[int, tuple[int, str]]
"""partition -> (offset, text beside it)"""

# Records that are not acknowledged by then are given up.
_DELIVERY_SECONDS = 30.0


class Delivery(Protocol):
    """Where a worker's output goes."""

    @property
    def is_waiting(self) -> bool:
        """Something was told that only a commit shows to others."""
        ...

    def tell(self, events: Sequence[Event]) -> None:
        """Take events, in order."""
        ...

    def send(self, topic: str, key: bytes | None, value: bytes, headers: Headers) -> None:
        """Take another record: a dead letter."""
        ...

    def commit(self, state: Sequence[State], offsets: Offsets) -> None:
        """Write down what was told, `state` and `offsets`. Raises KafkaError."""
        ...

    def close(self) -> None:
        """Hang up; what was not committed is forgotten."""
        ...


class Transactions:
    """One transaction a commit."""

    def __init__(
        self, settings: KafkaSourceSettings, source: KafkaSource, counters: Counters, identity: str
    ) -> None:
        """`identity`: this process's; what its producer before this one left under way is ended.

        That a worker is not the owner of its partitions any more is proved by its membership in the group
        (KIP-447), not by who has its name. Raises KafkaError.
        """
        self._settings, self._source, self._counters = settings, source, counters
        self._told: list[Event] = []
        self._letters: list[tuple[str, bytes | None, bytes, Headers]] = []
        self._producer = TransactionalProducer(
            settings.connection,
            f"{settings.group}-{identity}",
            compression="gzip",
            timeout=settings.transaction_timeout,
            max_record_bytes=MAX_RECORD_BYTES,
        )

    @property
    def is_waiting(self) -> bool:
        """See `Delivery.is_waiting`."""
        return bool(self._told or self._letters)

    def tell(self, events: Sequence[Event]) -> None:
        """See `Delivery.tell`."""
        self._told += events

    def send(self, topic: str, key: bytes | None, value: bytes, headers: Headers) -> None:
        """See `Delivery.send`."""
        self._letters.append((topic, key, value, headers))

    def commit(self, state: Sequence[State], offsets: Offsets) -> None:
        """See `Delivery.commit`."""
        outcome = "failed"
        try:
            self._producer.begin()
            for event in self._told:
                made = record(event)
                self._producer.send(self._settings.events, made.key, made.value, made.headers)
            for letter in self._letters:
                self._producer.send(*letter)
            for partition, key, value in state:
                self._producer.send(self._settings.state_topic, key, value, partition=partition)
            self._producer.commit(self._source.places(offsets), self._source.membership())
            outcome = "committed"
        finally:
            self._counters.transactions.labels(outcome).inc()
        self._told, self._letters = [], []

    def close(self) -> None:
        """See `Delivery.close`."""
        self._producer.close()


class Sends:
    """Events as they come; state and offsets at each commit, after them."""

    is_waiting = False

    def __init__(self, settings: KafkaSourceSettings, source: KafkaSource) -> None:
        """Raises KafkaError."""
        self._settings, self._source = settings, source
        self._futures: list[Any] = []
        self._producer = KafkaProducer(
            **settings.connection.client_options(),
            enable_idempotence=True,
            acks="all",
            compression_type="gzip",
            max_request_size=MAX_RECORD_BYTES,
            request_timeout_ms=round(1000 * REQUEST_SECONDS),
            delivery_timeout_ms=round(1000 * _DELIVERY_SECONDS),
            max_block_ms=round(1000 * REQUEST_SECONDS),
            bootstrap_timeout_ms=round(1000 * CONNECT_SECONDS),
            reconnect_backoff_max_ms=1000,
            allow_auto_create_topics=False,
        )

    def tell(self, events: Sequence[Event]) -> None:
        """See `Delivery.tell`."""
        for event in events:
            made = record(event)
            self.send(self._settings.events, made.key, made.value, made.headers)

    def send(self, topic: str, key: bytes | None, value: bytes, headers: Headers) -> None:
        """See `Delivery.send`."""
        self._futures.append(self._producer.send(topic, key=key, value=value, headers=headers))

    def commit(self, state: Sequence[State], offsets: Offsets) -> None:
        """See `Delivery.commit`."""
        # In this order: what the state tells of has been told, and what the offsets pass has been written.
        self._settle()
        for partition, key, value in state:
            sent = self._producer.send(self._settings.state_topic, key=key, value=value, partition=partition)
            self._futures.append(sent)
        self._settle()
        self._source.commit(offsets)

    def close(self) -> None:
        """See `Delivery.close`."""
        with suppress(KafkaError):  # something is on its way still, and is given up
            self._producer.close(timeout=0)

    def _settle(self) -> None:
        deadline = time.monotonic() + _DELIVERY_SECONDS
        futures, self._futures = self._futures, []
        for future in futures:
            future.get(timeout=max(0.0, deadline - time.monotonic()))


def open_delivery(
    settings: KafkaSourceSettings, source: KafkaSource, counters: Counters, identity: str
) -> Delivery:
    """The delivery of a configuration. Raises KafkaError."""
    if settings.delivery == "exactly-once":
        return Transactions(settings, source, counters, identity)
    return Sends(settings, source)
