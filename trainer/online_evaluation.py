"""What a causal detector says of each frame of a recording: by the law, what its step says of a stream."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data import FloatArray
from trainer.detector import Detector


@torch.no_grad()
def frame_scores(detector: Detector, samples: NDArray[np.float32], lookahead: int = 0) -> FloatArray:
    """How sure the detector is that each class is going on: samples [T, C] -> [T // hop, K], in [0, 1].

    With a look-ahead, a frame's answer comes so many frames later; the last frames, whose answers would come
    after the recording, have the last answer that was given.

    A frame of which a sample is not finite is missing, as in a stream.
    """
    frames = len(samples) // detector.hop
    cut = torch.from_numpy(np.ascontiguousarray(samples[: frames * detector.hop], np.float32))
    finite = torch.isfinite(cut)
    mask = finite.reshape(frames, -1).all(dim=1).float()
    outputs = detector(torch.where(finite, cut, torch.zeros_like(cut))[None], mask[None])
    said = torch.sigmoid(outputs["ongoing"])[0]
    later = torch.arange(lookahead, frames + lookahead).clamp_max(frames - 1)
    return np.asarray(said[later].numpy())
