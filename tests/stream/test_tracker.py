"""The invariants of events, whatever the network says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine import Decoding, Manifest, Slot, read_bundle
from stream.events import Event
from stream.history import History
from stream.live_stream import MISFITS, LiveStream
from stream.nms import overlap
from stream.ring import Chunk, Ring
from stream.segments import Segments
from stream.tracker import Tracker


def outputs_of(seed: int, frames: int, spread: float, calm: float) -> dict[str, NDArray[np.float32]]:
    """Random outputs that hold on for a while, as real ones do: a random walk of logits."""
    random = np.random.default_rng(seed)

    def walk(width: int) -> NDArray[np.float32]:
        steps = random.normal(0, spread, (frames, width))
        values = np.zeros_like(steps)
        for t in range(1, frames):
            values[t] = calm * values[t - 1] + steps[t]
        return values.astype(np.float32)

    return {
        "ongoing": walk(3),
        "start": walk(3),
        "start_offset": random.normal(2, 4, (frames, 1)).astype(np.float32),
        "end": walk(3),
        "end_offsets": random.normal([2.0, 1.5], [4.0, 1.5], (frames, 2)).astype(np.float32),
    }


def events_of(
    manifest: Manifest,
    outputs: dict[str, NDArray[np.float32]],
    decoding: Decoding,
    abort: bool,
    origin: int = 0,
    mask: NDArray[np.bool_] | None = None,
) -> list[Event]:
    tracker = Tracker(manifest, "s", 0, origin, decoding)
    rate, chunk = manifest.frame.sample_rate, manifest.chunk
    events: list[Event] = []
    now = origin / rate
    for first in range(0, len(outputs["ongoing"]), chunk):
        now = (origin + (first + chunk) * manifest.frame.hop) / rate
        events += tracker.update(
            {n: v[first : first + chunk] for n, v in outputs.items()},
            np.ones(chunk, bool) if mask is None else mask[first : first + chunk],
            first,
            now,
            1e9 + now,
        )
    return events + (tracker.abort("lost", now, None) if abort else tracker.finish(now, None))


def within(low: float, high: float, *usual: float, above: bool = False) -> st.SearchStrategy[float]:
    """What is usual, and all that is allowed."""
    return st.sampled_from(usual) | st.floats(low, high, exclude_min=above, width=64)


# From all that `Decoding` allows.
decodings = st.builds(
    Decoding,
    start_threshold=within(0, 1, 0.0, 0.01, 0.2, 0.6),
    end_threshold=within(0, 1, 0.0, 0.01, 0.2, 0.6),
    gate=within(0, 1, 0.0, 0.0, 0.05, 0.2),
    confident=within(0, 1, 0.1, 0.3, 0.9),
    hold=within(0, 600, 0.0, 0.3, 1.0),
    nms_tiou=within(0, 1, 0.0, 0.1, 0.5),
    min_duration=within(0, 86400, 0.0, 0.0, 0.0, 0.5),
    max_duration=within(0, 86400, 0.01, 0.3, 2.0, 20.0, above=True),
    usual=st.none() | st.tuples(*[within(0, 86400, 0.5, 3.0, 30.0, above=True)] * 3),
    evidence=within(0, 10, 0.01, 0.1, above=True),
)


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    return read_bundle(tiny_bundle)[0]


@dataclass(frozen=True)
class Reign:
    """A stretch of a stream under one decoding; `frames` are rounded up to whole chunks."""

    decoding: Decoding
    frames: int
    chunk: int
    lookahead: int
    spread: float
    calm: float


reigns = st.builds(
    Reign,
    decoding=decodings,
    frames=st.integers(0, 150),
    chunk=st.sampled_from([1, 2, 8, 32]),
    lookahead=st.sampled_from([0, 7]) | st.integers(0, 1024),
    spread=st.sampled_from([0.5, 1.5, 4.0]),
    calm=st.sampled_from([0.0, 0.8, 0.98]),
)


def history_of(
    manifest: Manifest,
    seed: int,
    origin: int,
    course: Sequence[Reign],
    gaps: float,
    saves: float,
    abort: bool,
) -> list[tuple[Event, Reign]]:
    """A stream's events and under what they came: each reign adopts what the one before it left open.

    In `saves` of all chunks the tracker is saved, and another goes on as what was saved.
    """
    random = np.random.default_rng(seed)
    rate, hop = manifest.frame.sample_rate, manifest.frame.hop
    told: list[tuple[Event, Reign]] = []
    tracker, first, now = None, origin, origin / rate
    for number, reign in enumerate(course):
        own = manifest.model_copy(update={"chunk": reign.chunk, "lookahead": reign.lookahead})
        actions = [] if tracker is None else tracker.open_actions
        tracker = Tracker(own, "s", 0, first, reign.decoding, -1 if tracker is None else first)
        told += [(event, reign) for event in tracker.adopt(actions, (now, None))]
        chunks = -(-reign.frames // reign.chunk)
        outputs = outputs_of(seed + number, chunks * reign.chunk, reign.spread, reign.calm)
        for start in range(0, chunks * reign.chunk, reign.chunk):
            now = (first + (start + reign.chunk) * hop) / rate
            cut = {name: values[start : start + reign.chunk] for name, values in outputs.items()}
            events = tracker.update(cut, random.random(reign.chunk) >= gaps, start, now, 1e9 + now)
            told += [(event, reign) for event in events]
            if random.random() < saves:
                saved = msgpack.packb(tracker.save())
                assert len(saved) <= Tracker.largest_save(own, reign.decoding)
                tracker = Tracker.restored(msgpack.unpackb(saved), own, "s", 0, reign.decoding)
        first += chunks * reign.chunk * hop
    assert tracker is not None
    events = tracker.abort("lost", now, None) if abort else tracker.finish(now, None)
    return told + [(event, course[-1]) for event in events]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31), origin=st.sampled_from([0, 12345, 2**40]),
    rate=st.sampled_from([50.0, 1e-3, 1e4]),
    hop=st.sampled_from([1, 4]), course=st.lists(reigns, min_size=1, max_size=3),
    gaps=st.sampled_from([0.0, 0.1, 0.6]), saves=st.sampled_from([0.0, 0.2]), abort=st.booleans(),
)  # fmt: skip
def test_events_keep_their_promises(
    manifest: Manifest, seed: int, origin: int, rate: float, hop: int, course: list[Reign], gaps: float,
    saves: float, abort: bool,
) -> None:  # fmt: skip
    frame = manifest.frame.model_copy(update={"sample_rate": rate, "hop": hop})
    manifest = manifest.model_copy(update={"frame": frame})
    told = history_of(manifest, seed, origin, course, gaps, saves, abort)
    if saves:
        assert told == history_of(manifest, seed, origin, course, gaps, 0.0, abort)
    events = [event for event, _ in told]
    stories: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        assert event.instance_id is not None
        stories[event.instance_id].append(event)
    for story in stories.values():
        assert [e.type for e in story] in (
            ["action.started", "action.ended"], ["action.started", "action.aborted"],
        )  # fmt: skip
        assert len({e.label for e in story}) == 1
    for event in events:
        assert event.start is not None
        assert origin / rate <= event.start + 1e-6
        assert event.start <= event.time
        if event.type == "action.ended":
            assert event.end is not None
            assert event.start <= event.end <= event.time
        if event.score is not None:
            assert 0 <= event.score <= 1
    times = [event.time for event in events]
    assert times == sorted(times)
    for label in manifest.classes:
        ended = [(round(e.start * rate), round(e.end * rate), reign.decoding.nms_tiou) for e, reign in told
                 if e.type == "action.ended" and e.label == label]  # fmt: skip
        for i, first in enumerate(ended):
            for second in ended[i + 1 :]:
                assert overlap(first[:2], second[:2]) <= second[2]


@pytest.mark.parametrize("chunk", [1, 20])
def test_a_chunk_longer_than_what_is_remembered_starts_nothing_twice(manifest: Manifest, chunk: int) -> None:
    """1.6 s and 0.3 s: what was emitted in a chunk had been forgotten at its end."""
    manifest = manifest.model_copy(update={"chunk": chunk})
    decoding = Decoding(
        start_threshold=0.0, end_threshold=0.0, gate=0.0, confident=0.0, hold=0.0, nms_tiou=1.0,
        max_duration=0.3, min_duration=0.0,
    )  # fmt: skip
    for seed in range(20):
        events = events_of(manifest, outputs_of(seed, 200, 4.0, 0.0), decoding, abort=True)
        started = [event.instance_id for event in events if event.type == "action.started"]
        assert len(started) > 20
        assert len(set(started)) == len(started)


def test_random_outputs_do_make_events(manifest: Manifest) -> None:
    """Else the promises above would be kept by silence."""
    decoding = Decoding(start_threshold=0.2, end_threshold=0.2)
    kinds = [
        e.type
        for seed in range(5)
        for e in events_of(manifest, outputs_of(seed, 300, 1.5, 0.9), decoding, True)
    ]
    assert min(kinds.count(kind) for kind in ("action.started", "action.ended", "action.aborted")) > 3


def silence(frames: int) -> dict[str, NDArray[np.float32]]:
    """Outputs of the tiny bundle's classes a, b and c that say nothing."""
    return {
        "ongoing": np.full((frames, 3), -6, np.float32),
        "start": np.full((frames, 3), -6, np.float32),
        "start_offset": np.zeros((frames, 1), np.float32),
        "end": np.full((frames, 3), -6, np.float32),
        "end_offsets": np.ones((frames, 2), np.float32),
    }


def seen(events: list[Event]) -> list[tuple[str, float | None, float | None]]:
    return [(event.type.removeprefix("action."), event.start, event.end) for event in events]


def test_missing_frames_are_no_evidence_that_an_action_is_over(manifest: Manifest) -> None:
    """What the network says of them is the same whatever came before."""
    outputs = silence(160)
    outputs["ongoing"][30:100, 1] = 6
    outputs["ongoing"][50:70, 1] = -4
    there = np.ones(160, bool)
    assert len(events_of(manifest, outputs, Decoding(usual=(4.0, 4.0, 4.0)), False)) == 4
    there[50:70] = False
    found = seen(events_of(manifest, outputs, Decoding(usual=(4.0, 4.0, 4.0)), False, mask=there))
    assert found == [("started", 2.4, None), ("ended", 2.4, 8.0)]


def test_an_end_before_the_class_fades_is_none_however_long_nothing_was_open(manifest: Manifest) -> None:
    for idle in (0, 60, 400):
        outputs = silence(idle + 120)
        outputs["ongoing"][idle : idle + 80, 1] = 1
        outputs["end"][idle + 40, 1] = 6  # said in the middle, of a stretch that began eight frames ago
        outputs["end_offsets"][idle + 40] = (0.0, np.log(8))
        found = seen(events_of(manifest, outputs, Decoding(usual=(2.0, 2.0, 2.0)), False))
        start, end = idle * 0.08, (idle + 80) * 0.08
        assert [kind for kind, *_ in found] == ["started", "ended"], (idle, found)
        assert found[1][1:] == (pytest.approx(start), pytest.approx(end)), (idle, found)


def test_a_doubt_ends_a_short_class_and_not_a_long_one(manifest: Manifest) -> None:
    outputs = silence(300)
    outputs["ongoing"][30:150, 1:] = 6
    outputs["ongoing"][80:95, 1:] = -6  # 1.2 s
    outputs["start"][31, 2] = 6
    outputs["start_offset"][31] = np.log(np.expm1(2.0))
    decoding = Decoding(usual=(5.0, 2.0, 60.0), start_threshold=0.1)
    events = events_of(manifest, outputs, decoding, False)
    assert [seen([e])[0][0] for e in events if e.label == "b"] == ["started", "ended"] * 2
    assert seen([e for e in events if e.label == "c"])[1:] == [("ended", 2.4, 12.0)]
    stubborn = decoding.model_copy(update={"evidence": 0.3})
    assert len([e for e in events_of(manifest, outputs, stubborn, False) if e.label == "b"]) == 2


def test_what_never_ends_is_ended_once(manifest: Manifest) -> None:
    """A class that is stuck: after `max_duration` it is not announced again before it has been over."""
    outputs = silence(1000)
    outputs["ongoing"][10:600, 0] = 3
    outputs["ongoing"][700:800, 0] = 3
    decoding = Decoding(max_duration=10.0, usual=(2.0, 2.0, 2.0))
    kinds = [kind for kind, *_ in seen(events_of(manifest, outputs, decoding, False))]
    assert kinds == ["started", "ended"] * 2


@pytest.mark.parametrize("last", [50, 56, 58, 66, 75])
def test_after_one_that_never_ends_the_next_is_announced(manifest: Manifest, last: int) -> None:
    """However soon after its forced end, at 2 s, it is over."""
    outputs = silence(300)
    outputs["ongoing"][30:last, 0] = outputs["ongoing"][200:224, 0] = 6
    decoding = Decoding(max_duration=2.0, usual=(2.0, 2.0, 2.0))
    found = seen(events_of(manifest, outputs, decoding, False))
    assert [kind for kind, *_ in found] == ["started", "ended"] * 2
    assert found[2:] == [("started", 16.0, None), ("ended", 16.0, 17.92)]


@pytest.mark.parametrize("chunk", [1, 2, 4, 8])
def test_times_do_not_move_with_the_chunk(manifest: Manifest, chunk: int) -> None:
    outputs = silence(160)
    outputs["ongoing"][31:81, 2] = 2
    events = events_of(manifest.model_copy(update={"chunk": chunk}), outputs, Decoding(), False)
    assert seen(events) == [("started", 2.48, None), ("ended", 2.48, 6.48)]


@pytest.mark.parametrize("lookahead", [0, 6])
def test_a_clear_action_is_reported_once_and_soon(manifest: Manifest, lookahead: int) -> None:
    """Class b from frame 30 to 80; each head says so for ten frames afterwards, `lookahead` frames later."""
    frames = 140
    manifest = manifest.model_copy(update={"lookahead": lookahead})
    outputs = silence(frames)
    later = lookahead
    started_at, ended_at = slice(31 + later, 41 + later), slice(81 + later, 91 + later)
    outputs["ongoing"][30 + later : 80 + later, 1] = 6
    outputs["start"][started_at, 1] = outputs["end"][ended_at, 1] = 6
    # softplus(log(expm1(x))) is x: the frames since the start, and since the end.
    outputs["start_offset"][started_at, 0] = np.log(np.expm1(np.arange(31, 41) + later + 1 - 30))
    outputs["end_offsets"][ended_at, 0] = np.log(np.expm1(np.arange(81, 91) + later + 1 - 80))
    outputs["end_offsets"][ended_at, 1] = np.log(80 - 30)
    started, ended = events_of(manifest, outputs, Decoding(), False)
    wait = lookahead * 0.08
    assert (started.type, started.label, started.start) == ("action.started", "b", 2.4)
    assert started.time == pytest.approx(2.56 + wait)
    assert (ended.type, ended.start, ended.end) == ("action.ended", 2.4, 6.4)
    assert ended.time == pytest.approx(6.56 + wait)
    assert ended.score is not None
    assert ended.score > 0.9
    assert events_of(manifest, outputs, Decoding(), False) == [started, ended], "ids are the same in a replay"


def test_an_action_whose_start_was_missed_is_announced_late_and_once(manifest: Manifest) -> None:
    """Class b from frame 30 to 80; nothing says that it starts, nor that it ends."""
    outputs = silence(160)
    outputs["ongoing"][30:80, 1] = 6
    outputs["ongoing"][50:55, 1] = -6  # a doubt: less evidence than it takes to end it
    started, ended = events_of(manifest, outputs, Decoding(hold=0.5), False)
    assert (started.type, started.label, started.start) == ("action.started", "b", 2.4)
    # Usual are ten times `hold`; four times 3 % of that, at 1 - 0.3 a second, and what is left of a chunk.
    assert 2.4 + 0.6 / 0.7 <= started.time <= 2.4 + 0.6 / 0.7 + 0.16
    assert (ended.type, ended.start, ended.end) == ("action.ended", 2.4, 6.4)
    assert started.score is not None
    assert started.score <= 0.5, "half of what its course is worth"
    for logit, announced in ((-0.45, []), (-0.35, ["started", "ended"])):
        outputs["ongoing"][30:150, 1] = logit  # half of 0.389 is below the threshold, half of 0.413 is not
        found = seen(events_of(manifest, outputs, Decoding(hold=0.5), False))
        assert [kind for kind, *_ in found] == announced


@given(
    seed=st.integers(0, 1000),
    frames=st.integers(1, 60),
    begin=st.integers(0, 300),
    length=st.integers(0, 200),
)
def test_the_mean_of_the_history_is_the_mean(seed: int, frames: int, begin: int, length: int) -> None:
    values = np.round(np.random.default_rng(seed).random((frames, 2)), 4)
    history = History(30, 2, 100, 4)
    history.add(values[: frames // 2])
    history.add(values[frames // 2 :])
    low = min(max(begin // 4, frames - 30, 0), frames - 1)
    high = min(max(-(-(begin + length) // 4), low + 1), frames)
    assert history.mean(1, 100 + begin, 100 + begin + length) == pytest.approx(
        values[low:high, 1].mean(), abs=1e-9
    )


@pytest.mark.parametrize("floor", [0, 40])
def test_a_life_that_begins_where_another_of_its_epoch_ended_does_not_start_there(
    manifest: Manifest, floor: int
) -> None:
    """The other may have announced a start at its last sample, which is this one's first."""
    decoding = Decoding(start_threshold=0.1, confident=0.1, gate=0.1)
    ring = Ring(4, 2, 3, 50.0, 0.0, 0.0)
    stream = LiveStream("s", 0, 1, ring, Slot(0, 1), 0.0, floor)
    stream.ring.push(40, np.zeros((8, 3), np.float32))
    chunk = stream.ring.pop()
    assert isinstance(chunk, Chunk)
    outputs = silence(2)
    outputs["ongoing"][:] = outputs["start"][:] = 6
    outputs["start_offset"][:] = 50.0  # long before
    segments = Segments(manifest, decoding)
    events = segments.advance(stream, chunk) + segments.hear(stream, chunk, outputs)
    assert [event.start for event in events if event.type == "action.started"] == [] if floor else [0.8] * 3


HOSTILE = (None, -1, 2**70, -(2**63), 1e308, float("nan"), float("inf"), "x", b"x" * 24, [], {}, True)


def places_of(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) within a saved state."""
    for key, below in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(below, (dict, list)):
            yield from places_of(below)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**31), value=st.sampled_from(HOSTILE))
def test_a_state_that_is_none_is_refused_or_does_no_harm(manifest: Manifest, seed: int, value: Any) -> None:
    decoding, random = Decoding(start_threshold=0.0, end_threshold=0.0, gate=0.0), np.random.default_rng(seed)
    tracker, outputs = Tracker(manifest, "s", 0, 0, decoding), outputs_of(seed % 7, 60, 4.0, 0.8)

    def hear(hearing: Tracker, first: int, last: int) -> Iterator[Event]:
        for start in range(first, last, 2):
            cut = {name: values[start : start + 2] for name, values in outputs.items()}
            yield from hearing.update(cut, np.ones(2, bool), start, (start + 2) * 0.08, None)

    list(hear(tracker, 0, 40))
    saved = msgpack.unpackb(msgpack.packb(tracker.save()))
    places = list(places_of(saved))
    container, key = places[random.integers(len(places))]
    container[key] = value
    try:
        restored = Tracker.restored(saved, manifest, "s", 0, decoding)
    except MISFITS:
        return
    for event in (*hear(restored, 40, 60), *restored.finish(4.8, None)):
        event.to_json()
