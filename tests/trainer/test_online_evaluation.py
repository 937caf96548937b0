"""Frame scores of a recording are those that the runtime's step would give a stream."""

from __future__ import annotations

import numpy as np
import torch

from tests.tiny import random_detector
from trainer.detector import DetectorShape
from trainer.online_evaluation import frame_scores
from trainer.pyramid import PyramidShape


@torch.no_grad()
def test_frame_scores_are_those_of_the_step_with_what_is_missing_masked() -> None:
    detector = random_detector(DetectorShape(2, 3, PyramidShape(8, 2, 5, 3, chunk=2, expansion=2), hop=4))
    samples = np.random.default_rng(0).normal(size=(4 * 40 + 3, 2)).astype(np.float32)
    samples[50, 1] = np.nan
    said = frame_scores(detector, samples)
    assert said.shape == (40, 3)
    # With a look-ahead the same is said, of earlier frames.
    np.testing.assert_allclose(frame_scores(detector, samples, 3)[:37], said[3:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(frame_scores(detector, samples, 3)[37:], said[[39] * 3], rtol=1e-4, atol=1e-5)
    state = detector.zero_state(1)
    for chunk in range(20):
        piece = torch.from_numpy(np.nan_to_num(samples[8 * chunk : 8 * chunk + 8]))[None]
        mask = torch.tensor([[float(2 * chunk + frame != 12) for frame in range(2)]])
        outputs, state = detector.step(piece, mask, state)
        expected = torch.sigmoid(outputs["ongoing"])[0].numpy()
        np.testing.assert_allclose(said[2 * chunk : 2 * chunk + 2], expected, rtol=1e-4, atol=1e-5)
