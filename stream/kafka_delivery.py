"""What a worker writes to Kafka: events, dead letters, state, and how far it has read.

`Transactions`: all of it at once or nothing (exactly once). `Sends`: events at once, and state and offsets
later, in a transaction of their own, so that a crash in between says some events again (at least once). What
either raises, or leaves undone, ends with `close`: the worker begins anew.
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
from stream.kafka_producer import TransactionalProducer, Wait, settle
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


class _Committing:
    """What both ways have in common: the transaction that holds state and offsets."""

    def __init__(
        self,
        settings: KafkaSourceSettings,
        source: KafkaSource,
        counters: Counters,
        identity: str,
        wait: Wait,
    ) -> None:
        """`identity`: this process's; what its producer before this one left under way is ended.

        That a worker is not the owner of its partitions any more is proved by its membership in the group
        (KIP-447), not by who has its name. Raises KafkaError.
        """
        self._settings, self._source, self._counters = settings, source, counters
        self._transaction = TransactionalProducer(
            settings.connection,
            f"{settings.group}-{identity}",
            compression="gzip",
            timeout=settings.transaction_timeout,
            max_record_bytes=MAX_RECORD_BYTES,
            wait=wait,
        )
        self._wait = wait

    def _commit(
        self,
        events: Sequence[Event],
        letters: Sequence[tuple[str, bytes | None, bytes, Headers]],
        state: Sequence[State],
        offsets: Offsets,
    ) -> None:
        outcome = "failed"
        try:
            self._transaction.begin()
            for event in events:
                made = record(event)
                self._transaction.send(self._settings.events, made.key, made.value, made.headers)
            for letter in letters:
                self._transaction.send(*letter)
            for partition, key, value in state:
                self._transaction.send(self._settings.state_topic, key, value, partition=partition)
            self._transaction.commit(self._source.places(offsets), self._source.membership())
            outcome = "committed"
        finally:
            self._counters.transactions.labels(outcome).inc()

    def close(self) -> None:
        """See `Delivery.close`."""
        self._transaction.close()


class Transactions(_Committing):
    """One transaction a commit, of all."""

    def __init__(
        self,
        settings: KafkaSourceSettings,
        source: KafkaSource,
        counters: Counters,
        identity: str,
        wait: Wait,
    ) -> None:
        """Raises KafkaError."""
        super().__init__(settings, source, counters, identity, wait)
        self._told: list[Event] = []
        self._letters: list[tuple[str, bytes | None, bytes, Headers]] = []

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
        self._commit(self._told, self._letters, state, offsets)
        self._told, self._letters = [], []


class Sends(_Committing):
    """Events as they come; state and offsets at each commit, after them."""

    is_waiting = False

    def __init__(
        self,
        settings: KafkaSourceSettings,
        source: KafkaSource,
        counters: Counters,
        identity: str,
        wait: Wait,
    ) -> None:
        """Raises KafkaError."""
        super().__init__(settings, source, counters, identity, wait)
        self._futures: list[Any] = []
        self._producer = KafkaProducer(
            **settings.connection.client_options(),
            enable_idempotence=True,
            acks="all",
            compression_type="gzip",
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
        # What the state tells of, and the offsets pass, has been told by then.
        deadline = time.monotonic() + _DELIVERY_SECONDS
        futures, self._futures = self._futures, []
        for future in futures:
            settle(future, deadline, self._wait)
        self._commit((), (), state, offsets)

    def close(self) -> None:
        """See `Delivery.close`."""
        with suppress(KafkaError):  # something is on its way still, and is given up
            self._producer.close(timeout=0)
        super().close()


def open_delivery(
    settings: KafkaSourceSettings,
    source: KafkaSource,
    counters: Counters,
    identity: str,
    wait: Wait = lambda: None,
) -> Delivery:
    """The delivery of a configuration; `wait` is called while a commit waits for brokers, and may raise to
    give up. Raises KafkaError."""
    kind = Transactions if settings.delivery == "exactly-once" else Sends
    return kind(settings, source, counters, identity, wait)
