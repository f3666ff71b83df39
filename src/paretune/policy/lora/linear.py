"""Linear layers of the frozen base: their products, and their weights where these are quantized.

Products with weights of float32 are oneDNN's where the base runs on a processor with AVX-512.

torch multiplies float32 matrices by MKL on x86, and gives oneDNN the other dtypes. On a processor by AMD, MKL does not use AVX-512: with
SmolLM2's shapes oneDNN takes .54 of its time at 700 rows, .71 at 16 and .83 at one. Without AVX-512 it takes 1.1 to 1.4 times as long
as MKL (benchmarks/LOG.md). Small matrices stay with torch's default, where a call's overhead decides.

A quantized layer (bitsandbytes, torchao) computes its own product, and its weight is dequantized where a merge needs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, functional

from paretune.errors import ConfigError, first_line

__all__ = ["base_weight", "frozen_linear", "is_quantized", "numbers", "rounds_inputs"]

LARGE = 2**16  # numbers in a weight
ON_AVX512 = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for a weight (O, I) that is not trained; (..., O) for inputs (..., I), with a gradient to x."""
    if not _by_onednn(x, weight):
        if weight.numel() >= LARGE:
            x = x.contiguous()  # of a slice, the last token of each row, torch makes a batch, with a copy of a frozen weight for every row
        return functional.linear(x, weight, bias)
    x_BI = x.reshape(-1, x.shape[-1])
    y_BO = _Frozen.apply(x_BI, weight, bias) if torch.is_grad_enabled() and x.requires_grad else _product(x_BI, weight, bias)
    return y_BO.view(*x.shape[:-1], -1)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        weight.numel() >= LARGE
        and weight.dtype == x.dtype == torch.float32
        and weight.device.type == "cpu"
        and type(weight) in (Tensor, Parameter)  # a subclass (torchao) says float32 and holds something else
        and not weight.requires_grad
        and x.numel() > 0
        and ON_AVX512
    )


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


def is_quantized(layer: Any) -> bool:
    """Whether a module is a linear layer whose weight is anything but a matrix in 16 bits or more, to be read and written into."""
    weight: Any = next((getattr(layer, name) for name in ("W_q", "qweight", "weight") if hasattr(layer, name)), None)
    weight = weight.to_local() if hasattr(weight, "to_local") else weight  # this process's share of it
    plain = weight is None or (type(weight) in (Tensor, Parameter) and weight.is_floating_point() and weight.itemsize > 1)
    return hasattr(layer, "in_features") and not plain


def base_weight(layer: Any) -> Tensor:
    """The weight of a base layer in floating point: its own, or the dequantized one, which must give what the layer gives."""
    if not is_quantized(layer):
        return layer.weight.detach()
    from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight

    with torch.inference_mode(False), torch.no_grad():
        try:
            if type(layer.weight).__name__ in ("Params4bit", "Int8Params"):  # the other function loses an 8-bit layer's scales
                weight = dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None)).detach()
            else:
                weight = dequantize_module_weight(layer).detach()
            (x_BI,) = _probes(layer, weight, 1)
            want_BO = layer(x_BI)
            off = float((functional.linear(x_BI, weight, layer.bias) - want_BO).norm() / want_BO.norm())
            wrong = "" if off < 0.05 else f"whose weight gives outputs that are {off:.0%} off the layer's"
        except (AttributeError, TypeError, RuntimeError) as error:
            wrong = f"{type(error).__name__}: {first_line(error)}"
    if wrong:
        raise ConfigError(
            "a merge needs the base's weights in floating point",
            found=f"a quantized {type(layer).__name__}, {wrong}",
            remedy='use mixing "parameter" (gates), export with --as adapter, or fit on a base that is not quantized',
        )
    return weight


def rounds_inputs(layer: Any, dtype: torch.dtype) -> bool:
    """Whether a layer's outputs are not linear in its inputs: products in 8 bits round the activations, too."""
    with torch.inference_mode(False), torch.no_grad():
        one_BI, two_BI = _probes(layer, torch.empty(0, dtype=dtype, device=_device(layer)), 2)
        one, two, both, none = (layer(x_BI).double() for x_BI in (one_BI, two_BI, one_BI + two_BI, 0 * one_BI))
        return bool((both - one - two + none).norm() > 1e-4 * both.norm())


def numbers(parameter: Tensor) -> int:
    """How many numbers a parameter holds: two in each byte of a 4-bit one."""
    return parameter.numel() * (2 * parameter.element_size() if type(parameter).__name__ == "Params4bit" else 1)


def _probes(layer: Any, like: Tensor, count: int) -> list[Tensor]:
    width = layer.in_features
    return list(torch.arange(count * width, device=like.device).add(1).cos().to(like.dtype).view(count, 1, width))


def _device(layer: Any) -> torch.device:
    return next(tensor.device for tensor in (*layer.parameters(), *layer.buffers()))
