"""Suppression against ActionFormer's own numbers, a plain loop in its words, and its laws."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine import suppression
from engine.suppression import Method, suppress

GOLDEN = Path(__file__).parents[1] / "golden"
CASES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "nms.json").read_text())
METHODS: tuple[Method, ...] = ("soft", "linear", "hard")
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Table = tuple[Floats, Floats, Ints]


def table(rows: Sequence[tuple[float, float, float, int]]) -> Table:
    """Rows of (start, length, score, label)."""
    start, length, score, label = np.array(rows, dtype=np.float32).reshape(-1, 4).T
    return np.stack([start, start + length], axis=1), score.copy(), label.astype(np.int64)


def candidates(seed: int, sizes: list[int], *, ties: bool = False) -> Table:
    """As many of each class as `sizes` says, shuffled; with ties, of few different places and scores."""
    rng = np.random.default_rng(seed)
    number = sum(sizes)
    start, length = rng.uniform(0, 300, number), rng.lognormal(2.5, 1.0, number)
    score = rng.beta(0.5, 3, number) * 0.999 + 0.0005
    if ties:
        start, length, score = start.round(-1), length.round(-1), score.round(1)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    segments = np.stack([start, start + length], axis=1)
    return segments.astype(np.float32), score.astype(np.float32), labels.astype(np.int64)


def overlap(segment: Floats, segments: Floats, extra: float = 1e-6) -> Floats:
    """IoU [N] of one segment [2] with others [N, 2], lengths longer by `extra`, in the precision given."""
    inter = np.minimum(segment[1], segments[:, 1]) - np.maximum(segment[0], segments[:, 0])
    inter = np.maximum(inter, 0)
    more = segments.dtype.type(extra)
    lengths = segments[:, 1] - segments[:, 0] + more
    iou: Floats = inter / ((segment[1] - segment[0] + more) + lengths - inter)
    return iou


def reference(
    segments: Floats,
    scores: Floats,
    labels: Ints,
    *,
    method: Method = "soft",
    per_class: bool = True,
    iou_threshold: float = 0.1,
    sigma: float = 0.5,
    min_score: float = 0.001,
    max_segments: int = 200,
) -> tuple[list[int], list[float]]:
    """The rows that stay and their scores, by one class after the other and one selection after the other."""
    least, threshold, width = np.float32(min_score), np.float32(iou_threshold), np.float32(sigma)
    kept: list[tuple[float, int, int]] = []
    for label in np.unique(labels) if per_class else [None]:
        left = np.flatnonzero(labels == label) if per_class else np.arange(len(labels))
        if method == "hard":
            left = left[scores[left] > least]
        now = scores[left]
        for _ in range(max_segments):
            if not len(left):
                break
            best = int(np.argmax(now))
            kept.append((-float(now[best]), len(kept), int(left[best])))
            iou = overlap(segments[left[best]], segments[left])
            if method == "soft":
                now = now * np.exp(-(iou * iou) / width)
            elif method == "linear":
                now = now * np.where(iou >= threshold, 1 - iou, np.float32(1))
            stays = iou < threshold if method == "hard" else (now >= least) & (now > 0)
            stays[best] = False
            left, now = left[stays], now[stays]
    kept = sorted(kept)[:max_segments]
    return [row for _, _, row in kept], [-score for score, _, _ in kept]


def assert_same(found: Table, expected: Table) -> None:
    """The same scores in the same order and, among equal scores in any order, the same segments."""
    assert len(found[1]) == len(expected[1])
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-5)
    same = (np.abs(found[0][:, None] - expected[0]) <= 1e-4).all(axis=2)
    same &= np.abs(found[1][:, None] - expected[1]) <= 1e-5
    same &= found[2][:, None] == expected[2]
    assert same.any(axis=0).all()
    assert same.any(axis=1).all()


rows = st.tuples(
    st.integers(0, 12),
    st.integers(0, 5),
    st.one_of(st.sampled_from([0.0, 0.0004, 0.001, 0.25, 0.5]), st.floats(0, 1, width=32)),
    st.sampled_from([-3, 0, 7]),
)
tables = st.lists(rows, max_size=40).map(table)
options = st.fixed_dictionaries(
    {
        "method": st.sampled_from(METHODS),
        "per_class": st.booleans(),
        "iou_threshold": st.sampled_from([0.1, 0.3, 0.5, 1.0]),
        "sigma": st.sampled_from([0.1, 0.5, 2.0]),
        "min_score": st.sampled_from([0.0, 0.001, 0.05, 0.4]),
        "max_segments": st.sampled_from([1, 3, 20, 200]),
    }
)


# ------------------------------------------------------------------------------------------------ agreement


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_official_suppression(case: str) -> None:
    said = CASES[case]
    with np.load(GOLDEN / "nms.npz") as arrays:
        given_, expected = (
            tuple(arrays[f"{case}_{name}{suffix}"] for name in ("segments", "scores", "labels"))
            for suffix in ("_in", "")
        )
    found = suppress(
        *given_,
        method="soft" if said["use_soft_nms"] else "hard",
        per_class=said["multiclass"],
        iou_threshold=said["iou_threshold"],
        sigma=said["sigma"],
        min_score=said["min_score"],
        max_segments=said["max_seg_num"],
        voting_threshold=said["voting_thresh"],
    )
    assert [column.dtype for column in found] == [np.float32, np.float32, np.int64]
    assert_same(found, expected)


def assert_agrees_with_the_loop(given_: Table, **said: Any) -> None:
    segments, _, labels = given_
    kept, kept_scores = reference(*given_, **said)
    found = suppress(*given_, **said)
    np.testing.assert_array_equal(found[0], segments[kept].reshape(-1, 2))
    np.testing.assert_array_equal(found[2], labels[kept])
    np.testing.assert_allclose(found[1], np.array(kept_scores, dtype=np.float32), rtol=1e-6)


@settings(max_examples=300, deadline=None)
@given(tables, options, st.booleans())
def test_agrees_with_a_plain_loop(given_: Table, said: dict[str, Any], in_rounds: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if in_rounds:  # which so few would not take
            patch.setattr(suppression, "_few", lambda *_: False)
        assert_agrees_with_the_loop(given_, **said)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("limit", [30, 200, 1000])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "sizes",
    [[200, 120, 60, 60, 30, 10, 3, 1, 1], [700, *[3] * 100], [300, 1, *[2] * 250], [1] * 500],
    ids=["uneven", "skewed", "more skewed", "singles"],
)
def test_agrees_with_a_plain_loop_on_many(sizes: list[int], method: Method, limit: int, ties: bool) -> None:
    given_ = candidates(limit, sizes, ties=ties)
    assert_agrees_with_the_loop(given_, method=method, max_segments=limit, min_score=0.01)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("number", [500, 1500])
@pytest.mark.parametrize("method", METHODS)
def test_agrees_with_a_plain_loop_on_many_of_one_kind(method: Method, number: int, ties: bool) -> None:
    given_ = candidates(number, [number // 2, number // 2], ties=ties)
    assert_agrees_with_the_loop(given_, method=method, per_class=False, max_segments=150, iou_threshold=0.4)


# ----------------------------------------------------------------------------------------------------- laws


@settings(max_examples=60, deadline=None)
@given(tables, options)
def test_scores_descend_and_never_exceed_those_given(given_: Table, said: dict[str, Any]) -> None:
    segments, scores, labels = given_
    before = [column.copy() for column in given_]
    kept, kept_scores, kept_labels = suppress(*given_, **said)
    assert len(kept) == len(kept_scores) == len(kept_labels) <= said["max_segments"]
    assert (np.diff(kept_scores) <= 0).all()
    for segment, score, label in zip(kept, kept_scores, kept_labels, strict=True):
        assert score <= scores[(segments == segment).all(axis=1) & (labels == label)].max()
    for column, copy in zip(given_, before, strict=True):
        np.testing.assert_array_equal(column, copy)


@settings(max_examples=60, deadline=None)
@given(tables, st.sampled_from([0.1, 0.3, 0.5, 0.9]), st.sampled_from([0.001, 0.2]))
def test_hard_keeps_what_no_better_one_covers(given_: Table, threshold: float, least: float) -> None:
    segments, scores, labels = given_
    kept, kept_scores, kept_labels = suppress(
        *given_, method="hard", iou_threshold=threshold, min_score=least
    )
    for place, segment in enumerate(kept):
        others = kept[(kept_labels == kept_labels[place]) & (np.arange(len(kept)) != place)]
        assert (overlap(segment, others) < np.float32(threshold)).all()
    for segment, score, label in zip(segments, scores, labels, strict=True):
        if score > np.float32(least):
            better = kept[(kept_labels == label) & (kept_scores >= score)]
            assert (better == segment).all(axis=1).any() or (
                overlap(segment, better) >= np.float32(threshold)
            ).any()


@settings(max_examples=60, deadline=None)
@given(tables, options)
def test_classes_are_suppressed_as_if_alone(given_: Table, said: dict[str, Any]) -> None:
    said = said | {"per_class": True}
    found = suppress(*given_, **said)
    segments, scores, labels = given_
    alone = [
        suppress(segments[labels == label], scores[labels == label], labels[labels == label], **said)
        for label in np.unique(labels)
    ] or [given_]
    together = [np.concatenate(column) for column in zip(*alone, strict=True)]
    order = np.argsort(-together[1], kind="stable")[: said["max_segments"]]
    for column, other in zip(found, together, strict=True):
        np.testing.assert_array_equal(column, other[order])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(METHODS), st.booleans(), st.sampled_from([5, 200]))
def test_order_of_candidates_does_not_matter(seed: int, method: Method, per_class: bool, limit: int) -> None:
    segments, scores, labels = candidates(seed, [40, 20, 5])
    order = np.random.default_rng(seed).permutation(65)
    said: dict[str, Any] = {"method": method, "per_class": per_class, "max_segments": limit}
    found = suppress(segments, scores, labels, **said)
    other = suppress(segments[order], scores[order], labels[order], **said)
    for column, again in zip(found, other, strict=True):
        np.testing.assert_array_equal(column, again)


def test_none_returns_what_was_given() -> None:
    given_ = candidates(1, [300, 20])
    for column, found in zip(given_, suppress(*given_, method="none", max_segments=3), strict=True):
        np.testing.assert_array_equal(found, column)


@pytest.mark.parametrize("method", [*METHODS, "none"])
@pytest.mark.parametrize("per_class", [False, True])
def test_nothing_of_nothing(method: Method, per_class: bool) -> None:
    found = suppress(*table([]), method=method, per_class=per_class, voting_threshold=0.5)
    assert [column.shape for column in found] == [(0, 2), (0,), (0,)]
    assert [column.dtype for column in found] == [np.float32, np.float32, np.int64]


def test_the_best_of_a_class_stays_below_the_least_score() -> None:
    given_ = table([(0, 1, 0.5, 4), (5, 1, 0.02, 4), (0, 1, 0.03, 2), (9, 1, 0.04, 2), (0, 1, 0.05, 1)])
    cases: list[tuple[Method, bool, list[tuple[int, float]]]] = [
        ("soft", True, [(4, 0.5), (1, 0.05), (2, 0.04)]),
        ("linear", True, [(4, 0.5), (1, 0.05), (2, 0.04)]),
        ("hard", True, [(4, 0.5)]),
        ("soft", False, [(4, 0.5)]),
    ]
    for method, per_class, expected in cases:
        _, scores, labels = suppress(*given_, method=method, per_class=per_class, min_score=0.1)
        assert list(zip(labels, scores, strict=True)) == [(k, np.float32(v)) for k, v in expected]
    assert suppress(*given_, min_score=0.1, max_segments=2)[2].tolist() == [4, 1]
    assert suppress(*given_, min_score=0.9, per_class=False)[1].tolist() == [0.5]


# --------------------------------------------------------------------------------------------------- voting


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(METHODS), st.sampled_from([0.3, 0.7, 0.9]))
def test_votes_average_the_voters(seed: int, method: Method, threshold: float) -> None:
    segments, scores, labels = candidates(seed, [50, 10])
    said: dict[str, Any] = {"method": method, "per_class": False, "min_score": 0.1, "iou_threshold": 0.5}
    before = suppress(segments, scores, labels, **said)
    after = suppress(segments, scores, labels, voting_threshold=threshold, **said)
    np.testing.assert_array_equal(after[1], before[1])
    np.testing.assert_array_equal(after[2], before[2])
    for segment, voted in zip(before[0], after[0], strict=True):
        iou = overlap(segment, segments, extra=0)
        voters = segments[iou >= np.float32(threshold)].astype(np.float64)
        weights = (scores * iou)[iou >= np.float32(threshold)].astype(np.float64)
        assert (voters.min(axis=0) - 1e-4 <= voted).all()
        assert (voted <= voters.max(axis=0) + 1e-4).all()
        np.testing.assert_allclose(voted, weights @ voters / weights.sum(), rtol=0, atol=3e-4)


def test_votes_are_for_all_classes_together_only() -> None:
    given_ = candidates(3, [40, 40])
    for column, other in zip(suppress(*given_, voting_threshold=0.5), suppress(*given_), strict=True):
        np.testing.assert_array_equal(column, other)


def test_without_votes_segments_stay() -> None:
    given_ = table([(3, 0, 0.5, 0), (3, 0, 0.4, 0), (8, 2, 0.3, 0), (8, 2, 0.0, 1)])
    found = suppress(*given_, per_class=False, voting_threshold=0.9, method="hard", iou_threshold=0.5)
    np.testing.assert_array_equal(found[0], [[3, 3], [3, 3], [8, 10]])
    nobody = suppress(*table([(8, 2, 0.0, 1)]), per_class=False, voting_threshold=0.9)
    np.testing.assert_array_equal(nobody[0], [[8, 10]])
