"""A transactional producer whose calls end: with what they were to do, or with an error in bounded time.

kafka-python 3.0.12 (look again when it changes; tests/stream/test_kafka_sink.py kills and cuts):
- `send_offsets_to_transaction` and `commit_transaction` wait for ever when the connection to the coordinator
  fails just as their request is to be sent: the request is forgotten. Here they wait for so long at most, for
  which there is no public way.
- `commit_transaction` commits although records were given up (`delivery_timeout_ms`). Here each is asked.
- `close` with a timeout raises while records are on their way, and leaves its thread running.

After an error the producer is of no use but to be closed: the next one with the same transactional id first
has the broker end what was under way. Whether that was committed only a committed offset can tell.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from kafka import ConsumerGroupMetadata, KafkaProducer, OffsetAndMetadata, TopicPartition
from kafka.errors import KafkaError, KafkaTimeoutError

from stream.dead_letters import Headers
from stream.kafka_connection import KafkaConnection

# A partition has one request on its way at a time, so that a retry overtakes nothing; this is how large.
_REQUEST_BYTES = 256 * 1024
# How long a broker may take to be there, to answer one request, and to take a whole transaction.
_CONNECT_SECONDS = 5.0
_REQUEST_SECONDS = 10.0
_TRANSACTION_SECONDS = 15.0
_CLOSE_SECONDS = 1.0
_LOOK_SECONDS = 1.0

Wait = Callable[[], None]


class TransactionalProducer:
    """Begins a transaction, takes records, commits them with offsets; again and again, then `close`."""

    def __init__(
        self,
        connection: KafkaConnection,
        transactional_id: str,
        compression: str | None = None,
        timeout: float = _TRANSACTION_SECONDS,
        max_record_bytes: int = 1024 * 1024,
        wait: Wait = lambda: None,
    ) -> None:
        """Connect, and have the broker end what an earlier producer of this id left under way.

        `wait` is called about once a second while `commit` waits, and may raise to give up.

        `timeout`: seconds for a transaction, after which it fails here and the broker gives it up.

        Raises KafkaError when that is not possible, ConfigError for a secret that is not there.
        """
        self._timeout, self._wait = timeout, wait
        self._futures: list[Any] = []
        self._producer = KafkaProducer(
            **connection.client_options(),
            transactional_id=transactional_id,
            enable_idempotence=True,
            acks="all",
            compression_type=compression,
            batch_size=_REQUEST_BYTES,
            request_timeout_ms=_milliseconds(_REQUEST_SECONDS),
            delivery_timeout_ms=_milliseconds(max(timeout, _REQUEST_SECONDS)),
            transaction_timeout_ms=_milliseconds(timeout),
            max_request_size=max_record_bytes,
            # Right after a transaction the coordinator refuses the next for some milliseconds.
            retry_backoff_ms=20,
            max_block_ms=_milliseconds(_CONNECT_SECONDS),
            bootstrap_timeout_ms=_milliseconds(_CONNECT_SECONDS),
            reconnect_backoff_max_ms=1000,
            allow_auto_create_topics=False,
        )
        try:
            self._producer.init_transactions()
        except BaseException:
            self.close()
            raise

    def has_topic(self, topic: str) -> bool:
        """Whether the topic exists, as far as this user may know. Raises KafkaError when it may not."""
        try:
            return bool(self._producer.partitions_for(topic))
        except KafkaTimeoutError:
            return False

    def begin(self) -> None:
        """Begin a transaction. Raises KafkaError."""
        self._producer.begin_transaction()

    def send(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Headers | None = None,
        partition: int | None = None,
    ) -> None:
        """Make a record part of the transaction; it is on its way when this returns. Raises KafkaError.

        Kafka's own timestamp is when it was sent: brokers refuse, or soon delete, records of another time,
        and the clock of who captured the frames may be wrong.
        """
        self._futures.append(
            self._producer.send(topic, key=key, value=value, headers=headers, partition=partition)
        )

    def commit(
        self, offsets: Mapping[TopicPartition, OffsetAndMetadata], group: ConsumerGroupMetadata | str
    ) -> None:
        """Commit the records together with the offsets of `group`.

        Raises KafkaError when it was not done, or when it is not known whether it was.
        """
        deadline = time.monotonic() + self._timeout
        futures, self._futures = self._futures, []
        for future in futures:
            settle(future, deadline, self._wait)
        transactions = self._producer._transaction_manager
        self._await(transactions.send_offsets_to_transaction(dict(offsets), group), deadline)
        self._await(transactions.begin_commit(), deadline)

    def close(self) -> None:
        """Hang up at once; a transaction that is under way stays so until the id is used again."""
        sender = self._producer._sender
        sender.force_close()
        sender.join(_CLOSE_SECONDS)
        with suppress(KafkaError):
            self._producer.close(timeout=0)

    def _await(self, result: Any, deadline: float) -> None:
        self._producer._sender.wakeup()
        while not result.wait(timeout_ms=_milliseconds(_left(deadline))):
            if time.monotonic() >= deadline:
                raise KafkaTimeoutError(f"no answer within {self._timeout:g} s")
            self._wait()


def settle(future: Any, deadline: float, wait: Wait) -> None:
    """Until a record is acknowledged; `wait` is called about once a second. Raises KafkaError."""
    while not future.is_done and time.monotonic() < deadline:
        with suppress(KafkaTimeoutError):
            future.get(timeout=_left(deadline))
        wait()
    future.get(timeout=0)


def _left(deadline: float) -> float:
    """How long to wait at once."""
    return max(0.0, min(_LOOK_SECONDS, deadline - time.monotonic()))


def _milliseconds(seconds: float) -> int:
    return round(1000 * seconds)
