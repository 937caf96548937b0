"""Online non-maximum suppression: what was emitted suppresses what comes, never the reverse."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

# Segments of a class that are remembered, however many there were.
MOST = 1024


def overlap(a: tuple[int, int], b: tuple[int, int]) -> float:
    """tIoU of two segments (start, end), in [0, 1]; 0 where both are empty."""
    shared = min(a[1], b[1]) - max(a[0], b[0])
    if shared <= 0:
        return 0.0
    return shared / (max(a[1], b[1]) - min(a[0], b[0]))


class Emitted:
    """The segments of one class that were emitted, as far back as a new one can reach (`horizon` samples).

    `MOST` of them at most, so that its size is bounded whatever the network says: of those before, an empty
    one is left, at the latest of their announced starts.
    """

    def __init__(self, horizon: int) -> None:
        self._horizon = horizon
        self._segments: deque[tuple[int, int]] = deque()
        self._starts: deque[int] = deque()

    def save(self) -> list[list[int]]:
        """What is remembered: (start, end, announced start) each."""
        return [[*segment, start] for segment, start in zip(self._segments, self._starts, strict=True)]

    def restore(self, saved: Iterable[tuple[int, int, int]]) -> None:
        """Remember what was saved."""
        for start, end, announced in saved:
            self._segments.append((start, end))
            self._starts.append(announced)

    def suppresses(self, segment: tuple[int, int], tiou: float) -> bool:
        """Does `segment` overlap an emitted one by more than `tiou`?"""
        return any(overlap(segment, other) > tiou for other in self._segments)

    def beyond(self, segment: tuple[int, int], tiou: float) -> tuple[int, int]:
        """What of `segment` lies after all that it overlaps by more than `tiou`; empty if nothing does."""
        start, end = segment
        covered = [other[1] for other in self._segments if overlap(segment, other) > tiou]
        while covered and start < end:
            start = min(max(start, *covered), end)
            covered = [other[1] for other in self._segments if overlap((start, end), other) > tiou]
        return start, end

    def add(self, announced: int, segment: tuple[int, int], now: int) -> None:
        """Remember a segment and the start under which it was announced; forget what no new one can reach."""
        self._segments.append(segment)
        self._starts.append(announced)
        while self._segments and max(self._segments[0][1], self._starts[0]) < now - self._horizon:
            self._segments.popleft()
            self._starts.popleft()
        if len(self._segments) > MOST:
            latest = max(self._starts.popleft(), self._starts.popleft())
            self._segments.popleft()
            self._segments[0] = (latest, latest)
            self._starts.appendleft(latest)

    def announced(self, start: int) -> bool:
        """Was an action announced to start at this very sample? Perhaps, before what is remembered."""
        return start in self._starts or (len(self._starts) == MOST and start <= self._starts[0])
