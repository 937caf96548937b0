"""In full context Onset is ActionFormer: the official weights give the official numbers.

`tests/golden` holds what the official code computed, on random weights: the cases of the project's golden
set, and some with other options, made the same way.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import DataError
from trainer import load_official

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.yaml"))


def official(name: str) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays), json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_levels_are_the_official_ones(name: str) -> None:
    golden, _ = official(name)
    detector = load_official(GOLDEN / f"{name}.yaml", GOLDEN / f"{name}.pth.tar")
    levels = detector(golden["feats"].T[None])
    assert len(levels) == sum(key.startswith("mask_") for key in golden)
    for number, level in enumerate(levels):
        np.testing.assert_array_equal(level.mask[0].numpy(), golden[f"mask_{number}"].astype(bool))
        logits, offsets = golden[f"cls_logits_{number}"], golden[f"offsets_{number}"]
        np.testing.assert_allclose(level.cls_logits[0].T.numpy(), logits, rtol=0, atol=1e-4)
        np.testing.assert_allclose(level.offsets[0].T.numpy(), offsets, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_detections_are_the_official_ones(name: str) -> None:
    golden, facts = official(name)
    detector = load_official(GOLDEN / f"{name}.yaml", GOLDEN / f"{name}.pth.tar")
    keys = ("fps", "feat_stride", "num_frames", "duration")
    found = detector.detect(golden["feats"].T, **{key: facts[key] for key in keys})
    assert len(found.scores) == len(golden["scores"])
    # The same set: equal scores may come in another order.
    free = np.ones(len(found.scores), bool)
    mine = {key: getattr(found, key).numpy() for key in ("labels", "segments", "scores")}
    for label, segment, score in zip(golden["labels"], golden["segments"], golden["scores"], strict=True):
        same = free & (mine["labels"] == label) & (np.abs(mine["segments"] - segment) < 1e-3).all(axis=1)
        (fitting,) = np.nonzero(same & (np.abs(mine["scores"] - score) < 1e-5))
        assert len(fitting), (label, segment, score)
        free[fitting[0]] = False


@pytest.mark.parametrize("name", ["thumos_short", "global_abs", "fpn_start", "conv_fpn", "wide_kernels"])
def test_clips_in_a_batch_do_not_see_each_other(name: str) -> None:
    """A batch of clips of several lengths gives each clip's own numbers, whatever lies behind its length."""
    golden, _ = official(name)
    detector = load_official(GOLDEN / f"{name}.yaml", GOLDEN / f"{name}.pth.tar")
    longest = torch.from_numpy(golden["feats"].T)
    lengths = [len(longest), len(longest) // 2, 7]
    frames = torch.full((3, *longest.shape), torch.nan)
    for row, length in zip(frames, lengths, strict=True):
        row[:length] = longest[:length]
    batch = detector(frames, lengths)
    for number, length in enumerate(lengths):
        for together, alone in zip(batch, detector(longest[None, :length]), strict=True):
            there = together.mask[number]
            assert int(there.sum()) == int(alone.mask.sum())
            for part in ("cls_logits", "offsets"):
                a, b = getattr(together, part)[number][there], getattr(alone, part)[0][alone.mask[0]]
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_short_clip_is_not_computed_at_full_length() -> None:
    detector = load_official(GOLDEN / "thumos_short.yaml", GOLDEN / "thumos_short.pth.tar")
    levels = detector.answer(torch.zeros(1, 40, 32), [40])
    assert [level.mask.shape[1] for level in levels] == [96, 48, 24, 12, 6, 3]
    assert [level.mask.shape[1] for level in detector(torch.zeros(1, 40, 32))] == [576, 288, 144, 72, 36, 18]


def test_frames_that_cannot_be_are_refused() -> None:
    detector = load_official(GOLDEN / "thumos_short.yaml", GOLDEN / "thumos_short.pth.tar")
    facts = {"fps": 30.0, "feat_stride": 4, "num_frames": 16, "duration": 10.0}
    for frames, lengths, sentence in (
        (torch.zeros(1, 32, 50), None, "transpose"),
        (torch.zeros(50, 32), None, r"expected \[B, T, 32\]"),
        (torch.zeros(1, 50, 32), [51], "from 1 to 50"),
        (torch.zeros(1, 50, 32), [0], "from 1 to 50"),
        (torch.zeros(2, 50, 32), [50], "expected 2 numbers"),
    ):
        with pytest.raises(DataError, match=sentence):
            detector(frames, lengths)
    with pytest.raises(DataError, match="NaN"):
        detector.detect(torch.full((50, 32), torch.nan), **facts)
    for name in facts:
        with pytest.raises(DataError, match=name):
            detector.detect(torch.zeros(50, 32), **{**facts, name: -1.0})
    assert len(detector.detect(np.zeros((50, 32), ">f8")[::-1], **facts).scores) >= 0


def test_what_does_not_fit_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"`classify\.out\.bias` is \(20,\), the configuration makes \(5,\)"):
        load_official(GOLDEN / "hard_nms.yaml", GOLDEN / "thumos_short.pth.tar")
    with pytest.raises(DataError, match="it lacks"):
        load_official(GOLDEN / "conv_fpn.yaml", GOLDEN / "rel_pe.pth.tar")
    state = torch.load(GOLDEN / "hard_nms.pth.tar", weights_only=True)["state_dict"]
    for key, value, sentence in (
        (7, torch.zeros(1), "under a name"),
        ("module.reg_head.scale.9.scale", torch.tensor(1.0), "expected one for each"),
        ("module.backbone.stem.0.attn.rel_pe", torch.zeros(3), "not weights of the official code"),
    ):
        torch.save({"state_dict": {**state, key: value}}, tmp_path / "odd.pth.tar")
        with pytest.raises(DataError, match=sentence):
            load_official(GOLDEN / "hard_nms.yaml", tmp_path / "odd.pth.tar")
    with pytest.raises(DataError, match="cannot be opened"):
        load_official(GOLDEN / "hard_nms.yaml", tmp_path / "none.pth.tar")
    torch.save({"model": {}}, tmp_path / "other.pth.tar")
    with pytest.raises(DataError, match="state_dict"):
        load_official(GOLDEN / "hard_nms.yaml", tmp_path / "other.pth.tar")

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save({"state_dict": {"a": Evil()}}, tmp_path / "evil.pth.tar")
    with pytest.raises(DataError, match="nothing else is unpickled"):
        load_official(GOLDEN / "hard_nms.yaml", tmp_path / "evil.pth.tar")
    assert not (tmp_path / "ran").exists()
