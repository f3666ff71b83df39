"""Where adapters are combined (the mixing levels), and how a preference becomes gates (the rules).

    parameter   the exact soup W + sum_k g_k s_k B_k A_k, per row                         1 forward per token
    factor      (sum_k g_k B_k)(sum_k g_k A_k), as published for soups; one soup a batch  1 forward
    logit       softmax of sum_k g_k log pi_k, token by token                             K forwards, in one stacked batch
    hidden      the model's own head on sum_k g_k h_k, h after the final norm             K forwards of the decoder, 1 of the head
    reference   no adapter                                                                1 forward

At g = e_k every level is expert k. Hidden equals logit where the head is frozen, linear, without bias or soft cap: W sum g h = sum g W h;
elsewhere no such claim. At the logit and hidden levels gates that are all 0 mean the uniform policy, not the reference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from paretune.errors import ConfigError
from paretune.policy import LEVELS, Policy
from paretune.registry import RULES

__all__ = [
    "Best",
    "Constant",
    "FactorMix",
    "HiddenMix",
    "Identity",
    "LogitMix",
    "Nearest",
    "ParameterMix",
    "ReferencePolicy",
    "Rule",
    "Table",
]


@LEVELS.register("parameter")
class ParameterMix(Policy):
    """The exact soup of the adapters, its own for every row.

    Source: rewarded soups (2306.04488), whose formula averages full weights.
    Differs: unmerged and per row; what is averaged is what the adapters add (B A), not their factors (B and A).
    Hides: nothing between the experts was trained, so that under conflict the soup can be worse than the reference.
    """

    parts_need_gates = True

    def parts(self, input_ids_NT, attention_mask=None, position_ids=None, cache=None, gates_NK=None, last_only=False):
        if cache is not None:
            _own(cache, gates_NK)
        with self.bank.gates(gates_NK):
            return self._logits(self._inputs(1, input_ids_NT, attention_mask, position_ids, cache), last_only)

    def combine(self, parts: Tensor, gates_NK: Tensor | None) -> Tensor:
        return parts


@LEVELS.register("reference")
class ReferencePolicy(ParameterMix):
    """The base model without adapters, whatever the gates."""

    def parts(self, input_ids_NT, attention_mask=None, position_ids=None, cache=None, gates_NK=None, last_only=False):
        return super().parts(input_ids_NT, attention_mask, position_ids, cache, None, last_only)


@LEVELS.register("factor")
class FactorMix(ParameterMix):
    """The soup of the factors: A and B averaged separately.

    Source: the authors' code of rewarded soups (2306.04488), where all adapter tensors are averaged by name.
    Differs: nothing.
    Hides: cross terms g_j g_k B_j A_k; it equals the soup of the products only at g = e_k or where all A_k (or all B_k) are equal.
    """

    def parts(self, input_ids_NT, attention_mask=None, position_ids=None, cache=None, gates_NK=None, last_only=False):
        if gates_NK is None or gates_NK.dim() != 2 or not bool((gates_NK == gates_NK[:1]).all()):
            raise ConfigError(
                "factor averaging has one gate vector for the whole batch",
                found="rows with different gates" if gates_NK is not None else "no gates",
                remedy="sample one preference at a time, or use the parameter level, which mixes per row",
            )
        if cache is not None:
            _own(cache, gates_NK)
        with self.bank.factor(gates_NK[0]):
            return self._logits(self._inputs(1, input_ids_NT, attention_mask, position_ids, cache), last_only)


class _Stacked(Policy):
    """All K experts in one forward: the batch repeated K times, block k under adapter k, one cache of K * N rows."""

    @property
    def copies(self) -> int:
        return self.K


@LEVELS.register("logit")
class LogitMix(_Stacked):
    """A product of the experts, token by token: log pi(y_t) = sum_k g_k log pi_k(y_t) + constant.

    Source: MOD (2406.18853), the reverse-KL case.
    Differs: all experts share one stacked forward and one cache. Logits are mixed instead of their log-softmaxes: the normalisers
        are constants over V for each row, and drop out.
    Hides: the sequence-level product is optimal for linear preferences, the token-level one is not; K forwards per token.
    """

    def parts(self, input_ids_NT, attention_mask=None, position_ids=None, cache=None, gates_NK=None, last_only=False):
        """(K, N, T, V) logits of the experts, in the model's dtype."""
        with self.bank.blocks():
            logits = self._logits(self._inputs(self.K, input_ids_NT, attention_mask, position_ids, cache), last_only)
        return logits.unflatten(0, (self.K, -1))

    def combine(self, parts: Tensor, gates_NK: Tensor | None) -> Tensor:
        return _weighted(parts, gates_NK)


@LEVELS.register("hidden")
class HiddenMix(_Stacked):
    """The last hidden states of the experts, mixed, under the model's own head (bias, scale and soft cap included).

    Source: EMORL (2505.02579).
    Differs: a cache, and any decoding; the source decodes greedily without a cache.
    Hides: with a shared, frozen, bias-free linear head this IS logit mixing. A head with adapters runs under their soup.
    """

    def __init__(self, bank: Any, tokenizer: Any):
        super().__init__(bank, tokenizer)
        self.decoder = self.model.base_model
        if self.decoder is self.model:
            raise ConfigError(
                "hidden-state mixing needs a model made of a decoder and a head",
                found=type(self.model).__name__,
                remedy="load it as a causal LM, or mix at the logit level",
            )

    def parts(self, input_ids_NT, attention_mask=None, position_ids=None, cache=None, gates_NK=None, last_only=False):
        """(K, N, T, H) hidden states after the final norm."""
        with self.bank.blocks():
            inputs = self._inputs(self.K, input_ids_NT, attention_mask, position_ids, cache)
            hidden = self.decoder(**inputs).last_hidden_state
        return hidden[:, -int(last_only) :].unflatten(0, (self.K, -1))

    def combine(self, parts: Tensor, gates_NK: Tensor | None) -> Tensor:
        """The causal LM's own forward, its decoder replaced for one call by the mixed states: whatever its head does, it does here."""
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions as Output

        mixed = _weighted(parts, gates_NK).to(parts.dtype)
        own = self.decoder.__dict__.get("forward")  # libraries that place a model on devices put theirs here
        self.decoder.__dict__["forward"] = lambda *_, **__: Output(last_hidden_state=mixed)
        try:
            with self.bank.gates(gates_NK):
                return self.model(inputs_embeds=mixed, use_cache=False).logits
        finally:
            del self.decoder.__dict__["forward"]
            if own is not None:
                self.decoder.__dict__["forward"] = own


def _weighted(parts: Tensor, gates: Tensor | None) -> Tensor:
    """sum_k g_k parts_k in float32 (or wider): parts (K, N, T, X), gates (N, K) or (N, T, K) -> (N, T, X)."""
    assert gates is not None
    wide = torch.promote_types(parts.dtype, torch.float32)
    gates = (gates if gates.dim() == 3 else gates[:, None]).to(wide)
    mixed = parts[0].to(wide) * gates[:, :, :1]
    for k in range(1, len(parts)):
        mixed = mixed.addcmul(parts[k].to(wide), gates[:, :, k : k + 1])
    return mixed


def _own(cache: Any, gates: Tensor | None) -> None:
    """Keys and values at the parameter level were computed under gates: refuse others (a router's per-token gates may change)."""
    if gates is not None and gates.dim() == 3:
        return
    if cache.get_seq_length() == 0:
        cache.paretune_gates = None if gates is None else gates.detach().clone()
        return
    known = getattr(cache, "paretune_gates", None)
    same = torch.equal(known, gates) if known is not None and gates is not None else known is gates
    if not same:
        raise ConfigError(
            "at the parameter level a cache belongs to the gates that filled it",
            found="other gates than those of the cached tokens",
            remedy="make a new cache for every preference; parts are shared over preferences at the logit and hidden levels only",
        )


class Rule(ABC):
    """Preferences -> gates. Registered in RULES; a frozen dataclass of numbers, so that a family can be written as JSON."""

    registered_name: ClassVar[str]
    version: ClassVar[int]

    @abstractmethod
    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        """(W, K) float64 gates of W preferences."""


@RULES.register("identity")
@dataclass(frozen=True)
class Identity(Rule):
    """Adapter k has the weight of objective k."""

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        return np.array(w_WM, dtype=np.float64)


@RULES.register("nearest")
@dataclass(frozen=True)
class Nearest(Rule):
    """The one adapter that was trained nearest (Euclid) to the preference: `points_KM`; ties go to the first."""

    points_KM: tuple[tuple[float, ...], ...]

    def __post_init__(self):
        _rectangle("nearest", "points_KM", self.points_KM)

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        return np.eye(len(self.points_KM))[_nearest_rows(w_WM, self.points_KM)]


@RULES.register("best")
@dataclass(frozen=True)
class Best(Rule):
    """The one adapter whose measured returns `returns_KM` are worth most at the preference; ties go to the first."""

    returns_KM: tuple[tuple[float, ...], ...]

    def __post_init__(self):
        _rectangle("best", "returns_KM", self.returns_KM)

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        return np.eye(len(self.returns_KM))[(np.asarray(w_WM) @ np.asarray(self.returns_KM).T).argmax(1)]


@RULES.register("constant")
@dataclass(frozen=True)
class Constant(Rule):
    """The same gates at every preference: one expert, uniform weights."""

    gates_K: tuple[float, ...]

    def __post_init__(self):
        if not np.isfinite(self.gates_K).all():
            raise ConfigError("gates are finite numbers", found=f"gates_K = {list(self.gates_K)}", remedy="give one number per adapter")

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        return np.tile(np.asarray(self.gates_K, dtype=np.float64), (len(w_WM), 1))


@RULES.register("table")
@dataclass(frozen=True)
class Table(Rule):
    """What a search found: gates at some preferences, `gates_WK` at `w_WM`; any other preference takes the nearest row."""

    w_WM: tuple[tuple[float, ...], ...]
    gates_WK: tuple[tuple[float, ...], ...]

    def __post_init__(self):
        _rectangle("table", "w_WM", self.w_WM)
        _rectangle("table", "gates_WK", self.gates_WK)
        if len(self.w_WM) != len(self.gates_WK):
            raise ConfigError(
                "a table has one row of gates per preference",
                found=f"{len(self.w_WM)} preferences, {len(self.gates_WK)} rows of gates",
                remedy="give one row each",
            )

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        return np.asarray(self.gates_WK, dtype=np.float64)[_nearest_rows(w_WM, self.w_WM)]


def _nearest_rows(w_WM: np.ndarray, points_KM: tuple[tuple[float, ...], ...]) -> np.ndarray:
    distance_WK = ((np.asarray(w_WM)[:, None] - np.asarray(points_KM)[None]) ** 2).sum(-1)
    return distance_WK.argmin(1)


def _rectangle(rule: str, field: str, rows: tuple[tuple[float, ...], ...]) -> None:
    if not rows or len({len(row) for row in rows}) != 1 or not all(np.isfinite(row).all() for row in rows):
        raise ConfigError(
            f"{rule}: {field} is a table of finite numbers with rows of one length",
            found=f"{len(rows)} rows of lengths {sorted({len(row) for row in rows})}",
            remedy="give at least one row, all of one length",
        )
