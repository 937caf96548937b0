"""The measures against the official evaluator's numbers, a plain slow reference, and their own laws."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import metrics
from trainer.annotations import Annotations, read_annotations, unique_segments
from trainer.metrics import Instances

GOLDEN = Path(__file__).parents[1] / "golden"
TIOUS = (0.3, 0.5, 0.7)
Row = tuple[int, int, float, float, float]


def table(rows: list[Row]) -> Instances:
    """Rows of (recording, label, start, end, score)."""
    columns = list(zip(*rows, strict=True)) or [()] * 5
    return Instances(
        np.array(columns[0], dtype=np.int64),
        np.array(columns[1], dtype=np.int64),
        *(np.array(column, dtype=np.float64) for column in columns[2:]),
    )


def truth_table(annotations: Annotations, subset: str) -> tuple[dict[str, int], Instances]:
    recordings = annotations.subset(subset)
    rows = [
        (number, annotations.classes.index(segment.label), segment.start, segment.end, 1.0)
        for number, recording in enumerate(recordings)
        for segment in unique_segments(recording.segments)
    ]
    return {recording.name: number for number, recording in enumerate(recordings)}, table(rows)


# ---------------------------------------------------------------------------------------------------- golden


@pytest.mark.parametrize("case", ["thumos", "anet", "ego4d"])
def test_agrees_with_the_official_evaluator(case: str) -> None:
    document = json.loads((GOLDEN / "map.json").read_text())
    expected, said = document["expected"][case], document["predictions"]
    annotations = read_annotations(GOLDEN / "map_gt.json")
    names, truth = truth_table(annotations, "test")
    assert annotations.classes == tuple(f"c{number}" for number in range(6))  # so ids are indices
    detections = Instances(
        np.array([names[name] for name in said["video_id"]]),
        np.array(said["label"]),
        *(np.array(said[key]) for key in ("t_start", "t_end", "score")),
    )
    ap = metrics.average_precision(truth, detections, expected["tiou"])
    recall = metrics.recall_at_kx(truth, detections, expected["tiou"])
    np.testing.assert_allclose(ap.mean, expected["mAP"], rtol=0, atol=1e-12)
    assert ap.mean.mean() == pytest.approx(expected["average_mAP"], abs=1e-12)
    np.testing.assert_allclose(recall, expected["recall_at_1x_5x"], rtol=0, atol=1e-12)


def test_thumos14_of_the_released_actionformer(tmp_path: Path) -> None:
    folder = GOLDEN / "thumos14_actionformer"
    expected = json.loads((folder / "expected.json").read_text())
    (tmp_path / "truth.json").write_bytes(gzip.decompress((folder / "ground_truth.json.gz").read_bytes()))
    begin = time.perf_counter()
    names, truth = truth_table(read_annotations(tmp_path / "truth.json"), expected["split"])
    said = np.load(folder / "predictions.npz", allow_pickle=False)
    recording = np.array([names[name] for name in said["video_ids"]])[said["video_index"]]
    columns = (said[key].astype(np.float64) for key in ("t_start", "t_end", "score"))
    detections = Instances(recording, said["label"].astype(np.int64), *columns)
    ap = metrics.average_precision(truth, detections, expected["tiou_thresholds"])
    recall = metrics.recall_at_kx(truth, detections, expected["tiou_thresholds"])
    seconds = time.perf_counter() - begin

    assert (len(truth), len(detections)) == (expected["n_gt_after_dedup"], expected["n_predictions"])
    np.testing.assert_allclose(ap.mean, expected["mAP"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(recall, expected["recall_at_k"], rtol=0, atol=1e-9)
    for column, label in enumerate(ap.classes):
        np.testing.assert_allclose(ap.ap[:, column], expected["AP_per_class"][str(label)], rtol=0, atol=1e-9)
    assert (100 * ap.mean).round(2).tolist() == [82.13, 77.80, 70.95, 59.40, 43.88]
    assert seconds < 5  # 0.1 s when this was written


# ------------------------------------------------------------------------------------- a plain slow reference


def slow_tiou(a: Row, b: Row) -> float:
    shared = max(0.0, min(a[3], b[3]) - max(a[2], b[2]))
    union = (a[3] - a[2]) + (b[3] - b[2]) - shared
    return shared / union if union > 0 else 0.0


def slow_area(hits: list[bool], positives: int) -> float:
    """The area under max precision at recall r or beyond, instance by instance."""
    curve, right = [], 0
    for rank, hit in enumerate(hits, start=1):
        right += hit
        curve.append((right, right / rank))
    reached = range(1, right + 1)
    return sum(max(p for n, p in curve if n >= wanted) for wanted in reached) / positives


def slow_ap(truth: list[Row], detections: list[Row], quality: Any, threshold: float) -> dict[int, float]:
    result = {}
    for label in sorted({row[1] for row in truth}):
        goal = [row for row in truth if row[1] == label]
        free = [True] * len(goal)
        ranked = sorted((row for row in detections if row[1] == label), key=lambda row: -row[4])
        hits = []
        for row in ranked:
            options = [
                (quality(row, other), place)
                for place, other in enumerate(goal)
                if free[place] and other[0] == row[0] and quality(row, other) >= threshold
            ]
            if options:
                free[max(options)[1]] = False
            hits.append(bool(options))
        result[label] = slow_area(hits, len(goal))
    return result


def slow_recall(truth: list[Row], detections: list[Row], threshold: float, multiple: int) -> float:
    rates = []
    for label in sorted({row[1] for row in truth}):
        goal = [row for row in truth if row[1] == label]
        found = 0
        for name in {row[0] for row in goal}:
            here = [row for row in goal if row[0] == name]
            said = sorted((row for row in detections if row[:2] == (name, label)), key=lambda row: -row[4])
            top = said[: multiple * len(here)]
            found += sum(any(slow_tiou(row, other) >= threshold for row in top) for other in here)
        rates.append(found / len(goal))
    return sum(rates) / len(rates)


@st.composite
def scenes(draw: st.DrawFn) -> tuple[list[Row], list[Row]]:
    """Some truth, and detections near and far from it, with distinct scores; times on a coarse grid."""
    span = st.tuples(st.integers(0, 30), st.integers(1, 12)).map(lambda x: (x[0] / 2, (x[0] + x[1]) / 2))
    place = st.tuples(st.integers(0, 2), st.integers(0, 2), span)
    truth = [(r, c, s, e, 1.0) for r, c, (s, e) in draw(st.lists(place, min_size=1, max_size=14))]
    said = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), span), max_size=25))
    scores = draw(st.permutations(range(len(said))))
    detections = [(r, c, s, e, score / 32) for (r, c, (s, e)), score in zip(said, scores, strict=True)]
    return truth, detections


@settings(deadline=None, max_examples=300)
@given(scenes())
def test_agrees_with_the_slow_reference(scene: tuple[list[Row], list[Row]]) -> None:
    truth, detections = scene
    ap = metrics.average_precision(table(truth), table(detections), TIOUS)
    recall = metrics.recall_at_kx(table(truth), table(detections), TIOUS)
    for row, threshold in enumerate(TIOUS):
        slow = slow_ap(truth, detections, slow_tiou, threshold)
        assert dict(zip(ap.classes.tolist(), ap.ap[row], strict=True)) == pytest.approx(slow, abs=1e-12)
        for column, multiple in enumerate((1, 5)):
            expected = slow_recall(truth, detections, threshold, multiple)
            assert recall[row, column] == pytest.approx(expected, abs=1e-12)
    offsets = (0.5, 1.0, 3.0)
    points = metrics.start_average_precision(table(truth), table(detections), offsets)
    for row, offset in enumerate(offsets):
        slow = slow_ap(truth, detections, lambda a, b: -abs(a[2] - b[2]), -offset)
        assert dict(zip(points.classes.tolist(), points.ap[row], strict=True)) == pytest.approx(
            slow, abs=1e-12
        )


# ------------------------------------------------------------------------------------------------------- laws


@settings(deadline=None, max_examples=150)
@given(scenes(), st.randoms(use_true_random=False))
def test_laws_of_average_precision(scene: tuple[list[Row], list[Row]], random: Any) -> None:
    truth, detections = scene
    ap = metrics.average_precision(table(truth), table(detections), TIOUS)
    assert ((ap.ap >= 0) & (ap.ap <= 1)).all()
    assert (np.diff(metrics.recall_at_kx(table(truth), table(detections), TIOUS), axis=0) <= 1e-12).all()

    shuffled = random.sample(detections, len(detections))
    names = random.sample(range(5), 5)  # recordings by other numbers, and in another order
    renamed = [(names[row[0]], *row[1:]) for row in shuffled]
    again = metrics.average_precision(table([(names[r[0]], *r[1:]) for r in truth]), table(renamed), TIOUS)
    np.testing.assert_allclose(again.ap, ap.ap, rtol=0, atol=1e-12)

    squeezed = [(*row[:4], row[4] ** 3 - 7) for row in detections]  # only the order of the scores counts
    np.testing.assert_array_equal(metrics.average_precision(table(truth), table(squeezed), TIOUS).ap, ap.ap)

    worst = min((row[4] for row in detections), default=0.0) - 1
    noisy = [*detections, *((9, row[1], row[2], row[3], worst) for row in truth)]  # false, and ranked last
    np.testing.assert_array_equal(metrics.average_precision(table(truth), table(noisy), TIOUS).ap, ap.ap)


@settings(deadline=None, max_examples=100)
@given(scenes())
def test_perfect_predictions_score_one(scene: tuple[list[Row], list[Row]]) -> None:
    truth = table(scene[0])
    assert (metrics.average_precision(truth, truth, (0.3, 1.0)).ap == 1).all()
    assert metrics.recall_at_kx(truth, truth, (0.3, 1.0)) == pytest.approx(np.ones((2, 2)))
    assert (metrics.start_average_precision(truth, truth, (0.0, 1.0)).ap == 1).all()
    f1 = metrics.f1_at(truth, truth)
    assert (f1.f1, f1.precision, f1.recall) == (1, 1, 1)


@settings(deadline=None, max_examples=100)
@given(scenes())
def test_matching_is_one_to_one_within_recording_and_class(scene: tuple[list[Row], list[Row]]) -> None:
    truth, detections = scene
    rows = metrics.match_segments(table(truth), table(detections), 0.5)
    matched = [(place, row) for place, row in enumerate(rows.tolist()) if row >= 0]
    assert len({row for _, row in matched}) == len(matched)
    for place, row in matched:
        assert detections[place][:2] == truth[row][:2]
        assert slow_tiou(detections[place], truth[row]) >= 0.5
    f1 = metrics.f1_at(table(truth), table(detections))
    assert f1.true_positives == len(matched)
    assert f1.true_positives + f1.false_positives == len(detections)
    assert f1.true_positives + f1.false_negatives == len(truth)


def test_nothing_detected_and_nothing_true() -> None:
    some, none = table([(0, 0, 1.0, 2.0, 0.5)]), table([])
    assert metrics.average_precision(some, none, TIOUS).mean.tolist() == [0, 0, 0]
    assert metrics.average_precision(none, some, TIOUS).mean.tolist() == [0, 0, 0]
    assert metrics.recall_at_kx(some, none, TIOUS).tolist() == [[0, 0]] * 3
    assert metrics.recall_at_kx(none, some, TIOUS).tolist() == [[0, 0]] * 3
    assert metrics.f1_at(none, none).f1 == 0
    assert metrics.match_starts(some, none, np.zeros(0), 1.0).tolist() == []
    assert metrics.match_starts(none, some, np.zeros(1), 1.0).tolist() == [-1]


def test_of_equal_scores_the_later_row_goes_first() -> None:
    truth = table([(0, 0, 0.0, 10.0, 1.0)])
    exact, loose = (0, 0, 0.0, 10.0, 0.5), (0, 0, 0.0, 6.0, 0.5)
    assert metrics.match_segments(truth, table([exact, loose]), 0.5).tolist() == [-1, 0]
    assert metrics.match_segments(truth, table([loose, exact]), 0.5).tolist() == [-1, 0]


def test_a_detection_takes_the_best_free_truth() -> None:
    truth = table([(0, 0, 0.0, 10.0, 1.0), (0, 0, 2.0, 12.0, 1.0)])
    detections = table([(0, 0, 1.8, 12.0, 0.9), (0, 0, 1.9, 12.0, 0.8), (0, 0, 2.0, 12.0, 0.7)])
    assert metrics.match_segments(truth, detections, 0.5).tolist() == [1, 0, -1]


def test_many_detections_of_one_group_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    start = rng.uniform(0, 100, 400)
    said = Instances(
        np.zeros(400, np.int64),
        np.zeros(400, np.int64),
        start,
        start + rng.uniform(1, 9, 400),
        rng.random(400),
    )
    truth = Instances(
        *(column[:50] for column in (said.recording, said.label, said.start, said.end, said.score))
    )
    whole = metrics.match_segments(truth, said, 0.3)
    monkeypatch.setattr(metrics, "_BLOCK", 64)
    np.testing.assert_array_equal(metrics.match_segments(truth, said, 0.3), whole)


# ----------------------------------------------------------------------------------------- starts and frames


def test_starts_are_matched_in_the_order_of_emission() -> None:
    truth = table([(0, 0, 10.0, 20.0, 1.0), (0, 0, 30.0, 40.0, 1.0), (0, 1, 10.0, 20.0, 1.0)])
    rows: list[tuple[Row, float]] = [
        ((0, 0, 9.2, 9.2, 1.0), 9.1),  # a little early
        ((0, 0, 14.0, 14.0, 1.0), 15.0),  # the same action again
        ((0, 0, 29.5, 29.5, 1.0), 31.0),
        ((0, 0, 50.0, 50.0, 1.0), 51.0),  # nothing is going on
        ((0, 1, 15.0, 15.0, 1.0), 19.0),  # late, but it was going on
        ((1, 1, 15.0, 15.0, 1.0), 19.0),  # another recording
    ]
    starts, emitted = table([row for row, _ in rows]), np.array([time for _, time in rows])
    assert metrics.match_starts(truth, starts, emitted, 1.0).tolist() == [0, -1, 1, -1, 2, -1]
    assert metrics.match_starts(truth, starts, emitted, 0.5).tolist() == [-1, 0, 1, -1, 2, -1]
    order = np.array([3, 1, 5, 0, 4, 2])
    shuffled = table([rows[place][0] for place in order])
    assert metrics.match_starts(truth, shuffled, emitted[order], 1.0).tolist() == [-1, -1, -1, 0, 2, 1]


def test_frame_average_precision_by_hand() -> None:
    truth = np.array([[1, 0], [0, 0], [1, 0], [0, 0]], dtype=bool)
    scores = np.array([[0.9, 1], [0.8, 1], [0.7, 1], [0.1, 1]])
    ap = metrics.frame_average_precision(truth, scores)
    assert ap[0] == pytest.approx((1 + 2 / 3) / 2)
    assert np.isnan(ap[1])
    assert metrics.frame_average_precision(truth, np.zeros((4, 2)))[0] == pytest.approx(0.5)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=1, max_size=40), st.randoms())
def test_frame_average_precision_against_a_plain_sum(frames: list[tuple[bool, int]], random: Any) -> None:
    positives = sum(hit for hit, _ in frames)
    expected, before = 0.0, 0.0
    for level in sorted({score for _, score in frames}, reverse=True):
        above = [hit for hit, score in frames if score >= level]
        recall = sum(above) / positives if positives else 0.0
        expected += (recall - before) * sum(above) / len(above)
        before = recall
    random.shuffle(frames)
    ap = metrics.frame_average_precision(
        np.array([[hit] for hit, _ in frames]), np.array([[score] for _, score in frames], dtype=np.float32)
    )
    assert np.isnan(ap[0]) if not positives else ap[0] == pytest.approx(expected, abs=1e-12)
