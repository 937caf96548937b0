"""What befalls workers on a real Kafka beside being killed: brokers that are away, others in their way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from kafka import KafkaAdminClient, KafkaProducer, OffsetAndMetadata, TopicPartition
from kafka.errors import KafkaError, KafkaTimeoutError

from engine import OnnxSession, choice, read_bundle
from stream import kafka_source
from stream.checkpoint import MAX_RECORD_BYTES
from stream.config import load_service_config
from stream.counters import Counters
from stream.kafka_delivery import Delivery, open_delivery
from stream.kafka_source import KafkaSource, KafkaSourceSettings
from stream.reload import Reload
from stream.service import serve
from tests.kafka.broker import Cluster
from tests.kafka.flow import (
    DECODING,
    Feed,
    WorkerProcess,
    await_committed,
    await_ends,
    await_line,
    expected_events,
    messages_of,
    read_events,
    readiness,
    worker_config,
)
from tests.kafka.ports import free_port
from tests.tiny import random_detector, write_bundle_of
from trainer.detector import DetectorShape
from trainer.pyramid import PyramidShape


def await_readiness(port: int, status: int, why: str = "", seconds: float = 60.0) -> None:
    """Until /ready says so, and why."""
    deadline = time.monotonic() + seconds
    while (found := readiness(port))[0] != status or why not in found[1].get("source", ""):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def test_a_worker_whose_broker_is_away_is_not_ready_until_it_is_back(
    fragile: Cluster, tiny_bundle: Path, tmp_path: Path
) -> None:
    port, topics = free_port(), {"frames": "away-frames", "events": "away-events"}
    fragile.create_topic(topics["frames"], 2)
    fragile.create_topic(topics["events"])
    config = worker_config(tmp_path, tiny_bundle, fragile, topics, http={"address": f"127.0.0.1:{port}"})
    worker = WorkerProcess(config, tmp_path / "log")
    try:
        await_readiness(port, 200)
        fragile.proxies[0].cut()
        # By its question, by a request that was under way, or by its next beginning: each says so.
        await_readiness(port, 503, "broker")
        time.sleep(8.0)
        assert readiness(port)[0] == 503, "and it stays so"
        fragile.proxies[0].restore()
        await_readiness(port, 200)
        messages = messages_of(2, 300)
        feed = Feed(fragile, topics["frames"])
        feed.send(messages)
        feed.close()
        await_ends(fragile, topics["events"], ["s0", "s1"], 60)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/live", timeout=10) as answer:
            assert answer.status == 200
    finally:
        fragile.proxies[0].restore()
        worker.stop()


def take_identity(cluster: Cluster, identity: str, seconds: float = 60.0) -> KafkaProducer:
    """A producer with a transactional id: what another left open under it is over, and it commits no more."""
    producer = KafkaProducer(
        **cluster.client_settings(),
        transactional_id=identity,
        transaction_timeout_ms=round(1000 * seconds),
    )
    producer.init_transactions()
    return producer


def fence(cluster: Cluster, group: str) -> None:
    """Take its identity from the only worker of a group."""
    with closing(KafkaAdminClient(**cluster.client_settings())) as admin:
        listed = [entry.transactional_id for broker in admin.list_transactions().values() for entry in broker]
    (identity,) = [name for name in listed if name.startswith(f"{group}-")]
    take_identity(cluster, identity).close()


def test_a_bundle_that_could_not_take_over_for_a_failed_commit_does_after_it(
    kafka: Cluster, topic: Callable[..., str], tiny_bundle: Path, other_bundle: Path, tmp_path: Path
) -> None:
    bundle, log = tmp_path / "bundle", tmp_path / "log"
    shutil.copytree(tiny_bundle, bundle)
    topics = {"frames": topic(), "events": topic()}
    # Nothing is committed before the swap: it is the swap's commit that fails.
    rare = {"delivery": "at-least-once", "commit_interval": 60.0}
    config = worker_config(tmp_path, bundle, kafka, topics, kafka=rare, watch_bundle=False)
    messages = messages_of(2, 1000)
    feed = Feed(kafka, topics["frames"])
    half = len(messages) // 2
    feed.send(messages[:half])
    worker = WorkerProcess(config, log)
    try:
        deadline = time.monotonic() + 60
        while len(read_events(kafka, topics["events"])) < 2:
            assert time.monotonic() < deadline, "no event came"
        fence(kafka, topics["frames"] + "-group")
        shutil.copytree(other_bundle, bundle, dirs_exist_ok=True)
        worker.process.send_signal(signal.SIGHUP)
        await_line(log, "beginning anew from the last commit")
        await_line(log, "takes over from")
        feed.send(messages[half:])
        feed.close()
        events = await_ends(kafka, topics["events"], ["s0", "s1"], 60)
    finally:
        worker.stop()
    said = log.read_text()
    assert said.index("beginning anew from the last commit") < said.index("takes over from")
    assert said.count("takes over from") == 1
    for stream, expected in expected_events(tiny_bundle, messages).items():
        assert events[stream][-1] != expected[-1], "the other bundle has the last word"


def test_a_bundle_whose_streams_may_not_fit_into_a_record_neither_starts_nor_takes_over(
    kafka: Cluster, topic: Callable[..., str], tiny_bundle: Path, tmp_path: Path
) -> None:
    shape = DetectorShape(
        3, 10, PyramidShape(16, 2, 5, 4, chunk=2, relative=True, expansion=2), hop=4, prior=0.3
    )
    ten_classes = write_bundle_of(random_detector(shape), tmp_path / "ten")
    topics, day = {"frames": topic(), "events": topic()}, {"decoding": DECODING | {"max_duration": 86400.0}}
    too_large = worker_config(tmp_path, ten_classes, kafka, topics, **day)
    refused = WorkerProcess(too_large, tmp_path / "refused")
    assert refused.process.wait(60) == 2
    why = "lower `decoding.max_duration`"
    assert why in (tmp_path / "refused").read_text()

    bundle, log = tmp_path / "bundle", tmp_path / "log"
    shutil.copytree(tiny_bundle, bundle)
    worker = WorkerProcess(worker_config(tmp_path, bundle, kafka, topics, **day), log)
    try:
        await_line(log, "took up 1 partitions")
        shutil.copytree(ten_classes, bundle, dirs_exist_ok=True)
        await_line(log, why)
        feed = Feed(kafka, topics["frames"])
        feed.send(messages_of(2, 300))
        feed.close()
        events = await_ends(kafka, topics["events"], ["s0", "s1"], 60)
    finally:
        worker.stop()
    assert "the bundle stays tiny@" in log.read_text()
    old = read_bundle(tiny_bundle)[0].id
    assert {json.loads(event)["bundle"] for told in events.values() for event in told} == {old}


def test_the_largest_state_that_is_allowed_is_written_and_read(
    kafka: Cluster, topic: Callable[..., str], tiny_bundle: Path, tmp_path: Path
) -> None:
    topics = {"frames": topic(), "events": topic()}
    settings = settings_in(
        worker_config(tmp_path, tiny_bundle, kafka, topics, kafka={"transaction_timeout": 60.0})
    )
    # Noise, of which nothing can be compressed away; what is beside ring and tracker is left out of it.
    value = os.urandom(MAX_RECORD_BYTES - 16 * 1024)
    source, delivery = joined(settings, "me")
    try:
        delivery.commit([(0, b"mark:one", value)], {0: (1, '{"v":1,"rewind":0,"clock":0}')})
        found = source.resumption({0})[0]
    finally:
        delivery.close()
        source.close()
    assert found.records == {b"mark:one": value}


def settings_in(config: Path) -> KafkaSourceSettings:
    return KafkaSourceSettings.model_validate(yaml.safe_load(config.read_text())["source"]["kafka"])


def joined(settings: KafkaSourceSettings, identity: str) -> tuple[KafkaSource, Delivery]:
    """A member that holds partition 0, and its delivery."""
    source = KafkaSource(settings)
    deadline = time.monotonic() + 60
    gained: set[int] = set()
    while 0 not in gained:
        assert time.monotonic() < deadline, "it was given no partition"
        gained |= source.poll(5.0).gained
    return source, open_delivery(settings, source, Counters(), identity)


def test_who_has_joined_a_group_waits_for_no_message_to_say_so(
    kafka: Cluster, topic: Callable[..., str], tiny_bundle: Path, tmp_path: Path
) -> None:
    topics = {"frames": topic(), "events": topic()}
    with closing(KafkaSource(settings_in(worker_config(tmp_path, tiny_bundle, kafka, topics)))) as source:
        began = time.monotonic()
        while not source.poll(120.0).gained:  # it may be given nothing at first
            pass
        assert time.monotonic() - began < 60


@pytest.mark.parametrize("delivery", ["exactly-once", "at-least-once"])
def test_a_worker_that_does_not_know_that_it_lost_its_partitions_writes_neither_state_nor_offsets(
    delivery: str,
    kafka: Cluster,
    topic: Callable[..., str],
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    topics = {"frames": topic(), "events": topic()}
    settings = settings_in(worker_config(tmp_path, tiny_bundle, kafka, topics, kafka={"delivery": delivery}))
    key, text = b"life:one", '{"v":1,"rewind":0,"clock":0}'
    zombie, late = joined(settings, "zombie")
    late.commit([(0, key, b"before")], {0: (1, text)})
    unaware = zombie.membership()
    zombie.close()
    monkeypatch.setattr(zombie, "membership", lambda: unaware)
    successor, delivered = joined(settings, "successor")
    try:
        delivered.commit([(0, key, b"the successor's")], {0: (2, text)})
        with pytest.raises(KafkaError):
            late.commit([(0, key, b"the zombie's"), (0, b"life:other", b"the zombie's")], {0: (3, text)})
        late.close()
        take_identity(kafka, f"{settings.group}-zombie").close()
        found = successor.resumption({0})[0]
    finally:
        delivered.close()
        successor.close()
    assert found.committed == 2
    assert found.records == {key: b"the successor's"}


class LeftOpen:
    """A transaction of the group that its worker has left open: it has written `what`."""

    def __init__(self, cluster: Cluster, settings: KafkaSourceSettings, what: str, seconds: float) -> None:
        self._producer = take_identity(cluster, f"{settings.group}-dead", seconds)
        self._producer.begin_transaction()
        if what == "state":
            self._producer.send(settings.state_topic, key=b"life:one", value=b"junk", partition=0).get(30)
        else:
            place = TopicPartition(settings.topic, 0)
            offsets = {place: OffsetAndMetadata(1, "", -1)}
            self._producer.send_offsets_to_transaction(offsets, settings.group)

    def abort(self) -> None:
        """End it."""
        self._producer.abort_transaction()

    def close(self) -> None:
        """Hang up; it stays open."""
        self._producer.close(timeout=0)


@pytest.mark.parametrize("what", ["offsets", "state"])
def test_a_transaction_that_does_not_end_is_waited_for_but_not_for_ever(
    what: str,
    kafka: Cluster,
    topic: Callable[..., str],
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    topics = {"frames": topic(), "events": topic()}
    settings = settings_in(worker_config(tmp_path, tiny_bundle, kafka, topics))
    monkeypatch.setattr(kafka_source, "_SETTLE_SECONDS", 3.0)
    waits = []
    with (
        closing(KafkaSource(settings, lambda: waits.append(time.monotonic()))) as source,
        closing(LeftOpen(kafka, settings, what, 60.0)) as left,
    ):
        with pytest.raises(KafkaTimeoutError):
            source.resumption({0})
        assert len(waits) > 2, "the service could have been stopped meanwhile"
        left.abort()
        found = source.resumption({0})[0]
    assert (found.committed, found.records) == (0, {})


@pytest.mark.parametrize("what", ["offsets", "state"])
def test_a_worker_behind_the_transaction_of_a_dead_one_begins_when_the_broker_gives_that_up(
    what: str, kafka: Cluster, topic: Callable[..., str], tiny_bundle: Path, tmp_path: Path
) -> None:
    topics = {"frames": topic(), "events": topic()}
    config = worker_config(tmp_path, tiny_bundle, kafka, topics)
    settings = settings_in(config)
    messages = messages_of(2, 300)
    feed = Feed(kafka, topics["frames"])
    feed.send(messages)
    feed.close()
    KafkaSource(settings).close()  # makes the topic of the state
    LeftOpen(kafka, settings, what, 6.0).close()
    worker = WorkerProcess(config, tmp_path / "log")
    try:
        events = await_ends(kafka, topics["events"], ["s0", "s1"], 60)
    finally:
        status = worker.stop()
    assert status == 0
    assert events == expected_events(tiny_bundle, messages)


def test_a_worker_behind_an_open_transaction_stops_when_told(
    kafka: Cluster, topic: Callable[..., str], tiny_bundle: Path, tmp_path: Path
) -> None:
    topics = {"frames": topic(), "events": topic()}
    config = worker_config(tmp_path, tiny_bundle, kafka, topics)
    settings = settings_in(config)
    KafkaSource(settings).close()
    with closing(LeftOpen(kafka, settings, "offsets", 120.0)) as left:
        worker = WorkerProcess(config, tmp_path / "log")
        await_line(tmp_path / "log", "ready: reading topic")
        time.sleep(3.0)  # it has joined, and waits; had it not, it would stop all the more
        assert worker.stop() == 0
        left.abort()
    assert "stopped before its partitions were taken up" in (tmp_path / "log").read_text()


class Unforeseen(OnnxSession):
    """An engine that fails, in a way nobody foresaw: when it is opened, or when a stream comes to it."""

    failing = ""

    def __init__(self, *arguments: Any) -> None:
        if self.failing == "at once":
            raise RuntimeError("fails at once")
        super().__init__(*arguments)
        self._is_failing = self.failing == "later"

    def step(self, *arguments: Any) -> Any:
        if self._is_failing:
            raise RuntimeError("fails later")
        return super().step(*arguments)


def test_whatever_a_swap_raises_the_old_bundle_goes_on_and_no_event_is_another(
    kafka: Cluster,
    topic: Callable[..., str],
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Before the partitions are given up, and when they are being brought back."""
    topics, stop = {"frames": topic(), "events": topic()}, threading.Event()
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    config = worker_config(tmp_path, bundle, kafka, topics)
    messages = messages_of(2, 1500)
    reload = Reload(bundle, watch=False)
    feed, third = Feed(kafka, topics["frames"]), len(messages) // 3
    monkeypatch.setattr(choice, "OnnxSession", Unforeseen)
    counters: list[Counters] = []
    thread = threading.Thread(
        target=lambda: counters.append(serve(load_service_config(config), stop, None, reload))
    )
    thread.start()
    try:
        feed.send(messages[:third])
        await_committed(kafka, config, third)
        for part, failing in ((messages[third : 2 * third], "at once"), (messages[2 * third :], "later")):
            monkeypatch.setattr(Unforeseen, "failing", failing)
            manifest = json.loads((bundle / "bundle.json").read_text())
            manifest["training"]["notice"] = failing  # else it is what it was, and takes over nothing
            (bundle / "bundle.json").write_text(json.dumps(manifest))
            reload.request()
            deadline = time.monotonic() + 60
            while f"RuntimeError: fails {failing}" not in caplog.text:
                assert time.monotonic() < deadline, caplog.text
                time.sleep(0.05)
            feed.send(part)
        feed.close()
        events = await_ends(kafka, topics["events"], ["s0", "s1"], 90)
    finally:
        stop.set()
        thread.join(60)
    for stream, expected in expected_events(tiny_bundle, messages).items():
        assert events[stream] == expected
    counted = counters[0].snapshot()
    assert (counted["bundle_swaps_failed"], counted.get("bundle_swaps", 0)) == (2, 0)
