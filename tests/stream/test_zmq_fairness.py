"""A service under floods: who floods waits alone, what was sent arrives, and the end comes all the same."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zmq

from engine import choice
from stream.config import ServiceConfig
from stream.zmq_settings import ZmqSettings
from tests.stream.test_service import RATE, Running, await_event, config_of, of, read, wave
from tests.stream.test_zmq_worker import SlowSession, message, undisturbed

POLITE = 50
SEND = [sys.executable, "-m", "onset", "send"]


def config(bundle: Path, path: Path, **settings: object) -> ServiceConfig:
    small = ZmqSettings(endpoint="tcp://127.0.0.1:*", high_water_mark=4, heartbeat=0.1, heartbeat_timeout=0.3)
    base = config_of(bundle, path, queue_bytes=64 * 1024, max_streams=2 * POLITE, idle_timeout=20.0)
    source = base.source.model_copy(update={"zmq": small})
    return base.model_copy(update={"source": source, **settings})


def test_fifty_polite_streams_are_on_time_beside_one_that_floods(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "OnnxSession", SlowSession)
    path = tmp_path / "events.jsonl"
    flood, polite = wave(1, 400_000), wave(2, 160)
    running = Running(config(tiny_bundle, path))
    with zmq.Context() as context:
        sockets = [context.socket(zmq.PUSH) for _ in range(POLITE + 1)]
        for each in sockets:
            each.linger = 0
            each.sndhwm = 100
            each.connect(running.address)
        for start in range(0, 400_000, 8_000):  # each more than the queue has room for
            sockets[-1].send(message("flood", flood, start, start + 8_000))
        await_event(path, "flood", "stream.started")
        for start in range(0, 160, 16):
            for number in range(POLITE):
                sockets[number].send(message(f"polite {number}", polite, start, start + 16))
        for number in range(POLITE):
            await_event(path, f"polite {number}", "stream.ended", 60)
        assert not any(e["type"] == "stream.ended" for e in of(read(path), "flood")), "it was not held up"
        for each in sockets:
            each.close()
    monkeypatch.setattr(SlowSession, "seconds", 0.0)
    counters, events = running.stop()
    assert counters["streams_evicted"] == counters["late_samples"] == 0
    for name in ("polite 0", f"polite {POLITE - 1}"):
        assert of(events, name) == undisturbed(tiny_bundle, name, polite)


def test_what_onset_send_calls_sent_has_arrived(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "OnnxSession", SlowSession)
    monkeypatch.setattr(SlowSession, "seconds", 0.001)
    path = tmp_path / "events.jsonl"
    np.save(tmp_path / "a.npy", wave(3, 30_000))
    running = Running(config(tiny_bundle, path))
    arguments = [str(tmp_path / "a.npy"), "--to", running.address, "--rate", f"{RATE:g}"]
    done = subprocess.run(
        [*SEND, *arguments, "--speed", "0", "--arrival", "700"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "taken by" in done.stderr
    monkeypatch.setattr(SlowSession, "seconds", 0.0)
    counters, events = running.stop()
    assert counters["samples"] == 30_000
    assert of(events, "a")[-1]["reason"] == "end of stream"


def test_what_onset_send_does_not_know_to_have_arrived_is_said(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", wave(3, 300))
    with (
        zmq.Context() as context,
        context.socket(zmq.PULL) as listener,
    ):  # which takes one message, and no more
        listener.rcvhwm, listener.linger = 1, 0
        port = listener.bind_to_random_port("tcp://127.0.0.1")
        arguments = [str(tmp_path / "a.npy"), "--to", f"tcp://127.0.0.1:{port}", "--rate", "50"]
        done = subprocess.run(
            [*SEND, *arguments, "--speed", "0", "--arrival", "1", "--patience", "1"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 2
    words = " ".join(done.stderr.split())
    assert "Not known to have arrived: 'a' from sample" in words
    assert "to 299, and its end" in words


def test_the_end_comes_whoever_waits_at_the_door(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "OnnxSession", SlowSession)
    monkeypatch.setattr(SlowSession, "seconds", 0.05)
    running = Running(config(tiny_bundle, tmp_path / "events.jsonl", grace=4.0))
    port = int(running.address.rpartition(":")[2])
    samples = wave(1, 100_000)
    with zmq.Context() as context, context.socket(zmq.PUSH) as flood:
        flood.linger, flood.sndhwm = 0, 2
        flood.connect(running.address)
        for start in range(0, 80_000, 8_000):
            if flood.poll(500, zmq.POLLOUT):
                flood.send(message("flood", samples, start, start + 8_000))
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(600)]
        counters, _ = running.stop()
    for connection in silent:
        connection.close()
    assert counters["dropped_messages{stopped}"] >= 1, "all was processed: it had no reason to hang"
