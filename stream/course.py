"""The course of each class: has it come to go on, has it come to be over, and since when?

Page's test (E. S. Page, Continuous Inspection Schemes, Biometrika 41:100-115, 1954): the excess of a class's
probability over `GOING_ON` is summed up, and what the sum has risen since its lowest point, or fallen since
its highest, is evidence of a change whose likeliest moment is that point. A doubt of some frames leaves no
trace in it, however long an action lasts, and both are known at constant cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A class with at least this probability counts as going on. Below a half, since the focal loss that it was
# learned with makes probabilities modest.
GOING_ON = 0.3

_SAVED = ("sum", "low", "high", "low_at", "high_at", "open")


class Course:
    """The running sums of all classes. Evidence is in frames' worth of probability, times are in samples."""

    def __init__(self, classes: int, origin: int) -> None:
        # Sums of integers of 1e-4, to which probabilities are rounded: exact however long the stream runs.
        self._sum: NDArray[np.int64] = np.zeros(classes, np.int64)
        self._low, self._high = self._sum.copy(), self._sum.copy()
        self._low_at: NDArray[np.int64] = np.full(classes, origin, np.int64)
        self._high_at = self._low_at.copy()
        self._open: NDArray[np.bool_] = np.zeros(classes, np.bool_)

    def add(self, ongoing: NDArray[np.float64], heard: int) -> None:
        """The probabilities [K] of one more frame, which ends at sample `heard`."""
        self._sum += np.rint((ongoing - GOING_ON) * 1e4).astype(np.int64)
        lower, higher = self._sum <= self._low, self._sum >= self._high
        self._low[lower], self._low_at[lower] = self._sum[lower], heard
        # What goes on without an open action can be over, too; what has not come to go on cannot.
        higher |= lower & ~self._open
        self._high[higher], self._high_at[higher] = self._sum[higher], heard

    def save(self) -> dict[str, list[int]]:
        """The running sums, in plain values."""
        return {name: getattr(self, f"_{name}").astype(int).tolist() for name in _SAVED}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what was saved. Raises ValueError when that was of other classes."""
        for name in _SAVED:
            own = getattr(self, f"_{name}")
            own[:] = np.array(saved[name]).reshape(own.shape)

    @property
    def risen(self) -> NDArray[np.float64]:
        """[K], evidence that a class has come to go on."""
        return np.asarray((self._sum - self._low) / 1e4)

    @property
    def fallen(self) -> NDArray[np.float64]:
        """[K], evidence that a class is over."""
        return np.asarray((self._high - self._sum) / 1e4)

    def began(self, label: int) -> int:
        """Since when it goes on, if it does."""
        return int(self._low_at[label])

    def ended(self, label: int) -> int:
        """Since when it is over, if it is."""
        return int(self._high_at[label])

    def passed(self, evidence: NDArray[np.float64]) -> NDArray[np.bool_]:
        """[K], which classes went on without an open action, and are over by so much evidence [K]."""
        return np.asarray(~self._open & (self._high > self._low) & (self.fallen >= evidence))

    def opened(self, label: int, start: int, heard: int) -> None:
        """An action was announced: from its start on it matters whether it is over."""
        if self._high_at[label] <= start:
            self._high[label], self._high_at[label] = self._sum[label], heard
        self._open[label] = True

    def closed(self, label: int, heard: int) -> None:
        """An action has ended: from here on it matters whether another begins."""
        self._low[label], self._low_at[label] = self._sum[label], heard
        self._open[label] = False
