"""Workers on a real Kafka: whatever happens to them, the committed events are those of an undisturbed run."""

from __future__ import annotations

import json
import shutil
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from stream.partition import LOST
from stream.wire import encode
from tests.kafka.broker import Cluster
from tests.kafka.flow import (
    Feed,
    WorkerProcess,
    await_committed,
    await_ends,
    await_line,
    delete_messages,
    expected_events,
    messages_of,
    read_letters,
    worker_config,
)
from tests.kafka.ports import free_port


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


def test_a_worker_logs_in_by_tls_and_scram_and_never_tells_the_password(
    guarded: Cluster, tiny_bundle: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    assert guarded.credentials is not None
    topics = {"frames": "secret-frames", "events": "secret-events"}
    guarded.create_topic("secret-frames", 2)
    guarded.create_topic("secret-events", 2)
    messages = messages_of(2, 500)
    feed = Feed(guarded, "secret-frames")
    feed.send(messages)
    feed.close()
    tls = {"ca": str(guarded.credentials.ca_file)}
    secret = tmp_path / "secret"
    connection = {
        "bootstrap": guarded.bootstrap,
        "tls": tls,
        "sasl": {"username": guarded.credentials.user, "password_file": "secret"},
    }
    config = worker_config(tmp_path, tiny_bundle, guarded, topics, kafka={"connection": connection})

    secret.write_text("wrong" + guarded.credentials.password)
    stranger = WorkerProcess(config, log)
    await_line(log, "refuses the login; check `sasl`")
    stranger.kill()

    secret.write_text(guarded.credentials.password)
    worker = WorkerProcess(config, log)
    try:
        events = await_ends(guarded, "secret-events", ["s0", "s1"], 60)
    finally:
        worker.stop()
    assert events == expected_events(tiny_bundle, messages)
    assert guarded.credentials.password not in log.read_text()


def test_what_is_wrong_with_the_topics_is_said_at_the_start(
    kafka: Cluster, topic: Callable[..., str], tiny_bundle: Path, tmp_path: Path
) -> None:
    frames, events, state = topic(2), topic(2), topic(2)
    small = topic(2, {"cleanup.policy": "compact"})
    for changes, why in (
        ({"topic": "no-such-topic"}, "`topic`: no topic 'no-such-topic' is at"),
        ({"events": "no-such-topic"}, "kafka-topics.sh --create --topic no-such-topic"),
        ({"state": state}, "make it compact"),
        ({"state": small}, "--add-config max.message.bytes=16777216"),
        ({"letters": "no-such-topic"}, "`dead_letters.kafka_topic`: no topic"),
    ):
        log = tmp_path / f"log-{len(why)}"
        letters = changes.pop("letters", None)
        config = worker_config(
            tmp_path,
            tiny_bundle,
            kafka,
            {"frames": frames, "events": events},
            kafka=changes,
            dead_letters={"kafka_topic": letters},
        )
        worker = WorkerProcess(config, log)
        assert worker.process.wait(60) == 2
        assert why in log.read_text()


def test_a_worker_without_a_broker_waits_for_one_and_stops_when_told(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    away = Nowhere()
    config = worker_config(tmp_path, tiny_bundle, away, {"frames": "frames", "events": "events"})  # type: ignore[arg-type]
    worker = WorkerProcess(config, log)
    await_line(log, "no broker can be reached")
    assert worker.stop() == 0


class Nowhere:
    """A cluster that is not there."""

    def __init__(self) -> None:
        self.bootstrap = [f"127.0.0.1:{free_port()}"]


def test_messages_that_cannot_be_read_go_to_their_topic_with_the_reason(
    kafka: Cluster, topic: Callable[..., str], tiny_bundle: Path, tmp_path: Path
) -> None:
    topics = {"frames": topic(2), "events": topic(2)}
    letters = topic()
    messages = messages_of(2, 500)
    feed = Feed(kafka, topics["frames"])
    half = len(messages) // 2
    feed.send_bytes(b"s0", b"\xc1 what is this?")
    feed.send(messages[:half])
    config = worker_config(tmp_path, tiny_bundle, kafka, topics, dead_letters={"kafka_topic": letters})
    worker = WorkerProcess(config, tmp_path / "log")
    await_committed(kafka, config, half)
    for partition in (0, 1):  # a stream belongs in one partition
        feed.send_bytes(b"a key of its own", encode(messages[0]), partition)
    await_committed(kafka, config, half + 3)
    feed.send(messages[half:])
    feed.close()
    try:
        events = await_ends(kafka, topics["events"], ["s0", "s1"], 60)
    finally:
        worker.stop()
    assert events == expected_events(tiny_bundle, messages)
    found = {headers["onset-reason"]: value for headers, value in read_letters(kafka, letters)}
    assert found[b"not_msgpack"] == b"\xc1 what is this?"
    assert found[b"partition"] == encode(messages[0])


def test_at_least_once_says_some_events_again_after_a_kill_and_loses_none(
    kafka: Cluster, topic: Callable[..., str], tiny_bundle: Path, tmp_path: Path
) -> None:
    topics = {"frames": topic(2), "events": topic(2)}
    messages = messages_of(3, 2000)
    config = worker_config(
        tmp_path, tiny_bundle, kafka, topics, kafka={"delivery": "at-least-once", "commit_interval": 2.0}
    )
    feed = Feed(kafka, topics["frames"])
    half = len(messages) // 2
    feed.send(messages[:half])
    worker = WorkerProcess(config, tmp_path / "log")
    await_committed(kafka, config, half // 3)
    worker.kill()
    worker = WorkerProcess(config, tmp_path / "log")
    feed.send(messages[half:])
    feed.close()
    try:
        events = await_ends(kafka, topics["events"], ["s0", "s1", "s2"], 90)
    finally:
        worker.stop()
    for stream, expected in expected_events(tiny_bundle, messages).items():
        assert list(dict.fromkeys(events[stream])) == expected, "once the repeats are left out"


def test_a_worker_swaps_its_bundle_without_losing_a_message(
    kafka: Cluster, topic: Callable[..., str], tiny_bundle: Path, other_bundle: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    topics = {"frames": topic(2), "events": topic(2)}
    messages = messages_of(3, 3000)
    config = worker_config(tmp_path, bundle, kafka, topics)
    feed = Feed(kafka, topics["frames"])
    half = len(messages) // 2
    feed.send(messages[:half])
    worker = WorkerProcess(config, tmp_path / "log")
    await_committed(kafka, config, half)
    shutil.copytree(other_bundle, bundle, dirs_exist_ok=True)
    worker.process.send_signal(signal.SIGHUP)
    await_line(tmp_path / "log", "takes over from")
    feed.send(messages[half:])
    feed.close()
    try:
        events = await_ends(kafka, topics["events"], ["s0", "s1", "s2"], 60)
    finally:
        worker.stop()
    for stream, expected in expected_events(tiny_bundle, messages).items():
        read = [json.loads(event) for event in events[stream]]
        assert len({event["bundle"] for event in read}) == 2
        beginnings = sum(b'"stream.started"' in event for event in expected)  # the first, and after gaps
        assert [event["type"] for event in read].count("stream.started") == beginnings
        assert read[-1]["time"] == json.loads(expected[-1])["time"]
        started = [e["instance_id"] for e in read if e["type"] == "action.started"]
        over = [e["instance_id"] for e in read if e["type"] in ("action.ended", "action.aborted")]
        assert sorted(started) == sorted(over)


def test_messages_that_were_deleted_cost_their_streams_a_loud_new_beginning(
    kafka: Cluster, topic: Callable[..., str], tiny_bundle: Path, tmp_path: Path
) -> None:
    topics = {"frames": topic(), "events": topic()}
    messages = messages_of(2, 3000)
    config = worker_config(tmp_path, tiny_bundle, kafka, topics)
    feed = Feed(kafka, topics["frames"])
    most = len(messages) * 2 // 3
    feed.send(messages[:most])
    worker = WorkerProcess(config, tmp_path / "log")
    await_committed(kafka, config, most)
    worker.kill()
    delete_messages(kafka, topics["frames"], most - 10)
    feed.send(messages[most:])
    feed.close()
    worker = WorkerProcess(config, tmp_path / "log")
    try:
        events = await_ends(kafka, topics["events"], ["s0", "s1"], 60)
    finally:
        worker.stop()
    assert "ERROR" in (tmp_path / "log").read_text()
    assert "keep messages longer (retention.ms)" in (tmp_path / "log").read_text()
    for told in events.values():
        read = [json.loads(event) for event in told]
        lost = [event["type"] for event in read if event.get("reason") == LOST]
        assert lost[-1:] == ["stream.ended"]
        started = [e["instance_id"] for e in read if e["type"] == "action.started"]
        over = [e["instance_id"] for e in read if e["type"] in ("action.ended", "action.aborted")]
        assert sorted(started) == sorted(over)


def test_a_worker_that_was_held_up_takes_no_stream_for_silent_that_was_not(
    kafka: Cluster, topic: Callable[..., str], tiny_bundle: Path, tmp_path: Path
) -> None:
    topics = {"frames": topic(), "events": topic()}
    messages = messages_of(2, 1000)
    config = worker_config(
        tmp_path, tiny_bundle, kafka, topics, idle_timeout=5.0, kafka={"session_timeout": 30.0}
    )
    worker = WorkerProcess(config, tmp_path / "log")
    await_line(tmp_path / "log", "took up 1 partitions")
    feed = Feed(kafka, topics["frames"])
    half = len(messages) // 2
    feed.send(messages[:half])
    await_committed(kafka, config, half)
    worker.process.send_signal(signal.SIGSTOP)
    for at in range(half, len(messages), 8):  # for longer than `idle_timeout`
        feed.send(messages[at : at + 8])
        time.sleep(1.5)
    feed.close()
    worker.process.send_signal(signal.SIGCONT)
    try:
        events = await_ends(kafka, topics["events"], ["s0", "s1"], 60)
    finally:
        worker.stop()
    assert events == expected_events(tiny_bundle, messages)


def test_messages_that_are_deleted_while_a_worker_is_held_up_are_missed_loudly(
    kafka: Cluster, topic: Callable[..., str], tiny_bundle: Path, tmp_path: Path
) -> None:
    topics = {"frames": topic(), "events": topic()}
    messages = messages_of(2, 12000)
    # What has been fetched already is not missed, so a fetch is small.
    small = {"session_timeout": 20.0, "max_poll": 5, "max_message_bytes": 1024}
    config = worker_config(tmp_path, tiny_bundle, kafka, topics, kafka=small)
    worker = WorkerProcess(config, tmp_path / "log")
    feed = Feed(kafka, topics["frames"])
    half = len(messages) // 2
    feed.send(messages[:half])
    await_committed(kafka, config, half)
    worker.process.send_signal(signal.SIGSTOP)
    feed.send(messages[half:])
    feed.close()
    delete_messages(kafka, topics["frames"], len(messages) - 30)
    worker.process.send_signal(signal.SIGCONT)
    try:
        events = await_ends(kafka, topics["events"], ["s0", "s1"], 60)
    finally:
        worker.stop()
    assert "were deleted before they were read" in (tmp_path / "log").read_text()
    for told in events.values():
        read = [json.loads(event) for event in told]
        started = [e["instance_id"] for e in read if e["type"] == "action.started"]
        over = [e["instance_id"] for e in read if e["type"] in ("action.ended", "action.aborted")]
        assert sorted(started) == sorted(over)


def test_a_worker_is_ready_once_its_partitions_are_where_they_were(
    kafka: Cluster, topic: Callable[..., str], tiny_bundle: Path, tmp_path: Path
) -> None:
    topics = {"frames": topic(2), "events": topic()}
    port = free_port()
    config = worker_config(tmp_path, tiny_bundle, kafka, topics, http={"address": f"127.0.0.1:{port}"})
    worker = WorkerProcess(config, tmp_path / "log")
    try:
        seen = []
        deadline = time.monotonic() + 60
        while not seen or seen[-1] != 200:
            assert time.monotonic() < deadline, seen
            seen += [status_of(f"http://127.0.0.1:{port}/ready")]
            time.sleep(0.01)
        assert 503 in seen, "it was not ready before it had joined the group"
        feed = Feed(kafka, topics["frames"])
        feed.send(messages_of(2, 500))
        feed.close()
        await_ends(kafka, topics["events"], ["s0", "s1"], 60)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            metrics = answer.read().decode()
    finally:
        worker.stop()
    assert f'onset_lag_messages{{partition="0",topic="{topics["frames"]}"}} 0.0' in metrics
    assert 'onset_transactions_total{outcome="committed"}' in metrics


def status_of(url: str) -> int:
    """The status of an answer; 0 where nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as problem:
        return problem.code
    except OSError:
        return 0
