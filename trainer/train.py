"""The training loop: AdamW with warm-up and cosine decay, an average of the weights, resume, DDP.

One process, or several under `torchrun`: each then draws its own crops of the batch, gradients are averaged.
A run folder holds `config.yaml` (paths made absolute), `checkpoint.pt` and TensorBoard's event files.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from engine.errors import ConfigError
from trainer.build import CHECKPOINT, CONFIG, build_detector, describe, hop_of, load_checkpoint
from trainer.config import Config, TrainConfig
from trainer.data import Corpus, Crop, Sampler, load_corpus, statistics
from trainer.detector import look_back
from trainer.losses import diou, focal

log = logging.getLogger(__name__)


def train(config: Config, run: Path, resume: bool = False, threads: int | None = None) -> Path:
    """Train `config` into the folder `run`; returns the checkpoint's path.

    Raises ConfigError when `run` already holds a checkpoint and `resume` is not set.
    """
    if (run / CHECKPOINT).exists() and not resume:
        raise ConfigError(f"{run}: holds a trained run already; give --resume to go on, or another --output")
    if threads:
        torch.set_num_threads(threads)
    with _processes() as (rank, world):
        corpus = load_corpus(config.data, "train")
        trainer = _Trainer(config, corpus, run, rank, world)
        if resume and (run / CHECKPOINT).exists():
            trainer.restore(load_checkpoint(run / CHECKPOINT))
        trainer.fit()
    return run / CHECKPOINT


@contextlib.contextmanager
def _processes() -> Iterator[tuple[int, int]]:
    """Join the process group that `torchrun` announces, if it does; yields (rank, world size)."""
    if "RANK" not in os.environ:
        yield 0, 1
        return
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield distributed.get_rank(), distributed.get_world_size()
    finally:
        distributed.destroy_process_group()


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then half a cosine down to a hundredth."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    passed = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, passed))))


def parameter_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weight matrices decay; biases, norms, scales and position biases do not."""
    decayed = [p for n, p in model.named_parameters() if p.ndim >= 2 and not n.endswith("attention.bias")]
    chosen = {id(p) for p in decayed}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [{"params": decayed, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]


def batch_of(crops: list[Crop], device: torch.device) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Crops stacked: samples [B, N * hop, C], mask [B, N], and each target [B, N, ...]."""

    def stack(arrays: list[Any]) -> Tensor:
        return torch.from_numpy(np.stack(arrays)).to(device)

    targets = {
        f.name: stack([getattr(crop.targets, f.name) for crop in crops]) for f in fields(crops[0].targets)
    }
    return stack([crop.samples for crop in crops]), stack([crop.mask for crop in crops]), targets


def losses(
    outputs: dict[str, Tensor], mask: Tensor, targets: dict[str, Tensor], config: TrainConfig, reach: float
) -> dict[str, Tensor]:
    """The parts of the loss, each a sum over the frames that are there, over the number of its positives."""

    def classify(name: str) -> Tensor:
        elements = focal(outputs[name], targets[name]) * mask[..., None]
        return elements.sum() / targets[name].sum().clamp_min(1.0)

    start_offset, end_offsets = look_back(outputs)
    known = (targets["start_mask"] * mask) > 0
    late = (start_offset[known] - targets["start_offset"][known]) / reach
    paired = (targets["end_mask"] * mask) > 0
    pair = diou(end_offsets[paired], targets["end_offsets"][paired])
    near = (end_offsets[..., 1][paired] - targets["end_offsets"][..., 1][paired]) / reach
    return {
        "ongoing": config.ongoing_weight * classify("ongoing"),
        "start": config.start_weight * classify("start"),
        "end": config.end_weight * classify("end"),
        "start_offset": config.offset_weight
        * F.smooth_l1_loss(late, torch.zeros_like(late), reduction="sum", beta=0.1)
        / known.sum().clamp_min(1),
        "end_pair": config.offset_weight * pair.sum() / paired.sum().clamp_min(1),
        "end_offset": config.offset_weight
        * F.smooth_l1_loss(near, torch.zeros_like(near), reduction="sum", beta=0.1)
        / paired.sum().clamp_min(1),
    }


class _Trainer:
    """The state of one run."""

    def __init__(self, config: Config, corpus: Corpus, run: Path, rank: int, world: int) -> None:
        self.config, self.corpus, self.run, self.rank, self.world = config, corpus, run, rank, world
        if config.train.batch % world:
            raise ConfigError(f"`train.batch` {config.train.batch} is not a multiple of {world} processes")
        torch.manual_seed(config.seed)
        self.generator = np.random.default_rng([config.seed, rank])
        self.device = torch.device(
            f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
        )
        hop = hop_of(config, corpus.sample_rate)
        self.model = build_detector(config, corpus.channels, len(corpus.classes), corpus.sample_rate)
        self.model.front.normalise_with(*(torch.from_numpy(part) for part in statistics(corpus)))
        self.model.to(self.device)
        self.average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.parallel: nn.Module = DistributedDataParallel(self.model) if world > 1 else self.model
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.train.weight_decay), lr=config.train.learning_rate
        )
        period = self.model.period
        frames = round(config.train.crop * corpus.sample_rate / hop)
        self.sampler = Sampler(corpus, config, hop, max(period, -(-frames // period) * period))
        self.step = 0
        torch.manual_seed(config.seed * 1009 + rank)  # what dropout draws differs between processes

    def fit(self) -> None:
        config = self.config.train
        if self.rank == 0:
            self.run.mkdir(parents=True, exist_ok=True)
            (self.run / CONFIG).write_text(config_text(self.config), encoding="utf-8")
            size = sum(p.numel() for p in self.model.parameters())
            log.info(
                "%s: %d recordings, %.1f h, %d classes; %d parameters; %d steps of %d crops of %d frames",
                self.config.name, len(self.corpus.tracks), self.corpus.seconds / 3600,
                len(self.corpus.classes), size, config.steps, config.batch, self.sampler.frames,
            )  # fmt: skip
        columns = (
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"), TimeRemainingColumn(),
        )  # fmt: skip
        writer = SummaryWriter(str(self.run)) if self.rank == 0 else None
        with Progress(*columns, disable=self.rank > 0) as progress:
            bar = progress.add_task(self.config.name, total=config.steps, completed=self.step, loss=0.0)
            while self.step < config.steps:
                parts = self._advance()
                if writer is not None and self.step % 20 == 0:
                    total = sum(parts.values())
                    for name, value in {**parts, "total": total}.items():
                        writer.add_scalar(f"train/{name}", value, self.step)
                    progress.update(bar, loss=total)
                progress.update(bar, completed=self.step)
                if self.step % config.checkpoint_every == 0 or self.step == config.steps:
                    self.save()
        if writer is not None:
            writer.close()

    def _advance(self) -> dict[str, float]:
        """One optimiser step; returns the parts of the loss."""
        config = self.config.train
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config)
        crops = [self.sampler.draw(self.generator) for _ in range(config.batch // self.world)]
        samples, mask, targets = batch_of(crops, self.device)
        self.parallel.train()
        parts = losses(self.parallel(samples, mask), mask, targets, config, self.sampler.reach)
        total = torch.stack(list(parts.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        if not torch.isfinite(norm):
            raise ConfigError(
                f"the loss is not finite at step {self.step}; a smaller `train.learning_rate` may help"
            )
        self.optimizer.step()
        self.step += 1
        decay = min(config.ema, (1 + self.step) / (10 + self.step))
        for name, value in self.model.state_dict().items():
            self.average[name].lerp_(value, 1 - decay)
        return {name: float(value.detach()) for name, value in parts.items()}

    def save(self) -> None:
        """Write the checkpoint in one move, so that a kill leaves the old or the new one."""
        states: list[Any] = [None] * self.world
        mine = {"numpy": _plain(self.generator.bit_generator.state), "torch": torch.get_rng_state()}
        if self.world > 1:
            distributed.all_gather_object(states, mine)
        else:
            states = [mine]
        if self.rank:
            return
        content = {
            "step": self.step,
            "data": describe(self.corpus),
            "model": self.model.state_dict(),
            "ema": self.average,
            "optimizer": self.optimizer.state_dict(),
            "random": states,
        }
        part = self.run / (CHECKPOINT + ".part")
        torch.save(content, part)
        part.replace(self.run / CHECKPOINT)

    def restore(self, content: dict[str, Any]) -> None:
        """Go on where a checkpoint stopped, bit for bit on a CPU with the same number of processes."""
        if content["data"] != describe(self.corpus):
            raise ConfigError(
                f"{self.run}: was trained on other data ({content['data']}); use another --output"
            )
        try:
            self.model.load_state_dict(content["model"])
        except RuntimeError:
            raise ConfigError(
                f"{self.run}: the checkpoint is of another `model`; give that, or a new --output"
            ) from None
        self.average = {name: value.to(self.device) for name, value in content["ema"].items()}
        self.optimizer.load_state_dict(content["optimizer"])
        self.step = content["step"]
        if len(content["random"]) == self.world:
            mine = content["random"][self.rank]
            self.generator.bit_generator.state = _restored(mine["numpy"])
            torch.set_rng_state(mine["torch"])


def _plain(state: Any) -> Any:
    """A bit generator's state as what a weights-only checkpoint may hold: its 128-bit integers as text."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    return f"int:{state}" if isinstance(state, int) else state


def _restored(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _restored(value) for key, value in state.items()}
    return int(state[4:]) if isinstance(state, str) and state.startswith("int:") else state


def config_text(config: Config) -> str:
    """The configuration as YAML that can be read from anywhere: its paths absolute."""
    values = config.model_dump(mode="json")
    for key in ("annotations", "recordings"):
        values["data"][key] = str(Path(values["data"][key]).resolve())
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
