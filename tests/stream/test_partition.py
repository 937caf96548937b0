"""Whoever goes on with a log of messages says what the one before it would have said, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import DataError, OnnxSession
from stream import partition
from stream.checkpoint import Committed
from stream.config import RuntimeSettings
from stream.events import Event
from stream.partition import LOST, Partition, maker_of, warm_chunks
from stream.runtime import Runtime
from stream.wire import Message

RATE = 50.0
DECODING = {"start_threshold": 0.2, "end_threshold": 0.1, "confident": 0.3, "hold": 0.1, "max_duration": 6.0}
SETTINGS = RuntimeSettings(max_streams=6, max_batch=3, idle_timeout=4.0, reorder=0.2, max_gap=0.4)

Log = list[tuple[float, Message]]


def wave(seed: int, n: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.3 * np.cumsum(rng.normal(size=(n, 3)), axis=0)).astype(np.float32)


def make_log(seed: int, trouble: float = 1.0, length: int = 3000) -> Log:
    """Three streams with all that happens to streams: losses, disorder, repeats, ends, restarts, silences."""
    rng = np.random.default_rng(seed)
    entries: Log = []
    for index, name in enumerate(("one", "two", "three")):
        samples = wave(seed + index, length)
        at, time, epoch, base = 0, rng.uniform(0, 5), 1, 0
        while at < length:
            n = int(rng.integers(1, 90))
            stop = min(length, at + n)
            fate = rng.random() / trouble
            message = Message(
                name,
                at - base,
                samples[at:stop],
                RATE,
                epoch,
                1000.0 + (at - base) / RATE,
                end=stop == length or fate < 0.01,
            )
            time += (stop - at) / RATE
            if fate < 0.01 or fate < 0.015:  # it ends; what follows is a new life
                epoch, base = epoch + 1, stop
            elif fate < 0.02:  # it falls silent for longer than `idle_timeout`
                time += 6.0
            elif fate < 0.03:  # a gap too long to fill
                at = stop + 60
                continue
            when = time + (rng.uniform(0, 0.3) if fate > 0.8 else 0.0)
            if fate < 0.05:
                pass  # lost
            else:
                entries.append((when, message))
                if fate < 0.1:
                    entries.append((when + 0.1, message))  # repeated
            at = stop
    entries.sort(key=lambda entry: entry[0])
    return entries


@dataclass
class Broker:
    """What outlives a worker: one transaction after another."""

    events: list[str] = field(default_factory=list)
    records: dict[bytes, bytes] = field(default_factory=dict)
    offset: int = 0
    text: str | None = None
    first: int = 0  # messages before this one were deleted


class Worker:
    """One life of a worker, on a partition that it takes up where the last commit was."""

    def __init__(self, bundle: Path, broker: Broker, max_streams: int = 6) -> None:
        self.session = OnnxSession(bundle, slots=max_streams, threads=1)
        decoding = self.session.manifest.decoding.model_copy(update=DECODING)
        run = SETTINGS.model_copy(update={"max_streams": max_streams})
        self.events: list[str] = []
        self.runtime = Runtime(self.session, self._hear, run, None, decoding)
        self.broker = broker
        self.partition = Partition(
            self.runtime,
            "frames-0",
            self._tell,
            maker_of(self.session.manifest, decoding, run.model_copy(update={"max_streams": 6})),
            warm_chunks(self.session.manifest, SETTINGS.max_gap),
            broker.offset,
            None if broker.text is None else Committed.from_text(broker.text),
            broker.records,
            broker.first,
        )
        self.position = self.partition.start

    def _tell(self, events: Sequence[Event]) -> None:
        self.events += [event.to_json() for event in events]

    def _hear(self, events: Sequence[Event]) -> None:
        self._tell([event for event in events if self.partition.is_news(event.stream)])

    def read(self, log: Log, count: int) -> bool:
        """Take up to `count` messages; False: there are none left."""
        for offset in range(self.position, min(len(log), self.position + count)):
            self.partition.take(offset, *log[offset])
        self.position = min(len(log), self.position + count)
        self.partition.reach(self.position)
        self.runtime.drain()
        self.partition.tick()
        return self.position < len(log)

    def commit(self) -> None:
        if self.partition.is_replaying:
            return
        records, rewind = self.partition.checkpoint()
        self.broker.events += self.events
        self.events = []
        for key, value in records:
            if value is None:
                self.broker.records.pop(key, None)
            else:
                self.broker.records[key] = value
        self.broker.offset, self.broker.text = self.partition.position, rewind.to_text()


def by_stream(events: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for event in events:
        found.setdefault(json.loads(event)["stream"], []).append(event)
    return found


def undisturbed(bundle: Path, log: Log) -> dict[str, list[str]]:
    broker = Broker()
    worker = Worker(bundle, broker)
    worker.read(log, len(log))
    worker.commit()
    return by_stream(broker.events)


@given(seed=st.integers(0, 2**16), trouble=st.sampled_from([0.2, 1.0]), marks=st.sampled_from([1, 2**22]))
@settings(max_examples=10, deadline=None)
def test_a_log_read_by_many_workers_that_die_gives_the_events_of_one(
    seed: int, trouble: float, marks: int, tiny_bundle: Path
) -> None:
    log = make_log(seed, trouble)
    with mock.patch.object(partition, "_MARKS_BYTES", marks):
        _read_by_many(log, seed, tiny_bundle)


def _read_by_many(log: Log, seed: int, tiny_bundle: Path) -> None:
    expected = undisturbed(tiny_bundle, log)
    rng = np.random.default_rng(seed)
    broker = Broker()
    lives = replayed = 0
    done = False
    while not done:
        worker = Worker(tiny_bundle, broker)
        replayed += broker.offset - worker.position
        lives += 1
        while worker.partition.is_replaying:  # one that never lives so long gets nowhere
            worker.read(log, 25)
        for _ in range(int(rng.integers(1, 8))):
            done = not worker.read(log, int(rng.integers(1, 30)))
            if done or rng.random() < 0.8:
                worker.commit()  # else it dies with what it had not committed, or commits more later
    assert by_stream(broker.events) == expected
    assert sum(map(len, expected.values())) > 30
    assert lives == 1 or replayed > 0


def test_marks_that_are_too_many_for_one_commit_come_in_turns(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition, "_MARKS_BYTES", 1)
    samples = wave(3, 2000)
    log: Log = [
        (at / RATE, Message(name, at, samples[at : at + 20], RATE, 1))
        for at in range(0, 2000, 20)
        for name in ("one", "two", "three")
    ]
    worker, told, rewinds = Worker(tiny_bundle, Broker()), [], []
    while worker.read(log, 3):
        records, rewind = worker.partition.checkpoint()
        marks = [key for key, value in records if key.startswith(b"mark:") and value is not None]
        assert len(marks) <= 1
        told += marks
        rewinds.append(worker.position - rewind.rewind)
    turns = [told[first : first + 3] for first in range(0, len(told) - 2, 3)]
    assert len(turns) > 3
    assert all(len(set(turn)) == 3 for turn in turns)
    # No worse than a mark for each in every commit by much: a turn more.
    monkeypatch.setattr(partition, "_MARKS_BYTES", 2**22)
    worker, usual = Worker(tiny_bundle, Broker()), []
    while worker.read(log, 3):
        usual.append(worker.position - worker.partition.checkpoint()[1].rewind)
    assert max(usual) <= max(rewinds) <= max(usual) + 3 * 3


STEADY: Log = [
    (at / RATE, Message("one", at, wave(9, 3000)[at : at + 30], RATE, 1, 1000.0 + at / RATE, end=at == 2970))
    for at in range(0, 3000, 30)
]


def stopped_at(bundle: Path, messages: int) -> Broker:
    """What a worker that read so many of STEADY, committing often, has left."""
    broker = Broker()
    worker = Worker(bundle, broker)
    while worker.position < messages:
        worker.read(STEADY[:messages], 10)
        worker.commit()
    return broker


def open_in(events: list[str]) -> set[str | None]:
    """The actions that were announced and are not over."""
    over = {name for kind, name in kinds(events) if kind in ("action.ended", "action.aborted")}
    return {name for kind, name in kinds(events) if kind == "action.started"} - over


def stopped_in_action(bundle: Path, messages: range = range(80, 97)) -> Broker:
    """The same, with actions under way."""
    return next(broker for n in messages if open_in((broker := stopped_at(bundle, n)).events))


def kinds(events: list[str]) -> list[tuple[str, str | None]]:
    return [(e["type"], e.get("instance_id")) for e in map(json.loads, events)]


def is_whole(events: list[str]) -> bool:
    """Each action started once, and ended or aborted at most once, after that."""
    found = kinds(events)
    started = [name for kind, name in found if kind == "action.started"]
    over = [name for kind, name in found if kind in ("action.ended", "action.aborted")]
    after = all(
        found.index(("action.started", name)) < i
        for i, (kind, name) in enumerate(found)
        if name in over and kind != "action.started"
    )
    return (
        after
        and len(set(started)) == len(started)
        and len(set(over)) == len(over)
        and set(over) <= set(started)
    )


def test_a_stream_is_taken_up_from_its_mark_not_from_its_beginning(tiny_bundle: Path) -> None:
    broker = stopped_at(tiny_bundle, 90)
    worker = Worker(tiny_bundle, broker)
    assert 25 < broker.offset - worker.position < 70
    assert worker.partition.start > 0


def test_messages_that_are_gone_are_said_to_be_and_the_stream_begins_anew(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker = stopped_in_action(tiny_bundle)
    was_open = open_in(broker.events)
    broker.first = broker.offset - 5
    worker = Worker(tiny_bundle, broker)
    assert worker.position == broker.first
    assert "keep messages longer" in caplog.text
    worker.read(STEADY, 100)
    worker.commit()
    lost = [e for e in map(json.loads, broker.events) if e.get("reason") == LOST]
    assert {e["instance_id"] for e in lost if e["type"] == "action.aborted"} == was_open
    assert [e["type"] for e in lost][-1] == "stream.ended"
    assert [kind for kind, _ in kinds(broker.events)].count("stream.started") == 2
    assert is_whole(broker.events)


def test_messages_deleted_before_they_were_read_are_told(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker = stopped_at(tiny_bundle, 60)
    broker.first = 80
    worker = Worker(tiny_bundle, broker)
    assert "messages 60 to 79 were deleted before they were read" in caplog.text
    worker.read(STEADY, 100)
    worker.commit()
    assert broker.offset == 100
    assert is_whole(broker.events)


@pytest.mark.parametrize("messages", [range(15, 40), range(80, 97)], ids=["young", "marked"])
def test_another_bundle_goes_on_with_the_actions_that_are_open(
    messages: range, tiny_bundle: Path, other_bundle: Path
) -> None:
    broker = stopped_in_action(tiny_bundle, messages)
    before = len(broker.events)
    for stop in (broker.offset + 1, broker.offset + 2, 100):  # its successors have the same to do
        worker = Worker(other_bundle, broker)
        worker.read(STEADY[:stop], 100)
        worker.commit()
    later = [json.loads(event) for event in broker.events[before:]]
    assert {event["bundle"] for event in later} == {worker.session.manifest.id}
    assert "stream.started" not in [event["type"] for event in later]
    assert is_whole(broker.events)
    ended = {e["instance_id"] for e in later if e["type"] == "action.ended"}
    assert open_in(broker.events[:before]) <= ended


def test_a_state_that_is_damaged_costs_its_stream_a_new_beginning_and_no_other(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker = stopped_at(tiny_bundle, 90)
    broker.records[b"mark:one"] = b"\xc1" + broker.records[b"mark:one"]
    broker.records[b"junk"] = b"junk"
    worker = Worker(tiny_bundle, broker)
    worker.read(STEADY, 100)
    worker.commit()
    assert "neither a life nor a mark" in caplog.text
    assert "not a mark that Onset 1 has written" in caplog.text
    assert is_whole(broker.events)
    assert (
        LOST in broker.events[-1] or [kind for kind, _ in kinds(broker.events)].count("stream.started") == 2
    )


def test_streams_that_find_no_place_with_a_successor_are_ended(tiny_bundle: Path) -> None:
    log = make_log(3, 0.001, 2500)
    broker = Broker()
    worker = Worker(tiny_bundle, broker)
    worker.read(log, len(log) - 20)
    worker.commit()
    worker.read(log, 1)
    worker.commit()
    successor = Worker(tiny_bundle, broker, max_streams=1)
    successor.read(log, len(log))
    successor.commit()
    reasons = [json.loads(event).get("reason") for event in broker.events]
    assert reasons.count("max_streams") >= 2
    for events in by_stream(broker.events).values():
        assert is_whole(events)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{}", '{"v":2,"rewind":1,"clock":0}', '{"v":1,"rewind":"x","clock":0}']
)
def test_a_text_that_is_not_ours_beside_an_offset_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="is this consumer group used by something else"):
        Committed.from_text(text)
