"""The Kafka that other tests rely on: it keeps what it was given, refuses strangers, and can be cut off."""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import KafkaTimeoutError

from tests.conftest import ROOT
from tests.kafka.broker import Cluster
from tests.kafka.certificates import write_certificates


def read(cluster: Cluster, topic: str, count: int, partition: int = 0) -> list[bytes]:
    """The first `count` committed values of a partition; fewer when no more come within a minute."""
    place = TopicPartition(topic, partition)
    deadline = time.monotonic() + 60
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


def test_a_client_with_the_password_and_the_authority_comes_in(guarded: Cluster) -> None:
    guarded.create_topic("known")
    with produce(guarded) as producer:
        producer.send("known", b"hello").get(timeout=60)
    assert read(guarded, "known", 1) == [b"hello"]


# The client takes both refusals for a passing trouble and tries again: why it failed is in its log alone.
def test_a_wrong_password_is_refused(guarded: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "kafka")
    settings = guarded.client_settings() | {"sasl_plain_password": "guess"}
    with pytest.raises(KafkaTimeoutError):
        KafkaAdminClient(**settings, bootstrap_timeout_ms=2000)
    assert "SaslAuthenticationFailedError" in caplog.text


def test_a_broker_of_another_authority_is_refused(
    guarded: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "kafka")
    other, _ = write_certificates(tmp_path)
    settings = guarded.client_settings() | {"ssl_cafile": str(other)}
    with pytest.raises(KafkaTimeoutError):
        KafkaAdminClient(**settings, bootstrap_timeout_ms=2000)
    assert "certificate verify failed" in caplog.text


@pytest.mark.parametrize("end", [Cluster.kill, Cluster.stop])
def test_what_was_acknowledged_outlives_the_broker_process(
    guarded: Cluster, end: Callable[[Cluster, int], None]
) -> None:
    name = f"kept-{end.__name__}"
    guarded.create_topic(name)
    with produce(guarded) as producer:
        producer.send(name, b"before").get(timeout=60)
        end(guarded, 0)
        guarded.start(0)
        producer.send(name, b"after").get(timeout=60)
    assert read(guarded, name, 2) == [b"before", b"after"]


@pytest.mark.parametrize("silently", [False, True])
def test_what_is_produced_while_the_network_is_cut_arrives_when_it_is_back(
    guarded: Cluster, silently: bool
) -> None:
    name = f"cut-{silently}"
    guarded.create_topic(name)
    with produce(guarded) as producer:
        producer.send(name, b"before").get(timeout=60)
        guarded.proxies[0].cut(silently)
        late = producer.send(name, b"late")
        with pytest.raises(KafkaTimeoutError):
            late.get(timeout=1)
        guarded.proxies[0].restore()
        late.get(timeout=60)
    assert read(guarded, name, 2) == [b"before", b"late"]


def test_three_brokers_go_on_without_one_and_take_it_back(has_kafka: None, tmp_path: Path) -> None:
    with Cluster(tmp_path, brokers=3) as cluster:
        cluster.create_topic("replicated", partitions=3)  # each broker leads one
        with produce(cluster) as producer:
            for value in (b"all", b"two", b"all again"):
                sent = [producer.send("replicated", value, partition=partition) for partition in range(3)]
                for future in sent:
                    future.get(timeout=60)
                if value == b"all":
                    cluster.kill(0)
                if value == b"two":
                    cluster.start(0)
        for partition in range(3):
            assert read(cluster, "replicated", 3, partition) == [b"all", b"two", b"all again"]


def test_a_broker_does_not_outlive_a_killed_test_run(has_kafka: None, tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from tests.kafka.broker import Cluster
with Cluster(Path(sys.argv[1])) as cluster:
    print(cluster.bootstrap[0], flush=True)
    time.sleep(600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        host, port = run.stdout.readline().split(":")
        socket.create_connection((host, int(port))).close()
        run.kill()
    deadline = time.monotonic() + 60
    with pytest.raises(ConnectionRefusedError):  # noqa: PT012
        while time.monotonic() < deadline:
            socket.create_connection((host, int(port))).close()
            time.sleep(0.1)
