"""Silence is judged by what had arrived: neither a pause of the service nor anybody's clock ends a stream."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine import OnnxSession, Slot, choice
from stream.listening import ListeningClock
from stream.wire import Message
from tests.stream.test_partition import RATE as LOG_RATE
from tests.stream.test_partition import Broker, Worker
from tests.stream.test_service import await_event, config_of, of, read, wave
from tests.stream.test_zmq_worker import message, running, undisturbed

IDLE_SECONDS = 0.8


class StallingSession(OnnxSession):
    """An engine that stands still when it is told to, until it may go on."""

    stall = threading.Event()
    stands, released = threading.Event(), threading.Event()

    def step(self, slots: Sequence[Slot], samples: Any, mask: Any) -> Any:
        if self.stall.is_set():
            self.stands.set()
            self.released.wait(60)
        return super().step(slots, samples, mask)


def test_streams_are_not_silent_while_the_service_stands_still(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "OnnxSession", StallingSession)
    path = tmp_path / "events.jsonl"
    samples = wave(1, 400)
    names = [f"polite {number}" for number in range(4)]
    StallingSession.stall.set()
    with running(config_of(tiny_bundle, path, idle_timeout=IDLE_SECONDS)) as send:
        for name in names:
            send(message(name, samples, 0, 200))
        assert StallingSession.stands.wait(30)
        time.sleep(2 * IDLE_SECONDS)
        StallingSession.stall.clear()
        for name in names:
            send(message(name, samples, 200, 400))
        StallingSession.released.set()
        for name in names:
            await_event(path, name, "stream.ended")
    for name in names:
        assert of(read(path), name) == undisturbed(tiny_bundle, name, samples)


def test_a_pause_counts_for_little_and_listening_for_all_of_it() -> None:
    now = 0.0
    listened = ListeningClock(1.0, lambda: now)
    for _ in range(3):
        now += 0.4
        listened.caught_up()
    assert listened() == pytest.approx(1.2)
    now = 500.0  # it stood still, or the machine slept
    assert listened() == pytest.approx(1.2)
    assert listened.caught_up() == 1.0
    assert listened() == pytest.approx(2.2)


def entry(at: float | None, stream: str, seq: int) -> tuple[Any, Message]:
    return at, Message(stream, seq, wave(7, 3000)[seq : seq + 30], LOG_RATE, 1)


def test_a_producer_whose_clock_is_a_year_ahead_ends_no_other_stream_of_its_partition(
    tiny_bundle: Path,
) -> None:
    worker = Worker(tiny_bundle, Broker())
    # No broker says when these were put there, as in a topic with CreateTime.
    log = [entry(None, name, seq) for seq in range(0, 600, 30) for name in ("one", "two", "ahead")]
    worker.read(log, len(log))
    assert worker.runtime.streams == ["one", "two", "ahead"]
    worker.partition.listen(3.0)
    log += [entry(None, name, seq) for seq in range(600, 660, 30) for name in ("two", "ahead")]
    worker.read(log, len(log))
    worker.partition.listen(2.0)  # 5 s since "one" spoke, 2 s since the others did
    assert worker.runtime.streams == ["two", "ahead"]


def test_listening_at_the_end_of_a_partition_goes_on_from_its_broker_s_clock(tiny_bundle: Path) -> None:
    worker = Worker(tiny_bundle, Broker())
    worker.read([entry(1e9 + seq / LOG_RATE, "one", seq) for seq in range(0, 600, 30)], 100)
    assert not worker.partition.is_silent(3.9)
    worker.partition.listen(2.0)
    worker.partition.listen(1.9)
    assert worker.runtime.streams == ["one"]
    assert worker.partition.is_silent(0.2)
    worker.partition.listen(0.2)
    assert worker.runtime.streams == []


def test_what_is_read_again_is_not_judged_again(tiny_bundle: Path) -> None:
    """The stream went on for whoever read it first, whatever the timestamps say now."""
    broker = Broker()
    log = [entry(None, "one", seq) for seq in range(0, 1200, 30)]
    worker = Worker(tiny_bundle, broker)
    worker.read(log, 20)
    worker.commit()
    apart = [(1000.0 * at, told) for at, (_, told) in enumerate(log)]
    successor = Worker(tiny_bundle, broker)
    successor.read(apart[:20] + log[20:], len(log))
    successor.commit()
    started = [event for event in broker.events if '"stream.started"' in event]
    assert len(started) == 1
    assert not any("lost its state" in event or "idle" in event for event in broker.events)
