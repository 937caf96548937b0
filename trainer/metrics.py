"""The field's measures on plain arrays: AP over tIoU and over start offsets, recall, frame AP, F1, delays.

Knows nothing of files, subsets or class names: recordings and classes are integers here, times are seconds.
`trainer.scoring` puts names on both ends.

Every matching is greedy in the order of descending scores, one truth for one detection, within one recording
and one class. Of equal scores the later row goes first, and of equal qualities the later truth is taken: what
the reference evaluators do, by reversing an ascending sort, made certain by a stable one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# Qualities of this many (detection, truth) pairs are held at once: 32 MiB of float64.
_BLOCK = 4 * 1024**2


@dataclass(frozen=True, slots=True)
class Instances:
    """N segments as columns, each [N]: recording and class as integers, start and end in seconds, score.

    For truth, `score` is not read. For starts alone, `end` repeats `start`.
    """

    recording: Ints
    label: Ints
    start: Floats
    end: Floats
    score: Floats

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True, slots=True)
class AveragePrecision:
    """`ap` [thresholds, K] for the K classes that the truth holds, whose numbers are `classes` [K]."""

    classes: Ints
    ap: Floats

    @property
    def mean(self) -> Floats:
        """mAP at each threshold, [thresholds]; 0 where the truth holds nothing."""
        return self.ap.mean(axis=1) if len(self.classes) else np.zeros(len(self.ap))


@dataclass(frozen=True, slots=True)
class F1:
    """Counts at one tIoU over all classes (micro), and what follows from them; 0/0 is 0."""

    true_positives: int
    false_positives: int
    false_negatives: int

    @property
    def precision(self) -> float:
        return _ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float:
        return _ratio(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def f1(self) -> float:
        wrong = self.false_positives + self.false_negatives
        return _ratio(2 * self.true_positives, 2 * self.true_positives + wrong)


def tiou(start: Floats, end: Floats, other_start: Floats, other_end: Floats) -> Floats:
    """Temporal intersection over union of segments, broadcast; 0 where both are empty."""
    shared = np.maximum(np.minimum(end, other_end) - np.maximum(start, other_start), 0.0)
    union = (other_end - other_start) + (end - start) - shared
    result: Floats = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return result


def average_precision(truth: Instances, detections: Instances, tious: Sequence[float]) -> AveragePrecision:
    """AP at each tIoU for each class of the truth, as ActivityNet's and ActionFormer's evaluators have it.

    A detection takes the truth of highest tIoU that is still free and overlaps by at least the threshold; AP
    is the area under the interpolated precision (Everingham et al., PASCAL VOC 2011). A class without
    detections has AP 0; detections of classes that the truth does not hold are not read.
    """
    return _precision_over(truth, detections, tious, _overlap)


def start_average_precision(
    truth: Instances, starts: Instances, tolerances: Sequence[float]
) -> AveragePrecision:
    """Point-level AP of action starts (Shou et al., Online Detection of Action Start, ECCV 2018, section 5).

    A predicted start takes the nearest free true start of its class and recording at most `tolerance` seconds
    away, in the order of descending scores; AP is interpolated as in `average_precision`. The papers' p-mAP
    is `.mean` at offsets of 1 to 10 seconds.
    """
    return _precision_over(truth, starts, [-tolerance for tolerance in tolerances], _nearness)


def recall_at_kx(
    truth: Instances, detections: Instances, tious: Sequence[float], multiples: Sequence[int] = (1, 5)
) -> Floats:
    """Recall@kx (Grauman et al., Ego4D, moment queries), mean over the truth's classes: [tious, multiples].

    Of a recording's detections of a class, the k * n of highest score count, n being the number of true
    instances there. A truth is recalled when any of them overlaps it enough: one may recall several.
    """
    classes = np.unique(truth.label)
    recalled = np.zeros((len(tious), len(multiples)))
    if not len(classes):
        return recalled
    pairs = _pairs(truth, detections, _overlap, min(tious))
    place = _place_in_group(detections)[pairs.detection]
    keys, group_of_truth = np.unique(_keys(truth, truth), return_inverse=True)
    size = np.bincount(group_of_truth, minlength=len(keys))[group_of_truth][pairs.truth]
    share = 1.0 / np.bincount(np.searchsorted(classes, truth.label))  # of one instance in its class's recall
    for row, threshold in enumerate(tious):
        for column, multiple in enumerate(multiples):
            found = np.unique(pairs.truth[(pairs.quality >= threshold) & (place < multiple * size)])
            recalled[row, column] = share[np.searchsorted(classes, truth.label[found])].sum() / len(classes)
    return recalled


def frame_average_precision(truth: NDArray[np.bool_], scores: NDArray[np.floating]) -> Floats:
    """AP of per-frame scores for each class, [K]; NaN for a class that occurs in no frame.

    truth, scores: [T, K], the frames of all recordings one after another. AP = sum over the distinct scores,
    descending, of precision times gain in recall: frames of equal score are ranked together, so that the
    result does not depend on their order. The measure of online action detection (De Geest et al., 2016).
    """
    result = np.full(truth.shape[1], np.nan)
    for label in range(truth.shape[1]):
        positives = int(truth[:, label].sum())
        if not positives:
            continue
        order = np.argsort(-scores[:, label], kind="stable")
        ranked = scores[order, label]
        last = np.append(ranked[1:] != ranked[:-1], True)  # the last frame of each run of equal scores
        hits = np.cumsum(truth[order, label])[last]
        precision = hits / (np.flatnonzero(last) + 1)
        result[label] = float(np.sum(np.diff(hits, prepend=0) * precision) / positives)
    return result


def f1_at(truth: Instances, detections: Instances, threshold: float = 0.5) -> F1:
    """F1 at one tIoU of everything that was detected, whatever its score: the events as a consumer gets them.

    Unlike in AP, a detection of a class that the truth does not hold is a false positive.
    """
    hits = int((match_segments(truth, detections, threshold) >= 0).sum())
    return F1(hits, len(detections) - hits, len(truth) - hits)


def match_segments(truth: Instances, detections: Instances, threshold: float) -> Ints:
    """For each detection the row of the truth it is matched to at tIoU >= threshold, or -1: [N]."""
    return _match(_pairs(truth, detections, _overlap, threshold), len(detections), len(truth), threshold)


def match_starts(truth: Instances, starts: Instances, emitted: Floats, tolerance: float) -> Ints:
    """For each announced start the row of the truth that it announces, or -1: [N].

    In the order of emission, a start takes, of its recording and class, the free truth whose start is nearest
    to the announced one, among those that were going on, give or take `tolerance` seconds, at any time
    between the announced start and the emission. What is announced a second time stays without truth.
    """
    result = np.full(len(starts), -1, dtype=np.int64)
    taken = np.zeros(len(truth), dtype=np.bool_)
    for theirs, mine in _groups(truth, starts):
        for row in mine[np.lexsort((starts.start[mine], emitted[mine]))]:
            going_on = (truth.start[theirs] <= emitted[row] + tolerance) & (
                truth.end[theirs] >= starts.start[row] - tolerance
            )
            near = theirs[going_on & ~taken[theirs]]
            if len(near):
                chosen = near[np.argmin(np.abs(truth.start[near] - starts.start[row]))]
                taken[chosen] = True
                result[row] = chosen
    return result


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Candidate matches in the order in which the greedy matching considers them, each [M]."""

    detection: Ints
    truth: Ints
    quality: Floats


Quality = Callable[[Instances, Ints, Instances, Ints], Floats]


def _overlap(detections: Instances, mine: Ints, truth: Instances, theirs: Ints) -> Floats:
    return tiou(
        detections.start[mine, None], detections.end[mine, None], truth.start[theirs], truth.end[theirs]
    )


def _nearness(starts: Instances, mine: Ints, truth: Instances, theirs: Ints) -> Floats:
    return -np.abs(starts.start[mine, None] - truth.start[theirs])


def _precision_over(
    truth: Instances, detections: Instances, thresholds: Sequence[float], quality: Quality
) -> AveragePrecision:
    classes = np.unique(truth.label)
    ap = np.zeros((len(thresholds), len(classes)))
    if not len(classes) or not len(detections) or not len(thresholds):
        return AveragePrecision(classes, ap)
    pairs = _pairs(truth, detections, quality, min(thresholds))
    order = _by_score(detections)
    order = order[np.argsort(detections.label[order], kind="stable")]
    first = np.searchsorted(detections.label[order], classes, side="left")
    last = np.searchsorted(detections.label[order], classes, side="right")
    positives = np.bincount(np.searchsorted(classes, truth.label))
    for row, threshold in enumerate(thresholds):
        hit = _match(pairs, len(detections), len(truth), threshold)[order] >= 0
        for column, (begin, end) in enumerate(zip(first, last, strict=True)):
            ap[row, column] = _interpolated(hit[begin:end], int(positives[column]))
    return AveragePrecision(classes, ap)


def _interpolated(hit: NDArray[np.bool_], positives: int) -> float:
    """The area under the interpolated precision of ranked hits [N] (VOC 2011)."""
    hits = np.cumsum(hit)
    precision = hits / np.arange(1, len(hit) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]  # the best precision at this recall or a higher
    return float(envelope[hit].sum() / positives)


def _by_score(detections: Instances) -> Ints:
    return np.argsort(detections.score, kind="stable")[::-1]


def _keys(truth: Instances, rows: Instances) -> Ints:
    """One number for a recording and class, the same in both tables."""
    return rows.label * (int(truth.recording.max(initial=0)) + 1) + rows.recording


def _groups(truth: Instances, detections: Instances) -> Iterator[tuple[Ints, Ints]]:
    """Rows of truth and of detections, ascending, for each recording and class in which there are both."""
    known = detections.recording <= truth.recording.max(initial=-1)  # others would share a number
    mine = np.flatnonzero(known)
    keys_truth, keys_mine = _keys(truth, truth), _keys(truth, detections)[mine]
    order_truth, order_mine = np.argsort(keys_truth, kind="stable"), np.argsort(keys_mine, kind="stable")
    sorted_truth, sorted_mine = keys_truth[order_truth], keys_mine[order_mine]
    common = np.intersect1d(sorted_truth, sorted_mine)
    bounds = [
        np.searchsorted(keys, common, side=side)
        for keys in (sorted_truth, sorted_mine)
        for side in ("left", "right")
    ]
    for a, b, c, d in zip(*bounds, strict=True):
        yield order_truth[a:b], mine[order_mine[c:d]]


def _pairs(truth: Instances, detections: Instances, quality: Quality, minimum: float) -> _Pairs:
    rows: list[tuple[Ints, Ints, Floats]] = []
    for theirs, mine in _groups(truth, detections):
        step = max(1, _BLOCK // len(theirs))
        for begin in range(0, len(mine), step):
            block = mine[begin : begin + step]
            values = quality(detections, block, truth, theirs)
            first, second = np.nonzero(values >= minimum)
            rows.append((block[first], theirs[second], values[first, second]))
    if not rows:
        none = np.zeros(0, dtype=np.int64)
        return _Pairs(none, none, np.zeros(0))
    detection, other, value = (np.concatenate(column) for column in zip(*rows, strict=True))
    rank = np.empty(len(detections), dtype=np.int64)
    rank[_by_score(detections)] = np.arange(len(detections))
    order = np.lexsort((-other, -value, rank[detection]))
    return _Pairs(detection[order], other[order], value[order])


def _match(pairs: _Pairs, detections: int, truths: int, threshold: float) -> Ints:
    enough = pairs.quality >= threshold
    result = [-1] * detections
    free = [True] * truths
    for mine, theirs in zip(pairs.detection[enough].tolist(), pairs.truth[enough].tolist(), strict=True):
        if free[theirs] and result[mine] < 0:
            free[theirs] = False
            result[mine] = theirs
    return np.array(result, dtype=np.int64)


def _place_in_group(detections: Instances) -> Ints:
    """Each detection's place, 0 for the highest score, among those of its recording and class: [N]."""
    order = _by_score(detections)
    keys = _keys(detections, detections)[order]
    grouped = np.argsort(keys, kind="stable")
    _, first, count = np.unique(keys[grouped], return_index=True, return_counts=True)
    place = np.empty(len(detections), dtype=np.int64)
    place[order[grouped]] = np.arange(len(detections)) - np.repeat(first, count)
    return place


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
