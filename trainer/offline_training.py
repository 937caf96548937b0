"""What the detector in full context learns: ActionFormer's step, with its targets, losses, normaliser and
schedules (Zhang, Wu, Li, ECCV 2022, section 3.4, and the official repository's settings).

What a step draws (which clips, where they are cut, what dropout drops) follows from the seed and the number
of the step alone, so that a run goes on bit for bit, and several processes see the batch that one would.
"""

from __future__ import annotations

import bisect
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from engine.errors import ConfigError, DataError
from trainer.build import refuse_trained
from trainer.features import Clip, FeatureSet, cut
from trainer.losses import diou, focal
from trainer.moments import assign, places
from trainer.offline import Level, OfflineDetector
from trainer.recipe import ModelRecipe, OptRecipe, Recipe, TrainRecipe, recipe_text
from trainer.train import Loop, device_of, parameter_groups, processes, total

EMA = 0.999
_MOMENTUM = 0.9  # of the loss normaliser


def train_offline(recipe: Recipe, run: Path, resume: bool = False, init: Path | None = None) -> Path:
    """Train the detector of `recipe` into the folder `run`; returns the checkpoint's path.

    `init`: a run whose averaged weights to begin with. Raises ConfigError when `run` already holds a
    checkpoint and `resume` is not set.
    """
    if not resume:
        refuse_trained(run)
    with processes() as (rank, world):
        task = OfflineTask(recipe, FeatureSet(recipe, recipe.train_split, training=True), rank, world)
        return Loop(task, run, rank, world).fit(resume, init)


def epochs_of(opt: OptRecipe) -> int:
    """Epochs that are trained, those of the warm-up included."""
    return opt.early_stop_epochs or opt.epochs + opt.warmup_epochs


def learning_rate(step: int, opt: OptRecipe, iterations: int) -> float:
    """The official schedules in closed form; `iterations`: steps an epoch, `step` from 0.

    Warm-up from 0 in equal parts, then half a cosine down to 1e-8 (0 without a warm-up), or a factor
    `schedule_gamma` at each of `schedule_steps`, which are epochs after the warm-up.
    """
    base, warm = opt.learning_rate, opt.warmup_epochs * iterations if opt.warmup else 0
    if step < warm:
        return base * step / max(1, warm - 1)
    since = step - warm
    if opt.schedule_type == "multistep":
        milestones = sorted(epoch * iterations for epoch in opt.schedule_steps)
        return base * opt.schedule_gamma ** bisect.bisect_right(milestones, since)
    least = 1e-8 if opt.warmup else 0.0
    part = since / max(1, opt.epochs * iterations)
    return least + 0.5 * (base - least) * (1 + math.cos(math.pi * part))


def targets(
    levels: list[Level],
    clips: list[tuple[Tensor, Tensor]],
    model: ModelRecipe,
    train: TrainRecipe,
    classes: int,
) -> tuple[Tensor, Tensor]:
    """What each moment of each clip should answer: classes [B, N, K], distances [B, N, 2]; N over all levels.

    `clips`: segments [n, 2] in frames and labels [n] of each.
    """
    at = places([level.mask.shape[1] for level in levels], model.strides, model.regression_range)
    radius = train.center_sample_radius if train.center_sample == "radius" else None
    pairs = [assign(at, segments, labels, classes, radius) for segments, labels in clips]
    return torch.stack([wanted for wanted, _ in pairs]), torch.stack([far for _, far in pairs])


def losses(
    levels: list[Level],
    wanted: Tensor,
    distances: Tensor,
    train: TrainRecipe,
    normaliser: float,
    world: int = 1,
) -> tuple[Tensor, dict[str, Tensor], float]:
    """The loss to minimise, its parts, and the normaliser after the step.

    Sums over the moments of all levels, over a running mean of the number of positives. In several processes
    positives are counted over all, and the sums scaled by their number, so that the average of their
    gradients is that of one process with the whole batch.
    """
    there = torch.cat([level.mask for level in levels], dim=1)
    positive = (wanted.sum(dim=-1) > 0) & there
    count = float(total(positive.sum().float(), world))
    normaliser = _MOMENTUM * normaliser + (1 - _MOMENTUM) * max(count, 1)
    smoothed = wanted[there] * (1 - train.label_smoothing)
    smoothed = smoothed + train.label_smoothing / (wanted.shape[-1] + 1)
    logits = torch.cat([level.cls_logits for level in levels], dim=1)[there]
    classify = focal(logits, smoothed).sum() / normaliser
    back = distances.new_tensor([1.0, -1.0])  # `diou` measures both ends back in time
    found = torch.cat([level.offsets for level in levels], dim=1)[positive] * back
    regress = diou(found, distances[positive] * back).sum() / normaliser
    weight = train.loss_weight
    if weight <= 0:
        weight = float(total(classify, world)) / max(float(total(regress, world)), 0.01)
    parts = {"cls_loss": classify, "reg_loss": regress, "final_loss": classify + weight * regress}
    return world * parts["final_loss"], parts, normaliser


def judge(
    levels: list[Level], clips: list[tuple[Tensor, Tensor]], recipe: Recipe, normaliser: float, world: int
) -> tuple[Tensor, dict[str, Tensor], float]:
    """`losses` of what the levels say about `clips` (`targets`)."""
    device = levels[0].mask.device
    wanted, distances = targets(levels, clips, recipe.model, recipe.train_cfg, recipe.dataset.num_classes)
    train = recipe.train_cfg
    return losses(levels, wanted.to(device), distances.to(device), train, normaliser, world)


class _Draws(Dataset[Clip]):
    """Clips of a feature set, cut as the key (seed, epoch, index) says."""

    def __init__(self, data: FeatureSet, recipe: Recipe) -> None:
        self.data, self.settings = data, recipe.dataset

    def __getitem__(self, key: tuple[int, int, int]) -> Clip:
        clip = self.data.read(key[2])
        settings = self.settings
        generator = np.random.default_rng(key)
        return cut(clip, settings.max_seq_len, settings.trunc_thresh, settings.crop_ratio, generator)


class OfflineTask:
    """A `trainer.train.Task`."""

    def __init__(self, recipe: Recipe, data: FeatureSet, rank: int = 0, world: int = 1) -> None:
        self.recipe, self.data, self.rank, self.world = recipe, data, rank, world
        self.name: str = recipe.dataset_name
        self.clip = recipe.train_cfg.clip_grad_l2norm
        batch = recipe.loader.batch_size
        if batch % world:
            raise ConfigError(f"`loader.batch_size` {batch} is not a multiple of {world} processes")
        data.read(0)  # features that do not fit should say so before anything is written
        self.iterations = len(data) // batch
        if not self.iterations:
            raise DataError(f"{len(data)} recordings for training; expected at least a batch of {batch}")
        self.steps = epochs_of(recipe.opt) * self.iterations
        self.checkpoint_every = 5 * self.iterations
        self.device = device_of(rank)
        torch.manual_seed(recipe.init_rand_seed)
        self.model = OfflineDetector(recipe)
        self.model.silence(data.empty)
        self.model.to(self.device)
        self.normaliser = recipe.train_cfg.init_loss_norm
        self._batches: Iterator[list[Clip]] | None = None
        self._next = 0

    def optimizer(self) -> torch.optim.Optimizer:
        opt = self.recipe.opt
        groups = parameter_groups(self.model, opt.weight_decay)
        if opt.type == "SGD":
            return torch.optim.SGD(groups, lr=opt.learning_rate, momentum=opt.momentum)
        return torch.optim.AdamW(groups, lr=opt.learning_rate)

    def learning_rate(self, step: int) -> float:
        # The official code multiplies it by the number of its devices, among which it splits a batch.
        return len(self.recipe.devices) * learning_rate(step, self.recipe.opt, self.iterations)

    def ema(self, step: int) -> float:
        return EMA

    def losses(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        clips = self._batch(step)
        seeds = np.random.SeedSequence((self.recipe.init_rand_seed, step, self.rank))
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))
        return self.losses_of(model, clips)

    def losses_of(self, model: nn.Module, clips: list[Clip]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of some clips and its parts; moves the normaliser on."""
        lengths = [len(clip.features) for clip in clips]
        frames = torch.zeros(len(clips), max(lengths), clips[0].features.shape[1])
        for row, clip in zip(frames, clips, strict=True):
            row[: len(clip.features)] = torch.from_numpy(clip.features)
        levels = model(frames.to(self.device), lengths)
        truth = [(torch.from_numpy(clip.segments), torch.from_numpy(clip.labels)) for clip in clips]
        loss, parts, self.normaliser = judge(levels, truth, self.recipe, self.normaliser, self.world)
        return loss, parts

    def _batch(self, step: int) -> list[Clip]:
        """This process's part of the batch of a step; read ahead by the loader's workers."""
        if self._batches is None or step != self._next:
            loader = DataLoader(
                _Draws(self.data, self.recipe),
                batch_sampler=self._keys(step),
                num_workers=min(self.recipe.loader.num_workers, os.cpu_count() or 1),
                collate_fn=list,
            )
            self._batches = iter(loader)
        self._next = step + 1
        try:
            return next(self._batches)
        except (
            DataError
        ) as problem:  # a worker's comes with the story of its life; the last line is the error
            raise DataError(str(problem).strip().rsplit("DataError: ", 1)[-1]) from None

    def _keys(self, first: int) -> list[list[tuple[int, int, int]]]:
        seed, size = self.recipe.init_rand_seed, self.recipe.loader.batch_size
        keys = []
        order: dict[int, list[int]] = {}
        for step in range(first, self.steps):
            epoch, place = divmod(step, self.iterations)
            if epoch not in order:
                order = {epoch: np.random.default_rng((seed, epoch)).permutation(len(self.data)).tolist()}
            whole = order[epoch][place * size : (place + 1) * size]
            keys.append([(seed, epoch, index) for index in whole[self.rank :: self.world]])
        return keys

    def config_text(self) -> str:
        return recipe_text(self.recipe)

    def describe(self) -> dict[str, Any]:
        return {"classes": list(self.data.classes), "recordings": len(self.data)}

    def state(self) -> dict[str, Any]:
        return {"normaliser": self.normaliser}

    def restore(self, state: dict[str, Any]) -> None:
        self.normaliser = float(state["normaliser"])

    def summary(self) -> str:
        return (
            f"{len(self.data)} recordings, {len(self.data.classes)} classes; {epochs_of(self.recipe.opt)} "
            f"epochs of {self.iterations} batches of {self.recipe.loader.batch_size}"
        )
