"""From the moments of one step to candidates: who started, who ended, how sure, and when.

Pure arithmetic on one stream's outputs; knows nothing of what was emitted before. Probabilities are
rounded to
1e-4 and times to whole samples here, before anything is decided on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SCORE_DIGITS = 4


@dataclass(frozen=True)
class Moments:
    """The decoded outputs of one chunk of N frames and K classes. Times are samples of the stream."""

    now: NDArray[np.int64]  # [N], the sample after each frame's last
    ongoing: NDArray[np.float64]  # [N, K]
    start: NDArray[np.float64]  # [N, K]
    start_at: NDArray[np.int64]  # [N]
    end: NDArray[np.float64]  # [N, K]
    end_from: NDArray[np.int64]  # [N]
    end_at: NDArray[np.int64]  # [N]


def decode(outputs: Mapping[str, NDArray[np.float32]], first_sample: int, origin: int, hop: int) -> Moments:
    """Outputs [N, ...] of the chunk that begins at `first_sample`; `origin`: the first sample of the epoch.

    Offsets look back from the end of their frame, in frames: softplus of `start_offset` to a start, softplus
    of the first of `end_offsets` to an end, exp of the second from there to its start. No time is before
    `origin` or after its frame.
    """
    frames = outputs["ongoing"].shape[0]
    now = first_sample + hop * np.arange(1, frames + 1, dtype=np.int64)

    def back(offset: NDArray[np.float64]) -> NDArray[np.int64]:
        samples = np.rint(offset * hop).clip(0, float(2**40)).astype(np.int64)
        return np.asarray((now - samples).clip(origin, now))

    start = np.logaddexp(0.0, outputs["start_offset"][:, 0].astype(np.float64))
    end, length = outputs["end_offsets"].astype(np.float64).T
    end = np.logaddexp(0.0, end)
    end_at = back(end)
    return Moments(
        now=now,
        ongoing=probability(outputs["ongoing"]),
        start=probability(outputs["start"]),
        start_at=back(start),
        end=probability(outputs["end"]),
        end_from=np.minimum(back(end + np.exp(length.clip(-4.0, 10.0))), end_at),
        end_at=end_at,
    )


def probability(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """The logistic function, rounded to `SCORE_DIGITS`."""
    return np.asarray(np.round(1.0 / (1.0 + np.exp(-logits.astype(np.float64).clip(-60, 60))), SCORE_DIGITS))
