"""The blocks of the pyramid, each in two contexts.

`full` is ActionFormer's (Zhang, Wu, Li: ActionFormer, ECCV 2022, section 3; layer by layer as its official
configuration describes it): convolutions see both sides, attention sees a window around the query. `causal`
has the same weights: convolutions see the left side only, and a query sees at most `window` tokens back
and no token that had not arrived when its chunk was complete.

Tokens are [B, T, D], masks [B, T, 1] (1 where there is a token). Convolutions are written as sums of shifted
products, so that the exported step is matrix products and elementwise arithmetic only, and so that a whole
sequence needs no copy of itself for every tap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.memory import Memory
from trainer.products import Linear, slide

# Added to the score of a key that a query may not see. exp(-1e4) is 0 in every precision, and half
# precision can hold it, which -inf followed by a softmax over nothing cannot survive.
HIDDEN = -1e4


@dataclass(frozen=True)
class Reach:
    """What a layer sees of time on one level. `memory` None: full context.

    `chunk`: tokens of this level that a chunk brings (1 where a token takes several chunks).
    `exists` [B, 1, 1]: see `Memory.extend`; None where every step brings whole tokens.
    """

    memory: Memory | None
    chunk: int
    exists: Tensor | None = None


def taps(x: Tensor, kernel: int, stride: int, name: str, reach: Reach, exists: Tensor | None) -> list[Tensor]:
    """The `kernel` shifted views of `x` [B, T, D] that a convolution sums over, each [B, T / stride, D].

    Full context: tap k of output j is x[j * stride + k - kernel // 2]. Causal: the last tap of output j is
    the last token that it covers, x[j * stride + stride - 1]. One token with stride 2 gives one output, which
    the caller knows to exist only every second time.
    """
    length = x.shape[1]
    if reach.memory is None:
        x = F.pad(x, (0, 0, kernel // 2, kernel // 2))
        return [x[:, k : k + length : stride] for k in range(kernel)]
    x = reach.memory.extend(name, x, kernel - 1, exists)
    if length == 1:
        return [x[:, k : k + 1] for k in range(kernel)]
    return [x[:, stride - 1 + k : stride - 1 + k + length - (stride - 1) : stride] for k in range(kernel)]


class Conv(nn.Module):
    """A dense convolution over time; weight [kernel, D_in, D_out]."""

    def __init__(
        self, name: str, width_in: int, width_out: int, kernel: int = 3, bias: bool = True, stride: int = 1
    ) -> None:
        super().__init__()
        self.name, self.kernel, self.stride = name, kernel, stride
        self.weight = nn.Parameter(torch.empty(kernel * width_in, width_out))
        self.bias = nn.Parameter(torch.zeros(width_out)) if bias else None
        nn.init.kaiming_uniform_(self.weight.T, a=math.sqrt(5))

    def forward(self, x: Tensor, mask: Tensor, reach: Reach) -> Tensor:
        """[B, T, D_in] -> [B, T / stride, D_out], zero where `mask` [B, T / stride, 1] is."""
        if self.stride > 1:
            views = taps(x, self.kernel, self.stride, self.name, reach, reach.exists)
            y = torch.cat(views, dim=-1) @ self.weight
        elif reach.memory is None:
            side = self.kernel // 2
            y = slide(F.pad(x, (0, 0, side, side)), self.weight, self.kernel)
        else:
            x = reach.memory.extend(self.name, x, self.kernel - 1, reach.exists)
            y = slide(x, self.weight, self.kernel)
        if self.bias is not None:
            y = y + self.bias
        return y * mask


class DepthwiseConv(nn.Module):
    """A convolution of each channel by itself; weight [kernel, D]."""

    def __init__(self, width: int, kernel: int = 3, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(kernel, width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        nn.init.uniform_(self.weight, -1 / math.sqrt(kernel), 1 / math.sqrt(kernel))

    def forward(self, views: list[Tensor]) -> Tensor:
        """The views of `taps`, each [B, T, D] -> [B, T, D]."""
        y = views[0] * self.weight[0]
        for k in range(1, len(views)):
            y = torch.addcmul(y, views[k], self.weight[k])
        return y if self.bias is None else y + self.bias


def visible(length: int, window: int, ahead: int, chunk: int, causal: bool, device: torch.device) -> Tensor:
    """Which keys a block of `length` queries may see: bool [length, window + length + ahead].

    Key column j stands for the token j - window of the block (column `window` is the block's first token).
    """
    query = torch.arange(length, device=device)[:, None]
    key = torch.arange(-window, length + ahead, device=device)[None, :]
    back = query - key
    if causal:
        return (back <= window) & (key < (query // chunk + 1) * chunk)
    return back.abs() <= window


class Dropout(nn.Module):
    """`nn.Dropout` at a third of its cost on a CPU, where what is dropped would be drawn one by one: a byte
    of a random word decides for each number, so that the rate is the nearest multiple of 1 / 256."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.dropped = min(255, round(256 * rate))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.dropped:
            return x
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device)
        words.random_(-(2**63), None)  # the whole range: else the highest bit would never be set
        kept = words.view(torch.uint8)[: x.numel()].reshape(x.shape) >= self.dropped
        return x * (kept.to(x.dtype) * (256 / (256 - self.dropped)))


class LocalAttention(nn.Module):
    """Multi-head attention within a window, behind depthwise convolutions (ActionFormer, section 3.2).

    `window`: tokens back in causal context, tokens to either side in full context (their 19 is a 9 here);
    0 there: every token sees every other. `ahead`: the most tokens ahead that a query may see, within its
    chunk (causal) or its window (full). A stride of s makes one token of s. `relative` adds a learned bias
    for each distance and head.
    """

    def __init__(
        self,
        name: str,
        width: int,
        heads: int,
        window: int,
        ahead: int,
        stride: int,
        relative: bool,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.name, self.heads, self.window, self.stride = name, heads, window, stride
        self.kernel = stride + 1 if stride > 1 else 3
        for part in ("query", "key", "value"):
            self.add_module(f"{part}_conv", DepthwiseConv(width, self.kernel))
            self.add_module(f"{part}_norm", nn.LayerNorm(width))
            self.add_module(part, Linear(width, width))
        self.proj = Linear(width, width)
        self.dropout = Dropout(dropout)
        self.ahead = ahead
        self.bias = nn.Parameter(torch.zeros(heads, window + ahead + 1)) if relative else None

    def _project(self, part: str, views: list[Tensor], mask: Tensor) -> Tensor:
        conv, norm, linear = (getattr(self, f"{part}{end}") for end in ("_conv", "_norm", ""))
        y: Tensor = linear(norm(conv(views) * mask))
        return y

    def forward(self, x: Tensor, mask: Tensor, reach: Reach, exists_in: Tensor | None) -> Tensor:
        """`x` [B, T, D] on the finer level, `mask` [B, T / stride, 1] -> [B, T / stride, D].

        `reach` is that of the output's level; `exists_in` tells whether the input's tokens exist.
        """
        views = taps(x, self.kernel, self.stride, f"{self.name}.conv", reach, exists_in)
        query, key, value = (self._project(part, views, mask) for part in ("query", "key", "value"))
        window, length = self.window, query.shape[1]
        if window == 0 and reach.memory is None:
            return self._everywhere(query, key, value, mask)
        # Blocks of queries: a step is one block; a sequence is cut at chunk borders, so that no block needs
        # a key to its right in causal context.
        block = min(length, -(-max(window, 16) // reach.chunk) * reach.chunk)
        blocks = -(-length // block)
        spill = blocks * block - length
        ahead = 0 if reach.memory is not None else window
        if reach.memory is not None:
            key = reach.memory.extend(f"{self.name}.key", key, window, reach.exists)
            value = reach.memory.extend(f"{self.name}.value", value, window, reach.exists)
            keep = reach.memory.extend(f"{self.name}.mask", mask, window, reach.exists)
            sides = (0, spill)
        else:
            keep, sides = mask, (window, window + spill)
        if blocks > 1 or reach.memory is None:
            key, value, keep = (F.pad(t, (0, 0, *sides)) for t in (key, value, keep))
            query = F.pad(query, (0, 0, 0, spill))
            span = window + block + ahead
            key, value, keep = (t.unfold(1, span, block).transpose(2, 3) for t in (key, value, keep))
        else:
            span = window + block
            key, value, keep = (t.unsqueeze(1) for t in (key, value, keep))
        batch, width = x.shape[0], x.shape[2]
        head = width // self.heads
        query = query.reshape(batch, blocks, block, self.heads, head).transpose(2, 3)
        key = key.reshape(batch, blocks, span, self.heads, head).permute(0, 1, 3, 4, 2)
        value = value.reshape(batch, blocks, span, self.heads, head).transpose(2, 3)
        score = (query * (1.0 / math.sqrt(head))) @ key  # [B, blocks, H, block, span]
        allowed = visible(block, window, ahead, reach.chunk, reach.memory is not None, x.device)
        score = score + (1.0 - keep.reshape(batch, blocks, 1, 1, span)) * HIDDEN
        score = score + self._bias(block, span, allowed, score)
        y = (score.softmax(dim=-1) @ value).transpose(2, 3).reshape(batch, blocks * block, width)
        if spill:
            y = y[:, :length]
        result: Tensor = self.dropout(self.proj(y)) * mask
        return result

    def _everywhere(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Global attention: [B, T, D] each, `mask` [B, T, 1] -> [B, T, D]."""
        batch, length, width = query.shape
        parts = [
            t.reshape(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for t in (query, key, value)
        ]
        hidden = ((1.0 - mask) * HIDDEN).reshape(batch, 1, 1, length)
        y = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], attn_mask=hidden)
        result: Tensor = self.dropout(self.proj(y.transpose(1, 2).reshape(batch, length, width))) * mask
        return result

    def _bias(self, block: int, span: int, allowed: Tensor, like: Tensor) -> Tensor:
        """[H or 1, block, span]: the learned bias of each distance, HIDDEN where not allowed."""
        hidden = torch.where(allowed, 0.0, HIDDEN).to(like.dtype)[None]
        if self.bias is None:
            return hidden
        query = torch.arange(block, device=like.device)[:, None]
        key = torch.arange(span, device=like.device)[None, :] - self.window
        distance = (query - key + self.ahead).clamp(0, self.window + self.ahead)
        biased: Tensor = self.bias[:, distance] + hidden
        return biased


class DropPath(nn.Module):
    """Drops a residual branch of a whole sample in training (stochastic depth), after a learned scale."""

    def __init__(self, width: int, rate: float, scale: float = 1e-4) -> None:
        super().__init__()
        self.rate = rate
        self.scale = nn.Parameter(torch.full((width,), scale)) if rate > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            return x
        x = x * self.scale
        if not self.training:
            return x
        keep = 1.0 - self.rate
        return x * (torch.rand(x.shape[0], 1, 1, device=x.device) < keep).to(x.dtype) / keep


class Block(nn.Module):
    """One transformer block: local attention and a perceptron, each behind a norm and beside a skip."""

    def __init__(
        self,
        name: str,
        width: int,
        heads: int,
        window: int,
        ahead: int,
        stride: int = 1,
        expansion: int = 4,
        relative: bool = False,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.name, self.stride = name, stride
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = LocalAttention(
            f"{name}.attention", width, heads, window, ahead, stride, relative, attention_dropout
        )
        self.mlp = nn.Sequential(
            Linear(width, expansion * width),
            nn.GELU(),
            Dropout(dropout),
            Linear(expansion * width, width),
            Dropout(dropout),
        )
        self.path1, self.path2 = DropPath(width, drop_path), DropPath(width, drop_path)

    def forward(
        self, x: Tensor, mask_in: Tensor, mask: Tensor, reach: Reach, exists_in: Tensor | None
    ) -> Tensor:
        """`x` [B, T, D], `mask_in` [B, T, 1], `mask` [B, T / stride, 1] -> [B, T / stride, D]."""
        y = self.norm1(x)
        if reach.memory is not None:
            y = y * mask_in  # a missing token is zero to its successors; ActionFormer leaves the norm's bias
        y = self.attention(y, mask, reach, exists_in)
        skip = x
        if self.stride > 1 and reach.memory is None:
            # Padded below every number, which the zeros of `taps` are not.
            side = (self.stride + 1) // 2
            padded = F.pad(x, (0, 0, side, side), value=-math.inf)
            skip = padded[:, : x.shape[1] : self.stride]
            for k in range(1, self.stride + 1):
                skip = torch.maximum(skip, padded[:, k : k + x.shape[1] : self.stride])
        elif self.stride > 1:
            views = taps(x, 3, self.stride, f"{self.name}.skip", reach, exists_in)
            skip = torch.maximum(torch.maximum(views[0], views[1]), views[2])
        x = skip * mask + self.path1(y)
        result: Tensor = x + self.path2(self.mlp(self.norm2(x)) * mask)
        return result
