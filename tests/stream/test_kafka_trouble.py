"""What befalls workers on a real Kafka beside being killed: brokers that are away, others in their way."""

from __future__ import annotations

import time
import urllib.request
from pathlib import Path

from tests.kafka.broker import Cluster
from tests.kafka.flow import Feed, WorkerProcess, await_ends, messages_of, readiness, worker_config
from tests.kafka.ports import free_port


def await_readiness(port: int, status: int, why: str = "", seconds: float = 60.0) -> None:
    """Until /ready says so, and why."""
    deadline = time.monotonic() + seconds
    while (found := readiness(port))[0] != status or why not in found[1].get("source", ""):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def test_a_worker_whose_broker_is_away_is_not_ready_until_it_is_back(
    has_kafka: None, tiny_bundle: Path, tmp_path: Path
) -> None:
    port = free_port()
    with Cluster(tmp_path / "kafka") as cluster:
        cluster.create_topic("frames", 2)
        cluster.create_topic("events")
        topics = {"frames": "frames", "events": "events"}
        config = worker_config(tmp_path, tiny_bundle, cluster, topics, http={"address": f"127.0.0.1:{port}"})
        worker = WorkerProcess(config, tmp_path / "log")
        try:
            await_readiness(port, 200)
            cluster.stop(0)
            await_readiness(port, 503, "no broker answered for ")
            assert readiness(port)[0] == 503, "and it stays so"
            cluster.start(0)
            await_readiness(port, 200)
            messages = messages_of(2, 300)
            feed = Feed(cluster, "frames")
            feed.send(messages)
            feed.close()
            await_ends(cluster, "events", ["s0", "s1"], 60)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/live", timeout=10) as answer:
                assert answer.status == 200
        finally:
            worker.stop()
