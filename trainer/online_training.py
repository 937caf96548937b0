"""What the causal detector learns: AdamW with warm-up and cosine decay on random crops, one optimiser step
a batch. Under `torchrun` each process draws its own crops of the batch."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from engine.errors import ConfigError
from trainer.build import CONFIG, build_detector, describe, hop_of, refuse_trained
from trainer.config import Config, TrainConfig
from trainer.data import Corpus, Crop, Sampler, load_corpus, statistics
from trainer.detector import Detector, look_back
from trainer.losses import diou, focal
from trainer.offline import OfflineDetector
from trainer.train import Loop, device_of, parameter_groups, processes, total

log = logging.getLogger(__name__)


def train_online(config: Config, run: Path, resume: bool = False, init: Path | None = None) -> Path:
    """Train the causal detector of `config` into the folder `run`; returns the checkpoint's path.

    `init`: a run whose averaged weights to begin with. Raises ConfigError when `run` already holds a
    checkpoint and `resume` is not set.
    """
    if not resume:
        refuse_trained(run)
    with processes() as (rank, world):
        corpus = load_corpus(config.data, "train")
        task = OnlineTask(fitted(config, corpus), corpus, rank, world)
        return Loop(task, run, rank, world).fit(resume, init)


def fitted(config: Config, corpus: Corpus) -> Config:
    """`config` with what decoding must know of the actions that are trained on, unless it says so itself:
    what those of each class last on average, and as what one may last, twice the longest, an hour at most.

    Raises ConfigError where it says so of another number of classes.
    """
    if misfit := config.decoding.misfit(len(corpus.classes)):
        raise ConfigError(misfit)
    rate, chosen = corpus.sample_rate, config.decoding
    lengths: list[list[float]] = [[] for _ in corpus.classes]
    for track in corpus.tracks:
        for (start, end), label in zip(track.segments.tolist(), track.labels.tolist(), strict=True):
            lengths[label].append((end - start) / rate)
    every = [length for some in lengths for length in some] or [1.0]
    known = {
        # A class that training never saw will hardly be found; the average of all stands for it.
        "usual": tuple(round(float(np.clip(np.mean(some or every), 1e-3, 86400)), 3) for some in lengths),
        # A tracker remembers so much of each class of each stream.
        "max_duration": max(chosen.max_duration, float(min(3600, math.ceil(2 * max(every))))),
    }
    missing = {name: value for name, value in known.items() if name not in chosen.model_fields_set}
    decoding = chosen.model_copy(update=missing)
    if max(every) > decoding.max_duration:
        log.warning(
            "an action of training lasts %.0f s, and in a stream is ended after %.0f s; set "
            "`decoding.max_duration` for more: a stream's memory grows with it",
            max(every),
            decoding.max_duration,
        )
    return config.model_copy(update={"decoding": decoding})


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then half a cosine down to a hundredth."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    passed = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, passed))))


def batch_of(crops: list[Crop], device: torch.device) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Crops stacked: samples [B, N * hop, C], mask [B, N], and each target [B, N, ...]."""

    def stack(arrays: list[Any]) -> Tensor:
        return torch.from_numpy(np.stack(arrays)).to(device)

    targets = {
        f.name: stack([getattr(crop.targets, f.name) for crop in crops]) for f in fields(crops[0].targets)
    }
    return stack([crop.samples for crop in crops]), stack([crop.mask for crop in crops]), targets


def losses(
    outputs: dict[str, Tensor],
    mask: Tensor,
    targets: dict[str, Tensor],
    config: TrainConfig,
    reach: float,
    world: int = 1,
) -> dict[str, Tensor]:
    """The parts of the loss, each a sum over the frames that are there, over the number of its positives.

    Positives are counted over all processes, and the sums are scaled by their number, so that the average of
    their gradients is that of one process with the whole batch.
    """

    def share(loss: Tensor, positives: Tensor) -> Tensor:
        return world * loss.sum() / total(positives, world).clamp_min(1.0)

    def classify(name: str) -> Tensor:
        return share(focal(outputs[name], targets[name]) * mask[..., None], targets[name].sum())

    start_offset, end_offsets = look_back(outputs)
    known = (targets["start_mask"] * mask) > 0
    late = (start_offset[known] - targets["start_offset"][known]) / reach
    paired = (targets["end_mask"] * mask) > 0
    pair = diou(end_offsets[paired], targets["end_offsets"][paired])
    near = (end_offsets[..., 1][paired] - targets["end_offsets"][..., 1][paired]) / reach

    def distance(value: Tensor) -> Tensor:
        return F.smooth_l1_loss(value, torch.zeros_like(value), reduction="sum", beta=0.1)

    starts, pairs = known.sum().float(), paired.sum().float()
    return {
        "ongoing": config.ongoing_weight * classify("ongoing"),
        "start": config.start_weight * classify("start"),
        "end": config.end_weight * classify("end"),
        "start_offset": config.offset_weight * share(distance(late), starts),
        "end_pair": config.offset_weight * share(pair, pairs),
        "end_offset": config.offset_weight * share(distance(near), pairs),
    }


# A configuration, channels, classes and the sampling rate in Hz -> a model with fresh weights.
Build = Callable[[Config, int, int, float], Detector | OfflineDetector]


class CropTask:
    """What the tasks on random crops of recordings share: data, optimiser, schedule, average, state."""

    def __init__(self, config: Config, corpus: Corpus, build: Build, rank: int, world: int) -> None:
        self.config, self.corpus, self.world = config, corpus, world
        self.name, self.steps, self.clip = config.name, config.train.steps, config.train.clip
        self.checkpoint_every = config.train.checkpoint_every
        if config.train.batch % world:
            raise ConfigError(f"`train.batch` {config.train.batch} is not a multiple of {world} processes")
        torch.manual_seed(config.seed)
        self.generator = np.random.default_rng([config.seed, rank])
        self.device = device_of(rank)
        hop = hop_of(config, corpus.sample_rate)
        self.model = build(config, corpus.channels, len(corpus.classes), corpus.sample_rate)
        assert self.model.front is not None
        self.model.front.normalise_with(*(torch.from_numpy(part) for part in statistics(corpus)))
        self.model.to(self.device)
        period = max(1 << (config.model.levels - 1), config.model.chunk)
        frames = round(config.train.crop * corpus.sample_rate / hop)
        frames = max(period, -(-frames // period) * period)
        if config.model.lookahead >= frames // 2:
            raise ConfigError(
                f"`model.lookahead` of {config.model.lookahead} frames leaves little to learn from crops of "
                f"{frames}; look less far ahead, or train on longer crops (`train.crop`)"
            )
        self.sampler = Sampler(corpus, config, hop, frames)
        torch.manual_seed(config.seed * 1009 + rank)  # what dropout draws differs between processes

    def optimizer(self) -> torch.optim.Optimizer:
        settings = self.config.train
        return torch.optim.AdamW(
            parameter_groups(self.model, settings.weight_decay), lr=settings.learning_rate
        )

    def learning_rate(self, step: int) -> float:
        return learning_rate(step, self.config.train)

    def ema(self, step: int) -> float:
        return min(self.config.train.ema, (2 + step) / (11 + step))

    def config_text(self) -> str:
        return config_text(self.config)

    def describe(self) -> dict[str, Any]:
        return describe(self.corpus)

    def state(self) -> dict[str, Any]:
        return {"numpy": _plain(self.generator.bit_generator.state)}

    def restore(self, state: dict[str, Any]) -> None:
        self.generator.bit_generator.state = _restored(state["numpy"])

    def summary(self) -> str:
        corpus = self.corpus
        return (
            f"{len(corpus.tracks)} recordings, {corpus.seconds / 3600:.1f} h, {len(corpus.classes)} classes; "
            f"{self.config.train.batch} crops of {self.sampler.frames} frames"
        )


class OnlineTask(CropTask):
    """A `trainer.train.Task`: the causal detector."""

    def __init__(self, config: Config, corpus: Corpus, rank: int = 0, world: int = 1) -> None:
        super().__init__(config, corpus, build_detector, rank, world)

    def losses(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config.train
        crops = [self.sampler.draw(self.generator) for _ in range(config.batch // self.world)]
        if config.chunks:
            assert isinstance(self.model, Detector)
            # The same for all processes of a step.
            self.model.chunk = int(np.random.default_rng([self.config.seed, step]).choice(config.chunks))
        samples, mask, targets = batch_of(crops, self.device)
        answered = mask.clone()
        answered[:, : self.sampler.lookahead] = 0.0  # these are about what was before the crop
        parts = losses(model(samples, mask), answered, targets, config, self.sampler.reach, self.world)
        return torch.stack(list(parts.values())).sum(), parts


def _plain(state: Any) -> Any:
    """A bit generator's state as what a weights-only checkpoint may hold: its 128-bit integers as text."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    return f"int:{state}" if isinstance(state, int) else state


def _restored(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _restored(value) for key, value in state.items()}
    return int(state[4:]) if isinstance(state, str) and state.startswith("int:") else state


def write_config(config: Config, run: Path) -> None:
    """Write a run's configuration in one move, so that a kill leaves the old or the new one."""
    part = run / (CONFIG + ".part")
    part.write_text(config_text(config), encoding="utf-8")
    part.replace(run / CONFIG)


def config_text(config: Config) -> str:
    """The configuration as YAML that can be read from anywhere: its paths absolute."""
    values = config.model_dump(mode="json")
    data = values["data"]
    data["annotations"] = str(Path(data["annotations"]).resolve())
    data["recordings"] = [str(Path(folder).resolve()) for folder in data["recordings"]]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
