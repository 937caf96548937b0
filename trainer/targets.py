"""Label assignment: what each frame should answer, from the segments of its recording.

Frame t covers [t, t + 1) in frames; what it may know ends at t + 1, and offsets look back from there.
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
    segments: NDArray[np.float64], labels: NDArray[np.int64], frames: int, classes: int, reach: float
) -> Targets:
    """`segments` [n, 2] in frames of the crop (they may stick out of it), `labels` [n].

    A frame is positive for a start (an end) of class c from the moment it happened until `reach` frames
    later. Where several apply, the offsets are those of the latest. The pair of an end whose start lies
    before the crop is not asked for: the model cannot have seen it.
    """
    ongoing = np.zeros((frames, classes), np.float32)
    start, end = np.zeros_like(ongoing), np.zeros_like(ongoing)
    start_offset, start_mask = np.zeros(frames, np.float32), np.zeros(frames, np.float32)
    end_offsets, end_mask = np.zeros((frames, 2), np.float32), np.zeros(frames, np.float32)
    now = np.arange(1, frames + 1, dtype=np.float64)
    for (begin, finish), label in sorted(
        zip(segments.tolist(), labels.tolist(), strict=True), key=lambda item: item[0]
    ):
        ongoing[(now - 0.5 >= begin) & (now - 0.5 < finish), label] = 1.0
        since = now - begin
        recent = (since >= 0) & (since < reach)
        start[recent, label] = 1.0
        start_offset[recent], start_mask[recent] = since[recent], 1.0
    for (begin, finish), label in sorted(
        zip(segments.tolist(), labels.tolist(), strict=True), key=lambda item: item[0][1]
    ):
        since = now - finish
        recent = (since >= 0) & (since < reach)
        end[recent, label] = 1.0
        end_offsets[recent] = np.stack([now[recent] - begin, since[recent]], axis=1)
        end_mask[recent] = float(begin >= 0)
    return Targets(ongoing, start, start_offset, start_mask, end, end_offsets, end_mask)
