"""The losses of the causal detector. All return sums; the caller divides by the number of positives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def focal(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss (Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, eq. 5), elementwise.

    `targets` in [0, 1]; a negative `alpha` leaves the class balance out.
    """
    p = torch.sigmoid(logits)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p_true = p * targets + (1 - p) * (1 - targets)
    loss = loss * (1 - p_true) ** gamma
    if alpha >= 0:
        loss = loss * (alpha * targets + (1 - alpha) * (1 - targets))
    return loss


def diou(predicted: Tensor, target: Tensor, eps: float = 1e-8) -> Tensor:
    """1 - DIoU of segments [n, 2] given as (back to the start, back to the end) from one point, [n].

    Zheng et al., Distance-IoU Loss, AAAI 2020, eq. 7, in one dimension: the squared distance of the centres
    over the squared length of the hull is added to what the overlap misses.
    """
    overlap = (
        torch.minimum(predicted[:, 0], target[:, 0]) - torch.maximum(predicted[:, 1], target[:, 1])
    ).clamp_min(0)
    union = (predicted[:, 0] - predicted[:, 1]) + (target[:, 0] - target[:, 1]) - overlap
    hull = torch.maximum(predicted[:, 0], target[:, 0]) - torch.minimum(predicted[:, 1], target[:, 1])
    centre = 0.5 * (predicted.sum(dim=1) - target.sum(dim=1))
    return 1 - overlap / union.clamp_min(eps) + (centre / hull.clamp_min(eps)) ** 2
