"""What a worker writes to Kafka: events, dead letters, state, and how far it has read.

`Transactions`: all of it at once or nothing (exactly once). `Sends`: events at once, the rest later, so that
a crash in between says some events again (at least once). Both block until the broker has answered; `wait`
is called meanwhile, and may raise to give up.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from kafka import KafkaProducer
from kafka.errors import KafkaError

from stream.checkpoint import MAX_RECORD_BYTES
from stream.cloudevents import record
from stream.counters import Counters
from stream.dead_letters import Headers
from stream.events import Event
from stream.kafka_source import CONNECT_SECONDS, REQUEST_SECONDS, KafkaSource, KafkaSourceSettings

log = logging.getLogger(__name__)

State = tuple[int, bytes, bytes | None]
"""(partition, key, value) of the compacted topic"""
Offsets = Mapping[int, tuple[int, str]]
"""partition -> (offset, text beside it)"""

# Records that are not acknowledged by then are given up, and the worker begins anew from its last commit.
_DELIVERY_SECONDS = 60.0


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
        """Write down what was told, `state` and `offsets`. Raises KafkaError: begin anew."""
        ...

    def close(self) -> None:
        """Hang up; what was not committed is forgotten."""
        ...


class _Producing:
    """A producer, and what both ways have in common."""

    def __init__(
        self,
        settings: KafkaSourceSettings,
        source: KafkaSource,
        counters: Counters,
        wait: Callable[[], None],
        **options: Any,
    ) -> None:
        self._settings, self._source, self._counters, self._wait = settings, source, counters, wait
        self._futures: list[Any] = []
        self._producer = KafkaProducer(
            **settings.connection.client_options(),
            enable_idempotence=True,
            acks="all",
            allow_auto_create_topics=False,
            max_request_size=MAX_RECORD_BYTES,
            compression_type="gzip",
            linger_ms=0,
            retry_backoff_ms=20,
            request_timeout_ms=round(1000 * REQUEST_SECONDS),
            delivery_timeout_ms=round(1000 * _DELIVERY_SECONDS),
            max_block_ms=round(1000 * REQUEST_SECONDS),
            bootstrap_timeout_ms=round(1000 * CONNECT_SECONDS),
            reconnect_backoff_max_ms=1000,
            **options,
        )

    def _send_events(self, events: Sequence[Event]) -> None:
        for event in events:
            made = record(event)
            self._send(self._settings.events, made.key, made.value, made.headers)

    def _send_state(self, state: Sequence[State]) -> None:
        for partition, key, value in state:
            self._send(self._settings.state_topic, key, value, None, partition)

    def _send(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Headers | None,
        partition: int | None = None,
    ) -> None:
        self._futures.append(
            self._producer.send(topic, key=key, value=value, headers=headers, partition=partition)
        )

    def _settle(self) -> None:
        """Wait until all that was sent is acknowledged. Raises what was not."""
        self._producer.flush(timeout=_DELIVERY_SECONDS)
        futures, self._futures = self._futures, []
        for future in futures:
            future.get(timeout=0)

    def _patiently(self, call: Callable[[], None]) -> None:
        """Run what may wait for a broker for long, and meanwhile ask `wait` whether to go on."""
        failure: list[BaseException] = []
        done = threading.Event()

        def run() -> None:
            try:
                call()
            except BaseException as problem:
                failure.append(problem)
            done.set()

        threading.Thread(target=run, name="kafka-delivery", daemon=True).start()
        while not done.wait(0.5):
            self._wait()
        if failure:
            raise failure[0]

    def close(self) -> None:
        """See `Delivery.close`."""
        try:
            self._producer.close(timeout=0)
        except KafkaError as problem:
            log.debug("the producer was closed with something on its way: %s", problem)


class Transactions(_Producing):
    """One transaction a commit."""

    def __init__(
        self,
        settings: KafkaSourceSettings,
        source: KafkaSource,
        counters: Counters,
        wait: Callable[[], None],
    ) -> None:
        """Raises KafkaError."""
        # An id of its own: that a worker is not the owner of its partitions any more is proved by its
        # membership in the group (KIP-447), not by who has its name.
        super().__init__(
            settings,
            source,
            counters,
            wait,
            transactional_id=f"{settings.group}-{uuid.uuid4()}",
            transaction_timeout_ms=round(1000 * settings.transaction_timeout),
        )
        self._told: list[Event] = []
        self._letters: list[tuple[str, bytes | None, bytes, Headers]] = []
        self._patiently(self._producer.init_transactions)

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
        try:
            self._patiently(lambda: self._commit(state, offsets))
        except Exception:
            self._counters.transactions.labels("aborted").inc()
            raise
        self._counters.transactions.labels("committed").inc()
        self._told, self._letters = [], []

    def _commit(self, state: Sequence[State], offsets: Offsets) -> None:
        self._producer.begin_transaction()
        try:
            self._send_events(self._told)
            for topic, key, value, headers in self._letters:
                self._send(topic, key, value, headers)
            self._send_state(state)
            self._producer.send_offsets_to_transaction(
                self._source.places(offsets), self._source.membership()
            )
            # The client would commit a transaction without the records that it gave up, so each is asked.
            self._settle()
            self._producer.commit_transaction()
        except KafkaError:
            self._futures.clear()
            self._abort()
            raise

    def _abort(self) -> None:
        try:
            self._producer.abort_transaction()
        except KafkaError as problem:  # the broker gives it up after `transaction_timeout`
            log.debug("a transaction could not be aborted: %s", problem)


class Sends(_Producing):
    """Events as they come; state and offsets at each commit, after them."""

    @property
    def is_waiting(self) -> bool:
        """See `Delivery.is_waiting`."""
        return False

    def tell(self, events: Sequence[Event]) -> None:
        """See `Delivery.tell`."""
        self._send_events(events)

    def send(self, topic: str, key: bytes | None, value: bytes, headers: Headers) -> None:
        """See `Delivery.send`."""
        self._send(topic, key, value, headers)

    def commit(self, state: Sequence[State], offsets: Offsets) -> None:
        """See `Delivery.commit`."""
        self._patiently(lambda: self._commit(state, offsets))

    def _commit(self, state: Sequence[State], offsets: Offsets) -> None:
        # In this order: what the state tells of has been told, and what the offsets pass has been written.
        self._settle()
        self._send_state(state)
        self._settle()
        self._source.commit(offsets)


def open_delivery(
    settings: KafkaSourceSettings, source: KafkaSource, counters: Counters, wait: Callable[[], None]
) -> Delivery:
    """The delivery of a configuration. Raises KafkaError."""
    kind = Transactions if settings.delivery == "exactly-once" else Sends
    return kind(settings, source, counters, wait)
