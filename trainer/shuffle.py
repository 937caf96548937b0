"""Recordings whose activities are cut out and joined in random order.

Where activities were recorded in a fixed order, a model can answer with the order instead of the signal.
What it loses on shuffled recordings says how much of it that was.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from engine.errors import DataError
from trainer.annotations import Recording, Segment
from trainer.data import Grid

FloatArray = NDArray[np.float32]
Segments = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def shuffled(
    samples: FloatArray, segments: Segments, labels: Ints, generator: np.random.Generator, least: int = 1
) -> tuple[FloatArray, Segments, Ints]:
    """A recording `samples` [T, C], `segments` [n, 2] in samples, `labels` [n] in random order.

    It is cut at the borders of its segments, to the nearest sample; segments that overlap stay together.
    What lies between is a piece of its own, unless it has fewer than `least` samples: then it stays with the
    piece before it, or at the recording's start with the one after. Pieces are ordered such that segments of
    one class do not come to touch, as far as that can be had; where they do, they stay two segments.

    Every sample is there once, and each segment lies on the same samples as before; it keeps its fractions of
    a sample, and so may stick out of its piece by half a sample. Parts of segments outside the recording are
    left out. Segments come back in order of their starts. Raises DataError for a segment that has no part
    inside the recording.
    """
    segments = segments.clip(0, len(samples))
    _require_inside(segments, len(samples))
    first, last = _borders(segments)
    bounds = _cuts(first, last, len(samples), least)
    pieces = np.split(samples, bounds[1:-1])
    home = np.searchsorted(bounds, first, side="right") - 1
    order = _apart(
        generator.permutation(len(pieces)), _touching(bounds, first, last, labels, len(pieces)), generator
    )
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    begins = np.empty_like(lengths)
    begins[order] = np.cumsum(lengths[order]) - lengths[order]
    moved = segments + (begins - bounds[: len(pieces)])[home][:, None]
    ranks = np.lexsort((moved[:, 1], moved[:, 0]))
    return np.concatenate([pieces[k] for k in order]), moved[ranks], labels[ranks]


def _require_inside(segments: Segments, length: int) -> None:
    """Raises DataError for a segment of no length, as one outside the recording has after clipping."""
    wrong = np.flatnonzero(~(segments[:, 1] > segments[:, 0]))
    if len(wrong):
        raise DataError(
            f"segments {wrong[:10].tolist()}: nothing of them lies inside the recording of {length} samples; "
            "expected start < end, and a part of each in the recording"
        )


def _borders(segments: Segments) -> tuple[Ints, Ints]:
    """First sample of each segment and the one after its last, [n] each; every segment has at least one."""
    # Not rint, which rounds halves to even numbers: the same segment elsewhere must have the same samples.
    first, last = np.floor(segments + 0.5).astype(np.int64).T
    short = last <= first
    first = np.where(short, np.floor(segments[:, 0]).astype(np.int64), first)
    return first, np.where(short, first + 1, last)


def _cuts(first: Ints, last: Ints, length: int, least: int) -> Ints:
    """Borders of the pieces in samples, ascending, from 0 to `length`."""
    if not len(first):
        return np.unique([0, length])
    order = np.argsort(first, kind="stable")
    reached = np.maximum.accumulate(last[order])
    apart = np.flatnonzero(first[order][1:] >= reached[:-1])
    begins = first[order][np.append(0, apart + 1)]
    ends = reached[np.append(apart, len(order) - 1)]
    long_after = np.append(begins[1:], length) - ends >= least
    if begins[0] < least:
        begins = begins[1:]
    return np.unique(np.concatenate([[0], begins, ends[long_after], [length]]))


def _touching(bounds: Ints, first: Ints, last: Ints, labels: Ints, pieces: int) -> Bools:
    """Whether piece i before j makes segments of one class touch, [pieces + 1, pieces + 1].

    The last index stands for no piece, which touches none.
    """
    classes, index = np.unique(labels, return_inverse=True)
    heads = np.zeros((pieces + 1, len(classes)), np.bool_)
    tails = np.zeros_like(heads)
    at_head, at_tail = np.isin(first, bounds), np.isin(last, bounds)
    heads[np.searchsorted(bounds, first[at_head]), index[at_head]] = True
    tails[np.searchsorted(bounds, last[at_tail]) - 1, index[at_tail]] = True
    touching: Bools = tails @ heads.T
    return touching


def _apart(order: Ints, touching: Bools, generator: np.random.Generator) -> Ints:
    """Move single pieces to random places until none touch, or no move makes it fewer."""
    nothing = len(order)
    while True:
        clashes = np.flatnonzero(touching[order[:-1], order[1:]])
        # Either piece of a clash can be what is in the way.
        for place in generator.permutation(np.union1d(clashes, clashes + 1)):
            piece, rest = order[place], np.delete(order, place)
            before, after = np.append(nothing, rest), np.append(rest, nothing)
            change = touching[before, piece].astype(int) + touching[piece, after] - touching[before, after]
            count = change + np.count_nonzero(touching[rest[:-1], rest[1:]])
            if count.min() < len(clashes):
                slots = np.flatnonzero(count == count.min())
                order = np.insert(rest, generator.choice(slots), piece)
                break
        else:
            return order


def shuffled_recording(
    recording: Recording, samples: FloatArray, grid: Grid, seed: int
) -> tuple[Recording, FloatArray]:
    """A recording with its activities in random order, and its samples [T, C]; an order for each name."""
    names = sorted({item.label for item in recording.segments})
    borders = np.array([(item.start, item.end) for item in recording.segments], np.float64).reshape(-1, 2)
    labels = np.array([names.index(item.label) for item in recording.segments], np.int64)
    generator = np.random.default_rng([seed, *recording.name.encode()])
    joined, segments, order = shuffled(samples, grid.samples(borders), labels, generator)
    found = tuple(
        Segment(grid.seconds(start), grid.seconds(end), names[label])
        for (start, end), label in zip(segments.tolist(), order.tolist(), strict=True)
    )
    return replace(recording, segments=found), joined
