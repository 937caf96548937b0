"""The Kafka that other tests rely on: it keeps what it was given, refuses strangers, and can be cut off."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from tests.kafka.broker import Cluster


def read(cluster: Cluster, topic: str, count: int, seconds: float = 60.0) -> list[bytes]:
    """The first `count` committed values of a topic's only partition."""
    place = TopicPartition(topic, 0)
    deadline = time.monotonic() + seconds
    values: list[bytes] = []
    with contextlib.closing(
        KafkaConsumer(
            isolation_level="read_committed", auto_offset_reset="earliest", **cluster.client_settings()
        )
    ) as consumer:
        consumer.assign([place])
        while len(values) < count and time.monotonic() < deadline:
            values += [record.value for record in consumer.poll(200).get(place, [])]
    return values


@contextlib.contextmanager
def produce(cluster: Cluster, **settings: Any) -> Iterator[KafkaProducer]:
    producer = KafkaProducer(**cluster.client_settings(), **settings)
    try:
        yield producer
    finally:
        producer.close(timeout=0)


def test_what_a_transaction_committed_is_read_and_what_it_aborted_is_not(
    kafka: Cluster, topic: Callable[..., str]
) -> None:
    name = topic()
    with produce(kafka, transactional_id=name) as producer:
        producer.init_transactions()
        producer.begin_transaction()
        producer.send(name, b"aborted")
        producer.flush()
        producer.abort_transaction()
        producer.begin_transaction()
        producer.send(name, b"committed")
        producer.commit_transaction()
    assert read(kafka, name, 1) == [b"committed"]
