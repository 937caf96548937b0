"""The pyramid in full context, with ActionFormer's heads: every moment of every level classifies itself and
regresses the distances to the start and to the end of its action (ActionFormer, ECCV 2022, section 3.3).

The blocks are those of the causal detector; only the context differs. The weights of the official code's
checkpoints load by name (`official_weights`), which is how the blocks are held to its numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.blocks import Conv, Reach
from trainer.pyramid import Pyramid, PyramidShape


@dataclass(frozen=True)
class Level:
    """One level's answers: `cls_logits` [B, T_l, K], `offsets` [B, T_l, 2] (strides), `mask` [B, T_l]."""

    cls_logits: Tensor
    offsets: Tensor
    mask: Tensor


class LevelHead(nn.Module):
    """Convolutions shared by all levels, each with a norm, and a last one for the answer."""

    def __init__(self, width: int, outputs: int, layers: int = 3) -> None:
        super().__init__()
        self.convs = nn.ModuleList(Conv("", width, width, bias=False) for _ in range(layers - 1))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers - 1))
        self.out = Conv("", width, outputs)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        reach = Reach(None, 1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x, mask, reach)))
        y: Tensor = self.out(x, mask, reach)
        return y


class OfflineDetector(nn.Module):
    """Reads whole recordings. `shape.inputs` is the width of the features, `shape.window` one side."""

    def __init__(self, shape: PyramidShape, classes: int) -> None:
        super().__init__()
        self.pyramid = Pyramid(shape)
        self.norms = nn.ModuleList(nn.LayerNorm(shape.width) for _ in range(shape.levels))
        self.classify = LevelHead(shape.width, classes)
        self.regress = LevelHead(shape.width, 2)
        self.scale = nn.Parameter(torch.ones(shape.levels))

    def forward(self, features: Tensor, mask: Tensor) -> list[Level]:
        """`features` [B, T, C], `mask` [B, T]; T is a multiple of the coarsest stride."""
        present = mask.to(features.dtype)[..., None]
        levels = self.pyramid(features, present, self.pyramid.reaches(None, None))
        answers = []
        for level, (x, there) in enumerate(levels):
            x = self.norms[level](x)
            offsets = torch.relu(self.regress(x, there) * self.scale[level])
            answers.append(Level(self.classify(x, there), offsets, there[..., 0] > 0))
        return answers


def official_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official code's state dict (identity neck, transformer backbone) under the names used here.

    Convolutions turn from [out, in, kernel] to [kernel * in, out], depthwise ones to [kernel, channels],
    norms from [1, C, 1] to [C].
    """
    renamed: dict[str, Tensor] = {}
    scales: dict[int, Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix("module.")
        if name.startswith("reg_head.scale."):
            scales[int(name.split(".")[2])] = value
            continue
        for old, new in _NAMES:
            name = name.replace(old, new)
        if "_conv.weight" in name:
            value = value[:, 0].T
        elif value.ndim == 3 and value.shape[0] == 1 and "norm" in name:
            value = value[0, :, 0]
        elif value.ndim == 3 and value.shape[2] == 1:
            value = value[:, :, 0]
        elif value.ndim == 3:
            value = value.permute(2, 1, 0).reshape(-1, value.shape[0])
        renamed[name] = value.contiguous()
    renamed["scale"] = torch.stack([scales[level] for level in sorted(scales)]).reshape(-1)
    return renamed


_NAMES = (
    ("backbone.embd_norm.", "pyramid.embed_norm."),
    ("backbone.embd.", "pyramid.embed."),
    ("backbone.", "pyramid."),
    (".attn.", ".attention."),
    (".ln1.", ".norm1."),
    (".ln2.", ".norm2."),
    ("neck.fpn_norms.", "norms."),
    ("cls_head.cls_head.", "classify.out."),
    ("reg_head.offset_head.", "regress.out."),
    ("cls_head.head.", "classify.convs."),
    ("reg_head.head.", "regress.convs."),
    ("cls_head.norm.", "classify.norms."),
    ("reg_head.norm.", "regress.norms."),
    (".conv.weight", ".weight"),
    (".conv.bias", ".bias"),
)
