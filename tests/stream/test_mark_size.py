"""The state of a stream fits into one record, whatever came of the stream: known when the service starts."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import ConfigError, Decoding, Manifest, read_bundle
from stream import nms
from stream import ring as ring_module
from stream.config import RuntimeSettings
from stream.nms import MOST
from stream.partition import check_marks
from stream.ring import Chunk, Ring, largest_save
from stream.tracker import Tracker
from tests.stream.test_tracker import decodings, events_of, outputs_of

# Late in a long stream, where a sample's number takes as much room as it can.
LATE = 2**40


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    return read_bundle(tiny_bundle)[0]


def fed(manifest: Manifest, decoding: Decoding, seed: int, frames: int, spread: float = 4.0) -> Tracker:
    tracker = Tracker(manifest, "s", 0, LATE, decoding)
    outputs, chunk, hop = outputs_of(seed, frames, spread, 0.0), manifest.chunk, manifest.frame.hop
    for first in range(0, frames, chunk):
        now = (LATE + (first + chunk) * hop) / manifest.frame.sample_rate
        cut = {name: values[first : first + chunk] for name, values in outputs.items()}
        tracker.update(cut, np.ones(chunk, bool), first, now, None)
    return tracker


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31), decoding=decodings, spread=st.sampled_from([0.5, 4.0]),
    frames=st.sampled_from([50, 400]), lookahead=st.sampled_from([0, 7]),
)  # fmt: skip
def test_no_tracker_takes_more_than_was_said(
    manifest: Manifest, seed: int, decoding: Decoding, spread: float, frames: int, lookahead: int
) -> None:
    manifest = manifest.model_copy(update={"lookahead": lookahead})
    tracker = fed(manifest, decoding, seed, frames, spread)
    assert len(msgpack.packb(tracker.save())) <= Tracker.largest_save(manifest, decoding)


@pytest.mark.parametrize("max_duration", [240.0, 3600.0])
def test_a_tracker_that_is_full_takes_half_of_what_was_said_at_least(
    max_duration: float, manifest: Manifest
) -> None:
    # Noise that starts and ends an action at every chance.
    decoding = Decoding(
        start_threshold=0.0, end_threshold=0.0, gate=0.0, confident=0.0, hold=0.0, max_duration=max_duration
    )
    rate = manifest.frame.rate
    tracker = fed(manifest, decoding, 0, 5500)
    if max_duration > 1000:  # which is long to feed, and of which the history is most
        tracker._history.add(np.random.default_rng(0).random((round(max_duration * rate) + 1, 3)))
    saved = tracker.save()
    assert max(len(emitted) for emitted in saved["emitted"]) == 1 + MOST  # the border, and what is remembered
    bound = Tracker.largest_save(manifest, decoding)
    assert bound / 2 <= len(msgpack.packb(saved)) <= bound


def test_what_is_forgotten_is_not_announced_again(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nms, "MOST", 64)
    decoding = Decoding(
        start_threshold=0.0, end_threshold=0.0, gate=0.0, confident=0.0, hold=0.0, max_duration=3600.0
    )
    outputs = outputs_of(1, 3000, 4.0, 0.0)
    outputs["end_offsets"][::9, 1] = 12.0  # it reaches back to the beginning, over all that was forgotten
    events = events_of(manifest, outputs, decoding, abort=True)
    for kinds in (("action.started",), ("action.ended", "action.aborted")):
        told = [event.instance_id for event in events if event.type in kinds]
        assert len(told) > 3 * 64
        assert len(set(told)) == len(told)


def test_of_many_segments_the_newest_are_remembered_one_by_one_and_the_others_as_a_border(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nms, "MOST", 8)
    emitted = nms.Emitted(horizon=1000)
    for number in range(20):
        emitted.add(10 * number, (10 * number + 1, 10 * number + 9), now=200)
    restored = nms.Emitted(horizon=1000)
    restored.restore(emitted.save())
    for found in (emitted, restored):
        assert len(found.save()) == 1 + 8
        assert [start for start in range(200) if not found.announced(start)] == [
            start for start in range(111, 200) if start % 10
        ]
        assert found.suppresses((131, 139), 0.5)
        assert not found.suppresses((119, 129), 1.0)
        assert found.suppresses((118, 119), 1.0), "it may overlap what is forgotten"
        assert found.beyond((100, 120), 0.5) == (119, 120)
    emitted.add(1200, (1201, 1209), now=1200)  # and what no new one reaches
    assert emitted.save() == [[190, 199], [1201, 1209, 1200]]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31), longest=st.sampled_from([1, 20]), channels=st.sampled_from([1, 6]),
    anchors=st.sampled_from([20, 4096]),
)  # fmt: skip
def test_no_ring_takes_more_than_was_said(seed: int, longest: int, channels: int, anchors: int) -> None:
    random = np.random.default_rng(seed)
    with mock.patch.object(ring_module, "_ANCHORS", anchors):
        _fill_and_measure(random, longest, channels)


def _fill_and_measure(random: np.random.Generator, longest: int, channels: int) -> None:
    ring = Ring(4, 2, channels, 50.0, 1.0, 2.0)
    at = LATE
    for _ in range(300):
        n = int(random.integers(1, longest + 1))
        at += int(random.integers(0, 4)) - 1  # repeats, and losses
        ring.push(at, np.zeros((n, channels), np.float32), (at, float(random.random())))
        at += n
        if random.random() < 0.2:
            ring.pop()
        assert len(msgpack.packb(ring.save())) <= largest_save(ring.capacity, channels)


def test_a_ring_that_is_full_takes_half_of_what_was_said_at_least() -> None:
    for seconds in (20.0, 80.0):  # with an anchor for each sample, and for one in three
        ring = Ring(4, 2, 3, 50.0, seconds, seconds)
        for at in range(LATE, LATE + ring.capacity):
            ring.push(at, np.ones((1, 3), np.float32), (at, 1e9 + at))
        bound = largest_save(ring.capacity, 3)
        assert bound / 2 <= len(msgpack.packb(ring.save())) <= bound


def test_of_many_anchors_some_are_kept_and_tell_the_same_times() -> None:
    ring = Ring(4, 2, 1, 50.0, 600.0, 600.0)
    assert ring.capacity > 4096
    samples = np.ones((1, 1), np.float32)
    for at in np.random.default_rng(0).permutation(20_000).tolist():
        ring.push(at, samples, (at, 1e9 + at / 50.0))
    while isinstance(chunk := ring.pop(), Chunk):
        assert chunk.captured_start == pytest.approx(1e9 + chunk.first_sample / 50.0, abs=1e-6)


def test_what_may_not_fit_is_refused_with_what_to_lower(manifest: Manifest) -> None:
    run = RuntimeSettings()
    check_marks(manifest, manifest.decoding, run)
    many = manifest.model_copy(update={"classes": tuple(f"class {i}" for i in range(100))})
    hour = Decoding(max_duration=3600.0)
    check_marks(many, hour, run)
    more = many.model_copy(update={"classes": tuple(f"class {i}" for i in range(300))})
    with pytest.raises(ConfigError, match=r"300 classes.*lower `decoding.max_duration`"):
        check_marks(more, hour, run)
    wide = manifest.model_copy(update={"frame": manifest.frame.model_copy(update={"channels": 2048})})
    for changes, remedy in (
        ({"max_gap": 600.0}, "lower `max_gap`"),
        ({"reorder": 60.0, "max_gap": 60.0}, "lower `reorder`"),
    ):
        with pytest.raises(ConfigError, match=rf"2048 channels.*{remedy}"):
            check_marks(wide, manifest.decoding, RuntimeSettings.model_validate(changes))
    with pytest.raises(ConfigError, match="a smaller chunk than 1024 frames"):
        check_marks(wide.model_copy(update={"chunk": 1024}), manifest.decoding, run)
    fast = manifest.frame.model_copy(update={"channels": 256, "sample_rate": 1e6})
    with pytest.raises(ConfigError, match="lower `max_gap`"):  # and not for want of memory
        check_marks(
            manifest.model_copy(update={"frame": fast}), manifest.decoding, RuntimeSettings(max_gap=600.0)
        )
