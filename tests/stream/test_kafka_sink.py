"""The Kafka sink, on a real broker: every event once and in order, whatever is killed or cut off."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaConsumer, TopicPartition
from kafka.consumer.fetcher import ConsumerRecord

from engine import ConfigError
from engine.schema import parse
from stream.cloudevents import record
from stream.counters import Counters
from stream.events import Event
from stream.kafka_sink import KafkaSink, KafkaSinkSettings
from tests.kafka.broker import Cluster
from tests.kafka.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
# How long a broker is away; `make chaos` says two minutes.
CHAOS_SECONDS = float(os.environ.get("ONSET_CHAOS_SECONDS", "6"))
PATIENCE = 120.0


def event(number: int, stream: str = "a") -> Event:
    return Event("stream.started", stream, 0, "tiny@0123456789ab", float(number), captured=1.7e9 + number)


def settings_of(cluster: Cluster | None, name: str, spool: Path, **values: Any) -> KafkaSinkSettings:
    """For the topic `name`; without a cluster, of one that is not there."""
    bootstrap = cluster.bootstrap if cluster else [f"127.0.0.1:{free_port()}"]
    values = {"connection": {"bootstrap": bootstrap}, "topic": name, "spool": spool} | values
    return parse(KafkaSinkSettings, values, "sink")


@contextlib.contextmanager
def sending(settings: KafkaSinkSettings, counters: Counters | None = None) -> Iterator[KafkaSink]:
    sink = KafkaSink(settings, counters)
    try:
        yield sink
    finally:
        sink.close(PATIENCE)


def committed(cluster: Cluster, topic: str) -> list[ConsumerRecord]:
    """All that a consumer of committed records sees now, partition by partition."""
    with contextlib.closing(
        KafkaConsumer(
            **cluster.client_settings(), isolation_level="read_committed", auto_offset_reset="earliest"
        )
    ) as consumer:
        places = [TopicPartition(topic, i) for i in consumer.partitions_for_topic(topic)]
        consumer.assign(places)
        ends = consumer.end_offsets(places)
        records: list[ConsumerRecord] = []
        deadline = time.monotonic() + PATIENCE
        while any(consumer.position(place) < ends[place] for place in places):
            assert time.monotonic() < deadline, "the topic cannot be read to its end"
            for found in consumer.poll(200).values():
                records += found
    return records


def numbers(cluster: Cluster, topic: str) -> dict[str, list[int]]:
    """The numbers of the events of each stream, in the topic's order."""
    found: dict[str, list[int]] = defaultdict(list)
    for entry in committed(cluster, topic):
        found[entry.key.decode()].append(int(json.loads(entry.value)["time"]))
    return dict(found)


def await_that(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


class Load:
    """Writes numbered events of three streams, some 300 a second, until it is stopped."""

    def __init__(self, sink: KafkaSink) -> None:
        self._sink, self._stop = sink, threading.Event()
        self.written = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            self._sink.write([event(self.written, stream) for stream in "abc"])
            self.written += 1

    def stop(self) -> dict[str, list[int]]:
        """What must arrive."""
        self._stop.set()
        self._thread.join()
        return {stream: list(range(self.written)) for stream in "abc"}


def test_events_arrive_as_cloudevents_once_and_in_order(
    kafka: Cluster, topic: Callable[..., str], tmp_path: Path
) -> None:
    name, counters = topic(partitions=3), Counters()
    events = [event(number, f"stream {number % 7}") for number in range(700)]
    with sending(settings_of(kafka, name, tmp_path / "spool.db"), counters) as sink:
        for first in range(0, len(events), 9):
            sink.write(events[first : first + 9])
        sink.write([])
    assert sink.depth == 0
    assert counters.snapshot()["events_delivered"] == len(events)
    found = committed(kafka, name)
    assert len({entry.partition for entry in found}) == 3
    for stream in {event.stream for event in events}:
        there = [entry for entry in found if entry.key == stream.encode()]
        assert len({entry.partition for entry in there}) == 1
        expected = [record(event) for event in events if event.stream == stream]
        assert [(entry.value, entry.headers) for entry in there] == [(r.value, r.headers) for r in expected]
    assert len(found) == len(events)


def test_compressed_events_arrive_as_well(kafka: Cluster, topic: Callable[..., str], tmp_path: Path) -> None:
    name = topic()
    with sending(settings_of(kafka, name, tmp_path / "spool.db", compression="gzip")) as sink:
        sink.write([event(number) for number in range(100)])
    assert numbers(kafka, name) == {"a": list(range(100))}


def test_an_event_does_not_wait_for_others(kafka: Cluster, topic: Callable[..., str], tmp_path: Path) -> None:
    name = topic()
    with sending(settings_of(kafka, name, tmp_path / "spool.db")) as sink:
        for number in range(5):
            sink.write([event(number)])
            await_that(lambda: sink.depth == 0)
        assert numbers(kafka, name) == {"a": [0, 1, 2, 3, 4]}


def test_without_a_broker_events_wait_and_are_sent_by_the_next_run(
    kafka: Cluster, topic: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, spool = topic(), tmp_path / "spool.db"
    absent = KafkaSink(settings_of(None, name, spool))
    absent.write([event(number) for number in range(50)])
    await_that(lambda: "no broker" in caplog.text)
    absent.close(0.1)
    assert absent.depth == 50
    assert "50 events were not sent" in caplog.text
    with sending(settings_of(kafka, name, spool)) as sink:
        sink.write([event(50)])
    assert numbers(kafka, name) == {"a": list(range(51))}


def test_what_the_broker_has_is_not_sent_again_after_a_crash_before_it_was_removed(
    kafka: Cluster, topic: Callable[..., str], tmp_path: Path
) -> None:
    name, spool, before = topic(), tmp_path / "spool.db", tmp_path / "before.db"
    absent = KafkaSink(settings_of(None, name, spool))
    absent.write([event(number) for number in range(50)])
    absent.close(0.0)
    shutil.copy(spool, before)
    with sending(settings_of(kafka, name, spool)):
        pass
    shutil.copy(before, spool)  # as a crash leaves it: committed there, not removed here
    with sending(settings_of(kafka, name, spool)) as sink:
        await_that(lambda: sink.depth == 0)
        sink.write([event(50)])
    assert numbers(kafka, name) == {"a": list(range(51))}


def test_a_spool_that_was_restored_from_a_copy_loses_none_of_its_new_events(
    kafka: Cluster, topic: Callable[..., str], tmp_path: Path
) -> None:
    name, spool, before = topic(), tmp_path / "spool.db", tmp_path / "before.db"
    KafkaSink(settings_of(None, name, spool)).close(0.0)
    shutil.copy(spool, before)
    with sending(settings_of(kafka, name, spool)) as sink:
        sink.write([event(number) for number in range(20)])
    shutil.copy(before, spool)
    absent = KafkaSink(settings_of(None, name, spool))
    absent.write([event(number) for number in range(100, 130)])
    absent.close(0.0)
    with sending(settings_of(kafka, name, spool)):
        pass
    assert numbers(kafka, name) == {"a": [*range(20), *range(100, 130)]}


def test_a_topic_that_does_not_exist_is_told_and_events_wait(
    kafka: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink = KafkaSink(settings_of(kafka, "nobody-made-this", tmp_path / "spool.db"))
    sink.write([event(0)])
    await_that(lambda: "the topic does not exist" in caplog.text)
    sink.close(0.0)
    assert sink.depth == 1


def test_a_full_spool_makes_the_service_wait_until_there_is_room(
    kafka: Cluster, topic: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, spool = topic(), tmp_path / "spool.db"
    absent = KafkaSink(settings_of(None, name, spool, spool_bytes=65536))
    absent.write([event(number) for number in range(100)])
    absent.close(0.0)
    with sending(settings_of(kafka, name, spool, spool_bytes=65536)) as sink:
        for first in range(100, 1000, 50):
            sink.write([event(number) for number in range(first, first + 50)])
    assert "the service waits for the broker" in caplog.text
    assert numbers(kafka, name) == {"a": list(range(1000))}


def test_a_full_spool_that_may_drops_the_oldest_and_counts_them(
    kafka: Cluster, topic: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, spool, counters = topic(), tmp_path / "spool.db", Counters()
    absent = KafkaSink(settings_of(None, name, spool, spool_bytes=65536, when_full="drop-oldest"), counters)
    for number in range(1000):
        absent.write([event(number)])
    absent.close(0.0)
    dropped = int(counters.snapshot()["events_dropped"])
    assert 500 < dropped < 1000
    assert "the oldest are dropped" in caplog.text
    with sending(settings_of(kafka, name, spool)):
        pass
    assert numbers(kafka, name) == {"a": list(range(dropped, 1000))}


@pytest.mark.parametrize(
    "values",
    [
        {"topic": "a b"},
        {"topic": ""},
        {"spool_bytes": 10},
        {"linger": -1},
        {"compression": "zip"},
        {"when_full": "panic"},
        {"connection": {"bootstrap": "nowhere"}},
    ],
    ids=str,
)
def test_wrong_settings_are_refused(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        settings_of(None, "events", tmp_path / "spool.db", **values)


def test_paths_can_be_made_relative_to_a_folder(tmp_path: Path) -> None:
    login = {"username": "onset", "password_file": "secret"}
    connection = {"bootstrap": "127.0.0.1:1", "sasl": login}
    found = settings_of(None, "events", Path("spool.db"), connection=connection).relative_to(tmp_path)
    assert found.spool == tmp_path / "spool.db"
    assert found.connection.sasl is not None
    assert found.connection.sasl.password_file == tmp_path / "secret"


def test_a_secret_that_is_missing_ends_the_service_before_it_begins(tmp_path: Path) -> None:
    login = {"username": "onset", "password_file": tmp_path / "none"}
    connection = {"bootstrap": "127.0.0.1:1", "sasl": login}
    with pytest.raises(ConfigError, match="password_file"):
        KafkaSink(settings_of(None, "events", tmp_path / "spool.db", connection=connection))


@pytest.mark.timeout(300 + 2 * CHAOS_SECONDS)
def test_a_broker_that_dies_under_load_and_comes_back_has_every_event_once_and_in_order(
    fragile: Cluster, tmp_path: Path
) -> None:
    fragile.create_topic("dies", partitions=2)
    fragile.kill(0)
    with sending(settings_of(fragile, "dies", tmp_path / "spool.db")) as sink:  # begins without a broker
        load = Load(sink)
        await_that(lambda: sink.depth > 100)
        fragile.start(0)
        await_that(lambda: sink.depth < 50)
        fragile.kill(0)
        time.sleep(CHAOS_SECONDS)
        assert sink.depth > 100
        fragile.start(0)
        await_that(lambda: sink.depth < 50)
        expected = load.stop()
    assert sink.depth == 0
    assert numbers(fragile, "dies") == expected


def test_a_network_that_is_cut_again_and_again_costs_no_event_and_repeats_none(
    fragile: Cluster, tmp_path: Path
) -> None:
    """The cuts come in the middle of transactions, at whichever request they happen to be."""
    rng = random.Random(0)
    (proxy,) = fragile.proxies
    fragile.create_topic("cut", partitions=2)
    with sending(settings_of(fragile, "cut", tmp_path / "spool.db")) as sink:
        load = Load(sink)
        await_that(lambda: load.written > 100 and sink.depth < 50)
        for cut in range(6):
            time.sleep(rng.uniform(0.0, 0.4))
            proxy.cut(silently=cut % 3 == 2)
            time.sleep(rng.uniform(0.0, 0.2))
            proxy.restore()
        await_that(lambda: sink.depth < 50)
        expected = load.stop()
    assert sink.depth == 0
    assert numbers(fragile, "cut") == expected


@pytest.mark.timeout(300 + 2 * CHAOS_SECONDS)
def test_a_network_that_swallows_everything_for_a_while_costs_no_event(
    fragile: Cluster, tmp_path: Path
) -> None:
    """For longer than a request may take, so that the client gives up what the broker may have done."""
    (proxy,) = fragile.proxies
    fragile.create_topic("swallows", partitions=2)
    with sending(settings_of(fragile, "swallows", tmp_path / "spool.db")) as sink:
        load = Load(sink)
        await_that(lambda: load.written > 100 and sink.depth < 50)
        proxy.cut(silently=True)
        time.sleep(max(CHAOS_SECONDS, 12.0))
        proxy.restore()
        await_that(lambda: sink.depth < 50)
        expected = load.stop()
    assert sink.depth == 0
    assert numbers(fragile, "swallows") == expected


_SERVICE = """
import sys
from pathlib import Path
from stream.events import Event
from stream.kafka_sink import KafkaSink, KafkaSinkSettings
bootstrap, spool, number = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
sink = KafkaSink(KafkaSinkSettings(connection={"bootstrap": bootstrap}, topic=sys.argv[4], spool=spool))
while True:
    sink.write([Event("stream.started", "a", 0, "tiny@0123456789ab", float(number))])
    number += 1
    print(number, flush=True)
"""


def test_a_process_that_is_killed_again_and_again_loses_no_event_and_repeats_none(
    kafka: Cluster, topic: Callable[..., str], tmp_path: Path
) -> None:
    name, spool, following = topic(), tmp_path / "spool.db", 0
    safe: set[int] = set()
    unsure: set[int] = set()  # kept or not, the process died before it could tell
    for life in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVICE, kafka.bootstrap[0], str(spool), str(following), name],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        threading.Timer(0.8 + 0.13 * life, process.send_signal, (signal.SIGKILL,)).start()
        lines += process.stdout.readlines()
        process.wait(30)
        told = [int(line) for line in lines if line.endswith("\n")]
        safe |= set(range(following, told[-1]))
        unsure.add(told[-1])
        following = told[-1] + 1
    assert numbers(kafka, name)["a"], "nothing was sent before a process was killed"
    with sending(settings_of(kafka, name, spool)):
        pass
    found = numbers(kafka, name)["a"]
    assert found == sorted(set(found))
    assert safe <= set(found) <= safe | unsure


def test_only_the_right_password_gets_in_and_no_password_is_ever_said(
    guarded: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    credentials = guarded.credentials
    assert credentials is not None
    guarded.create_topic("guarded")
    wrong = "wrong-horse-battery"
    for name in ("", "kafka", "stream"):
        caplog.set_level(logging.DEBUG, name)

    def connection(password: str, **tls: Any) -> dict[str, Any]:
        login = {"username": credentials.user, "password": password}
        return {"bootstrap": guarded.bootstrap, "sasl": login, "tls": {"ca": credentials.ca_file} | tls}

    spool = tmp_path / "spool.db"
    refused = KafkaSink(settings_of(None, "guarded", spool, connection=connection(wrong)))
    refused.write([event(0)])
    await_that(lambda: "refuses the login; check `sasl`" in caplog.text)
    refused.close(0.0)
    assert refused.depth == 1
    distrustful = KafkaSink(
        settings_of(None, "guarded", spool, connection=connection(credentials.password, ca=None))
    )
    await_that(lambda: "has a certificate that is not accepted" in caplog.text)
    distrustful.close(0.0)
    with sending(settings_of(None, "guarded", spool, connection=connection(credentials.password))) as sink:
        sink.write([event(1)])
    assert numbers(guarded, "guarded") == {"a": [0, 1]}
    said = caplog.text + "".join(capfd.readouterr())
    assert wrong not in said
    assert credentials.password not in said
