"""The detector in full context: ActionFormer, number for number (Zhang, Wu, Li, ECCV 2022, section 3).

Every moment of every level of the pyramid classifies itself and regresses the distances to the start and to
the end of its action. The blocks are those of the causal detector; only the context differs.

The official code pads a clip to a fixed length, and its numbers near the clip's end show it: norms have
biases, which stand where nothing is and reach back into the clip through the next convolution. What stands
there is the same everywhere, though, so a few tokens of padding on the coarsest level give the same numbers
as all of it, at a fraction of the cost (`OfflineDetector._cover`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from engine.errors import DataError
from engine.suppression import suppress
from trainer.beats import BeatFront
from trainer.blocks import Block, Conv, DepthwiseConv, Reach
from trainer.front import FeatureFront, SignalFront
from trainer.memory import Memory
from trainer.moments import decode, to_seconds
from trainer.recipe import ModelRecipe, Recipe

FULL = Reach(None, 1)


class Level(NamedTuple):
    """One level's answers: `cls_logits` [B, T_l, K], `offsets` [B, T_l, 2] (in strides), `mask` [B, T_l]."""

    cls_logits: Tensor
    offsets: Tensor
    mask: Tensor


class Detections(NamedTuple):
    """What was found in one recording: `segments` [N, 2] in seconds, `scores` [N], `labels` [N]."""

    segments: Tensor
    scores: Tensor
    labels: Tensor


class ConvBlock(nn.Module):
    """Two convolutions beside a skip: the block of the backbone without attention."""

    def __init__(self, width: int, stride: int, expansion: int = 2) -> None:
        super().__init__()
        self.conv1 = Conv("", width, expansion * width, stride=stride)
        self.conv2 = Conv("", expansion * width, width)
        self.downsample = Conv("", width, width, kernel=1, stride=stride) if stride > 1 else None

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`x` [B, T, D], `mask` [B, T / stride, 1] -> [B, T / stride, D]."""
        y = self.conv2(torch.relu(self.conv1(x, mask, FULL)), mask, FULL)
        skip = x if self.downsample is None else self.downsample(x, mask, FULL)
        result: Tensor = torch.relu(y + skip)
        return result


def sinusoids(length: int, width: int) -> Tensor:
    """Absolute positions [length, width] (Vaswani et al., 2017, section 3.5), over the root of the width."""
    place = np.arange(length)[:, None] / np.power(10000, 2 * (np.arange(width) // 2) / width)
    place[:, 0::2], place[:, 1::2] = np.sin(place[:, 0::2]), np.cos(place[:, 1::2])
    table: Tensor = torch.from_numpy(place).float() / width**0.5
    return table


class Backbone(nn.Module):
    """Features to one sequence of tokens for each level; a level's stride is a power of `scale_factor`."""

    positions: Tensor

    def __init__(self, recipe: Recipe, expansion: int) -> None:
        super().__init__()
        model, train = recipe.model, recipe.train_cfg
        width, inputs = model.width, sum(recipe.dataset.inputs)
        self.scale, self.longest = model.scale_factor, recipe.dataset.max_seq_len
        self.inputs = recipe.dataset.inputs
        self.proj: nn.ModuleList | None = None
        if not isinstance(recipe.dataset.input_dim, int):
            pairs = zip(self.inputs, model.widths, strict=True)
            self.proj = nn.ModuleList(Conv("", wide, narrow, kernel=1) for wide, narrow in pairs)
            inputs = width
        count, stems, branches = model.backbone_arch
        normed = model.embd_with_ln
        self.embed = nn.ModuleList(
            Conv("", inputs if i == 0 else width, width, model.embd_kernel_size, bias=not normed)
            for i in range(count)
        )
        self.embed_norm = nn.ModuleList(nn.LayerNorm(width) if normed else nn.Identity() for _ in self.embed)
        self.absolute = model.use_abs_pe and model.backbone_type == "convTransformer"
        if self.absolute:
            self.register_buffer("positions", sinusoids(self.longest, width), persistent=False)

        def block(level: int, stride: int) -> nn.Module:
            if model.backbone_type == "conv":
                return ConvBlock(width, stride)
            side = model.windows[level] // 2 if model.windows[level] > 1 else 0
            return Block(
                f"level.{level}",
                width,
                model.n_head,
                side,
                side,
                stride,
                expansion,
                relative=model.use_rel_pe and side > 0,
                dropout=train.dropout,
                drop_path=train.droppath,
                attention_dropout=train.dropout,
            )

        self.stem = nn.ModuleList(block(0, 1) for _ in range(stems))
        self.branch = nn.ModuleList(block(level, self.scale) for level in range(1, branches + 1))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            elif isinstance(module, Block) and module.attention.bias is not None:
                nn.init.trunc_normal_(module.attention.bias, std=(2.0 / width) ** 0.5)

    def forward(self, x: Tensor, mask: Tensor, padded: list[int]) -> list[tuple[Tensor, Tensor]]:
        """`x` [B, T, C], `mask` [B, T, 1] -> for each level its tokens [B, T_l, D] and mask [B, T_l, 1].

        `padded`: the length to which the official code would have padded each clip, over which it stretches
        the positions.
        """
        if self.proj is not None:
            parts = torch.split(x, list(self.inputs), dim=2)
            x = torch.cat([p(part, mask, FULL) for p, part in zip(self.proj, parts, strict=True)], dim=2)
        for conv, norm in zip(self.embed, self.embed_norm, strict=True):
            x = torch.relu(norm(conv(x, mask, FULL)))
        if self.absolute:
            x = x + self._positions(padded, x.shape[1]) * mask
        for block in self.stem:
            x = self._through(block, x, mask, mask)
        levels = [(x, mask)]
        for block in self.branch:
            coarse = mask[:, :: self.scale]  # a token is there if its first one is
            x, mask = self._through(block, x, mask, coarse), coarse
            levels.append((x, mask))
        return levels

    def _positions(self, padded: list[int], length: int) -> Tensor:
        """[B or 1, length, D]; what lies beyond a clip's own padded length is masked, and zero here."""
        tables = {}
        for size in set(padded):
            table = self.positions
            if not self.training and size > self.longest:
                table = F.interpolate(table.T[None], size, mode="linear", align_corners=False)[0].T
            tables[size] = F.pad(table[:length], (0, 0, 0, max(0, length - len(table))))
        if len(tables) == 1:
            return tables[padded[0]][None]
        return torch.stack([tables[size] for size in padded])

    @staticmethod
    def _through(block: nn.Module, x: Tensor, mask_in: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = block(x, mask_in, mask, FULL, None) if isinstance(block, Block) else block(x, mask)
        return y


class Neck(nn.Module):
    """A norm for each level (`identity`), after a top-down pass of sums in the feature pyramid (`fpn`)."""

    def __init__(self, model: ModelRecipe) -> None:
        super().__init__()
        levels, width, normed = len(model.strides), model.width, model.fpn_with_ln
        self.start, self.scale = model.fpn_start_level, model.scale_factor
        self.laterals: nn.ModuleList | None = None
        if model.fpn_type == "fpn":
            self.laterals = nn.ModuleList(
                Conv("", width, model.fpn_dim, kernel=1, bias=not normed) for _ in range(levels)
            )
            self.convs = nn.ModuleList(DepthwiseConv(model.fpn_dim, bias=not normed) for _ in range(levels))
        self.norms = nn.ModuleList(
            nn.LayerNorm(model.fpn_dim) if normed else nn.Identity() for _ in range(levels)
        )

    def forward(self, levels: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """[(tokens [B, T_l, D], mask)] of the backbone -> the same of the levels that the heads see."""
        levels = levels[self.start :]
        xs, masks = [x for x, _ in levels], [mask for _, mask in levels]
        if self.laterals is not None:
            xs = [lateral(x, m, FULL) for lateral, x, m in zip(self.laterals, xs, masks, strict=True)]
            for i in range(len(xs) - 1, 0, -1):
                xs[i - 1] = xs[i - 1] + xs[i].repeat_interleave(self.scale, dim=1)
            xs = [conv(_beside(x)) * m for conv, x, m in zip(self.convs, xs, masks, strict=True)]
        return [(norm(x), m) for norm, x, m in zip(self.norms, xs, masks, strict=True)]


def _beside(x: Tensor) -> list[Tensor]:
    padded = F.pad(x, (0, 0, 1, 1))
    return [padded[:, k : k + x.shape[1]] for k in range(3)]


class LevelHead(nn.Module):
    """Convolutions shared by all levels, each with a norm, and a last one for the answer."""

    def __init__(self, model: ModelRecipe, outputs: int) -> None:
        super().__init__()
        hidden, kernel, normed = model.head_dim, model.head_kernel_size, model.head_with_ln
        widths = [model.fpn_dim, *[hidden] * (model.head_num_layers - 1)]
        self.convs = nn.ModuleList(Conv("", width, hidden, kernel, bias=not normed) for width in widths[:-1])
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) if normed else nn.Identity() for _ in self.convs)
        self.out = Conv("", hidden, outputs, kernel)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, T_l, D] -> [B, T_l, outputs]."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x, mask, FULL)))
        y: Tensor = self.out(x, mask, FULL)
        return y


class OfflineDetector(nn.Module):
    """Reads whole recordings. `trainer.load_official` makes one from an official checkpoint.

    `front` turns what comes in into the features of the recipe (`hop` samples to a frame); None: they come
    as they are. `expansion`: of the perceptrons, in widths.
    """

    def __init__(
        self, recipe: Recipe, front: SignalFront | FeatureFront | BeatFront | None = None, expansion: int = 4
    ) -> None:
        super().__init__()
        self.recipe, self.front = recipe, front
        model, train = recipe.model, recipe.train_cfg
        self.backbone, self.neck = Backbone(recipe, expansion), Neck(model)
        self.classify = LevelHead(model, recipe.dataset.num_classes)
        self.regress = LevelHead(model, 2)
        self.scale = nn.Parameter(torch.ones(len(model.strides)))
        assert self.classify.out.bias is not None
        if train.cls_prior_prob > 0:
            nn.init.constant_(self.classify.out.bias, -np.log(1 / train.cls_prior_prob - 1))
        self.silence(train.head_empty_cls)

    @property
    def hop(self) -> int:
        """Samples a frame."""
        return 1 if self.front is None else self.front.hop

    def silence(self, labels: tuple[int, ...]) -> None:
        """Give classes without training data a bias that keeps them below every threshold."""
        assert self.classify.out.bias is not None
        with torch.no_grad():
            self.classify.out.bias[list(labels)] = -float(np.log((1 - 1e-6) / 1e-6))

    def forward(
        self, frames: Tensor | NDArray[np.float32], lengths: Tensor | list[int] | None = None
    ) -> list[Level]:
        """`frames` [B, T * hop, C], `lengths` [B] in frames (default: T) -> the answers of each level that
        the heads see.

        T_l is what the official code has: its padded length over the level's stride (in training, as short
        as gives the same numbers); what lies beyond a clip's length is zero and not in `mask`. What is
        beyond `lengths` in `frames` is not read.
        """
        x = self._read(frames, 3)
        batch, total = x.shape[0], x.shape[1] // self.hop
        known = [total] * batch if lengths is None else [int(length) for length in torch.as_tensor(lengths)]
        if len(known) != batch or not all(0 < length <= total for length in known):
            raise DataError(f"`lengths` are {known}, expected {batch} numbers of frames from 1 to {total}")
        if self.training:
            return self.answer(x, known)
        padded = self.recipe.padded(max(known))
        answers = []
        for level, stride in zip(self.answer(x, known), self.recipe.model.strides, strict=True):
            rest = padded // stride - level.mask.shape[1]
            logits, offsets = (F.pad(t, (0, 0, 0, rest)) for t in (level.cls_logits, level.offsets))
            answers.append(Level(logits, offsets, F.pad(level.mask, (0, rest))))
        return answers

    def _read(self, frames: Tensor | NDArray[np.float32], rank: int) -> Tensor:
        """`frames` as a tensor of the model's type, on its device. Raises DataError for a wrong shape."""
        array = frames if isinstance(frames, Tensor) else torch.from_numpy(np.array(frames, np.float64))
        x = array.to(self.scale)
        width = sum(self.recipe.dataset.inputs) if self.front is None else self.front.channels
        if x.ndim != rank or x.shape[-1] != width or 0 in x.shape:
            turned = "; transpose them" if x.ndim == rank and x.shape[-2] == width else ""
            expected = ["B", "T", str(width)][3 - rank :]
            raise DataError(
                f"frames are {list(x.shape)}, expected [{', '.join(expected)}] (`dataset.input_dim`){turned}"
            )
        return x

    def answer(self, frames: Tensor, lengths: list[int]) -> list[Level]:
        """As `forward`, with T_l as short as gives the same numbers."""
        longest = max(lengths)
        padded = [self.recipe.padded(length) for length in lengths]
        cover = self._cover(longest, self.recipe.padded(longest))
        frames = frames[:, : cover * self.hop]
        counts = torch.tensor(lengths, device=frames.device)
        there = torch.arange(cover, device=frames.device)[None] < counts[:, None]
        mask = there.to(frames.dtype)[..., None]
        x = F.pad(frames, (0, 0, 0, cover * self.hop - frames.shape[1]))
        if self.front is None:
            x = x.masked_fill(~there[..., None], 0.0)
        else:
            x = self.front(x, mask, Reach(Memory(), 1))
        answers = []
        for level, (y, present) in enumerate(self.neck(self.backbone(x, mask, padded))):
            offsets = torch.relu(self.regress(y, present) * self.scale[level])
            answers.append(Level(self.classify(y, present), offsets, present[..., 0] > 0))
        return answers

    def _cover(self, frames: int, padded: int) -> int:
        """The length that gives the numbers of `padded`: on every level, as many tokens of padding beyond
        the clip as a convolution reaches."""
        model = self.recipe.model
        coarsest: int = model.scale_factor ** (model.levels - 1)
        halo = max(1, model.embd_kernel_size // 2, model.head_kernel_size // 2)
        # Rounded up to the coarsest stride even where the official length is not a multiple of it.
        return min((-(-frames // coarsest) + halo) * coarsest, -(-padded // coarsest) * coarsest)

    @torch.no_grad()
    def detect(
        self,
        frames: Tensor | NDArray[np.float32],
        *,
        fps: float,
        feat_stride: float,
        num_frames: float,
        duration: float,
    ) -> Detections:
        """The actions in one recording, `frames` [T * hop, C], in the order of descending scores.

        `fps`: of the video; `feat_stride`, `num_frames`: video frames between two vectors, and under each;
        `duration` in seconds, to which segments are cut.
        """
        x = self._read(frames, 2)[None]
        if not bool(torch.isfinite(x).all()):
            raise DataError("frames hold NaN or Inf; expected finite features")
        facts = {"fps": fps, "feat_stride": feat_stride, "num_frames": num_frames, "duration": duration}
        for name, value in facts.items():
            if not (math.isfinite(value) and (value > 0 or (name == "num_frames" and value == 0))):
                raise DataError(f"`{name}` is {value}, expected a finite number above 0")
        levels = self.answer(x, [x.shape[1] // self.hop])
        test = self.recipe.test_cfg
        segments, scores, labels = decode(
            [(level.cls_logits[0], level.offsets[0], level.mask[0]) for level in levels],
            self.recipe.model.strides,
            threshold=test.pre_nms_thresh,
            most=test.pre_nms_topk,
            shortest=test.duration_thresh,
        )
        segments, scores, labels = suppress(
            segments,
            scores,
            labels,
            method=test.nms_method,
            per_class=test.multiclass_nms,
            iou_threshold=test.iou_threshold,
            sigma=test.nms_sigma,
            min_score=test.min_score,
            max_segments=test.max_seg_num,
            voting_threshold=test.voting_thresh,
        )
        segments = to_seconds(segments, fps, feat_stride, num_frames, duration)
        return Detections(*(torch.from_numpy(part) for part in (segments, scores, labels)))
