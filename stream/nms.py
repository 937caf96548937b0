"""Online non-maximum suppression: what was emitted suppresses what comes, never the reverse."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from stream.ring import sample_of

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

    `MOST` of them at most, so that its size is bounded whatever the network says. Of those that were
    forgotten a border is left, behind which nothing is emitted again: what is kept decides how much may be
    said, never whether a promise holds.
    """

    def __init__(self, horizon: int, said: int = -1) -> None:
        """`said`: starts up to this sample may have been announced by somebody else before."""
        self._horizon = horizon
        self._segments: deque[tuple[int, int]] = deque()
        self._starts: deque[int] = deque()
        self._said = said  # up to here starts may have been announced that are forgotten
        self._covered = -1  # and up to here segments may reach

    def save(self) -> list[list[int]]:
        """The border (starts, ends), then what is remembered: (start, end, announced start) each."""
        rows = [[*segment, start] for segment, start in zip(self._segments, self._starts, strict=True)]
        return [[self._said, self._covered], *rows]

    def restore(self, saved: Iterable[Sequence[int]]) -> None:
        """Remember what was saved."""
        for row in saved:
            if len(row) == 2:
                self._said, self._covered = map(sample_of, row)
                continue
            start, end, announced = map(sample_of, row)
            self._segments.append((start, end))
            self._starts.append(announced)

    @property
    def reach(self) -> int:
        """The latest end of all that was emitted; -1 for nothing."""
        return max([self._covered, *(end for _, end in self._segments)])

    def suppresses(self, segment: tuple[int, int], tiou: float) -> bool:
        """Does `segment` overlap an emitted one by more than `tiou`? Perhaps, before the border."""
        return segment[0] < self._covered or any(overlap(segment, other) > tiou for other in self._segments)

    def beyond(self, segment: tuple[int, int], tiou: float) -> tuple[int, int]:
        """What of `segment` lies after all that it overlaps by more than `tiou`; empty if nothing does."""
        start, end = segment
        start = min(max(start, self._covered), end)
        covered = [other[1] for other in self._segments if overlap((start, end), other) > tiou]
        while covered and start < end:
            start = min(max(start, *covered), end)
            covered = [other[1] for other in self._segments if overlap((start, end), other) > tiou]
        return start, end

    def add(self, announced: int, segment: tuple[int, int], now: int) -> None:
        """Remember a segment and the start under which it was announced; forget what no new one can reach."""
        self._segments.append(segment)
        self._starts.append(announced)
        while self._segments and (
            len(self._segments) > MOST or max(self._segments[0][1], self._starts[0]) < now - self._horizon
        ):
            self._said = max(self._said, self._starts.popleft())
            self._covered = max(self._covered, self._segments.popleft()[1])

    def announced(self, start: int) -> bool:
        """Was an action announced to start at this very sample? Perhaps, before the border."""
        return start <= self._said or start in self._starts
