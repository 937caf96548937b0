"""What a causal detector says of each frame of a recording: by the law, what its step says of a stream."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data import FloatArray
from trainer.detector import Detector


@torch.no_grad()
def frame_scores(detector: Detector, samples: NDArray[np.float32]) -> FloatArray:
    """How sure the detector is that each class is going on: samples [T, C] -> [T // hop, K], in [0, 1].

    A frame of which a sample is not finite is missing, as in a stream.
    """
    frames = len(samples) // detector.hop
    cut = torch.from_numpy(np.ascontiguousarray(samples[: frames * detector.hop], np.float32))
    finite = torch.isfinite(cut)
    mask = finite.reshape(frames, -1).all(dim=1).float()
    outputs = detector(torch.where(finite, cut, torch.zeros_like(cut))[None], mask[None])
    return np.asarray(torch.sigmoid(outputs["ongoing"])[0].numpy())
