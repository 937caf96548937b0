"""The invariants of events, whatever the network says."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine import Decoding, Manifest, read_bundle
from stream.events import Event
from stream.history import History
from stream.nms import overlap
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


decodings = st.builds(
    Decoding,
    start_threshold=st.sampled_from([0.0, 0.01, 0.2, 0.6]),
    end_threshold=st.sampled_from([0.0, 0.01, 0.2, 0.6]),
    gate=st.sampled_from([0.0, 0.05, 0.2]),
    confident=st.sampled_from([0.1, 0.3, 0.9]),
    hold=st.sampled_from([0.0, 0.3, 1.0]),
    nms_tiou=st.sampled_from([0.0, 0.1, 0.5]),
    min_duration=st.sampled_from([0.0, 0.5]),
    max_duration=st.sampled_from([2.0, 20.0]),
)


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    return read_bundle(tiny_bundle)[0]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31), spread=st.sampled_from([0.5, 1.5, 4.0]),
    calm=st.sampled_from([0.0, 0.8, 0.98]), decoding=decodings,
    abort=st.booleans(), origin=st.sampled_from([0, 12345]), lookahead=st.sampled_from([0, 7]),
)  # fmt: skip
def test_events_keep_their_promises(
    manifest: Manifest, seed: int, spread: float, calm: float, decoding: Decoding, abort: bool, origin: int,
    lookahead: int,
) -> None:  # fmt: skip
    manifest = manifest.model_copy(update={"lookahead": lookahead})
    events = events_of(manifest, outputs_of(seed, 200, spread, calm), decoding, abort, origin)
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
        assert origin / 50 <= event.start <= event.time + 1e-9
        if event.type == "action.ended":
            assert event.end is not None
            assert event.start <= event.end <= event.time + 1e-9
        if event.score is not None:
            assert 0 <= event.score <= 1
    times = [event.time for event in events]
    assert times == sorted(times)
    for label in manifest.classes:
        ended = [(round(e.start * 50), round(e.end * 50)) for e in events
                 if e.type == "action.ended" and e.label == label]  # fmt: skip
        for i, first in enumerate(ended):
            for second in ended[i + 1 :]:
                assert overlap(first, second) <= decoding.nms_tiou + 1e-9


def test_random_outputs_do_make_events(manifest: Manifest) -> None:
    """Else the promises above would be kept by silence."""
    decoding = Decoding(start_threshold=0.2, end_threshold=0.2)
    kinds = [
        e.type
        for seed in range(5)
        for e in events_of(manifest, outputs_of(seed, 300, 1.5, 0.9), decoding, True)
    ]
    assert min(kinds.count(kind) for kind in ("action.started", "action.ended", "action.aborted")) > 3


@pytest.mark.parametrize("lookahead", [0, 6])
def test_a_clear_action_is_reported_once_and_soon(manifest: Manifest, lookahead: int) -> None:
    """Class b from frame 30 to 80; each head says so for ten frames afterwards, `lookahead` frames later."""
    frames = 140
    manifest = manifest.model_copy(update={"lookahead": lookahead})
    outputs = {
        "ongoing": np.full((frames, 3), -6, np.float32),
        "start": np.full((frames, 3), -6, np.float32),
        "start_offset": np.zeros((frames, 1), np.float32),
        "end": np.full((frames, 3), -6, np.float32),
        "end_offsets": np.ones((frames, 2), np.float32),
    }
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
    outputs = {
        "ongoing": np.full((160, 3), -6, np.float32),
        "start": np.full((160, 3), -6, np.float32),
        "start_offset": np.zeros((160, 1), np.float32),
        "end": np.full((160, 3), -6, np.float32),
        "end_offsets": np.ones((160, 2), np.float32),
    }
    outputs["ongoing"][30:80, 1] = 6
    outputs["ongoing"][50:55, 1] = -6  # a doubt: less evidence than it takes to end it
    started, ended = events_of(manifest, outputs, Decoding(hold=0.5), False)
    assert (started.type, started.label, started.start) == ("action.started", "b", 2.4)
    # Usual are ten times `hold`; four times 3 % of that, at 1 - 0.3 a second, and what is left of a chunk.
    assert 2.4 + 0.6 / 0.7 <= started.time <= 2.4 + 0.6 / 0.7 + 0.16
    assert (ended.type, ended.start, ended.end) == ("action.ended", 2.4, 6.4)
    assert started.score is not None
    assert started.score <= 0.5, "half of what its course is worth"
    outputs["ongoing"][30:80, 1] = -0.7  # going on, but hardly: half of that is below the threshold
    assert events_of(manifest, outputs, Decoding(hold=0.5), False) == []


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
