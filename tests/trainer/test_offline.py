"""In full context the blocks are ActionFormer's: the official weights give the official numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from trainer.offline import OfflineDetector, official_weights
from trainer.pyramid import PyramidShape

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@torch.no_grad()
def test_full_context_is_actionformer_number_for_number() -> None:
    golden = np.load(GOLDEN / "thumos_short.npz")
    state = torch.load(GOLDEN / "thumos_short.pth.tar", map_location="cpu", weights_only=True)[
        "state_dict_ema"
    ]
    shape = PyramidShape(width=32, heads=4, window=9, levels=6, inputs=32)
    detector = OfflineDetector(shape, 20).eval()
    detector.load_state_dict(official_weights(state))
    # The official code pads short clips to its longest sequence, and its numbers near the end show it.
    length, padded = golden["feats"].shape[1], golden["mask_0"].shape[0]
    features = torch.zeros(1, padded, 32)
    features[0, :length] = torch.from_numpy(golden["feats"]).T
    mask = torch.arange(padded)[None] < length
    for level, found in enumerate(detector(features, mask)):
        there = golden[f"mask_{level}"].astype(bool)
        np.testing.assert_array_equal(found.mask[0].numpy(), there)
        logits, offsets = golden[f"cls_logits_{level}"], golden[f"offsets_{level}"]
        if logits.shape[0] == 20:
            logits, offsets = logits.T, offsets.T
        np.testing.assert_allclose(found.cls_logits[0].numpy()[there], logits[there], rtol=0, atol=1e-4)
        np.testing.assert_allclose(found.offsets[0].numpy()[there], offsets[there], rtol=0, atol=1e-4)
