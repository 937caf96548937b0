"""What a hostile reader of `stream.partition` found: more room, other settings, another log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stream.partition import LOST, warm_chunks
from stream.wire import Message
from tests.stream import test_partition
from tests.stream.test_partition import (
    DECODING,
    RATE,
    SETTINGS,
    STEADY,
    Broker,
    Log,
    Worker,
    make_log,
    stopped_at,
    stopped_in_action,
    undisturbed,
    wave,
)


def contradictions(events: Sequence[str], stream: str) -> list[str]:
    """What of a stream's events does not go together."""
    found: list[str] = []
    started: set[str] = set()
    over: set[str] = set()
    is_live = False
    for event in map(json.loads, events):
        kind, name = event["type"], event.get("instance_id")
        if event["stream"] != stream:
            continue
        if kind == "stream.started":
            found += ["a stream that runs was started"] * is_live
            is_live = True
        elif kind == "stream.ended":
            found += ["a stream ended that did not run"] * (not is_live)
            is_live = False
        elif kind == "action.started":
            found += [f"{name} was started twice"] * (name in started)
            found += [f"{name} was started in no stream"] * (not is_live)
            started.add(name)
        else:
            found += [f"{name} is over and was never started"] * (name not in started)
            found += [f"{name} is over twice"] * (name in over)
            over.add(name)
    if not is_live and started - over:
        found.append("actions go on in a stream that has ended")
    return found


def test_a_stream_that_was_refused_does_not_speak_from_nowhere_where_there_is_room(tiny_bundle: Path) -> None:
    log: Log = []
    for at in range(0, 3000, 30):
        for name, seed in (("one", 9), ("two", 5)):
            log.append((at / RATE, Message(name, at, wave(seed, 3000)[at : at + 30], RATE, 1)))
    broker = Broker()
    worker = Worker(tiny_bundle, broker, max_streams=1)
    for _ in range(12):
        worker.read(log[:130], 12)
        worker.commit()
    assert not [event for event in broker.events if json.loads(event)["stream"] == "two"]
    successor = Worker(tiny_bundle, broker, max_streams=6)
    assert successor.position < broker.offset
    successor.read(log, len(log))
    successor.commit()
    assert contradictions(broker.events, "one") == contradictions(broker.events, "two") == []
    assert [event for event in broker.events if json.loads(event)["stream"] == "two"]


def test_what_was_dropped_as_an_earlier_life_s_stays_dropped(tiny_bundle: Path) -> None:
    samples = wave(9, 1800)

    def message(first: int) -> Message:
        return Message("one", first, samples[first : first + 30], RATE, 1)

    log: Log = [(at / RATE, message(at)) for at in range(0, 900, 30)]
    later = 900 / RATE + 10.0  # silent for longer than `idle_timeout`; then it goes on, with a repeat first
    log.append((later, message(885)))
    log += [(later + (at - 900) / RATE, message(at)) for at in range(900, 1800, 30)]
    broker = Broker()
    for stop in range(31, len(log) + 3, 3):
        worker = Worker(tiny_bundle, broker)
        worker.read(log[:stop], len(log))
        worker.commit()
    assert broker.events == undisturbed(tiny_bundle, log)["one"]


@pytest.mark.parametrize(
    "change", [{"start_threshold": 0.45, "confident": 0.5}, {"max_duration": 3.0}, {"hold": 0.5}], ids=str
)
def test_other_decoding_goes_on_with_what_was_announced(
    change: dict[str, Any], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for messages in range(20, 98, 13):
        broker = stopped_at(tiny_bundle, messages)
        with monkeypatch.context() as other:
            other.setattr(test_partition, "DECODING", DECODING | change)
            worker = Worker(tiny_bundle, broker)
            worker.read(STEADY, len(STEADY))
            worker.commit()
        assert contradictions(broker.events, "one") == []


@pytest.mark.parametrize("change", [{"reorder": 0.0}, {"max_gap": 2.0}, {"idle_timeout": 0.4}], ids=str)
def test_other_settings_go_on_with_what_was_announced(
    change: dict[str, Any], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = make_log(1, 0.6, 2000)
    for messages in range(20, len(log), 37):
        broker = Broker()
        worker = Worker(tiny_bundle, broker)
        while worker.position < messages:
            worker.read(log[:messages], 10)
            worker.commit()
        with monkeypatch.context() as other:
            other.setattr(test_partition, "SETTINGS", SETTINGS.model_copy(update=change))
            worker = Worker(tiny_bundle, broker)
            worker.read(log, len(log))
            worker.commit()
        for stream in ("one", "two", "three"):
            assert contradictions(broker.events, stream) == []


def test_the_state_of_another_log_is_not_gone_on_with(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker = stopped_in_action(tiny_bundle)
    anew = [(1e6 + time, Message("one", m.seq, m.samples, RATE, 77)) for time, m in STEADY]
    broker.offset, broker.text = 0, None  # the topic was made anew, and its offsets went with it
    told = len(broker.events)
    worker = Worker(tiny_bundle, broker)
    worker.read(anew, len(anew))
    worker.commit()
    assert contradictions(broker.events, "one") == []
    later = [json.loads(event) for event in broker.events[told:]]
    first = next(event for event in later if event["type"] == "stream.started")
    assert (first["epoch"], first["time"]) == (77, 0.0), "no message of it was skipped"
    assert LOST in caplog.text


def test_workers_that_live_for_a_short_time_do_not_read_ever_more_again(tiny_bundle: Path) -> None:
    broker = Broker()
    again = []
    done = False
    while not done:
        worker = Worker(tiny_bundle, broker)
        again.append(broker.offset - worker.position)
        while worker.partition.is_replaying:
            worker.read(STEADY[: broker.offset], 25)
        for _ in range(8):
            done = not worker.read(STEADY, 1)
            worker.commit()
    warm = warm_chunks(worker.session.manifest, SETTINGS.max_gap) * worker.session.manifest.chunk_samples / 30
    assert again[-1] < 2 * warm


def test_a_partition_that_leaves_leaves_a_stream_that_has_moved(tiny_bundle: Path) -> None:
    worker = Worker(tiny_bundle, Broker())
    samples = wave(9, 600)
    for at in range(0, 300, 30):
        message = Message("one", at, samples[at : at + 30], RATE, 1, end=at == 270)
        worker.partition.take(at // 30, at / RATE, message)
    worker.runtime.drain()
    worker.commit()
    # Its producer comes back with another client, which puts it into another partition of this worker.
    worker.runtime.offer(Message("one", 0, samples[:30], RATE, 2), at=10.0)
    worker.partition.leave()
    assert list(worker.runtime.streams) == ["one"]
