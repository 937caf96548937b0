"""OnsetNMS, from a step's moments to segments: the specification, and its NumPy oracle.

The kernel (`engine/nms/`), the TensorRT plugins around it and this module are one function. Each stream, a
row of the batch, is worked on by itself, in IEEE single precision: every operation rounded, none fused, in
the order in which it stands here. So all agree to the last bit, on whatever processor.

In, for B streams, N moments, K classes and R remembered segments; float16 counts as what it widens to:

    scores   [B, N, K]     float32 or float16
    offsets  [B, N, 2]     of the same type
    memory   [B, 1 + 3 R]  float32: the `age` of the stream before this chunk, in samples; then R times
                           (start, end, class + 1), empty where class + 1 is 0. Zeros are a new stream.

Out, with M = `max_segments`; the places from `number` on hold segment (0, 0), score 0, label -1:

    segments [B, M, 2] float32, scores [B, M] float32, labels [B, M] int32, number [B] int32
    memory   [B, 1 + 3 R] float32, for the next step

1. There are two forms. Online, `hop` > 0: the moments are a chunk of N frames of `hop` samples, scores are
   logits x, offsets look back from the end of their frame, and times are whole samples from the chunk's end
   on. Offline, `hop` = 0: scores are probabilities and offsets (start, end) in any unit, taken as they are.
2. Online, the probability is rint(10^4 sigmoid(x)) / 10^4, but 0 unless x > -10. Rounded, as in
   `stream.decoder`, so that the last bits of x decide nothing. With e = exp(-min(|x|, 60)), sigmoid(x) is
   1 / (1 + e) for x >= 0, else e / (1 + e).
3. A pair of moment and class is a candidate if max(`score_threshold`, `min_score`) <= score < infinity and
   score > 0. Of more than `top_k` the best stay; of equal ones the lower class, then the earlier moment.
4. Online, offsets (a, b) become end = back(y), start = min(back(y + exp(clip(b, -4, 10))), end), where
   y = max(a, 0) + log1p(exp(-|a|)), back(y) = max(now - min(rint(y hop), 2^24), -age'), now = (n + 1 - N) hop
   for the moment n, age' = min(age + N hop, 2^24): no time is before the stream. If an offset is not finite,
   or end - start is not, or is below `min_length`, this is no candidate after all.
5. Each remembered segment of the candidate's class, moved by -N hop, does to the score what step 6 says of a
   kept one, in the memory's order: what was emitted suppresses what comes, never the reverse.
6. In each class, again and again, the best score that is at least `min_score` and above 0 is kept, of equal
   ones the earlier moment; and all others that it overlaps are multiplied, if `method` is

     soft   by exp(-((iou iou) / sigma)) (Bodla et al. 2017, equation 3, with ActionFormer's tIoU)
     hard   by 0 where iou >= `iou_threshold`

   with length = (end - start) + 1e-6, inter = min(end, end') - max(start, start') where that is above 0,
   iou = inter / ((length + length') - inter).
7. Given out are the first M of what all classes kept: the best score, then the lower class, then the one kept
   earlier, first.
8. The next memory: age'; then, as far as R goes, what was given out in its order, and what was remembered,
   moved, in its order, without what began more than 2^24 samples ago.

exp(x), for x <= 88, below -87 that of -87: n = rint(x log2(e)), r = (x - n H) - n L with H + L = ln 2, and
2^n times Taylor's polynomial of degree 7 in r, by Horner's rule. log1p(y) = (2 s) P(s s), s = y / (2 + y),
P(z) = 1 + z/3 + z^2/5 + ... + z^7/15, by Horner's rule.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from engine.errors import EngineError
from engine.schema import Strict
from engine.suppression import factors, suppress

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

MAX_HOP, LARGEST_TIME = 2**16, 2**24  # samples
ONE, FARTHEST, LARGEST = np.float32(1), np.float32(LARGEST_TIME), np.finfo(np.float32).max
_LOG2_E = np.float32(1.44269504)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_TAYLOR = [ONE / np.float32(factorial) for factorial in (5040, 720, 120, 24, 6, 2, 1, 1)]
_ODD = [ONE / np.float32(odd) for odd in range(15, 0, -2)]

FAR = np.float32(1e4)  # below any logit that says something

Bounded = Annotated[int, Field(ge=1, le=2**16)]


class NmsSettings(Strict):
    """What an `OnsetNMS` node is told."""

    hop: int = Field(ge=0, le=MAX_HOP, description="samples of one moment; 0: the offline form")
    score_threshold: float = Field(0.1, ge=0, le=1, description="a candidate scores at least this")
    min_score: float = Field(0.001, ge=0, le=1, description="suppressed to below this, it is dropped")
    min_length: float = Field(
        0.0, ge=0, le=LARGEST_TIME, description="shorter segments are no candidates; samples"
    )
    method: Literal["soft", "hard"] = Field("soft", description="what overlap does: lower a score, or remove")
    iou_threshold: float = Field(0.1, ge=1e-6, le=1, description="hard: overlap from which on it removes")
    sigma: float = Field(0.5, ge=1e-3, le=1e3, description="soft: the larger, the less it lowers scores")
    top_k: Bounded = Field(512, description="candidates at most, over all classes")
    max_segments: Bounded = Field(64, description="segments at most that a step gives out")

    def attributes(self) -> dict[str, int | float]:
        """As a node has them, each of which it needs: `soft`, 1 or 0, stands for `method`."""
        values = self.model_dump()
        return values | {"soft": int(values.pop("method") == "soft")}


class Kept(NamedTuple):
    """What one step gives out: see the module."""

    segments: Floats  # [B, M, 2]
    scores: Floats  # [B, M]
    labels: Ints  # [B, M]
    number: Ints  # [B]
    memory: Floats  # [B, 1 + 3 R]


def keep(
    scores: NDArray[np.floating], offsets: NDArray[np.floating], memory: Floats, settings: NmsSettings
) -> Kept:
    """Scores [B, N, K], offsets [B, N, 2] and memory [B, 1 + 3 R] through the steps of the module's text.

    Raises EngineError when the shapes do not fit or the chunk is too long.
    """
    batch, moments = scores.shape[:2] if scores.ndim == 3 else (-1, -1)
    remembered, rest = divmod(memory.shape[-1] - 1, 3)
    fits = offsets.shape == (batch, moments, 2) and memory.shape == (batch, 1 + 3 * remembered) and not rest
    if not fits or 0 in scores.shape[1:] or moments * settings.hop > FARTHEST:
        raise EngineError(
            f"scores {list(scores.shape)}, offsets {list(offsets.shape)} and memory {list(memory.shape)} "
            f"do not fit, expected [B, N, K], [B, N, 2] and [B, 1 + 3 R], with N * {settings.hop} up to 2^24"
        )
    most = settings.max_segments
    out = Kept(
        np.zeros((batch, most, 2), np.float32),
        np.zeros((batch, most), np.float32),
        np.full((batch, most), -1, np.int32),
        np.zeros(batch, np.int32),
        np.zeros_like(memory),
    )
    for row in range(batch):
        values, spans = scores[row].astype(np.float32), offsets[row].astype(np.float32)
        now, known = memory[row, 0] + np.float32(moments * settings.hop), memory[row, 1:].reshape(-1, 3)
        age = now if now < FARTHEST else FARTHEST
        known = known[known[:, 2] >= 1] - np.array([moments * settings.hop] * 2 + [0], np.float32)
        segments, kept, labels = _row(values, spans, known, age, settings)
        out.number[row] = len(kept)
        for column, found in ((out.segments, segments), (out.scores, kept), (out.labels, labels)):
            column[row, : len(kept)] = found
        emitted = np.column_stack([segments, labels.astype(np.float32) + ONE])
        after = np.concatenate([emitted, known[known[:, 0] >= -FARTHEST]])[:remembered]
        out.memory[row, 0] = age
        out.memory[row, 1 : 1 + after.size] = after.reshape(-1)
    return out


def _row(
    scores: Floats, offsets: Floats, known: Floats, age: np.float32, settings: NmsSettings
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Steps 2 to 7 for one stream, of which the segments `known` [R, 3] were emitted."""
    moments = len(scores)
    if settings.hop:
        scores = probability(scores)
    flat = scores.T.reshape(-1)  # class by class, moment after moment: the order of equal scores
    least = np.float32(settings.min_score)
    enough = np.maximum(np.float32(settings.score_threshold), least)
    index = np.flatnonzero((flat >= enough) & (flat > 0) & (flat <= LARGEST))
    if len(index) > settings.top_k:
        index = np.sort(index[np.argsort(-flat[index], kind="stable")[: settings.top_k]])
    index = index[np.isfinite(offsets[index % moments]).all(axis=1)]
    segments = offsets[index % moments]
    if settings.hop:
        segments = _look_back(segments, index % moments + 1 - moments, age, settings.hop)
    with np.errstate(over="ignore"):
        lengths = segments[:, 1] - segments[:, 0]
    fits = (lengths >= np.float32(settings.min_length)) & (lengths <= LARGEST)
    index, segments = index[fits], segments[fits]
    values, labels = flat[index], index // moments
    for start, end, number in known:
        same = np.flatnonzero(labels + 1 == number)
        values[same] *= factors(
            np.array([start, end]),
            segments[same],
            method=settings.method,
            iou_threshold=settings.iou_threshold,
            sigma=settings.sigma,
            exponential=exponential,
        )
    stays = (values >= least) & (values > 0)
    return suppress(
        segments[stays],
        values[stays],
        labels[stays],
        method=settings.method,
        iou_threshold=settings.iou_threshold,
        sigma=settings.sigma,
        min_score=settings.min_score if settings.method == "soft" else 0.0,
        max_segments=settings.max_segments,
        exponential=exponential,
    )


def _look_back(offsets: Floats, frame: NDArray[np.int64], age: np.float32, hop: int) -> Floats:
    """Segments [n, 2] of offsets [n, 2], of moments that end `frame` [n] frames after the chunk's end."""
    now, step = (frame * hop).astype(np.float32), np.float32(hop)

    def back(offset: Floats) -> Floats:
        with np.errstate(over="ignore"):
            samples = np.minimum(np.rint(offset * step), FARTHEST)
        return np.asarray(np.maximum(now - samples, -age))

    a, b = offsets.T
    ended = np.maximum(a, np.float32(0)) + _log1p(_exp(-np.abs(a)))
    end = back(ended)
    start = back(ended + _exp(b.clip(np.float32(-4), np.float32(10))))
    return np.column_stack([np.minimum(start, end), end])


def logits_there(logits: Floats, mask: NDArray[np.bool_]) -> Floats:
    """Logits [B, N, K], those of missing frames (`mask` [B, N] is False) so low that none is a candidate."""
    return np.asarray(logits + (FAR * (mask.astype(np.float32) - ONE))[..., None])


def probability(logits: Floats) -> Floats:
    """Step 2."""
    e = _exp(-np.minimum(np.abs(logits), np.float32(60)))
    sigmoid = np.where(logits >= 0, ONE, e) / (ONE + e)
    steps = np.float32(10_000)
    return np.asarray(np.where(logits > -10, np.rint(sigmoid * steps) / steps, np.float32(0)))


def exponential(x: Floats, out: Floats) -> None:
    """The module's exp(x), for x <= 88, into `out`, which may be `x`."""
    bounded = np.where(x > -87, x, np.float32(-87))
    n = np.rint(bounded * _LOG2_E)
    r = (bounded - n * _LN2_HIGH) - n * _LN2_LOW
    value = np.full_like(r, _TAYLOR[0])
    for coefficient in _TAYLOR[1:]:
        value = value * r + coefficient
    np.multiply(value, ((n.astype(np.int32) + 127) << 23).view(np.float32), out=out)


def _exp(x: Floats) -> Floats:
    result = np.empty_like(x)
    exponential(x, result)
    return result


def _log1p(y: Floats) -> Floats:
    """log(1 + y) for y in [0, 1]."""
    s = y / (np.float32(2) + y)
    z, value = s * s, np.full_like(y, _ODD[0])
    for coefficient in _ODD[1:]:
        value = value * z + coefficient
    return np.asarray(np.float32(2) * s * value)
