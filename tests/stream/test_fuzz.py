"""Hostile messages at the sources: nothing falls over, nothing is unaccounted for, nobody else notices."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from kafka import KafkaConsumer, TopicPartition

from stream.wire import encode
from tests.kafka.broker import Cluster
from tests.kafka.flow import (
    Feed,
    WorkerProcess,
    await_committed,
    await_ends,
    expected_events,
    messages_of,
    worker_config,
)
from tests.stream.fuzz import LIMITS, run
from tests.stream.fuzzer import Fuzzer


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_flood_of_hostile_messages_over_zeromq_changes_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    outcome = run(tiny_bundle, tmp_path, messages=20_000, seed=1)
    assert outcome.is_well, f"{outcome}\n{(tmp_path / 'log').read_text(errors='replace')[-4000:]}"
    assert outcome.messages == 20_000
    assert len(outcome.refused) > 12
    start, end = outcome.rss
    assert end < 1.05 * start, outcome


def test_a_flood_of_hostile_messages_in_kafka_changes_nothing_and_every_letter_is_kept(
    kafka: Cluster, topic: Callable[..., str], tiny_bundle: Path, tmp_path: Path
) -> None:
    topics = {"frames": topic(2), "events": topic(2)}
    letters = topic(1)
    valid = messages_of(4, 2000)
    expected = expected_events(tiny_bundle, valid)
    config = worker_config(
        tmp_path,
        tiny_bundle,
        kafka,
        topics,
        kafka={"max_message_bytes": LIMITS.max_bytes, "max_poll": 500},
        dead_letters={"kafka_topic": letters, "per_second": 100_000},
        max_streams=1024,  # which partition is read first is not said: strangers must not take all places
    )
    hostile = iter(Fuzzer(2, LIMITS, expected.keys(), epoch=1))
    refused: Counter[bytes] = Counter()
    sent = 0
    feed = Feed(kafka, topics["frames"])
    for number, message in enumerate(valid):
        feed.send_bytes(message.stream.encode(), encode(message))
        sent += 1
        if number < 12:
            continue  # so that all are open: what is older cannot harm them
        for _ in range(9):
            shot = next(hostile)
            # Whatever can be read comes where its stream does: in two partitions it would be refused as well.
            key = shot.stream.encode() or [b"", b"s0", b"\xff\x00", bytes(1000)][sent % 4]
            value = None if shot.reason and sent % 50 == 0 else shot.data
            feed.send_bytes(key, value)
            refused[value or b""] += shot.reason is not None
            sent += 1
    feed.close()
    worker = WorkerProcess(config, tmp_path / "log")
    try:
        events = await_ends(kafka, topics["events"], list(expected), 90)
        await_committed(kafka, config, sent)
    finally:
        status = worker.stop()
    log = (tmp_path / "log").read_text(errors="replace")
    assert status == 0, log
    assert "Traceback" not in log
    assert "beginning anew" not in log
    assert {stream: events[stream] for stream in expected} == expected
    assert read_letters(kafka, letters) == +refused


def read_letters(cluster: Cluster, topic: str) -> Counter[bytes]:
    found: Counter[bytes] = Counter()
    with closing(
        KafkaConsumer(
            **cluster.client_settings(),
            group_id=None,
            enable_auto_commit=False,
            isolation_level="read_committed",
        )
    ) as consumer:
        place = TopicPartition(topic, 0)
        consumer.assign([place])
        consumer.seek_to_beginning(place)
        end = consumer.end_offsets([place])[place]
        while consumer.position(place) < end:
            for records in consumer.poll(timeout_ms=200).values():
                found.update(record.value for record in records)
    return found
