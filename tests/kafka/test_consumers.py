"""Who reads events: the sample consumer, and kcat, a client of another make. Both see what `detect` says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.kafka.broker import Cluster
from tests.kafka.flow import WorkerProcess, await_ends

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "deploy" / "demo"
STREAM = "hapt_u10_e19"
RECORDING = DEMO / "recordings" / f"{STREAM}.npy"


@dataclass(frozen=True)
class Served:
    """A recording that went through a service: where its events are, and what they have to say."""

    broker: str
    topic: str
    expected: list[dict[str, object]]


def onset(*words: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "onset", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def served(kafka: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """`onset run` on the shipped configuration and `onset send` of a demo recording."""
    folder, name = tmp_path_factory.mktemp("served"), f"consumers-{os.urandom(4).hex()}"
    onset("detect", DEMO / "bundle", RECORDING, "--output", folder / "events.jsonl")
    values = yaml.safe_load((ROOT / "configs" / "service-kafka.yaml").read_text())
    values["bundle"] = str(DEMO / "bundle")
    source = values["source"]["kafka"]
    source["connection"]["bootstrap"] = kafka.bootstrap
    source |= {"topic": f"{name}-frames", "events": f"{name}-events", "group": name}
    (folder / "service.yaml").write_text(yaml.safe_dump(values))
    for topic in (source["topic"], source["events"]):
        kafka.create_topic(topic, 3)
    worker = WorkerProcess(folder / "service.yaml", folder / "log")
    try:
        target = f"kafka://{kafka.bootstrap[0]}/{source['topic']}"
        onset("send", RECORDING, "--to", target, "--rate", 50, "--speed", 0, "--epoch", 0)
        await_ends(kafka, source["events"], [STREAM], 60)
    finally:
        assert worker.stop() == 0, (folder / "log").read_text()
    lines = (folder / "events.jsonl").read_text().splitlines()
    return Served(kafka.bootstrap[0], source["events"], [json.loads(line) for line in lines])


def test_the_sample_consumer_prints_what_happened(served: Served) -> None:
    expected = [
        f"onset.{event['type']} {STREAM} {event.get('label')} {event.get('start')} {event.get('end')}"
        for event in served.expected
    ]
    assert len(expected) > 20
    command = [sys.executable, str(ROOT / "deploy" / "consumer.py"), served.broker, served.topic]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as consumer:
        assert consumer.stdout is not None
        try:  # it reads on for ever; the suite's time limit is the deadline
            printed = [consumer.stdout.readline().rstrip("\n") for _ in expected]
        finally:
            consumer.kill()
    assert printed == expected


def test_kcat_reads_the_same_cloud_events(served: Served) -> None:
    if shutil.which("kcat") is None:
        pytest.skip("there is no kcat; apt-get install kcat")
    command = ["kcat", "-C", "-q", "-e", "-b", served.broker, "-t", served.topic, "-o", "beginning"]
    command += ["-X", "isolation.level=read_committed", "-f", "%k\\t%h\\t%s\\n"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    values = [json.loads(value) for _, _, value in rows]
    ours = ("type", "stream", "label", "start", "end", "score", "instance_id", "time")
    assert [[value.get(key) for key in ours] for value in values] == [
        [event.get(key) for key in ours] for event in served.expected
    ]
    for (key, said, _), value in zip(rows, values, strict=True):
        headers = dict(header.split("=", 1) for header in said.split(","))
        assert key == headers["ce_subject"] == STREAM
        assert headers["ce_type"] == f"onset.{value['type']}"
        assert headers["ce_specversion"] == "1.0"
