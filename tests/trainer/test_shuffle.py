"""Shuffled recordings: nothing is lost, segments stay on their samples, and classes do not merge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.errors import DataError
from trainer.shuffle import shuffled

Floats = NDArray[np.float32]
Segments = NDArray[np.float64]
Ints = NDArray[np.int64]
Recording = tuple[Floats, Segments, Ints]
seeds = st.integers(0, 2**32 - 1)


def recording(length: int, rows: Sequence[tuple[float, float, int]]) -> Recording:
    """Samples [length, 2] that say where they were, and segments of rows (start, end, label)."""
    samples = np.stack([np.arange(length), -np.arange(length)], axis=1).astype(np.float32)
    segments = np.array([row[:2] for row in rows], np.float64).reshape(-1, 2)
    return samples, segments, np.array([row[2] for row in rows], np.int64)


@st.composite
def recordings(draw: st.DrawFn) -> Recording:
    """Any segments in any order: apart, touching, overlapping, sticking out; in quarters of a sample."""
    length = draw(st.integers(1, 60))
    rows = []
    for _ in range(draw(st.integers(0, 8))):
        start = draw(st.integers(-8, 4 * length - 1))
        end = max(start, 0) + draw(st.integers(1, 60))
        rows.append((start / 4, end / 4, draw(st.integers(0, 2))))
    return recording(length, rows)


@st.composite
def chains(draw: st.DrawFn) -> Recording:
    """Segments one after another, in whole samples, with a gap after some of them."""
    rows, at = [], draw(st.integers(0, 4))
    for _ in range(draw(st.integers(1, 8))):
        end = at + draw(st.integers(1, 6))
        rows.append((at, end, draw(st.integers(0, 2))))
        at = end + draw(st.sampled_from([0, 0, 0, 1, 4]))
    return recording(at, rows)


def covered(samples: Floats, segments: Segments, labels: Ints) -> Counter[tuple[float, int, bytes]]:
    """Of each segment its length, its label and the samples nearest to it."""
    return Counter(
        (end - start, label, samples[int(start + 0.5) : int(end + 0.5)].tobytes())
        for (start, end), label in zip(segments.tolist(), labels.tolist(), strict=True)
    )


def pieces(samples: Floats) -> list[tuple[int, int]]:
    """The runs of a shuffled recording: first sample in the original and length of each, sorted."""
    runs = np.split(samples[:, 0], np.flatnonzero(np.diff(samples[:, 0]) != 1) + 1)
    return sorted((int(run[0]), len(run)) for run in runs)


def merges(segments: Segments, labels: Ints) -> int:
    """Neighbours of one class that touch."""
    return int(((segments[1:, 0] == segments[:-1, 1]) & (labels[1:] == labels[:-1])).sum())


@given(recordings(), seeds, st.integers(0, 12))
def test_nothing_is_lost_and_segments_stay_on_their_samples(whole: Recording, seed: int, least: int) -> None:
    samples, segments, labels = whole
    copies = [part.copy() for part in whole]
    mixed, moved, names = shuffled(*whole, np.random.default_rng(seed), least)
    assert [part.dtype for part in (mixed, moved, names)] == [part.dtype for part in whole]
    np.testing.assert_array_equal(np.sort(mixed[:, 0]), samples[:, 0])
    np.testing.assert_array_equal(mixed[:, 1], -mixed[:, 0])
    assert (np.diff(moved[:, 0]) >= 0).all()
    assert covered(mixed, moved, names) == covered(samples, segments.clip(0, len(samples)), labels)
    for part, copy in zip(whole, copies, strict=True):
        np.testing.assert_array_equal(part, copy)
    for part, same in zip(
        (mixed, moved, names), shuffled(*whole, np.random.default_rng(seed), least), strict=True
    ):
        np.testing.assert_array_equal(part, same)


@given(chains(), seeds)
def test_classes_merge_only_where_no_order_keeps_them_apart(whole: Recording, seed: int) -> None:
    samples, segments, labels = whole
    _, moved, names = shuffled(*whole, np.random.default_rng(seed))
    borders = np.append(np.insert(segments.ravel(), 0, 0), len(samples)).reshape(-1, 2)
    total = len(segments) + int((borders[:, 1] > borders[:, 0]).sum())
    most = int(np.bincount(labels).max())
    # The most frequent class needs a piece of something else between each two of its own.
    assert merges(moved, names) == max(0, most - (total - most) - 1)
    assert len(moved) == len(segments)


@given(chains(), seeds, st.integers(0, 6))
def test_apart_segments_stay_apart(whole: Recording, seed: int, least: int) -> None:
    _, moved, _ = shuffled(*whole, np.random.default_rng(seed), least)
    assert (moved[1:, 0] >= moved[:-1, 1]).all()


def test_it_is_cut_at_segments_and_gaps_that_are_long_enough() -> None:
    rows = [(3, 10, 0), (12, 20, 1), (20, 30, 0), (36, 40, 1), (38, 44, 2), (39, 41, 0)]
    whole = recording(46, rows)

    def cut(least: int) -> set[tuple[tuple[int, int], ...]]:
        """The pieces by every one of many orders; two that stay together by chance look like one."""
        return {tuple(pieces(shuffled(*whole, np.random.default_rng(s), least)[0])) for s in range(60)}

    # Overlapping segments are one piece, [36, 44); a short gap belongs to what is before, the first to after.
    finest = {
        1: ((0, 3), (3, 7), (10, 2), (12, 8), (20, 10), (30, 6), (36, 8), (44, 2)),
        3: ((0, 3), (3, 9), (12, 8), (20, 10), (30, 6), (36, 10)),
        4: ((0, 12), (12, 8), (20, 10), (30, 6), (36, 10)),
        7: ((0, 12), (12, 8), (20, 16), (36, 10)),
    }
    for least, expected in finest.items():
        found = cut(least)
        assert max(found, key=len) == expected
        starts = {first for first, _ in expected}
        assert {first for order in found for first, _ in order} <= starts


def test_orders_differ_and_all_of_them_come_up() -> None:
    whole = recording(30, [(0, 10, 0), (10, 20, 1), (20, 30, 2)])
    orders = Counter(tuple(shuffled(*whole, np.random.default_rng(seed))[2].tolist()) for seed in range(600))
    assert len(orders) == 6
    assert min(orders.values()) > 60


def test_without_segments_it_is_one_piece() -> None:
    samples, segments, labels = recording(9, [])
    mixed, moved, names = shuffled(samples, segments, labels, np.random.default_rng(0))
    np.testing.assert_array_equal(mixed, samples)
    assert (moved.shape, names.shape) == ((0, 2), (0,))


@pytest.mark.parametrize("row", [(20.0, 25.0), (-5.0, 0.0), (7.0, 7.0), (8.0, 3.0), (np.nan, 4.0)])
def test_a_segment_of_nothing_is_refused(row: tuple[float, float]) -> None:
    whole = recording(20, [(1, 5, 0), (*row, 1)])
    with pytest.raises(DataError, match=r"segments \[1\].*20 samples"):
        shuffled(*whole, np.random.default_rng(0))
