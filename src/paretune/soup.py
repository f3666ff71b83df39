"""Exact soups of adapters as plain tensors: the factors of a layer's soup, its merged weight, and those of a whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paretune.errors import ConfigError
from paretune.fused import Factor, FusedLayer, Gated

if TYPE_CHECKING:
    from paretune.lora import Gates, LoraBank

__all__ = ["soup_factors", "soup_state", "soup_weight"]


def soup_factors(layer: FusedLayer, weights_K: Tensor, *, how: str = "delta") -> tuple[Tensor, Tensor]:
    """(r, I) and (r, O), whose product is the soup of one layer at weights (K,); a weight of 0 adds no ranks. `how`: see `soup_state`."""
    with torch.no_grad():
        if how == "factor":
            a_rI, b_rO = layer.factor(Factor(weights_K))
            return a_rI, b_rO
        owner_R, scale_R = layer.pattern_tensors(weights_K.device)
        kept_R = (weights_K != 0)[owner_R]
        scale_R = (weights_K[owner_R] * scale_R)[kept_R].to(layer.b[0].dtype)
        return layer.a_IR().t()[kept_R], layer.b_RO()[kept_R] * scale_R[:, None]


def soup_weight(layer: FusedLayer, weights_K: Tensor, *, how: str = "delta") -> Tensor:
    """The merged weight of one layer, in float32 or wider."""
    weight = layer.base.weight.detach()
    wide = torch.promote_types(weight.dtype, torch.float32)
    a_rI, b_rO = soup_factors(layer, weights_K, how=how)
    delta_OI = b_rO.to(wide).t() @ a_rI.to(wide)
    return weight.to(wide) + (delta_OI.t() if layer.module.fan_in_fan_out else delta_OI)


def soup_state(bank: LoraBank, weights_K: Gates, *, how: str = "delta") -> dict[str, Tensor]:
    """Merged weights under the base model's own parameter names, for `load_state_dict(..., strict=False)` on a fresh copy of it.

    "delta" is the exact soup W + sum_k w_k s_k B_k A_k. "factor" is W + s (sum_k w_k B_k)(sum_k w_k A_k).
    Source: rewarded soups (2306.04488); its code averages the factors.
    Differs: "delta" averages what the adapters add, as the paper's formula does for full weights.
    Hides: "factor" has cross terms w_j w_k B_j A_k between experts that never met; at w = e_k the two agree.
    """
    weights = bank._made(Gated, weights_K, dims=(1,)).gates.detach()
    if how not in ("delta", "factor"):
        raise ConfigError('a soup is "delta" or "factor"', found=repr(how), remedy='use "delta", the exact one')
    return {f"{layer.name}.weight": soup_weight(layer, weights, how=how).to(layer.base.weight.dtype) for layer in bank.layers}
