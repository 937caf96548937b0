"""Fronts: from what arrives to the frames of the pyramid, [B, N, width]. Causal in both contexts.

`SignalFront` takes raw samples: normalisation with the training set's statistics, the first differences
beside the samples (so that level and change are both seen), and strided convolutions down to the frame rate.
`FeatureFront` takes feature vectors as they are; `trainer.beats` has a third.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.blocks import Conv, Reach


def strides(hop: int) -> list[int]:
    """`hop` as a product of convolution strides of about 2 to 5: 10 -> [2, 5], 16 -> [4, 4], 1 -> []."""
    factors: list[int] = []
    rest, prime = hop, 2
    while rest > 1:
        if prime * prime > rest:
            prime = rest
        while rest % prime == 0:
            factors.append(prime)
            rest //= prime
        prime += 1
    merged: list[int] = []
    for factor in factors:
        if merged and merged[-1] * factor <= 5:
            merged[-1] *= factor
        else:
            merged.append(factor)
    return merged


class StridedConv(nn.Module):
    """A convolution of kernel 2 * stride: an output covers its own samples and as many before them."""

    def __init__(self, name: str, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = Conv(name, stride * width_in, width_out, kernel=2)
        self.norm = nn.LayerNorm(width_out)

    def forward(self, x: Tensor, mask: Tensor, reach: Reach) -> Tensor:
        """`x` [B, T * stride, D_in], `mask` [B, T, 1] -> [B, T, D_out]."""
        x = x.reshape(x.shape[0], mask.shape[1], x.shape[2] * self.stride)
        return F.gelu(self.norm(self.conv(x, mask, reach))) * mask


def differences(x: Tensor, present: Tensor, past: Reach) -> Tensor:
    """x[t] - x[t - 1], [B, T, C]; 0 where either is missing, since a difference to nothing says nothing.

    `present` [B, T, 1] is 1 where there is a sample.
    """
    assert past.memory is not None
    before = past.memory.extend("front.sample", torch.cat([x, present], dim=-1), 1)[:, :-1]
    return (x - before[..., :-1]) * present * before[..., -1:]


class SignalFront(nn.Module):
    """Raw samples [B, N * hop, C] and a mask of frames [B, N, 1] -> frames [B, N, width]."""

    mean: Tensor
    scale: Tensor
    step_scale: Tensor

    def __init__(self, channels: int, hop: int, width: int, stem_width: int) -> None:
        super().__init__()
        self.channels, self.hop = channels, hop
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("step_scale", torch.ones(channels))
        self.strides = stages = strides(hop) or [1]
        widths = [
            2 * channels,
            *[max(stem_width, width >> (len(stages) - 1 - i)) for i in range(len(stages))],
        ]
        widths[-1] = width
        self.stages = nn.ModuleList(
            StridedConv(f"front.{i}", widths[i], widths[i + 1], stride) for i, stride in enumerate(stages)
        )

    def normalise_with(self, mean: Tensor, std: Tensor, step_std: Tensor) -> None:
        """Set the statistics of the training set: of samples, and of their first differences; each [C]."""
        self.mean.copy_(mean)
        self.scale.copy_(1.0 / std.clamp_min(1e-6))
        self.step_scale.copy_(1.0 / step_std.clamp_min(1e-6))

    def forward(self, samples: Tensor, mask: Tensor, reach: Reach) -> Tensor:
        present = mask.repeat_interleave(self.hop, dim=1) if self.hop > 1 else mask
        x = (samples - self.mean) * present
        past = Reach(reach.memory, 1)
        step = differences(x, present, past)
        x = torch.cat([x * self.scale, step * self.step_scale], dim=-1)
        length = x.shape[1]
        for stage, stride in zip(self.stages, self.strides, strict=True):
            length //= stride
            ratio = length // mask.shape[1]
            x = stage(x, mask.repeat_interleave(ratio, dim=1) if ratio > 1 else mask, past)
        return x


class FeatureFront(nn.Module):
    """Feature vectors [B, N, C] -> frames [B, N, width]: normalisation and a projection."""

    mean: Tensor
    scale: Tensor

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.channels, self.hop = channels, 1
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))
        self.project = nn.Linear(channels, width)

    def normalise_with(self, mean: Tensor, std: Tensor, step_std: Tensor) -> None:
        """Set the statistics of the training set; each [C]. Differences are not used here."""
        self.mean.copy_(mean)
        self.scale.copy_(1.0 / std.clamp_min(1e-6))

    def forward(self, samples: Tensor, mask: Tensor, reach: Reach) -> Tensor:
        y: Tensor = self.project((samples - self.mean) * self.scale) * mask
        return y
