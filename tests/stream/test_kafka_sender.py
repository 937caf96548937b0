"""`onset send --to kafka://`: everything arrives, once and in order, or a sentence says why not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from kafka import KafkaConsumer, TopicPartition

from engine.errors import ConfigError, OnsetError
from stream.kafka_connection import KafkaConnection
from stream.kafka_sender import KafkaSender
from stream.wire import Limits, decode
from tests.kafka.broker import Cluster
from tests.kafka.flow import messages_of
from tests.kafka.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
LIMITS = Limits(50.0, 3)


def records(cluster: Cluster, topic: str) -> list[Any]:
    """All records of a topic."""
    with closing(KafkaConsumer(**cluster.client_settings(), group_id=None)) as consumer:
        places = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic) or ()]
        consumer.assign(places)
        consumer.seek_to_beginning(*places)
        ends, found = consumer.end_offsets(places), []
        while any(consumer.position(place) < ends[place] for place in places):
            for batch in consumer.poll(timeout_ms=200).values():
                found += batch
    return found


def send(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "onset", "send", *map(str, words), "--rate", "50", "--speed", "0"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_everything_is_there_when_it_has_closed_and_each_stream_in_order(
    kafka: Cluster, topic: Callable[..., str]
) -> None:
    name, messages = topic(3), messages_of(4, 2000)
    with KafkaSender(f"kafka://{kafka.bootstrap[0]}/{name}") as sender:
        for message in messages:
            sender.send(message)
    found = records(kafka, name)
    assert len(found) == len(messages)
    homes: dict[str, set[int]] = {}
    for stream in ("s0", "s1", "s2", "s3"):
        mine = [record for record in found if record.key == stream.encode()]
        homes[stream] = {record.partition for record in mine}
        read = [decode(record.value, LIMITS) for record in mine]
        sent = [message for message in messages if message.stream == stream]
        assert [message.seq for message in read] == [message.seq for message in sent]
        assert all((a.samples == b.samples).all() for a, b in zip(read, sent, strict=True))
    assert all(len(partitions) == 1 for partitions in homes.values())
    assert len(set.union(*homes.values())) > 1


def test_a_topic_that_is_not_there_and_a_broker_that_is_not_are_told_apart(kafka: Cluster) -> None:
    with pytest.raises(ConfigError, match=r"there is no topic 'nowhere'.*--create --topic nowhere"):
        KafkaSender(f"kafka://{kafka.bootstrap[0]}/nowhere", connect_timeout=3.0)
    with pytest.raises(ConfigError, match=r"no broker answered .*is a Kafka there"):
        KafkaSender(f"kafka://127.0.0.1:{free_port()}/frames", connect_timeout=1.0)


@pytest.mark.parametrize("target", ["kafka://", "kafka://host:1", "kafka://host:1/", "kafka:///frames"])
def test_a_target_without_a_broker_or_a_topic_is_refused(target: str) -> None:
    with pytest.raises(ConfigError, match="expected kafka://HOST:PORT/TOPIC"):
        KafkaSender(target)


def test_two_ways_to_name_the_brokers_are_one_too_many() -> None:
    with pytest.raises(ConfigError, match="kafka:///TOPIC where a file"):
        KafkaSender("kafka://host:1/frames", KafkaConnection(bootstrap=("host:2",)))
    with pytest.raises(ConfigError, match=r"'host', expected host:port"):
        KafkaSender("kafka://host/frames")


def test_a_password_comes_from_a_file_and_what_a_lost_broker_did_not_take_is_said(
    guarded: Cluster, tmp_path: Path
) -> None:
    np.save(tmp_path / "wrist.npy", np.zeros((100, 3), np.float32))
    assert guarded.credentials is not None
    guarded.create_topic("sent")
    (tmp_path / "password").write_text(guarded.credentials.password)
    connection = {
        "bootstrap": guarded.bootstrap,
        "tls": {"ca": str(guarded.credentials.ca_file)},
        "sasl": {"username": guarded.credentials.user, "password_file": "password"},
    }
    file = tmp_path / "kafka.yaml"
    file.write_text(yaml.safe_dump(connection))
    done = send(tmp_path / "wrist.npy", "--to", "kafka:///sent", "--kafka-config", file)
    assert done.returncode == 0, done.stderr
    assert {record.key for record in records(guarded, "sent")} == {b"wrist"}
    (tmp_path / "password").write_text("wrong")
    done = send(tmp_path / "wrist.npy", "--to", "kafka:///sent", "--kafka-config", file)
    assert done.returncode == 2
    assert "none accepted this client" in " ".join(done.stderr.split())

    (tmp_path / "password").write_text(guarded.credentials.password)
    known = KafkaConnection(**connection).relative_to(tmp_path)
    sender = KafkaSender("kafka:///sent", known, delivery_timeout=3.0)
    guarded.proxies[0].cut()
    try:
        sender.send(messages_of(1, 25)[0])
        with pytest.raises(OnsetError, match="kafka:///sent did not take everything: no broker"):
            sender.close()
    finally:
        guarded.proxies[0].restore()


def test_options_of_the_other_transport_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "wrist.npy", np.zeros((100, 3), np.float32))
    for words, sentence in (
        (("--to", "kafka://127.0.0.1:1/frames", "--key", "a", "--server-key", "b"), "are for ZeroMQ"),
        (("--to", "tcp://127.0.0.1:1", "--kafka-config", "a"), "--kafka-config is for --to kafka:///TOPIC"),
    ):
        done = send(tmp_path / "wrist.npy", *words)
        assert done.returncode == 2
        assert sentence in " ".join(done.stderr.split())
