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

    Offsets look back from the end of their frame; no time is earlier than `origin` or later than its frame.
    """
    frames = outputs["ongoing"].shape[0]
    now = first_sample + hop * np.arange(1, frames + 1, dtype=np.int64)

    def back(offset: NDArray[np.float32]) -> NDArray[np.int64]:
        samples = np.rint(offset.astype(np.float64) * hop).clip(0, float(2**40)).astype(np.int64)
        return np.asarray((now - samples).clip(origin, now))

    end_at = back(outputs["end_offsets"][:, 1])
    return Moments(
        now=now,
        ongoing=probability(outputs["ongoing"]),
        start=probability(outputs["start"]),
        start_at=back(outputs["start_offset"][:, 0]),
        end=probability(outputs["end"]),
        end_from=np.minimum(back(outputs["end_offsets"][:, 0]), end_at),
        end_at=end_at,
    )


def probability(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """The logistic function, rounded to `SCORE_DIGITS`."""
    return np.asarray(np.round(1.0 / (1.0 + np.exp(-logits.astype(np.float64).clip(-60, 60))), SCORE_DIGITS))
