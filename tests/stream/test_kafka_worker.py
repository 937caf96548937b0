"""Workers on a real Kafka: whatever happens to them, the committed events are those of an undisturbed run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("delivery", ["exactly-once", "at-least-once"])
def test_what_a_worker_reads_from_kafka_comes_out_as_events(
    delivery: str, kafka: Cluster, topic: Callable[..., str], tiny_bundle: Path, tmp_path: Path
) -> None:
    topics = {"frames": topic(4), "events": topic(3)}
    messages = messages_of(5, 1500)
    feed = Feed(kafka, topics["frames"])
    feed.send(messages)
    feed.close()
    config = worker_config(tmp_path, tiny_bundle, kafka, topics, kafka={"delivery": delivery})
    worker = WorkerProcess(config, tmp_path / "log")
    try:
        events = await_ends(kafka, topics["events"], [f"s{i}" for i in range(5)], 60)
    finally:
        status = worker.stop()
    assert status == 0, (tmp_path / "log").read_text()
    assert events == expected_events(tiny_bundle, messages)


def test_a_worker_that_is_killed_has_a_successor_that_says_the_rest(
    kafka: Cluster, topic: Callable[..., str], tiny_bundle: Path, tmp_path: Path
) -> None:
    topics = {"frames": topic(2), "events": topic(2)}
    messages = messages_of(4, 3000)
    config = worker_config(tmp_path, tiny_bundle, kafka, topics)
    feed = Feed(kafka, topics["frames"])
    part = len(messages) // 4
    worker = WorkerProcess(config, tmp_path / "log")
    for i in range(4):
        feed.send(messages[i * part : (i + 1) * part if i < 3 else None])
        if i < 3:
            await_committed(kafka, config, part * (i + 1) // 2)
            worker.kill()
            worker = WorkerProcess(config, tmp_path / "log")
    feed.close()
    try:
        events = await_ends(kafka, topics["events"], [f"s{i}" for i in range(4)], 90)
    finally:
        worker.stop()
    assert events == expected_events(tiny_bundle, messages)
    assert "messages are read again" in (tmp_path / "log").read_text()
