"""Learning from a teacher: a run on the same data that saw more of the future.

The teacher is a causal detector with a longer look-ahead, which answers the same questions some frames later.
Its answers, moved to the frames that they are about, are mixed into the truth that the student is taught
(Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015, section 2, at temperature 1): near
a border that the signal does not show yet, they say how much of it can be known.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from engine.errors import ConfigError
from trainer.build import describe, load_run
from trainer.config import Config
from trainer.data import Corpus

_QUESTIONS = ("ongoing", "start", "end")


class Teacher:
    """A trained detector and how much later than the student it answers."""

    def __init__(self, run: Path, config: Config, corpus: Corpus, hop: int, device: torch.device) -> None:
        """Raises ConfigError for a run that answers other questions than the student of `config` will."""
        other, detector, content = load_run(run)
        if content["data"] != describe(corpus) or detector.hop != hop:
            raise ConfigError(
                f"`train.teacher` {run}: was trained on other classes, channels, sampling rate or hop; "
                "expected a run on the data of this configuration"
            )
        if other.train.reach != config.train.reach:
            raise ConfigError(
                f"`train.teacher` {run}: its `train.reach` is {other.train.reach:g} s, the student's "
                f"{config.train.reach:g} s; they answer the same questions only where it is the same"
            )
        self.later = other.model.lookahead - config.model.lookahead
        if self.later < 0:
            raise ConfigError(
                f"`train.teacher` {run}: looks {other.model.lookahead} frames ahead, less than the student's "
                f"{config.model.lookahead}; give a run with a longer `model.lookahead`"
            )
        self.detector = detector.to(device)

    @torch.no_grad()
    def mix(
        self, samples: Tensor, mask: Tensor, targets: dict[str, Tensor], weight: float
    ) -> dict[str, Tensor]:
        """`targets` of a batch with `weight` of the teacher's answers in those of the classes [B, N, K].

        Frames that the teacher would answer after the crop, or in a frame that is missing, keep the truth.
        """
        outputs = self.detector(samples, mask)
        frames = mask.shape[1] - self.later
        share = weight * mask[:, self.later :, None]
        mixed = dict(targets)
        for name in _QUESTIONS:
            soft = torch.sigmoid(outputs[name][:, self.later :])
            truth = targets[name].clone()
            truth[:, :frames] += share * (soft - truth[:, :frames])
            mixed[name] = truth
        return mixed
