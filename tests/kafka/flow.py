"""Streams through Kafka: messages in, workers as processes, events out, and what the events have to be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition

from engine import OnnxSession
from stream.config import RuntimeSettings
from stream.events import Event
from stream.runtime import Runtime
from stream.wire import Message, encode
from tests.kafka.broker import Cluster

RATE = 50.0
DECODING = {"start_threshold": 0.2, "end_threshold": 0.1, "confident": 0.3, "hold": 0.1, "max_duration": 6.0}
RUN = {"max_streams": 16, "reorder": 0.2, "max_gap": 0.4}
ROOT = Path(__file__).resolve().parents[2]


def wave(seed: int, n: int) -> np.ndarray:
    """A random walk of 3 channels."""
    rng = np.random.default_rng(seed)
    return (0.3 * np.cumsum(rng.normal(size=(n, 3)), axis=0)).astype(np.float32)


def messages_of(streams: int, samples: int, arrival: int = 25) -> list[Message]:
    """Streams s0, s1, ... side by side, some messages swapped, some lost; each with an end."""
    rng = np.random.default_rng(streams)
    found: list[Message] = []
    waves = [wave(seed, samples) for seed in range(streams)]
    for at in range(0, samples, arrival):
        batch = [
            Message(
                f"s{i}",
                at,
                waves[i][at : at + arrival],
                RATE,
                1,
                1000.0 + at / RATE,
                end=at + arrival >= samples,
            )
            for i in range(streams)
            if at + arrival >= samples or rng.random() > 0.01
        ]
        rng.shuffle(batch)  # type: ignore[arg-type]
        found += batch
    return found


def expected_events(bundle: Path, messages: Sequence[Message]) -> dict[str, list[bytes]]:
    """What an undisturbed runtime says, by stream."""
    events: list[Event] = []
    session = OnnxSession(bundle, slots=16, threads=1)
    decoding = session.manifest.decoding.model_copy(update=DECODING)
    runtime = Runtime(session, events.extend, RuntimeSettings(**RUN), None, decoding)  # type: ignore[arg-type]
    for message in messages:
        runtime.offer(message)
        runtime.run_ready()
    runtime.drain()
    found: dict[str, list[bytes]] = {}
    for event in events:
        found.setdefault(event.stream, []).append(event.to_json().encode())
    return found


class Feed:
    """A producer of wire messages, keyed by stream."""

    def __init__(self, cluster: Cluster, topic: str, compression: str | None = None) -> None:
        self._topic = topic
        self._producer = KafkaProducer(
            **cluster.client_settings(),
            compression_type=compression,
            enable_idempotence=True,
            acks="all",
            delivery_timeout_ms=600_000,
            request_timeout_ms=10_000,
            max_block_ms=120_000,
            reconnect_backoff_max_ms=500,
        )

    def send(self, messages: Sequence[Message]) -> None:
        """Without waiting for the broker."""
        for message in messages:
            self.send_bytes(message.stream.encode(), encode(message))

    def send_bytes(self, key: bytes | None, value: bytes | None, partition: int | None = None) -> None:
        """Whatever it may be."""
        self._producer.send(self._topic, key=key, value=value, partition=partition)

    def close(self) -> None:
        """Everything has arrived."""
        self._producer.flush(timeout=120)
        self._producer.close()


def worker_config(
    folder: Path, bundle: Path, cluster: Cluster, topics: Mapping[str, str], **changes: Any
) -> Path:
    """The file of a service's configuration."""
    kafka: dict[str, Any] = {
        "connection": {"bootstrap": cluster.bootstrap},
        "group": topics["frames"] + "-group",
        "topic": topics["frames"],
        "events": topics["events"],
        "commit_interval": 0.3,
        "session_timeout": 3.0,
        "transaction_timeout": 5.0,
        "max_poll": 60,
    }
    kafka |= changes.pop("kafka", {})
    values = {
        "bundle": str(bundle),
        "source": {"kafka": kafka},
        "threads": 1,
        "decoding": DECODING,
        **RUN,
    } | changes
    path = folder / f"service{len(list(folder.glob('service*.yaml')))}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


class WorkerProcess:
    """`onset run` as a process of its own."""

    def __init__(self, config: Path, log: Path, before: str = "") -> None:
        """`before`: Python that runs first."""
        self._log = log.open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{before}\nfrom onset import main; main()", "run", str(config)],
            cwd=ROOT,
            stderr=self._log,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def kill(self) -> None:
        """SIGKILL, and gone."""
        self.process.kill()
        self.process.wait()
        self._log.close()

    def stop(self, seconds: float = 60.0) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        finally:
            self.kill()


def read_events(cluster: Cluster, topic: str) -> dict[str, list[bytes]]:
    """All committed events by stream, in the order of their partition."""
    found: dict[str, list[bytes]] = {}
    for record in _read(cluster, topic):
        found.setdefault(record.key.decode(), []).append(record.value)
    return found


def read_letters(cluster: Cluster, topic: str) -> list[tuple[dict[str, bytes], bytes]]:
    """All committed dead letters: headers and value."""
    return [(dict(record.headers), record.value) for record in _read(cluster, topic)]


def _read(cluster: Cluster, topic: str) -> list[Any]:
    found: list[Any] = []
    with closing(
        KafkaConsumer(
            **cluster.client_settings(),
            group_id=None,
            enable_auto_commit=False,
            isolation_level="read_committed",
            auto_offset_reset="earliest",
        )
    ) as consumer:
        places = [TopicPartition(topic, p) for p in consumer.partitions_for_topic(topic) or ()]
        consumer.assign(places)
        consumer.seek_to_beginning(*places)
        ends = consumer.end_offsets(places)
        while any(consumer.position(place) < ends[place] for place in places):
            for batch in consumer.poll(timeout_ms=200).values():
                found += batch
    return found


def await_ends(
    cluster: Cluster, topic: str, streams: Sequence[str], seconds: float
) -> dict[str, list[bytes]]:
    """The committed events, once each of `streams` has ended."""
    deadline = time.monotonic() + seconds
    while True:
        found = read_events(cluster, topic)
        ended = {
            s
            for s in streams
            if any(json.loads(e).get("reason") == "end of stream" for e in found.get(s, ()))
        }
        if ended >= set(streams):
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"after {seconds:g} s these have not ended: {sorted(set(streams) - ended)}")
        time.sleep(0.5)


def await_committed(cluster: Cluster, config: Path, messages: int, seconds: float = 60.0) -> None:
    """Until the group of a configuration has committed so many messages, over all partitions."""
    kafka = yaml.safe_load(config.read_text())["source"]["kafka"]
    deadline = time.monotonic() + seconds
    with closing(KafkaConsumer(**cluster.client_settings(), group_id=kafka["group"])) as consumer:
        places = [
            TopicPartition(kafka["topic"], p) for p in consumer.partitions_for_topic(kafka["topic"]) or ()
        ]
        while sum(consumer.committed(place) or 0 for place in places) < messages:
            assert time.monotonic() < deadline, f"not {messages} messages committed within {seconds:g} s"
            time.sleep(0.1)


def await_line(log: Path, text: str, seconds: float = 60.0) -> None:
    """Until a log says so."""
    deadline = time.monotonic() + seconds
    while text not in (log.read_text(errors="replace") if log.exists() else ""):
        assert time.monotonic() < deadline, (
            f"{text!r} is not in the log: {log.read_text(errors='replace')[-4000:]}"
        )
        time.sleep(0.05)


def delete_messages(cluster: Cluster, topic: str, before: int) -> None:
    """What retention does: the messages of partition 0 before an offset are gone."""
    with closing(KafkaAdminClient(**cluster.client_settings())) as admin:
        admin.delete_records({TopicPartition(topic, 0): before})


def readiness(port: int) -> tuple[int, dict[str, str]]:
    """The status of /ready, and what is missing; 0 where nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=10) as answer:
            return int(answer.status), {}
    except urllib.error.HTTPError as problem:
        return problem.code, dict(json.loads(problem.read())["missing"])
    except OSError:
        return 0, {}
