"""Soups that are more than weighted sums: TIES and DARE, on what the adapters add."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from paretune.errors import ConfigError
from paretune.fused import FusedLayer
from paretune.mixing.levels import ParameterMix, _own
from paretune.policy import LEVELS
from paretune.seeds import seed_for

__all__ = ["RECIPES", "MergedMix", "dare", "ties", "trim"]

RECIPES = ("ties", "dare", "dare-ties")


@LEVELS.register("merged")
class MergedMix(ParameterMix):
    """The base model plus a merge of the adapters' dense changes D_k = s_k B_k A_k, matrix by matrix; one merge for a whole batch.

        ties       trim each D_k to its `density` largest entries; elect a sign per entry, that of sum_k g_k D_k; keep what agrees
        dare       drop entries at random (keep `density` of them), divide the rest by `density`, then sum_k g_k D_k
        dare-ties  drop at random, then elect signs as ties does

    Source: TIES (2306.01708), DARE (2311.03099); weights as mergekit has them.
    Differs: entries are trimmed per matrix, as PEFT and mergekit do, not over the whole model as the paper does. The weights take part in
        the election. `normalise` divides what agrees by the sum of its weights (mergekit, and the paper's mean at equal weights);
        without it, it is their weighted sum. What is merged is the product B A, not the factors, which PEFT's `add_weighted_adapter`
        merges. Masks come from `seed`, one stream per matrix and adapter.
    Hides: at g = e_k it is the trimmed expert, not the expert, unless density is 1. Normalised, it jumps at the vertices: an entry that
        one expert alone keeps counts fully however small that expert's gate. A merge is dense: no rank is left, and it is computed anew
        for every preference, at the memory of one model.
    """

    def __init__(self, bank: Any, tokenizer: Any, *, how: str = "ties", density: float = 0.5, normalise: bool = True, seed: int = 0):
        super().__init__(bank, tokenizer)
        if how not in RECIPES or not 0 < density <= 1:
            raise ConfigError(
                f"a merge is one of {', '.join(RECIPES)}, and keeps a share of entries above 0 and at most 1",
                found=f"how={how!r}, density={density:g}",
                remedy='density is the share that is kept; use level "parameter" for the plain soup',
            )
        self.how, self.density, self.normalise, self.seed = how, density, normalise, seed
        self._known: tuple[Any, dict[str, Tensor]] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {"how": self.how, "density": self.density, "normalise": self.normalise, "seed": self.seed}

    def parts(self, input_ids_NT, attention_mask=None, position_ids=None, cache=None, gates_NK=None, last_only=False):
        if gates_NK is None or gates_NK.dim() != 2 or not bool((gates_NK == gates_NK[:1]).all()):
            raise ConfigError(
                "a merged soup has one gate vector for the whole batch",
                found="rows with different gates" if gates_NK is not None else "no gates",
                remedy="sample one preference at a time, or use the parameter level, which mixes per row",
            )
        if cache is not None:
            _own(cache, gates_NK)
        inputs = {**self._inputs(1, input_ids_NT, attention_mask, position_ids, cache), "logits_to_keep": int(last_only)}
        with self.bank.gates(None):
            return functional_call(self.model, self.weights(gates_NK[0]), kwargs=inputs).logits

    def weights(self, gates_K: Tensor) -> dict[str, Tensor]:
        """The merged weights under the names that the model's parameters have while the bank is attached; no gradient."""
        stamp = [(p._version, p.data_ptr()) for k in range(self.K) for p in self.bank.parameters_of(k)]
        asked = ([float(g) for g in gates_K], stamp)
        if self._known is None or self._known[0] != asked:
            with torch.inference_mode(False), torch.no_grad():
                self._known = (asked, dict(self._merge(gates_K.detach().clone())))
        return self._known[1]

    def _merge(self, gates_K: Tensor) -> Iterator[tuple[str, Tensor]]:
        for layer in self.bank.layers:
            yield f"{layer.name}.base_layer.weight", self.merged_weight(layer, gates_K).to(layer.base.weight.dtype)

    def merged_weight(self, layer: FusedLayer, gates_K: Tensor) -> Tensor:
        """The merged weight of one layer, in float32 or wider."""
        weight = layer.base.weight.detach()
        wide = torch.promote_types(weight.dtype, torch.float32)
        deltas = weight.new_zeros((self.K, layer.b[0].shape[0], layer.a[0].shape[1]), dtype=wide)
        for k, a_rI, b_Or, scale in zip(layer.members, layer.a, layer.b, layer.scalings, strict=True):
            deltas[k] = b_Or.detach().to(wide) @ a_rI.detach().to(wide) * scale
        kept = self._sparse(deltas, layer.name)
        gates = gates_K.to(wide)
        merged = torch.einsum("k,koi->oi", gates, kept) if self.how == "dare" else ties(kept, gates, normalise=self.normalise)
        return weight.to(wide) + (merged.t() if layer.module.fan_in_fan_out else merged)

    def _sparse(self, deltas_KOI: Tensor, name: str) -> Tensor:
        if self.how == "ties":
            return torch.stack([trim(delta, self.density) for delta in deltas_KOI])
        return torch.stack([dare(delta, self.density, seed=seed_for(self.seed, "dare", name, k)) for k, delta in enumerate(deltas_KOI)])


def trim(delta: Tensor, density: float) -> Tensor:
    """The int(density * size) entries of largest magnitude; the others are 0.

    Source: TIES (2306.01708), its first step.
    Differs: per matrix.
    Hides: small entries of a low-rank change are not noise: without them the change is no longer of low rank.
    """
    flat = delta.flatten()
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).scatter(0, kept, flat[kept]).view_as(delta)


def dare(delta: Tensor, density: float, *, seed: int) -> Tensor:
    """Each entry with probability `density`, divided by it; 0 otherwise: unbiased, entry by entry.

    Source: DARE (2311.03099).
    Differs: nothing; the source's drop rate is 1 - density.
    Hides: one draw. Another seed is another policy.
    """
    draws = torch.rand(delta.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(delta.device)
    return torch.where(draws < density, delta / density, 0.0)


def ties(deltas_KOI: Tensor, gates_K: Tensor, *, normalise: bool) -> Tensor:
    """(O, I): per entry, the gated changes that have the sign of their sum; their weighted mean with `normalise`, else their sum.

    Source: TIES (2306.01708), election and disjoint merge; with weights as in mergekit.
    Differs: an entry whose changes cancel exactly is elected positive, as in PEFT.
    Hides: see `MergedMix`.
    """
    gates = gates_K[:, None, None]
    pulled = gates * deltas_KOI
    elected = torch.where(pulled.sum(0) >= 0, 1.0, -1.0)
    agrees = pulled.sign() == elected
    total = (pulled * agrees).sum(0)
    if not normalise:
        return total
    weight = (gates * agrees).sum(0)
    return torch.where(weight == 0, 0.0, total / torch.where(weight == 0, 1.0, weight))
