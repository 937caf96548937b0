"""How much later events are seen for being said exactly once: python -m tests.benchmarks.kafka_delivery

Two workers, one of each `delivery`, read the same messages at the same time from one broker; one consumer of
committed records looks when each event is there, counted from when its last sample was captured.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
from kafka import KafkaConsumer

from stream.kafka_sender import KafkaSender
from stream.wire import Message
from tests.kafka.broker import Cluster
from tests.kafka.flow import RATE, WorkerProcess, wave, worker_config
from tests.tiny import write_tiny_bundle

STREAMS, SECONDS = 8, 60
ARRIVAL = 8  # samples: a chunk
WAYS = ("exactly-once", "at-least-once")


def send(target: str) -> None:
    """All streams in real time, each message when its last sample is captured."""
    waves = [wave(seed, round(SECONDS * RATE)) for seed in range(STREAMS)]
    began = time.time()
    with KafkaSender(target) as sender:
        for at in range(0, len(waves[0]), ARRIVAL):
            time.sleep(max(0.0, began + (at + ARRIVAL) / RATE - time.time()))
            for i, samples in enumerate(waves):
                piece = samples[at : at + ARRIVAL]
                end = at + ARRIVAL >= len(samples)
                sender.send(Message(f"s{i}", at, piece, RATE, 1, began + at / RATE, end=end))


def measure(folder: Path) -> dict[str, np.ndarray]:
    """Seconds from capture to sight, of each event, by delivery."""
    bundle = write_tiny_bundle(folder / "bundle")
    seen: dict[str, list[float]] = {way: [] for way in WAYS}
    with Cluster(folder / "kafka") as cluster:
        for name in ("frames", *WAYS):
            cluster.create_topic(name, 2)
        workers = []
        for way in WAYS:
            kafka = {"delivery": way, "group": f"group-{way}"}
            config = worker_config(folder, bundle, cluster, {"frames": "frames", "events": way}, kafka=kafka)
            workers.append(WorkerProcess(config, folder / f"{way}.log"))
        options = {"auto_offset_reset": "earliest", "isolation_level": "read_committed"}
        with closing(KafkaConsumer(*WAYS, **options, **cluster.client_settings())) as consumer:
            while not all("took up" in (folder / f"{way}.log").read_text() for way in WAYS):
                time.sleep(0.1)
            feeding = threading.Thread(target=send, args=(f"kafka://{cluster.bootstrap[0]}/frames",))
            feeding.start()
            quiet = 0.0
            while feeding.is_alive() or time.monotonic() - quiet < 5.0:
                for batch in consumer.poll(timeout_ms=50).values():
                    now, quiet = time.time(), time.monotonic()
                    for record in batch:
                        event = json.loads(record.value)
                        if event["type"].startswith("action."):
                            seen[record.topic].append(now - event["captured"])
        for worker in workers:
            worker.stop()
    return {way: np.array(values) for way, values in seen.items()}


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name:
        seen = measure(Path(name))
    medians = {way: float(np.median(values)) for way, values in seen.items()}
    for way, values in seen.items():
        print(  # noqa: T201
            f"{way}: {len(values)} events, median {medians[way] * 1000:.0f} ms, "
            f"95 % within {np.quantile(values, 0.95) * 1000:.0f} ms"
        )
    print(f"ratio of medians {medians[WAYS[0]] / medians[WAYS[1]]:.2f}")  # noqa: T201


if __name__ == "__main__":
    main()
