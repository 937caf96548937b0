"""Moments of the detector in full context: where they stand, what each should answer, what each has said.

A moment of level l at token j stands at frame j * stride. Distances are in frames; what the network says
and is taught is in strides (ActionFormer, section 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def places(lengths: Sequence[int], strides: Sequence[int], ranges: Sequence[tuple[float, float]]) -> Tensor:
    """[sum of lengths, 4]: frame, shortest and longest distance that the level regresses, stride."""
    rows = []
    for length, stride, (low, high) in zip(lengths, strides, ranges, strict=True):
        frame = torch.arange(length, dtype=torch.float32) * stride
        rest = torch.tensor([low, high, stride], dtype=torch.float32).expand(length, 3)
        rows.append(torch.cat([frame[:, None], rest], dim=1))
    return torch.cat(rows)


def assign(
    places: Tensor, segments: Tensor, labels: Tensor, classes: int, radius: float | None
) -> tuple[Tensor, Tensor]:
    """What each moment should answer: classes [N, K] (0 or 1), distances to start and end [N, 2] in strides.

    `segments` [n, 2] in frames, `labels` [n]. A moment is positive for an action when it lies inside it
    (within `radius` strides of its centre, unless that is None) and the farther border is within its
    level's range; of several, it takes the shortest, and every class of actions as short (to a thousandth
    of a frame). Distances of a moment without an action mean nothing.
    """
    count = len(places)
    if not len(segments):
        return places.new_zeros(count, classes), places.new_zeros(count, 2)
    frame, low, high, stride = (places[:, i, None] for i in range(4))
    start, end = segments[None, :, 0], segments[None, :, 1]
    distances = torch.stack((frame - start, end - frame), dim=-1)  # [N, n, 2]
    inside = distances
    if radius is not None:
        centre = 0.5 * (start + end)
        first = torch.maximum(centre - stride * radius, start)
        last = torch.minimum(centre + stride * radius, end)
        inside = torch.stack((frame - first, last - frame), dim=-1)
    farther = distances.amax(dim=-1)
    fits = (inside.amin(dim=-1) > 0) & (farther >= low) & (farther <= high)
    duration = (end - start).expand(count, -1).masked_fill(~fits, torch.inf)
    shortest, chosen = duration.min(dim=1)
    taken = (duration <= shortest[:, None] + 1e-3) & (duration < torch.inf)
    one_hot = torch.nn.functional.one_hot(labels, classes).to(places.dtype)
    wanted = (taken.to(places.dtype) @ one_hot).clamp(0.0, 1.0)
    return wanted, distances[torch.arange(count), chosen] / stride


def decode(
    levels: Sequence[tuple[Tensor, Tensor, Tensor]],
    strides: Sequence[int],
    *,
    threshold: float,
    most: int,
    shortest: float,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Each level's (logits [T_l, K], offsets [T_l, 2], mask [T_l]) -> candidates: segments [N, 2] in frames,
    scores [N], labels [N].

    Of each level the `most` candidates above `threshold` in the order of their scores, without those that
    are not longer than `shortest` frames.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for (logits, offsets, mask), stride in zip(levels, strides, strict=True):
        score = (logits.sigmoid() * mask[:, None]).flatten()
        above = (score > threshold).nonzero(as_tuple=True)[0]
        score, order = score[above].sort(descending=True, stable=True)
        score, above = score[:most], above[order[:most]]
        moment = above // logits.shape[1]
        place = (moment * stride).to(offsets.dtype)
        reach = offsets[moment] * stride
        segment = torch.stack((place - reach[:, 0], place + reach[:, 1]), dim=1)
        long = segment[:, 1] - segment[:, 0] > shortest
        found.append((segment[long], score[long], (above % logits.shape[1])[long]))
    segments, scores, labels = (torch.cat(column).cpu().numpy() for column in zip(*found, strict=True))
    return segments.astype(np.float32), scores.astype(np.float32), labels


def to_seconds(
    segments: NDArray[np.float32], fps: float, stride: float, num_frames: float, duration: float
) -> NDArray[np.float32]:
    """Segments [N, 2] in feature frames to seconds: a vector stands at the centre of the clip it covers."""
    seconds = (segments * np.float32(stride) + np.float32(0.5 * num_frames)) / np.float32(fps)
    return np.asarray(np.clip(seconds, 0.0, duration), np.float32)
