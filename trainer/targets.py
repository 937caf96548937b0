"""Label assignment: what each frame should answer, from the segments of its recording.

Frame t covers [t, t + 1) in frames; what it may know ends at t + 1, and offsets look back from there. With a
look-ahead of L, what it is asked about ends at t + 1 - L: the frames since then are the future that it saw.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Targets:
    """Targets of one crop of N frames. Masks say where an offset is asked for."""

    ongoing: FloatArray  # [N, K]
    start: FloatArray  # [N, K]
    start_offset: FloatArray  # [N]
    start_mask: FloatArray  # [N]
    end: FloatArray  # [N, K]
    end_offsets: FloatArray  # [N, 2]: back to the start, back to the end
    end_mask: FloatArray  # [N]


def assign(
    segments: NDArray[np.float64],
    labels: NDArray[np.int64],
    frames: int,
    classes: int,
    reach: float,
    lookahead: int = 0,
) -> Targets:
    """`segments` [n, 2] in frames of the crop (they may stick out of it), `labels` [n].

    A frame is positive for a start (an end) of class c from the moment it happened, and `lookahead` frames
    have passed, until `reach` frames later. Where several apply, the offsets are those of the latest. The
    pair of an end whose start lies before the crop is not asked for: the model cannot have seen it.
    """
    ongoing = np.zeros((frames, classes), np.float32)
    start, end = np.zeros_like(ongoing), np.zeros_like(ongoing)
    start_offset, start_mask = np.zeros(frames, np.float32), np.zeros(frames, np.float32)
    end_offsets, end_mask = np.zeros((frames, 2), np.float32), np.zeros(frames, np.float32)
    now = np.arange(1, frames + 1, dtype=np.float64)
    asked = now - lookahead
    for (begin, finish), label in sorted(
        zip(segments.tolist(), labels.tolist(), strict=True), key=lambda item: item[0]
    ):
        ongoing[(asked - 0.5 >= begin) & (asked - 0.5 < finish), label] = 1.0
        recent = (asked >= begin) & (asked - begin < reach)
        start[recent, label] = 1.0
        start_offset[recent], start_mask[recent] = (now - begin)[recent], 1.0
    for (begin, finish), label in sorted(
        zip(segments.tolist(), labels.tolist(), strict=True), key=lambda item: item[0][1]
    ):
        recent = (asked >= finish) & (asked - finish < reach)
        end[recent, label] = 1.0
        end_offsets[recent] = np.stack([now - begin, now - finish], axis=1)[recent]
        end_mask[recent] = float(begin >= 0)
    return Targets(ongoing, start, start_offset, start_mask, end, end_offsets, end_mask)
