"""Events as records: what a consumer of CloudEvents relies on, and that the schema tells the truth."""

from __future__ import annotations

import json
import random
from collections import Counter
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from engine import OnnxSession
from stream.cloudevents import SCHEMA, record
from stream.config import RuntimeSettings
from stream.events import Event
from stream.runtime import Runtime
from stream.wire import Message

RATE = 50.0
LOW = {"start_threshold": 0.2, "end_threshold": 0.1, "confident": 0.3, "hold": 0.1}
TYPES = {"action.started", "action.ended", "action.aborted", "stream.started", "stream.ended"}

schema = json.loads(files("stream").joinpath("event.schema.json").read_text(encoding="utf-8"))
validator = Draft202012Validator(schema)


class Streams:
    """A runtime over the tiny bundle on a clock of its own, and what left it."""

    def __init__(self, bundle: Path) -> None:
        self.events: list[Event] = []
        self.now = 0.0
        session = OnnxSession(bundle, slots=2, threads=1)
        self.runtime = Runtime(
            session,
            self.events.extend,
            RuntimeSettings(max_streams=2, reorder=0.1, max_gap=0.2, idle_timeout=5.0),
            decoding=session.manifest.decoding.model_copy(update=LOW),
            clock=lambda: self.now,
        )

    def send(self, seq: int, samples: np.ndarray, **fields: Any) -> None:
        fields = {"stream": "a", "time": 1.7e9 + seq / RATE} | fields
        self.runtime.offer(Message(seq=seq, samples=samples, rate=RATE, **fields))

    def fall_silent(self) -> None:
        self.runtime.drain()
        self.now += 10.0
        self.runtime.tick()
        self.runtime.drain()


def wave(seed: int, n: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.3 * np.cumsum(rng.normal(size=(n, 3)), axis=0)).astype(np.float32)


@pytest.fixture(scope="module")
def events(tiny_bundle: Path) -> list[Event]:
    """What a run emits that has everything: gaps, loss, values that overflow, restarts, orderly ends."""
    streams = Streams(tiny_bundle)
    samples = wave(0, 2000)
    streams.send(0, samples[:500])
    streams.send(600, samples[600:900])
    streams.fall_silent()
    streams.send(900, samples[900:1200], time=None)
    streams.send(0, samples[:400], epoch=2**64 - 1, end=True)
    overflowing = samples[:600].copy()
    overflowing[300] = 3e38
    streams.send(0, overflowing, stream="Küche \N{SLIGHTLY SMILING FACE} 100%/2")
    streams.runtime.stop()
    assert {event.type for event in streams.events} == TYPES
    return streams.events


def test_every_event_that_a_run_emits_is_of_the_schema(events: list[Event]) -> None:
    Draft202012Validator.check_schema(schema)
    for event in events:
        validator.validate(json.loads(record(event).value))


def test_what_the_schema_leaves_out_no_event_has_and_what_it_asks_for_is_needed(events: list[Event]) -> None:
    for event in {event.type: event for event in events}.values():
        fields = json.loads(event.to_json())
        for key in fields:
            if key != "captured":
                assert not validator.is_valid({k: v for k, v in fields.items() if k != key}), (
                    event.type,
                    key,
                )
        assert not validator.is_valid(fields | {"color": "red"})
        for key, value in {
            "instance_id": "0" * 24,
            "label": "a",
            "start": 1.0,
            "end": 2.0,
            "score": 0.5,
        }.items():
            assert (key in fields) == validator.is_valid(fields | {key: value}), (event.type, key)
        assert ("reason" in fields) == validator.is_valid(fields | {"reason": "idle"})


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"type": "action.paused"},
        {"stream": ""},
        {"epoch": -1},
        {"epoch": 1.5},
        {"time": "1.0"},
        {"time": -1.0},
        {"captured": None},
        {"bundle": "tiny"},
        {"score": 1.5},
        {"instance_id": "0"},
        {"label": 3},
    ],
    ids=str,
)
def test_an_event_with_a_wrong_value_is_not_of_the_schema(
    change: dict[str, Any], events: list[Event]
) -> None:
    fields = json.loads(next(e for e in events if e.type == "action.started").to_json())
    assert validator.is_valid(fields)
    assert not validator.is_valid(fields | change)


def test_a_record_is_a_cloudevent_in_binary_mode(events: list[Event]) -> None:
    event = next(e for e in events if e.type == "action.ended" and e.captured is not None)
    found = record(event)
    assert found.key == event.stream.encode()
    assert found.value == event.to_json().encode()
    headers = {name: value.decode("utf-8") for name, value in found.headers}
    assert len(headers) == len(found.headers)
    time = datetime.fromisoformat(headers.pop("ce_time").replace("Z", "+00:00"))
    assert time.tzinfo == timezone.utc
    assert time.timestamp() == pytest.approx(event.captured, abs=1e-6)
    assert headers.pop("ce_id") == found.id
    assert headers == {
        "ce_specversion": "1.0",
        "ce_type": "onset.action.ended",
        "ce_source": f"/onset/bundles/{event.bundle}",
        "ce_subject": event.stream,
        "ce_dataschema": SCHEMA,
        "content-type": "application/json",
    }
    assert schema["$id"] == SCHEMA


def test_a_name_beyond_ascii_is_itself_in_every_header(events: list[Event]) -> None:
    name = "Küche \N{SLIGHTLY SMILING FACE} 100%/2"
    found = record(next(event for event in events if event.stream == name))
    assert found.key == dict(found.headers)["ce_subject"] == name.encode("utf-8")


@pytest.mark.parametrize("captured", [None, 1e17, -1e17, -6e10])
def test_without_a_clock_that_can_be_told_there_is_no_time(captured: float | None) -> None:
    found = record(Event("stream.started", "a", 0, "b@0123456789ab", 0.0, captured))
    assert "ce_time" not in dict(found.headers)


def test_the_time_of_a_producer_is_rfc_3339_to_the_microsecond() -> None:
    found = record(Event("stream.started", "a", 0, "b@0123456789ab", 0.0, -0.5))
    assert dict(found.headers)["ce_time"] == b"1969-12-31T23:59:59.500000Z"


def test_an_id_is_the_same_in_every_process_and_for_every_event_another(events: list[Event]) -> None:
    event = Event("action.started", "a", 3, "b@0123456789ab", 2.5, None, "0" * 24, "walk", 1.25, score=0.5)
    assert record(event).id == "dac2282e0c53f6f204af679d0479b837"
    assert len({record(event).id for event in events}) == len(events)


@settings(deadline=None, max_examples=25)
@given(rng=st.integers(0, 2**32).map(random.Random))
def test_no_two_events_share_an_id_whatever_befalls_a_stream(tiny_bundle: Path, rng: random.Random) -> None:
    """Short pieces, silences and overflows, often at the border of a frame (4 samples) or a chunk (8)."""
    streams = Streams(tiny_bundle)
    samples = wave(rng.randint(0, 9), 400)
    at = epoch = 0
    for _ in range(rng.randint(2, 12)):
        n = rng.choice([1, 2, 3, 4, 5, 8, 16, rng.randint(1, 60)])
        piece = samples[at % 300 : at % 300 + n].copy()
        if rng.random() < 0.2:
            piece[-1] = 3e38
        streams.send(at, piece, epoch=epoch)
        at += n
        fate = rng.random()
        if fate < 0.4:
            streams.fall_silent()
        elif fate < 0.5:
            streams.runtime.end("a")
            streams.runtime.drain()
        elif fate < 0.65:
            at += rng.randint(1, 40)
        elif fate < 0.7:
            epoch, at = epoch + 1, 0
    streams.runtime.stop()
    ids = Counter(record(event).id for event in streams.events)
    assert max(ids.values(), default=1) == 1, [e for e in streams.events if ids[record(e).id] > 1]


@pytest.mark.timeout(30)  # it hung
def test_a_stream_whose_segment_is_cut_with_samples_far_ahead_goes_on(tiny_bundle: Path) -> None:
    """An overflow ends the segment while the ring holds what follows a long silence, to its last place."""
    streams = Streams(tiny_bundle)
    samples = wave(0, 400)
    broken = samples[:16].copy()
    broken[-1] = 3e38
    streams.send(0, broken)
    streams.send(50, samples[50:54])
    streams.runtime.end("a")
    for _ in range(100):
        if not streams.runtime.run_ready():
            break
    else:
        raise AssertionError("it never ended")
    streams.runtime.stop()
    assert [event.type for event in streams.events][-1] == "stream.ended"
