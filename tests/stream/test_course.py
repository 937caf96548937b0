"""Page's test, against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.course import GOING_ON, Course


@given(
    seed=st.integers(0, 2**31),
    frames=st.integers(1, 80),
    opened=st.integers(0, 80),
    closed=st.integers(0, 80),
)
def test_evidence_is_what_the_sum_has_moved_since_its_turning_point(
    seed: int, frames: int, opened: int, closed: int
) -> None:
    values = np.round(np.random.default_rng(seed).random((frames, 2)), 4)
    course = Course(2, 100)
    for frame, row in enumerate(values):
        course.add(row, 104 + 4 * frame)
        if frame == opened:
            course.opened(1, 104 + 4 * frame, 104 + 4 * frame)
        if frame == closed:
            course.closed(1, 104 + 4 * frame)
    sums = np.round(np.concatenate([[0.0], np.cumsum(values[:, 1] - GOING_ON)]), 6)
    # The newest of equal turning points: the lowest since the last closing; the highest since the last
    # opening, or where nothing is open, since the last time that a lowest was reached.
    low = high = 0
    is_open = False
    for k in range(1, frames + 1):
        if sums[k] <= sums[low]:
            low = k
            high = high if is_open else k
        if sums[k] >= sums[high]:
            high = k
        if k - 1 == opened:
            high, is_open = k, True
        if k - 1 == closed:
            low, is_open = k, False
    assert course.fallen[1] == pytest.approx(sums[high] - sums[frames], abs=1e-9)
    assert course.risen[1] == pytest.approx(sums[frames] - sums[low], abs=1e-9)
    assert course.ended(1) == 100 + 4 * high
    assert course.began(1) == 100 + 4 * low


def test_a_doubt_leaves_no_trace_and_an_end_is_placed_where_it_was() -> None:
    course = Course(1, 0)
    going = [0.8] * 30 + [0.1] * 3 + [0.8] * 30 + [0.05] * 20
    worst = 0.0
    for frame, value in enumerate(going):
        course.add(np.array([value]), frame + 1)
        if frame < 63:
            worst = max(worst, float(course.fallen[0]))
    assert worst == pytest.approx(3 * (GOING_ON - 0.1))
    assert course.fallen[0] == pytest.approx(20 * (GOING_ON - 0.05))
    assert (course.began(0), course.ended(0)) == (0, 63)
