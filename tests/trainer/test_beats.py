"""The front that sees beats: it finds them, and says the same of a faster, louder or inverted one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.beats import BeatFront
from trainer.blocks import Reach
from trainer.memory import Memory

RATE, HOP = 120.0, 24
WIDTH = 0.012  # seconds, standard deviation of a beat's bump


def pulses(times: list[float], seconds: float, noise: float = 0.0, gain: float = 1.0) -> Tensor:
    """Bumps at `times` (in seconds), as first differences [1, T, 1] in units of a usual one."""
    at = np.arange(round(seconds * RATE)) / RATE
    signal = sum(np.exp(-0.5 * ((at - time) / WIDTH) ** 2) for time in times)
    signal = signal + noise * np.random.default_rng(0).normal(size=len(at))
    return torch.from_numpy(gain * np.diff(signal, prepend=signal[0])).reshape(1, -1, 1)


def last_of(beats: BeatFront, steps: Tensor) -> tuple[Tensor, Tensor]:
    """What a whole stream's frames are told: the queue of beats and its description."""
    mask = torch.ones(1, steps.shape[1] // beats.hop, 1, dtype=steps.dtype)
    reach = Reach(Memory(), 1)
    last = beats.last(beats.found(steps, mask, reach), reach)
    return last, beats.describe(last)


def found(beats: BeatFront, steps: Tensor) -> list[float]:
    """The times of all beats found, in seconds, without the delay of finding them."""
    mask = torch.ones(1, steps.shape[1] // beats.hop, 1, dtype=steps.dtype)
    seen = beats.found(steps, mask, Reach(Memory(), 1))[0]
    ends = (torch.arange(len(seen)) + 1) * beats.hop
    times = (ends - seen[:, 1])[seen[:, 0] > 0] / beats.rate
    return [float(time) - 0.2 - 0.05 - 0.025 for time in times]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), mean=st.floats(0.45, 1.6), gain=st.floats(0.1, 30.0))
def test_beats_are_found_at_any_pace_and_gain(seed: int, mean: float, gain: float) -> None:
    rng = np.random.default_rng(seed)
    times = (1.0 + np.cumsum(mean * rng.uniform(0.7, 1.3, size=40))).tolist()
    seconds = HOP / RATE * round((times[-1] + 2.0) * RATE / HOP)
    seen = np.array(found(BeatFront(1, HOP, 8, 4, RATE), pulses(times, seconds, noise=0.02, gain=gain)))
    # What a usual beat is like is known after some seconds; until then, noise may pass for one.
    known = [time for time in times if time > times[0] + 6.0]
    seen = seen[seen > known[0] - 0.2]
    assert len(seen) == len(known)
    assert np.abs(seen - np.array(known)).max() < 0.05


def test_what_frames_are_told_does_not_depend_on_pace_or_gain() -> None:
    beats = BeatFront(1, HOP, 8, 4, RATE)
    rhythm = np.cumsum([0.8, 0.8, 0.5, 1.1] * 6)

    def told(pace: float, gain: float) -> Tensor:
        times = (1.0 + rhythm * pace).tolist()
        last, described = last_of(beats, pulses(times, 30.0, gain=gain))
        after = round((times[15] + 0.45) * RATE / HOP)
        assert float(last[0, after, :, 0].sum()) == 5
        return described[0, after]

    slow, fast, loud = told(1.0, 1.0), told(0.8, 1.0), told(1.0, 7.0)
    torch.testing.assert_close(loud, slow, rtol=1e-6, atol=1e-6)
    intervals = slice(0, 4)
    torch.testing.assert_close(fast[intervals], slow[intervals], rtol=0.0, atol=0.15)
    usual = 4 * beats.count
    assert float(fast[usual]) == pytest.approx(float(slow[usual]) + np.log(0.8), abs=0.03)


def test_how_unlike_earlier_beats_are_tells_rhythms_apart() -> None:
    beats = BeatFront(1, HOP, 8, 12, RATE)

    def unlike(intervals: list[float]) -> dict[int, float]:
        """Of intervals over all beats that are remembered, by lag."""
        times = (1.0 + np.cumsum(intervals)).tolist()
        _, described = last_of(beats, pulses(times, 24 * HOP / RATE * 5))
        after = round((times[-1] + 0.45) * RATE / HOP)
        return {lag: float(described[0, after, 4 * 12 + 2 + 4 * (lag - 1) + 1]) for lag in (1, 2, 3, 4)}

    regular, second = unlike([0.8] * 24), unlike([0.5, 1.1] * 12)
    third = unlike([0.5, 1.1, 0.8] * 8)
    none = unlike(np.random.default_rng(0).uniform(0.45, 1.15, 24).tolist())
    assert max(regular.values()) < -1.0
    assert max(second[2], second[4]) < -1.0 < 1.0 < min(second[1], second[3])
    assert third[3] < -1.0 < 0.8 < min(third[1], third[2], third[4])
    assert min(none.values()) > 0.8


def test_beats_of_long_ago_are_forgotten() -> None:
    beats = BeatFront(1, HOP, 8, 2, RATE)
    last, described = last_of(beats, pulses([1.0, 2.0, 3.0], 30.0))
    horizon = beats.horizon
    assert float(last[0, round((3.5) * RATE / HOP), :, 0].sum()) == 3
    assert not last[0, round((3.6 + horizon) * RATE / HOP) :].any()
    assert torch.isfinite(described).all()


def test_a_flat_signal_has_no_beats() -> None:
    last, described = last_of(BeatFront(1, HOP, 8, 3, RATE), torch.zeros(1, 20 * HOP, 1, dtype=torch.float64))
    assert not last[..., 0].any()
    assert torch.isfinite(described).all()
