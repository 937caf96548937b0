"""Online non-maximum suppression: what was emitted suppresses what comes, never the reverse."""

from __future__ import annotations

from collections import deque


def overlap(a: tuple[int, int], b: tuple[int, int]) -> float:
    """tIoU of two segments (start, end), in [0, 1]; 0 where both are empty."""
    shared = min(a[1], b[1]) - max(a[0], b[0])
    if shared <= 0:
        return 0.0
    return shared / (max(a[1], b[1]) - min(a[0], b[0]))


class Emitted:
    """The segments of one class that were emitted, as far back as a new one can reach (`horizon` samples)."""

    def __init__(self, horizon: int) -> None:
        self._horizon = horizon
        self._segments: deque[tuple[int, int]] = deque()

    def suppresses(self, segment: tuple[int, int], tiou: float) -> bool:
        """Does `segment` overlap an emitted one by more than `tiou`?"""
        return any(overlap(segment, other) > tiou for other in self._segments)

    def add(self, segment: tuple[int, int]) -> None:
        """Remember an emitted segment and forget what no new one can reach."""
        self._segments.append(segment)
        while self._segments and self._segments[0][1] < segment[1] - self._horizon:
            self._segments.popleft()

    def began(self, start: int) -> bool:
        """Did an emitted segment begin at this very sample?"""
        return any(begin == start for begin, _ in self._segments)
