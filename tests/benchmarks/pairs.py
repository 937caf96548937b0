"""Pairs that are timed in turn, so that a machine that drifts hits both."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """A line of the table: medians in milliseconds, and that of the pairwise ratios ms / against_ms."""

    what: str
    ms: float
    against: str
    against_ms: float
    ratio: float

    @property
    def line(self) -> str:
        return f"| {self.what} | {self.ms} | {self.against} | {self.against_ms} | {self.ratio} |"


def paired(what: str, first: Work, against: str, second: Work, rounds: int) -> Row:
    """Time `first` and `second` in turn, after one call of each that is not counted."""
    times = np.empty((rounds, 2))
    for function in (first, second):
        function()
    for row in times:
        for column, function in enumerate((first, second)):
            begin = time.perf_counter()
            function()
            row[column] = 1000 * (time.perf_counter() - begin)
    ms, against_ms = np.median(times, axis=0).round(3).tolist()
    return Row(what, ms, against, against_ms, round(float(np.median(times[:, 0] / times[:, 1])), 2))
