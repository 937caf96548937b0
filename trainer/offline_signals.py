"""The detector in full context on raw signals: what the same pyramid finds when it may see the future.

It is trained on the crops, and with the schedule, of the causal detector; only the context, the heads and
their targets are ActionFormer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from trainer.build import build_offline, refuse_trained
from trainer.config import Config
from trainer.data import Corpus, FloatArray, Grid, load_corpus
from trainer.offline import OfflineDetector
from trainer.offline_training import judge
from trainer.online_training import CropTask
from trainer.predictions import Detection, Predictions, detections, of_segments
from trainer.recipe import Recipe
from trainer.train import Loop, processes

# What of an action must lie within a crop for the crop to be asked for it (the official `trunc_thresh`).
_VISIBLE = 0.5


def train_offline_signals(config: Config, run: Path, resume: bool = False, init: Path | None = None) -> Path:
    """Train the detector in full context of `config` into `run`; as `train_online`."""
    if not resume:
        refuse_trained(run)
    with processes() as (rank, world):
        task = OfflineSignalTask(config, load_corpus(config.data, "train"), rank, world)
        return Loop(task, run, rank, world).fit(resume, init)


class OfflineSignalTask(CropTask):
    """A `trainer.train.Task`."""

    def __init__(self, config: Config, corpus: Corpus, rank: int = 0, world: int = 1) -> None:
        super().__init__(config, corpus, build_offline, rank, world)
        self.normaliser = self.recipe.train_cfg.init_loss_norm

    @property
    def recipe(self) -> Recipe:
        """What the model was built from."""
        assert isinstance(self.model, OfflineDetector)
        return self.model.recipe

    def losses(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch of crops, every frame of which counts as there."""
        crops = [self.sampler.cut(self.generator) for _ in range(self.config.train.batch // self.world)]
        samples = torch.from_numpy(np.stack([crop[0] for crop in crops])).to(self.device)
        levels = model(samples, [self.sampler.frames] * len(crops))
        truth = [_visible(segments, labels, self.sampler.frames) for _, _, segments, labels in crops]
        loss, parts, self.normaliser = judge(levels, truth, self.recipe, self.normaliser, self.world)
        return loss, parts

    def state(self) -> dict[str, Any]:
        return {**super().state(), "normaliser": self.normaliser}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.normaliser = float(state["normaliser"])


def _visible(segments: NDArray[np.float64], labels: NDArray[np.int64], frames: int) -> tuple[Tensor, Tensor]:
    """The actions of which half lies within the crop, cut to it, on the grid of the moments: the one of frame
    t stands at t, which is the frame's centre."""
    inside = segments.clip(0, frames)
    share = (inside[:, 1] - inside[:, 0]) / np.maximum(segments[:, 1] - segments[:, 0], 1e-9)
    kept = share >= _VISIBLE
    return torch.from_numpy((inside[kept] - 0.5).astype(np.float32)), torch.from_numpy(labels[kept])


def detect_recordings(
    detector: OfflineDetector, recordings: Sequence[tuple[str, FloatArray, Grid]], classes: Sequence[str]
) -> Predictions:
    """What the detector finds in each recording (name, samples [T, C], grid), seen whole."""
    found: dict[str, tuple[Detection, ...]] = {}
    for name, samples, grid in track(recordings, "detecting", console=Console(stderr=True)):
        frames = len(samples) // detector.hop
        segments, scores, labels = detector.detect(
            samples[: frames * detector.hop],
            fps=grid.rate,
            feat_stride=detector.hop,
            num_frames=detector.hop + 2 * grid.shift,
            duration=grid.seconds(len(samples)),
        )
        found[name] = detections(segments.numpy(), scores.numpy(), labels.numpy(), classes)
    return of_segments(found)
