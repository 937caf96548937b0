"""The causal detector: front, pyramid, fusion, and heads for what can be known while the stream goes on.

For every frame t the heads answer, from what has arrived when t's chunk is complete:
  ongoing       is an action of class c going on at t?
  start         did one start within the last `reach` frames, and
  start_offset  how many frames ago?
  end           did one end within the last `reach` frames, and
  end_offsets   how many frames ago did it start, and end? (both look back)

With a look-ahead of L frames, "at t" is at t - L, and "within the last frames" before that.

All heads read level 0, into which every coarser level is summed: the newest token of each level that has
arrived when the chunk is complete. So an event waits for its chunk and never for the stride of a level,
and the start of a long action is seen by the level that spans it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.beats import BeatFront
from trainer.blocks import Conv, Dropout, Reach
from trainer.front import FeatureFront, SignalFront
from trainer.memory import Memory
from trainer.pyramid import Pyramid, PyramidShape

OUTPUTS = ("ongoing", "start", "start_offset", "end", "end_offsets")


@dataclass(frozen=True)
class DetectorShape:
    """Everything that decides the weights' shapes.

    `hop` 0 stands for a feature front; `beats` above 0 for one that sees so many beats of a signal of
    `sample_rate` Hz.
    """

    channels: int
    classes: int
    pyramid: PyramidShape
    hop: int = 0
    stem_width: int = 32
    head_width: int = 0
    prior: float = 0.01
    beats: int = 0
    sample_rate: float = 0.0


class Fusion(nn.Module):
    """Level 0 plus a projection of the newest token of every coarser level."""

    def __init__(self, shape: PyramidShape) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(shape.width) for _ in range(shape.levels))
        self.project = nn.ModuleList(nn.Linear(shape.width, shape.width) for _ in range(shape.levels))

    def forward(self, levels: list[tuple[Tensor, Tensor]], reaches: list[Reach], chunk: int) -> Tensor:
        """[(tokens [B, T_l, D], mask)] -> [B, N, D]."""
        frames = levels[0][0].shape[1]
        total: Tensor | None = None
        for level, (x, mask) in enumerate(levels):
            y = self.project[level](self.norms[level](x)) * mask
            if level > 0:
                y = self._spread(y, level, frames, reaches[level], chunk)
            total = y if total is None else total + y
        assert total is not None
        return total * levels[0][1]

    def _spread(self, y: Tensor, level: int, frames: int, reach: Reach, chunk: int) -> Tensor:
        """Tokens of a level [B, T_l, D] to the frames of the chunks that may see them, [B, N, D]."""
        chunks = (1 << level) // chunk
        if chunks <= 1 or reach.memory is None:
            return y.repeat_interleave(1 << level, dim=1)
        if reach.exists is not None:
            joined = reach.memory.extend(f"newest.{level}", y, 1, reach.exists)
            newest = torch.where(reach.exists > 0, joined[:, 1:], joined[:, :1])
            return newest.expand(-1, frames, -1)
        # The whole sequence: token m arrives with the last of its chunks, and holds for `chunks` of them.
        reach.memory.remember(f"newest.{level}", y[:, -1:])
        late = (chunks - 1) * chunk
        return F.pad(y.repeat_interleave(1 << level, dim=1), (0, 0, late, 0))[:, :frames]


class Head(nn.Module):
    """A convolution and a projection; its own for each question."""

    def __init__(self, name: str, width: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.conv = Conv(name, width, hidden, bias=False)
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor, mask: Tensor, reach: Reach) -> Tensor:
        y: Tensor = self.out(F.gelu(self.norm(self.conv(x, mask, reach))))
        return y


class Detector(nn.Module):
    """`forward` reads whole sequences, `step` one chunk after a state: the same weights and code.

    `chunk`, in frames, may be set to any power of two up to that of the shape: trained with several, the same
    weights serve several latencies.
    """

    def __init__(self, shape: DetectorShape) -> None:
        super().__init__()
        self.shape, self.chunk = shape, shape.pyramid.chunk
        pyramid = shape.pyramid
        width, hidden = pyramid.width, shape.head_width or pyramid.width
        self.front: SignalFront | FeatureFront | BeatFront
        if shape.beats:
            self.front = BeatFront(shape.channels, shape.hop, width, shape.beats, shape.sample_rate)
        elif shape.hop:
            self.front = SignalFront(shape.channels, shape.hop, width, shape.stem_width)
        else:
            self.front = FeatureFront(shape.channels, width)
        self.pyramid = Pyramid(pyramid)
        self.fusion = Fusion(pyramid)
        self.ongoing = Head("head.ongoing", width, hidden, shape.classes)
        self.start = Head("head.start", width, hidden, shape.classes + 1)
        self.end = Head("head.end", width, hidden, shape.classes + 2)
        self.dropout = Dropout(pyramid.dropout)
        bias = -math.log((1 - shape.prior) / shape.prior)
        for head in (self.ongoing, self.start, self.end):
            nn.init.constant_(head.out.bias[: shape.classes], bias)

    @property
    def hop(self) -> int:
        """Samples a frame."""
        return max(1, self.shape.hop)

    @property
    def period(self) -> int:
        """Frames after which the pyramid's strides repeat; whole sequences are multiples of it."""
        return max(1 << (self.shape.pyramid.levels - 1), self.chunk)

    def forward(self, samples: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """`samples` [B, N * hop, C], `mask` [B, N] (1: the frame is there) -> each output [B, N, ...].

        Logits for the classes; what `look_back` turns into offsets, back from the frame's end, t + 1.
        N is padded to a whole period with missing frames here.
        """
        frames = mask.shape[1]
        spill = -frames % self.period
        if spill:
            samples, mask = F.pad(samples, (0, 0, 0, spill * self.hop)), F.pad(mask, (0, spill))
        outputs = self._run(samples, mask.to(samples.dtype), Memory(), None)
        return {name: value[:, :frames] for name, value in outputs.items()}

    def step(
        self, samples: Tensor, mask: Tensor, state: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One chunk: `samples` [B, chunk * hop, C], `mask` [B, chunk] -> outputs [B, chunk, ...], state."""
        memory = Memory(state)
        phase = state["phase"]
        outputs = self._run(samples, mask.to(samples.dtype), memory, phase)
        chunks = self.period // self.chunk
        ahead = phase + 1.0
        memory.remember("phase", ahead - torch.floor(ahead / chunks) * chunks)
        return outputs, memory.new

    def zero_state(self, batch: int) -> dict[str, Tensor]:
        """The state of `batch` streams that begin: name -> zeros [B, length, D]."""
        reference = next(self.parameters())
        memory = _Blank()
        with torch.no_grad():
            samples = reference.new_zeros(batch, self.chunk * self.hop, self.shape.channels)
            phase = reference.new_zeros(batch, 1, 1)
            self._run(samples, reference.new_zeros(batch, self.chunk), memory, phase)
        memory.new["phase"] = phase
        return {name: torch.zeros_like(value) for name, value in memory.new.items()}

    def _run(self, samples: Tensor, mask: Tensor, memory: Memory, phase: Tensor | None) -> dict[str, Tensor]:
        present = mask[..., None]
        reaches = self.pyramid.reaches(memory, phase, self.chunk)
        x = self.front(samples, present, reaches[0])
        x = self.dropout(self.fusion(self.pyramid(x, present, reaches), reaches, self.chunk))
        classes = self.shape.classes
        ongoing = self.ongoing(x, present, reaches[0])
        start = self.start(x, present, reaches[0])
        end = self.end(x, present, reaches[0])
        return {
            "ongoing": ongoing,
            "start": start[..., :classes],
            "start_offset": start[..., classes:],
            "end": end[..., :classes],
            "end_offsets": end[..., classes:],
        }


def look_back(outputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Frames since a start [B, N], and since the start and the end of what ended [B, N, 2], all >= 0.

    The end lies a few frames back; the start lies before it at any distance, so its logarithm is what the
    head says (the clamp only keeps exp() finite). `stream.decoder` computes the same: in the graph, these
    functions would round a stream's offsets by its place in the batch.
    """
    back = F.softplus(outputs["end_offsets"][..., :1])
    length = torch.exp(outputs["end_offsets"][..., 1:].clamp(-4.0, 10.0))
    return F.softplus(outputs["start_offset"][..., 0]), torch.cat([back + length, back], dim=-1)


class _Blank(Memory):
    """A memory that is empty and takes part in a step: tells which states a detector has."""

    def recall(self, name: str, like: Tensor, length: int) -> Tensor:
        return like.new_zeros(like.shape[0], length, like.shape[2])
