"""The causal local-attention pyramid: frames in, one sequence of tokens for each level out.

Level l has one token for every 2^l frames, anchored at frame 0 of the stream. A token exists once its last
frame has arrived; in a step whose chunk is shorter than the stride, the phase (how many chunks of the stride
have passed) says for each stream whether a token of the level has just come to exist. The pyramid in full
context, with the same blocks, is `trainer.offline`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.blocks import Block, Conv, Reach
from trainer.memory import Memory


@dataclass(frozen=True)
class PyramidShape:
    """Sizes. `chunk` is in frames, the largest that the weights serve; `window` in tokens of each level."""

    width: int
    heads: int
    window: int
    levels: int
    stem: int = 2
    embed: int = 2
    expansion: int = 4
    chunk: int = 1
    relative: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0


class Pyramid(nn.Module):
    """`embed` convolutions and `stem` blocks on level 0, then one halving block for each further level."""

    def __init__(self, shape: PyramidShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.ModuleList(
            Conv(f"embed.{i}", shape.width, shape.width, bias=False) for i in range(shape.embed)
        )
        self.embed_norm = nn.ModuleList(nn.LayerNorm(shape.width) for _ in range(shape.embed))
        self.stem = nn.ModuleList(self._block(f"stem.{i}", level=0, stride=1) for i in range(shape.stem))
        self.branch = nn.ModuleList(
            self._block(f"branch.{level}", level, stride=2) for level in range(1, shape.levels)
        )

    def _block(self, name: str, level: int, stride: int) -> Block:
        shape = self.shape
        return Block(
            name,
            shape.width,
            shape.heads,
            shape.window,
            max(1, shape.chunk >> level) - 1,  # the rest of the largest chunk that a query is in
            stride,
            shape.expansion,
            shape.relative,
            shape.dropout,
            shape.drop_path,
        )

    def reaches(self, memory: Memory, phase: Tensor | None, chunk: int) -> list[Reach]:
        """What each level's layers see where `chunk` frames come at once; `phase` [B, 1, 1]: whole chunks so
        far, before this one; None in whole sequences, in which every level's tokens exist."""
        reaches = []
        for level in range(self.shape.levels):
            chunks = (1 << level) // chunk  # chunks that one token takes
            exists = None
            if phase is not None and chunks > 1:
                passed = (phase + 1.0) / chunks
                exists = (passed == torch.floor(passed)).to(phase.dtype)
            reaches.append(Reach(memory, max(1, chunk >> level), exists))
        return reaches

    def forward(self, x: Tensor, mask: Tensor, reaches: list[Reach]) -> list[tuple[Tensor, Tensor]]:
        """Frames [B, N, D] and their mask [B, N, 1] -> for each level its tokens [B, T_l, D] and mask."""
        for conv, norm in zip(self.embed, self.embed_norm, strict=True):
            # As in `Block`: ActionFormer lets the norm's bias stand where nothing is.
            x = torch.relu(norm(conv(x, mask, reaches[0]))) * mask
        for block in self.stem:
            x = block(x, mask, mask, reaches[0], None)
        levels = [(x, mask)]
        for level, block in enumerate(self.branch, start=1):
            finer, reach = reaches[level - 1], reaches[level]
            coarse = halve(mask, f"mask.{level}", finer)
            x = block(x, mask, coarse, reach, finer.exists)
            mask = coarse
            levels.append((x, mask))
        return levels


def halve(mask: Tensor, name: str, reach: Reach) -> Tensor:
    """The mask of the next level: a token is there if any of its frames is."""
    assert reach.memory is not None
    joined = reach.memory.extend(name, mask, 1, reach.exists)
    if mask.shape[1] == 1:
        return torch.maximum(joined[:, :1], joined[:, 1:])
    return torch.maximum(mask[:, ::2], mask[:, 1::2])
