"""Non-maximum suppression of temporal segments: number for number ActionFormer's official one, numpy alone.

Suppression is greedy: of what is left, the highest score is kept, and what overlaps it decays or goes. That
is one step after another within a class, but classes know nothing of each other. So many candidates advance
in rounds, one selection of every class at a time, as rows of a padded matrix. For few, where calls would cost
more than arithmetic, the factors of all pairs come first. Nothing is followed that can no longer become one
of the best `max_segments`.

Scores are probabilities, not negative; segments are (start, end), start <= end, in any one unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Method = Literal["soft", "linear", "hard", "none"]

_Number = TypeVar("_Number", bound=np.generic)
_Spans = Sequence[Floats]  # starts, ends and lengths
_Decay = Callable[[Floats], object]  # turns overlaps into factors of the scores, in place
Exponential = Callable[[Floats, Floats], object]  # of the first into the second, as `numpy.exp`

_EPSILON = np.float32(1e-6)  # what the reference adds to lengths; for votes it does not, nor does this
_LEAST = np.finfo(np.float32).smallest_subnormal  # of floors: so what was selected goes out by a score of 0
_BLOCK = 2**16  # pairs worked on at once, so that they stay in the caches
_UNLIKE = 32  # classes whose sizes differ by more do not share a matrix, which would be mostly padding


def suppress(
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
    voting_threshold: float = 0.0,
    exponential: Exponential = np.exp,
) -> tuple[Floats, Floats, Ints]:
    """The segments [M, 2] that stay of [N, 2], their scores [M], descending, and their labels [M].

    soft: a score decays by exp(-iou^2 / sigma) with every kept segment that overlaps; linear: by 1 - iou,
    from `iou_threshold` on. What falls below `min_score`, or to 0, is dropped, except the best of a class.
    hard: of what scores above `min_score`, what overlaps a kept segment by `iou_threshold` or more is
    dropped. none: everything stays, as it came. `per_class`: only segments of one label suppress each other.

    Of equal scores the lower label goes first if `per_class`, then the earlier row. If not `per_class`, a
    positive `voting_threshold` replaces each kept segment by the mean of all N that overlap it that much,
    weighted by given score times overlap; one without any weight, NaN in the reference, stays what it is.
    `exponential`: another than numpy's, whose last bits depend on the processor.
    """
    if method == "none":
        return segments, scores, labels
    least = np.float32(min_score)
    floor = max(least, _LEAST)
    enough = scores > least if method == "hard" else scores >= floor
    classes = labels if per_class else np.zeros_like(labels)
    rows = np.flatnonzero(enough)
    rows = rows[np.argsort(classes[rows], kind="stable")]
    chosen, kept_scores = _select(
        segments[rows],
        scores[rows],
        classes[rows],
        _decay(method, iou_threshold, sigma, exponential),
        floor,
        max_segments,
    )
    chosen = rows[chosen]
    if method != "hard" and len(rows) < len(scores):
        rest = _best_of_others(scores, classes, rows)
        chosen = np.concatenate([chosen, rest])[:max_segments]
        kept_scores = np.concatenate([kept_scores, scores[rest]])[:max_segments]
    kept = segments[chosen]
    if not per_class and voting_threshold > 0 and len(kept):
        kept = vote(kept, segments, scores, voting_threshold)
    return kept, kept_scores, labels[chosen]


def factors(
    segment: Floats,
    segments: Floats,
    *,
    method: Method,
    iou_threshold: float,
    sigma: float,
    exponential: Exponential = np.exp,
) -> Floats:
    """What one kept segment [2] leaves of the scores of others [N, 2], as factors [N]: see `suppress`."""
    spans = [*np.ascontiguousarray(segments.T), segments[:, 1] - segments[:, 0] + _EPSILON]
    result, spare, zeros = (np.zeros(len(segments), dtype=np.float32) for _ in range(3))
    start, end = segment
    _overlap([start, end, end - start + _EPSILON], spans, zeros, result, spare)
    _decay(method, iou_threshold, sigma, exponential)(result)
    return result


def _decay(method: Method, iou_threshold: float, sigma: float, exponential: Exponential) -> _Decay:
    threshold, width = np.array(iou_threshold, dtype=np.float32), np.array(-sigma, dtype=np.float32)

    def soft(iou: Floats) -> None:
        np.multiply(iou, iou, out=iou)
        np.divide(iou, width, out=iou)
        exponential(iou, iou)

    def linear(iou: Floats) -> None:
        np.multiply(iou, iou >= threshold, out=iou)
        np.subtract(1, iou, out=iou)

    def hard(iou: Floats) -> None:
        np.less(iou, threshold, out=iou)

    return {"soft": soft, "linear": linear, "hard": hard}[method]


def _overlap(some: _Spans, others: _Spans, zeros: Floats, out: Floats, spare: Floats) -> None:
    """IoU into `out`, rounded where the reference rounds; `some`, of last axis 1, broadcasts.

    `some` is spread over whole arrays first: numpy vectorises a minimum or maximum of two arrays only.
    """
    start, end, length = others
    out[...] = some[1]
    np.minimum(end, out, out=out)
    spare[...] = some[0]
    np.maximum(start, spare, out=spare)
    np.subtract(out, spare, out=out)
    np.maximum(out, zeros, out=out)
    spare[...] = some[2]
    np.add(spare, length, out=spare)
    np.subtract(spare, out, out=spare)
    np.divide(out, spare, out=out)


def _select(
    segments: Floats, scores: Floats, classes: Ints, decay: _Decay, floor: np.float32, limit: int
) -> tuple[Ints, Floats]:
    """Rows of the at most `limit` selections, best first, and their scores by then, none below `floor`.

    The rows come sorted by class.
    """
    number = len(scores)
    if not number:
        return np.zeros(0, dtype=np.int64), scores
    start, end = np.ascontiguousarray(segments.T)
    spans = (start, end, end - start + _EPSILON)
    edges = np.concatenate([[0], np.flatnonzero(classes[1:] != classes[:-1]) + 1, [number]])
    sizes = edges[1:] - edges[:-1]
    largest = int(sizes.max())
    if _few(number, largest, limit):
        return _one_by_one(spans, scores, classes, decay, floor, limit)
    chosen, values = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
    index = np.repeat(np.arange(len(sizes)), sizes)
    while largest:
        smaller = largest // _UNLIKE
        alike = (sizes > smaller) & (sizes <= largest)
        rows = np.flatnonzero(alike[index] & (scores >= floor))
        if len(rows):
            some = [span[rows] for span in spans]
            counts = np.bincount(index[rows])
            counts = counts[counts > 0]
            if _few(len(rows), int(counts.max()), limit):
                more, decayed = _one_by_one(some, scores[rows], index[rows], decay, floor, limit)
            else:
                more, decayed = _in_rounds(some, scores[rows], counts, decay, floor, limit)
            chosen, values = np.concatenate([chosen, rows[more]]), np.concatenate([values, decayed])
            if len(values) >= limit:
                floor = np.partition(values, -limit)[-limit]  # what lies below is not among the best
        largest = int(sizes[sizes <= smaller].max(initial=0))
    order = np.lexsort((classes[chosen], -values))[:limit]
    return chosen[order], values[order]


def _few(number: int, largest: int, limit: int) -> bool:
    """Do all pairs of this number, of which one class has the `largest`, cost less than going in rounds?"""
    # A pair takes a nanosecond or two, a round some microseconds; and the pairs should not take much memory.
    return number**2 <= 4096 * min(largest, limit, 1024)


def _one_by_one(
    spans: _Spans, scores: Floats, classes: Ints, decay: _Decay, floor: np.float32, limit: int
) -> tuple[Ints, Floats]:
    """The best `limit` selections, by the factors of all pairs, [N, N]."""
    number = len(scores)
    factors = np.empty((number, number), dtype=np.float32)
    step = max(1, _BLOCK // number)
    spare, zeros = np.empty_like(factors[:step]), np.zeros(number, dtype=np.float32)
    for begin in range(0, number, step):
        block = slice(begin, begin + step)
        some = factors[block]
        _overlap([span[block, None] for span in spans], spans, zeros, some, spare[: len(some)])
        decay(some)
        if classes[0] != classes[-1]:
            some[classes[block, None] != classes] = 1
    chosen: list[int] = []
    values: list[float] = []
    while len(chosen) < limit:
        best = int(scores.argmax())
        value = scores.item(best)
        if value < floor:
            break
        chosen.append(best)
        values.append(value)
        np.multiply(scores, factors[best], out=scores)
        scores[best] = 0
    return np.array(chosen, dtype=np.int64), np.array(values, dtype=np.float32)


def _in_rounds(
    spans: _Spans, scores: Floats, counts: Ints, decay: _Decay, floor: np.float32, limit: int
) -> tuple[Ints, Floats]:
    """The best `limit` selections and some more, round after round, the selections of a class in their order.

    counts: [K], how many of the rows belong to each class, one class after another.
    """
    rows = np.arange(len(scores))
    chosen: list[Ints] = []
    values: list[Floats] = []
    found = 0
    while len(counts):
        # Classes are rows of matrices; one alone stays a vector, on which the same calls cost less.
        base: Ints | int = 0
        if len(counts) > 1:
            inside = np.arange(counts.max()) < counts[:, None]
            base = np.arange(len(counts))[:, None] * inside.shape[1]
            rows, scores = _padded(rows, inside, 0), _padded(scores, inside, 0)
            spans = [_padded(span, inside, 1) for span in spans]  # from 1 to 1, which overlaps nothing
        factors, spare, zeros = np.empty_like(scores), np.empty_like(scores), np.zeros_like(scores)
        flat, rounds = scores.reshape(-1), min(max(limit // len(counts), 4), 16)
        while np.count_nonzero(counts) * counts.max() > 0.8 * scores.size:
            for _ in range(rounds):
                best = scores.argmax(axis=-1)[..., None] + base
                chosen.append(rows.take(best))
                values.append(flat.take(best))
                _overlap([span.take(best) for span in spans], spans, zeros, factors, spare)
                decay(factors)
                np.multiply(scores, factors, out=scores)
                flat[best] = 0
            found += rounds * len(counts)
            if found >= limit:
                floor = max(floor, np.partition(np.concatenate(values, axis=None), -limit)[-limit])
            left = scores >= floor
            counts = np.atleast_1d(np.count_nonzero(left, axis=-1))
        # By now so many are gone that it pays to close the gaps.
        rows, scores, spans = rows[left], scores[left], [span[left] for span in spans]
        counts = counts[counts > 0]
    decayed = np.concatenate(values, axis=None)
    enough = decayed >= floor
    return np.concatenate(chosen, axis=None)[enough], decayed[enough]


def _padded(column: NDArray[_Number], inside: NDArray[np.bool_], fill: float) -> NDArray[_Number]:
    """The values [N] where `inside` [K, W] says, row by row, and `fill` elsewhere: [K, W]."""
    result = np.full(inside.shape, fill, dtype=column.dtype)
    result[inside] = column
    return result


def _best_of_others(scores: Floats, classes: Ints, rows: Ints) -> Ints:
    """The best row of each class of which there is none in `rows`; the best of these first."""
    others = np.flatnonzero(~np.isin(classes, classes[rows]))
    others = others[np.lexsort((-scores[others], classes[others]))]
    best = others[np.unique(classes[others], return_index=True)[1]]
    order: Ints = np.argsort(-scores[best], kind="stable")
    return best[order]


def vote(kept: Floats, segments: Floats, scores: Floats, threshold: float) -> Floats:
    """Each kept segment [M, 2] as the mean of those of [N, 2] whose IoU with it is `threshold` or more."""
    start, end = np.ascontiguousarray(segments.T)
    spans = (start, end, end - start)
    result: Floats = kept.copy()
    step = max(1, _BLOCK // len(scores))
    weights = np.empty((min(step, len(kept)), len(scores)), dtype=np.float32)
    spare, zeros = np.empty_like(weights), np.zeros_like(scores)
    for begin in range(0, len(kept), step):
        some = kept[begin : begin + step]
        iou = weights[: len(some)]
        columns = (some[:, :1], some[:, 1:], some[:, 1:] - some[:, :1])
        with np.errstate(invalid="ignore"):  # of empty segments
            _overlap(columns, spans, zeros, iou, spare[: len(some)])
        votes = np.where(iou >= threshold, iou * scores, 0)
        total = votes.sum(axis=1, keepdims=True)
        voted = total > 0
        np.divide(votes, total, out=votes, where=voted)
        np.copyto(result[begin : begin + step], votes @ segments, where=voted)
    return result
