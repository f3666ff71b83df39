"""Matrix products with the frozen base's weights, by oneDNN where the base runs in float32 on an x86 processor.

torch multiplies float32 matrices by MKL there, and gives oneDNN the other dtypes. On a processor by AMD, MKL does not use AVX-512: with
SmolLM2's shapes oneDNN takes .54 of its time at 700 rows, .71 at 16 and .83 at one (benchmarks/LOG.md). Small matrices stay
with torch's default, where a call's overhead decides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["frozen_linear"]

LARGE = 2**16  # numbers in a weight


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for a weight (O, I) that is not trained; (..., O) for inputs (..., I), with a gradient to x."""
    if not _by_onednn(x, weight):
        return functional.linear(x, weight, bias)
    x_BI = x.reshape(-1, x.shape[-1])
    y_BO = _Frozen.apply(x_BI, weight, bias) if torch.is_grad_enabled() and x.requires_grad else _product(x_BI, weight, bias)
    return y_BO.view(*x.shape[:-1], -1)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        weight.numel() >= LARGE
        and weight.dtype == x.dtype == torch.float32
        and weight.device.type == "cpu"
        and not weight.requires_grad
        and x.numel() > 0
        and ON_X86
    )


ON_X86 = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def _product(x_BI: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x_BI.to_mkldnn(), weight, bias).to_dense()


class _Frozen(torch.autograd.Function):
    """The product with its gradient to the input, which keeps nothing but the weight."""

    @staticmethod
    def forward(ctx: Any, x_BI: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(x_BI, weight, bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        dy_BO = upstream[0]
        size = [len(dy_BO), weight.shape[1]]
        return torch.ops.aten.mkldnn_linear_backward_input(size, dy_BO.contiguous().to_mkldnn(), weight).to_dense(), None, None
