"""Matrix products for whole sequences, by the fastest library that this CPU has for them.

PyTorch multiplies float32 matrices with MKL, which on CPUs that are not Intel's runs at half of what oneDNN
reaches, and oneDNN is in PyTorch too, behind the convolutions and an operator that its compiler uses. Here
that operator serves forward and backward; where it is missing or says something else than `F.linear`, and
for other devices, other precisions and the tracer, plain PyTorch does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Fewer rows than this are not worth reordering a weight for.
_ROWS = 32


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def _works() -> bool:
    try:
        x, weight, bias = torch.rand(_ROWS, 5), torch.rand(5, 7).T, torch.rand(7)
        return torch.allclose(_onednn(x, weight, bias), F.linear(x, weight, bias), rtol=1e-4)
    except (AttributeError, RuntimeError):
        return False


_ONEDNN = _works()


def _suits(x: Tensor) -> bool:
    return _ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[0] >= _ROWS


def _times(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [R, K] @ weight [N, K]^T + bias [N]; weight may be a view."""
    return _onednn(x, weight, bias) if _suits(x) else F.linear(x, weight, bias)


class _Affine(torch.autograd.Function):
    """x [R, K] @ weight [N, K]^T + bias [N]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _times(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            _times(grad, weight.T) if need_x else None,
            _times(grad.T, x.T) if need_weight else None,
            grad.sum(dim=0) if need_bias else None,
        )


class Linear(nn.Linear):
    """`nn.Linear` for long sequences."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        rows = x.shape[:-1].numel() if not torch.onnx.is_in_onnx_export() else 0
        if rows < _ROWS or not _ONEDNN or x.device.type != "cpu" or x.dtype != torch.float32:
            return F.linear(x, self.weight, self.bias)
        y: Tensor = _Affine.apply(x.reshape(rows, -1), self.weight, self.bias)  # type: ignore[no-untyped-call]
        return y.reshape(*x.shape[:-1], -1)


class _Slide(torch.autograd.Function):
    """sum over k of rows[k : k + L] @ weight[k]; rows [L + kernel - 1, D_in], weight [kernel, D_in, D_out].

    Autograd would make a zero-filled copy of all rows for the gradient of each shift.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        length = rows.shape[0] - weight.shape[0] + 1
        y = _times(rows[:length], weight[0].T)
        for k in range(1, weight.shape[0]):
            y += _times(rows[k : k + length], weight[k].T)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        length = len(grad)
        to_rows = to_weight = None
        if ctx.needs_input_grad[0]:
            to_rows = torch.zeros_like(rows)
            for k in range(len(weight)):
                to_rows[k : k + length] += _times(grad, weight[k])
        if ctx.needs_input_grad[1]:
            turned = grad.T
            to_weight = torch.stack([_times(rows[k : k + length].T, turned) for k in range(len(weight))])
        return to_rows, to_weight


def slide(x: Tensor, flat: Tensor, kernel: int) -> Tensor:
    """A convolution that pads nothing, [B, T + kernel - 1, D_in] -> [B, T, D_out].

    `flat` [kernel * D_in, D_out]. All clips of the batch are one run of rows; the outputs that straddle two
    clips are left out.
    """
    batch, total, width = x.shape
    more = kernel - 1
    if torch.onnx.is_in_onnx_export():
        # One product for the tracer, which knows no functions of ours; with the weight as it is: one that is
        # reshaped in the graph is no constant, and a product with it rounds by the number of threads.
        views = [x[:, k : k + total - more] for k in range(kernel)]
        return torch.cat(views, dim=-1) @ flat
    weight = flat.reshape(kernel, width, -1)
    y: Tensor = _Slide.apply(x.reshape(-1, width), weight)  # type: ignore[no-untyped-call]
    if batch > 1 and more:
        y = F.pad(y, (0, 0, 0, more)).reshape(batch, total, -1)[:, : total - more]
    return y.reshape(batch, total - more, -1)
