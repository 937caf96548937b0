"""How sure each class was of going on, over a stretch of the recent past, at constant cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


class History:
    """Running sums of the ongoing probabilities of the last `frames` frames."""

    def __init__(self, frames: int, classes: int, first_sample: int, hop: int) -> None:
        self._sums: NDArray[np.int64] = np.zeros((frames + 1, classes), np.int64)
        self._first, self._hop = first_sample, hop
        self._count = 0

    def add(self, ongoing: NDArray[np.float64]) -> None:
        """Append the probabilities [N, K] of the next frames.

        Summed as integers of 1e-4, to which they are rounded: a sum that never loses a digit however long
        the stream runs.
        """
        size = len(self._sums)
        for row in np.rint(ongoing * 1e4).astype(np.int64):
            self._sums[(self._count + 1) % size] = self._sums[self._count % size] + row
            self._count += 1

    def save(self) -> dict[str, Any]:
        """What is remembered, in plain values and bytes."""
        kept = min(self._count, len(self._sums) - 1)
        places = np.arange(self._count - kept, self._count + 1) % len(self._sums)
        rows = np.diff(self._sums[places], axis=0).astype("<u2")
        return {"count": self._count, "rows": rows.tobytes()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Remember what was saved. Raises ValueError when that was of other classes or another length."""
        rows = np.frombuffer(saved["rows"], "<u2").reshape(-1, self._sums.shape[1]).astype(np.int64)
        self._count = int(saved["count"])
        if len(rows) != min(self._count, len(self._sums) - 1):
            raise ValueError(f"a history of {len(rows)} frames, not of {len(self._sums) - 1}")
        places = np.arange(self._count - len(rows), self._count + 1) % len(self._sums)
        # Only differences of sums are ever asked for.
        self._sums[places] = np.vstack([np.zeros(self._sums.shape[1], np.int64), np.cumsum(rows, axis=0)])

    def mean(self, label: int, begin: int, end: int) -> float:
        """The mean probability of a class between two samples, as far back as is remembered.

        At least one frame counts, the one in which `begin` lies.
        """
        oldest = max(0, self._count - len(self._sums) + 1)
        low = min(max((begin - self._first) // self._hop, oldest), self._count - 1)
        high = min(max(-(-(end - self._first) // self._hop), low + 1), self._count)
        size = len(self._sums)
        total = int(self._sums[high % size, label] - self._sums[low % size, label])
        return total / (high - low) / 1e4
