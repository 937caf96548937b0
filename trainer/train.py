"""The training loop, the same for both contexts: a task says what to learn, the loop learns it.

Averaged weights, checkpoints in one move, resume bit for bit on a CPU, TensorBoard, several processes under
`torchrun`. A run folder holds `config.yaml` (paths made absolute), `checkpoint.pt` and TensorBoard's files.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from engine.errors import ConfigError
from trainer.build import CHECKPOINT, CONFIG, load_checkpoint

log = logging.getLogger(__name__)


class Task(Protocol):
    """What to learn: a model, its optimiser and schedule, and the loss of each step."""

    name: str
    steps: int
    checkpoint_every: int
    clip: float  # largest L2 norm of the gradient; at most 0: none

    @property
    def model(self) -> nn.Module:
        """What is trained, on its device."""

    def optimizer(self) -> torch.optim.Optimizer:
        """A fresh optimiser of the model's parameters."""

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""

    def ema(self, step: int) -> float:
        """How much of the average stays at the end of a step, from 0."""

    def losses(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """What to minimise at a step, through `model` (the task's own, or its parallel wrapper), and its
        parts for the log."""

    def config_text(self) -> str:
        """The configuration as YAML that can be read from anywhere."""

    def describe(self) -> dict[str, Any]:
        """What a checkpoint must remember of the data."""

    def state(self) -> dict[str, Any]:
        """What else this process needs to go on: tensors and plain values."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""

    def summary(self) -> str:
        """One line for the log."""


@contextlib.contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """Join the process group that `torchrun` announces, if it does; yields (rank, world size)."""
    if "RANK" not in os.environ:
        yield 0, 1
        return
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield distributed.get_rank(), distributed.get_world_size()
    finally:
        distributed.destroy_process_group()


def device_of(rank: int) -> torch.device:
    """The device of a process: one GPU each where there are any."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device(f"cuda:{rank % torch.cuda.device_count()}")


def total(value: Tensor, world: int) -> Tensor:
    """`value` summed over the processes, without a gradient."""
    value = value.detach().clone()
    if world > 1:
        distributed.all_reduce(value)
    return value


def parameter_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weight matrices decay; biases, norms, scales and position biases do not."""
    decayed = [p for n, p in model.named_parameters() if p.ndim >= 2 and not n.endswith("attention.bias")]
    chosen = {id(p) for p in decayed}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [{"params": decayed, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]


class _Stop:
    """While it is entered, SIGINT and SIGTERM ask for a stop at the end of the step, once the state is saved.

    A second one stops at once. Several processes would not stop at the same step: there, signals do what
    they always do. Outside of the main thread there are none.
    """

    def __init__(self, world: int) -> None:
        self.asked = False
        in_main = threading.current_thread() is threading.main_thread()
        self._signals = (signal.SIGINT, signal.SIGTERM) if world == 1 and in_main else ()
        self._before: list[Any] = []

    def __enter__(self) -> None:
        self._before = [signal.signal(number, self._ask) for number in self._signals]

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _ask(self, *_: object) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in zip(self._signals, self._before, strict=False):
            signal.signal(number, handler)
        self._before = []


class Loop:
    """The state of one run."""

    def __init__(self, task: Task, run: Path, rank: int = 0, world: int = 1) -> None:
        self.task, self.run, self.rank, self.world = task, run, rank, world
        self.average = {name: value.detach().clone() for name, value in task.model.state_dict().items()}
        self.parallel: nn.Module = DistributedDataParallel(task.model) if world > 1 else task.model
        self.optimizer = task.optimizer()
        self.step = 0

    def fit(self, resume: bool = False, init: Path | None = None) -> Path:
        """Train to the end; returns the checkpoint's path. `init`: a run whose weights to begin with."""
        task = self.task
        if init is not None:
            self._begin_with(init)
        if resume and (self.run / CHECKPOINT).exists():
            self.restore(load_checkpoint(self.run / CHECKPOINT))
        if self.rank == 0:
            self.run.mkdir(parents=True, exist_ok=True)
            (self.run / CONFIG).write_text(task.config_text(), encoding="utf-8")
            size = sum(p.numel() for p in task.model.parameters())
            log.info("%s: %s; %d parameters; %d steps", task.name, task.summary(), size, task.steps)
        columns = (
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"), TimeRemainingColumn(),
        )  # fmt: skip
        writer = SummaryWriter(str(self.run)) if self.rank == 0 else None
        stopping = _Stop(self.world)
        with stopping, Progress(*columns, disable=self.rank > 0, console=Console(stderr=True)) as progress:
            bar = progress.add_task(task.name, total=task.steps, completed=self.step, loss=0.0)
            while self.step < task.steps:
                loss, parts = self.advance()
                if writer is not None and (self.step % 20 == 0 or self.step == task.steps):
                    values = {name: float(value.detach()) for name, value in {**parts, "total": loss}.items()}
                    values["learning_rate"] = task.learning_rate(self.step - 1)
                    for name, value in values.items():
                        writer.add_scalar(f"train/{name}", value, self.step)
                    progress.update(bar, loss=values["total"])
                progress.update(bar, completed=self.step)
                if self.step % task.checkpoint_every == 0 or self.step == task.steps or stopping.asked:
                    self.save()
                if stopping.asked and self.step < task.steps:
                    log.warning("stopped at step %d of %d; --resume goes on", self.step, task.steps)
                    raise SystemExit(130)
        if writer is not None:
            writer.close()
        return self.run / CHECKPOINT

    def _begin_with(self, init: Path) -> None:
        weights = load_checkpoint(init / CHECKPOINT)["ema"]
        try:
            self.task.model.load_state_dict(weights)
        except RuntimeError:
            raise ConfigError(
                f"{init}: its weights do not fit the configuration; give a run of the same model"
            ) from None
        for name, value in self.task.model.state_dict().items():
            self.average[name].copy_(value)

    def advance(self) -> tuple[Tensor, dict[str, Tensor]]:
        """One optimiser step; returns the loss and its parts."""
        task = self.task
        for group in self.optimizer.param_groups:
            group["lr"] = task.learning_rate(self.step)
        self.parallel.train()
        loss, parts = task.losses(self.parallel, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        largest = task.clip if task.clip > 0 else float("inf")
        norm = nn.utils.clip_grad_norm_(task.model.parameters(), largest)
        if not torch.isfinite(norm):
            raise ConfigError(
                f"the loss is not finite at step {self.step}; a smaller learning rate may help "
                "(`train.learning_rate`, or `opt.learning_rate` of a recipe in full context)"
            )
        self.optimizer.step()
        keep = task.ema(self.step)
        with torch.no_grad():
            current = task.model.state_dict()
            torch._foreach_lerp_(list(self.average.values()), [current[n] for n in self.average], 1 - keep)
        self.step += 1
        return loss, parts

    def save(self) -> None:
        """Write the checkpoint in one move, so that a kill leaves the old or the new one."""
        states: list[Any] = [None] * self.world
        mine = {"task": self.task.state(), "torch": torch.get_rng_state()}
        if self.world > 1:
            distributed.all_gather_object(states, mine)
        else:
            states = [mine]
        if self.rank:
            return
        content = {
            "step": self.step,
            "data": self.task.describe(),
            "model": self.task.model.state_dict(),
            "ema": self.average,
            "optimizer": self.optimizer.state_dict(),
            "random": states,
        }
        part = self.run / (CHECKPOINT + ".part")
        torch.save(content, part)
        part.replace(self.run / CHECKPOINT)

    def restore(self, content: dict[str, Any]) -> None:
        """Go on where a checkpoint stopped, bit for bit on a CPU with the same number of processes."""
        if content["data"] != self.task.describe():
            raise ConfigError(
                f"{self.run}: was trained on other data ({content['data']}); use another --output"
            )
        if "optimizer" not in content:
            raise ConfigError(
                f"{self.run}: holds imported weights without the state of their training; to begin with "
                f"them, give another --output and `--init {self.run}`"
            )
        try:
            self.task.model.load_state_dict(content["model"])
        except RuntimeError:
            raise ConfigError(
                f"{self.run}: the checkpoint is of another `model`; give that, or a new --output"
            ) from None
        device = next(self.task.model.parameters()).device
        self.average = {name: value.to(device) for name, value in content["ema"].items()}
        self.optimizer.load_state_dict(content["optimizer"])
        self.step = content["step"]
        mine = content["random"][self.rank if len(content["random"]) == self.world else 0]
        self.task.restore(mine["task"])
        if len(content["random"]) == self.world:
            torch.set_rng_state(mine["torch"])
