"""Rounds of a Kafka worker: bounded by work, fair between partitions, and deaf to wall clocks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from stream.backlog import Backlog
from stream.wire import Message, encode
from tests.kafka.broker import Cluster
from tests.kafka.flow import (
    RATE,
    Feed,
    WorkerProcess,
    await_committed,
    await_ends,
    await_line,
    expected_events,
    messages_of,
    read_events,
    readiness,
    wave,
    worker_config,
)
from tests.kafka.ports import free_port

APPEND_TIME = {"message.timestamp.type": "LogAppendTime"}
# One batch of the network in each slice; and the worker's wall clock is 40 s ahead of the broker's.
SMALL_SLICES_AND_ANOTHER_CLOCK = """
import time
now = time.time
time.time = lambda: now() + 40.0
from stream import kafka_worker
kafka_worker._SLICE_SECONDS, kafka_worker._BATCHES_AT_ONCE = 0.0, 1
"""

# A long message takes some 8 s, and who does not poll for 4 s is put out of the group.
SLOW_STEPS_AND_NO_PATIENCE = """
import time
from kafka import KafkaConsumer
KafkaConsumer.DEFAULT_CONFIG["max_poll_interval_ms"] = 4000
from engine import OnnxSession
step = OnnxSession.step
OnnxSession.step = lambda *given: (time.sleep(0.05), step(*given))[1]
"""


def test_a_partition_whose_messages_are_long_or_many_does_not_starve_another() -> None:
    backlog = Backlog()
    backlog.put(0, range(1000))
    backlog.put(1, range(100))
    backlog.put(2, range(3))
    cost = {0: 10, 1: 100, 2: 1}
    order: list[int] = []
    while (taken := backlog.take()) is not None:
        partition, record = taken
        assert record == order.count(partition), "a partition's records stay in order"
        backlog.charge(partition, cost[partition])
        order.append(partition)
        if len(order) == 500:
            backlog.put(2, [3])  # it has been away, and comes at once
    assert max(i for i, partition in enumerate(order[:400]) if partition == 2) < 10
    assert order.index(2, 500) < 503
    for end in range(20, 1100, 50):  # while both wait, both have had the same work
        work = [cost[partition] * order[:end].count(partition) for partition in (0, 1)]
        assert abs(work[0] - work[1]) <= 110
    backlog.put(5, ["a"])
    backlog.drop(5)
    assert 5 not in backlog
    assert not backlog


def test_neither_slices_nor_a_wall_clock_that_is_ahead_change_an_event(
    kafka: Cluster, topic: Callable[..., str], tiny_bundle: Path, tmp_path: Path
) -> None:
    topics = {"frames": topic(3, APPEND_TIME), "events": topic(2)}
    messages = messages_of(5, 1500)
    feed = Feed(kafka, topics["frames"])
    half = len(messages) // 2
    feed.send(messages[:half])
    config = worker_config(tmp_path, tiny_bundle, kafka, topics, idle_timeout=20.0, max_batch=2)
    worker = WorkerProcess(config, tmp_path / "log", SMALL_SLICES_AND_ANOTHER_CLOCK)
    try:
        await_committed(kafka, config, half)
        time.sleep(2.5)  # some rounds at the end of the log
        feed.send(messages[half:])
        feed.close()
        events = await_ends(kafka, topics["events"], [f"s{i}" for i in range(5)], 60)
    finally:
        status = worker.stop()
    assert status == 0, (tmp_path / "log").read_text()
    assert events == expected_events(tiny_bundle, messages)


def test_long_messages_are_worked_on_with_commits_and_signs_of_life_and_left_when_it_is_to_stop(
    kafka: Cluster, topic: Callable[..., str], tiny_bundle: Path, tmp_path: Path
) -> None:
    topics = {"frames": topic(1), "events": topic(1)}
    rng = np.random.default_rng(1)
    size, count = 12_000, 120
    with closing(KafkaProducer(**kafka.client_settings(), compression_type="gzip")) as producer:
        for number in range(count):
            samples = np.zeros((size, 3), np.float32)
            samples[::1000] = rng.normal(size=(size // 1000, 3))
            message = Message("long", number * size, samples, RATE, 1)
            producer.send(topics["frames"], key=b"long", value=encode(message))
        producer.flush()
    port = free_port()
    http = {"address": f"127.0.0.1:{port}", "stalled_after": 8.0}
    config = worker_config(tmp_path, tiny_bundle, kafka, topics, kafka={"max_poll": 500}, http=http)
    worker = WorkerProcess(config, tmp_path / "log")
    try:
        await_line(tmp_path / "log", "took up 1 partitions")
        await_committed(kafka, config, 1)
        assert committed(kafka, topics["frames"]) < count, "all of what was polled is one commit"
        assert "live" not in readiness(port)[1]
    finally:
        status = worker.stop(30.0)
    assert status == 0, (tmp_path / "log").read_text()
    told = [json.loads(event) for event in read_events(kafka, topics["events"])["long"]]
    assert told[0]["type"] == "stream.started"
    assert all(event["time"] <= committed(kafka, topics["frames"]) * size / RATE for event in told)


def test_a_message_that_takes_longer_than_a_group_s_patience_is_worked_on_once(
    kafka: Cluster, topic: Callable[..., str], tiny_bundle: Path, tmp_path: Path
) -> None:
    topics = {"frames": topic(1), "events": topic(1)}
    feed = Feed(kafka, topics["frames"])
    feed.send([Message("long", 0, wave(1, 1300), RATE, 1, end=True)])
    feed.close()
    config = worker_config(tmp_path, tiny_bundle, kafka, topics)
    worker = WorkerProcess(config, tmp_path / "log", SLOW_STEPS_AND_NO_PATIENCE)
    try:
        await_ends(kafka, topics["events"], ["long"], 90)
    finally:
        worker.stop()
    log = (tmp_path / "log").read_text()
    assert "beginning anew" not in log
    assert log.count("took up 1 partitions") == 1


def committed(cluster: Cluster, topic: str) -> int:
    with closing(KafkaConsumer(**cluster.client_settings(), group_id=topic + "-group")) as consumer:
        return int(consumer.committed(TopicPartition(topic, 0)) or 0)
