"""Mixings of parameters: adapters become one change of the weights, and the model runs once.

`parameter` is the exact weighted sum of what the adapters add, with gates for every row. `factor` averages their factors instead, and
`merged` prunes what they add before it sums (TIES, DARE); both make one set of weights for a whole batch. `routed` lets a small network
at every decoder layer correct the gates, token by token. `tied` is for trainings: its adapters share both factors and differ in a core.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from paretune.errors import ConfigError
from paretune.hub import text_config
from paretune.policy.base import MIXINGS, Policy, Weights, one_alone
from paretune.policy.lora.bank import LoraBank
from paretune.policy.lora.decoder import routed
from paretune.policy.lora.layers import Dense, FusedLayer
from paretune.policy.lora.linear import base_weight
from paretune.seeds import generator, seed_for

__all__ = [
    "FactorMix",
    "MergedMix",
    "ParameterMix",
    "RECIPES",
    "ROUTER_FILE",
    "ReferencePolicy",
    "RoutedMix",
    "TiedMix",
    "claim_cache",
    "dare",
    "ties",
    "trim",
]


@MIXINGS.register("parameter")
class ParameterMix(Policy):
    """The exact soup of the adapters, its own for every row.

    Source: rewarded soups (2306.04488), whose formula averages full weights.
    Differs: unmerged and per row; what is averaged is what the adapters add (B A), not their factors (B and A).
    Hides: nothing between the experts was trained, so that under conflict the soup can be worse than the reference.
    """

    parts_need_gates = True
    one_forward = True
    token_gates = True
    zero_is_reference = True
    attribution = "path"

    def single_weights(self, gates_K: Tensor) -> Weights | str:
        return Weights("delta", gates_K)

    def parts(self, input_ids_NT, attention_mask=None, position_ids=None, cache=None, gates_NK=None, last_only=False):
        if cache is not None:
            claim_cache(cache, gates_NK)
        with self.bank.gates(gates_NK):
            return self._logits(self._inputs(1, input_ids_NT, attention_mask, position_ids, cache), last_only)

    def combine(self, parts: Tensor, gates_NK: Tensor | None) -> Tensor:
        return parts


@MIXINGS.register("reference")
class ReferencePolicy(ParameterMix):
    """The base model without adapters, whatever the gates."""

    parts_need_gates = False
    vertices_are_experts = False

    def single_weights(self, gates_K: Tensor) -> Weights | str:
        return Weights("base", gates_K)

    def parts(self, input_ids_NT, attention_mask=None, position_ids=None, cache=None, gates_NK=None, last_only=False):
        return super().parts(input_ids_NT, attention_mask, position_ids, cache, None, last_only)


@MIXINGS.register("factor")
class FactorMix(ParameterMix):
    """The soup of the factors: A and B averaged separately.

    Source: the authors' code of rewarded soups (2306.04488), where all adapter tensors are averaged by name.
    Differs: nothing.
    Hides: cross terms g_j g_k B_j A_k; it equals the soup of the products only at g = e_k or where all A_k (or all B_k) are equal.
    """

    token_gates = False
    mixes_per_row = False
    attribution = "shapley"

    def single_weights(self, gates_K: Tensor) -> Weights | str:
        return Weights("factor", gates_K)

    def parts(self, input_ids_NT, attention_mask=None, position_ids=None, cache=None, gates_NK=None, last_only=False):
        _check_one_gate_vector("factor averaging", gates_NK)
        if cache is not None:
            claim_cache(cache, gates_NK)
        with self.bank.factor(gates_NK[0]):
            return self._logits(self._inputs(1, input_ids_NT, attention_mask, position_ids, cache), last_only)


def claim_cache(cache: Any, gates: Tensor | None) -> None:
    """Keys and values of a soup were computed under gates: refuse others (a router's per-token gates may change)."""
    if gates is not None and gates.dim() == 3:
        return
    if cache.get_seq_length() == 0:
        cache.paretune_gates = None if gates is None else gates.detach().clone()
        return
    known = getattr(cache, "paretune_gates", None)
    same = torch.equal(known, gates) if known is not None and gates is not None else known is gates
    if not same:
        raise ConfigError(
            "in a soup a cache belongs to the gates that filled it",
            found="other gates than those of the cached tokens",
            remedy="make a new cache for every preference; parts are shared over preferences at the logit and hidden mixings only",
        )


def _check_one_gate_vector(what: str, gates_NK: Tensor | None) -> None:
    if gates_NK is None or gates_NK.dim() != 2 or not bool((gates_NK == gates_NK[:1]).all()):
        raise ConfigError(
            f"{what} has one gate vector for the whole batch",
            found="rows with different gates" if gates_NK is not None else "no gates",
            remedy='sample one preference at a time, or use mixing "parameter", which mixes per row',
        )


RECIPES = ("ties", "dare", "dare-ties")


@MIXINGS.register("merged")
class MergedMix(ParameterMix):
    """The base model plus a merge of the adapters' dense changes D_k = s_k B_k A_k, matrix by matrix; one merge for a whole batch.

        ties       trim each D_k to its `density` largest entries; elect a sign per entry, that of sum_k g_k D_k; keep what agrees
        dare       drop entries at random (keep `density` of them), divide the rest by `density`, then sum_k g_k D_k
        dare-ties  drop at random, then elect signs as ties does

    Source: TIES (2306.01708), DARE (2311.03099); weights as mergekit has them.
    Differs: entries are trimmed per matrix, as PEFT and mergekit do, not over the whole model as the paper does. The weights take part in
        the election. `normalize` divides what agrees by the sum of its weights (mergekit, and the paper's mean at equal weights);
        without it, it is their weighted sum. What is merged is the product B A, not the factors, which PEFT's `add_weighted_adapter`
        merges. Masks come from `seed`, one stream per matrix and adapter.
    Hides: at g = e_k it is the trimmed expert, not the expert, unless density is 1. Normalized, it jumps at the vertices: an entry that
        one expert alone keeps counts fully however small that expert's gate. A merge is dense: no rank is left, and it is computed anew
        for every preference, at the memory of one model.
    """

    token_gates = False
    mixes_per_row = False
    attribution = "shapley"

    def __init__(self, bank: Any, tokenizer: Any, *, how: str = "ties", density: float = 0.5, normalize: bool = True, seed: int = 0):
        super().__init__(bank, tokenizer)
        if how not in RECIPES or not 0 < density <= 1:
            raise ConfigError(
                f"a merge is one of {', '.join(RECIPES)}, and keeps a share of entries above 0 and at most 1",
                found=f"how={how!r}, density={density:g}",
                remedy='density is the share that is kept; use mixing "parameter" for the plain soup',
            )
        self.how, self.density, self.normalize, self.seed = how, density, normalize, seed
        self.vertices_are_experts, self.symmetric = density == 1, how == "ties"
        self._known: tuple[Any, dict[str, Tensor]] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {"how": self.how, "density": self.density, "normalize": self.normalize, "seed": self.seed}

    def parts(self, input_ids_NT, attention_mask=None, position_ids=None, cache=None, gates_NK=None, last_only=False):
        _check_one_gate_vector("a merged soup", gates_NK)
        if cache is not None:
            claim_cache(cache, gates_NK)
        inputs = {**self._inputs(1, input_ids_NT, attention_mask, position_ids, cache), "logits_to_keep": int(last_only)}
        weights = self.weights(gates_NK[0])
        with self.bank.mode(Dense(weights)) if self.bank.quantized else self.bank.gates(None):
            given = {} if self.bank.quantized else weights
            return functional_call(self.model, given, kwargs=inputs, tie_weights=False).logits  # a tied head leaves the embeddings alone

    def weights(self, gates_K: Tensor) -> dict[str, Tensor]:
        """The merged weights under the names that the model's parameters have while the bank is attached; no gradient.

        On a quantized base they are the changes alone, by layer: its weights cannot be written into.
        """
        stamp = [(p._version, p.data_ptr()) for k in range(self.K) for p in self.bank.parameters_of(k)]
        asked = ([float(g) for g in gates_K], stamp)
        if self._known is None or self._known[0] != asked:
            with torch.inference_mode(False), torch.no_grad():
                self._known = (asked, dict(self._merge(gates_K.detach().clone())))
        return self._known[1]

    def _merge(self, gates_K: Tensor) -> Iterator[tuple[str, Tensor]]:
        for layer in self.bank.layers:
            if self.bank.quantized:
                yield layer.name, self._change(layer, gates_K)
                continue
            yield f"{layer.name}.base_layer.weight", self.merged_weight(layer, Weights("merge", gates_K)).to(layer.base.weight.dtype)

    def single_weights(self, gates_K: Tensor) -> Weights | str:
        return Weights("merge", gates_K)

    def merged_weight(self, layer: FusedLayer, weights: Weights) -> Tensor:
        weight, change = base_weight(layer.base), self._change(layer, weights.gates_K)
        return weight.to(change.dtype) + (change.t() if layer.transposed else change)

    def _change(self, layer: FusedLayer, gates_K: Tensor) -> Tensor:
        """What the merge adds to a weight, (O, I), in float32 or wider."""
        wide = torch.promote_types(self.model.dtype, torch.float32)
        deltas = layer.a[0].new_zeros((self.K, layer.b[0].shape[0], layer.a[0].shape[1]), dtype=wide)
        for k, a_rI, b_Or, scale in zip(layer.members, layer.a, layer.b, layer.scalings, strict=True):
            deltas[k] = b_Or.detach().to(wide) @ a_rI.detach().to(wide) * scale
        kept = self._sparse(deltas, layer.name)
        gates = gates_K.to(wide)
        return torch.einsum("k,koi->oi", gates, kept) if self.how == "dare" else ties(kept, gates, normalize=self.normalize)

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


def ties(deltas_KOI: Tensor, gates_K: Tensor, *, normalize: bool) -> Tensor:
    """(O, I): per entry, the gated changes that have the sign of their sum; their weighted mean with `normalize`, else their sum.

    Source: TIES (2306.01708), election and disjoint merge; with weights as in mergekit.
    Differs: an entry whose changes cancel exactly is elected positive, as in PEFT.
    Hides: see `MergedMix`.
    """
    gates = gates_K[:, None, None]
    pulled = gates * deltas_KOI
    elected = torch.where(pulled.sum(0) >= 0, 1.0, -1.0)
    agrees = pulled.sign() == elected
    total = (pulled * agrees).sum(0)
    if not normalize:
        return total
    weight = (gates * agrees).sum(0)
    return torch.where(weight == 0, 0.0, total / torch.where(weight == 0, 1.0, weight))


ROUTER_FILE = "router.safetensors"


@MIXINGS.register("routed")
class RoutedMix(ParameterMix):
    """A mixture of the adapters whose gates are those of the rule plus what a small network per layer corrects, token by token.

    gates(h, g) = g + i(g) * up tanh(down [h / rms(h), g, 1]), with i(g) = M/(M-1) * (1 - sum of the first M gates squared): nothing at the
    vertices, whose experts stay alone, and nothing before training, when `up` is 0. The gates that a row comes with must be those of a
    preference: the first `experts` of them are its weights. `seed` names the start of `down`.

    Source: ours; a mixture of LoRA experts with gates from hidden states as in X-LoRA (2402.07148).
    Differs: conditioned on a preference, zero at the vertices, no softmax: gates may be negative or sum to more than 1.
    Hides: the router of the first layer sees a token's embedding only; adapters outside the decoder's layers are refused.
    """

    token_gates = False
    symmetric = False  # the first `experts` adapters have weights, the others have not
    zero_is_reference = False
    attribution = "shapley"
    why_many = "its router sets the gates anew for every token"

    def single_weights(self, gates_K: Tensor) -> Weights | str:
        """At a vertex the router is silent, whatever the gates of the adapters beside the experts."""
        return Weights("delta", gates_K) if one_alone(gates_K[: self._given["experts"]]) else self.why_many

    def __init__(self, bank: LoraBank, tokenizer: Any, *, experts: int, width: int = 32, seed: int = 0):
        super().__init__(bank, tokenizer)
        if not 2 <= experts <= bank.count or width < 1:
            raise ConfigError(
                "a router corrects the gates of at least two experts, with a width of at least 1",
                found=f"experts = {experts} of {bank.count} adapters, width = {width}",
                remedy="name the number of objectives as experts",
            )
        self._given = {"experts": experts, "width": width, "seed": seed}
        self.vertices_are_experts = experts == bank.count
        inputs = text_config(self.model.config).hidden_size + bank.count + 1
        self._layers: list[tuple[Tensor, Tensor]] = []
        for layer in range(len(bank.stack)):
            drawn = generator(seed, "router", layer).normal(size=(width, inputs)) / np.sqrt(inputs)
            down = torch.tensor(drawn, dtype=torch.float32, device=self.device, requires_grad=True)
            up = torch.zeros(bank.count, width, dtype=torch.float32, device=self.device, requires_grad=True)
            self._layers.append((down, up))

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self._given)

    def parameters(self) -> list[Tensor]:
        return [*self.bank.parameters(), *(tensor for pair in self._layers for tensor in pair)]

    def save_extra(self, folder: Path) -> None:
        from safetensors.torch import save_file

        names = {f"{layer}.{name}": t for layer, pair in enumerate(self._layers) for name, t in zip(("down", "up"), pair, strict=True)}
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in names.items()}, folder / ROUTER_FILE)

    def load_extra(self, folder: Path) -> None:
        from safetensors.torch import load_file

        found = load_file(folder / ROUTER_FILE)
        with torch.no_grad():
            for layer, (down, up) in enumerate(self._layers):
                down.copy_(found[f"{layer}.down"])
                up.copy_(found[f"{layer}.up"])

    def parts(self, input_ids_NT, attention_mask=None, position_ids=None, cache=None, gates_NK=None, last_only=False):
        if gates_NK is None or gates_NK.dim() != 2:
            raise ConfigError(
                "a router corrects one row of gates per row of the batch",
                found="no gates" if gates_NK is None else f"gates {tuple(gates_NK.shape)}",
                remedy="give the gates of each row's preference, (rows, adapters)",
            )
        if cache is not None:
            claim_cache(cache, gates_NK)
        routers = {layer: partial(self._gates, layer) for layer in range(len(self._layers))}
        with routed(self.bank, routers, gates_NK):
            return self._logits(self._inputs(1, input_ids_NT, attention_mask, position_ids, cache), last_only)

    def _gates(self, layer: int, h_NTH: Tensor, gates_NK: Tensor) -> Tensor:
        """(N, T, K)."""
        down, up = self._layers[layer]
        gates_NK = gates_NK.to(down.dtype)
        m = self._given["experts"]
        mixed_N11 = (m / (m - 1) * (1 - (gates_NK[:, :m] ** 2).sum(1)))[:, None, None]
        h_NTH = h_NTH.to(down.dtype)
        h_NTH = h_NTH * torch.rsqrt((h_NTH**2).mean(-1, keepdim=True) + 1e-6)
        gates_NTK = gates_NK[:, None].expand(-1, h_NTH.shape[1], -1)
        seen = torch.cat([h_NTH, gates_NTK, torch.ones_like(gates_NTK[..., :1])], dim=-1)
        return gates_NTK + mixed_N11 * functional.linear(torch.tanh(functional.linear(seen, down)), up)


@MIXINGS.register("tied")
class TiedMix(ParameterMix):
    """The soup of adapters of which all but the first `own` share A and B: adapter k adds B C_k A, with a core C_k of its own.

    What is trained are A, B and the cores; `commit` writes each adapter as the plain LoRA with the factors B C_k and A. So a family is
    used at mixing "parameter", and nothing but a training needs this one. `seed` names the start of the cores.

    Source: PBLoRA (PARM, 2505.06274), in whose code B C(w) A with C(w) = sum_k w_k C_k stands beside a low-rank part that ignores w.
    Differs: nothing in the formula; cores start uniform within 1 / rank, as there.
    Hides: all preferences move within the one column space of B and the one row space of A.
    """

    symmetric = False  # the first `own` adapters are plain ones
    trains_only = True
    attribution = "shapley"
    why_many = "its adapters are written when a training ends, and are mixed as plain ones then"

    def single_weights(self, gates_K: Tensor) -> Weights | str:
        return self.why_many

    def __init__(self, bank: LoraBank, tokenizer: Any, *, own: int = 1, seed: int = 0):
        super().__init__(bank, tokenizer)
        self._given = {"own": own, "seed": seed}
        tied = range(own, bank.count)
        if own < 0 or len(tied) < 2 or not set(bank.names[own:]) <= set(bank.trainable):
            raise ConfigError(
                "at least two adapters share factors, and all of these are trained",
                found=f"own = {own} of {bank.count} adapters, trained: {', '.join(bank.trainable) or 'none'}",
                remedy="train two fresh adapters or more together",
            )
        self._free = [tensor for k in range(own) for tensor in bank.parameters_of(k) if tensor.requires_grad]
        self._parts: list[tuple[Any, list[int], Tensor, Tensor, list[Tensor]]] = []  # layer, places in it, A, B, cores
        for depth, layer in enumerate(bank.layers):
            places = [layer.members.index(k) for k in tied]
            first = places[0]
            if len({layer.ranks[i] for i in places}) > 1:
                raise ConfigError(
                    "adapters that share factors have one rank",
                    found=f"ranks {[layer.ranks[i] for i in places]}",
                    remedy="ask for fresh adapters of one rank",
                )
            rank, a_rI = layer.ranks[first], layer.a[first]
            b_Or = torch.zeros_like(layer.b[first], requires_grad=True)
            drawn = generator(seed, "cores", depth).uniform(-1, 1, size=(len(places), rank, rank)) / rank
            cores = [torch.tensor(core, dtype=a_rI.dtype, device=a_rI.device, requires_grad=True) for core in np.asarray(drawn)]
            for i in places:
                layer.a[i] = a_rI
            self._parts.append((layer, places, a_rI, b_Or, cores))

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self._given)

    def parameters(self) -> list[Tensor]:
        return [*self._free, *(tensor for _, _, a_rI, b_Or, cores in self._parts for tensor in (a_rI, b_Or, *cores))]

    def parts(self, *args: Any, **kwargs: Any) -> Tensor:
        for layer, places, _, b_Or, cores in self._parts:
            for i, core in zip(places, cores, strict=True):
                layer.b[i] = b_Or @ core
        return super().parts(*args, **kwargs)

    def commit(self) -> None:
        with torch.no_grad():
            for layer, places, a_rI, b_Or, cores in self._parts:
                labels = [list(layer.module.lora_A)[i] for i in places]
                for label, core in zip(labels, cores, strict=True):
                    layer.module.lora_A[label].weight.copy_(a_rI)
                    layer.module.lora_B[label].weight.copy_(b_Or @ core)
