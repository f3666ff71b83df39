"""The plain mixing levels: soups, logits, and the last hidden states. The table of all levels stands in `paretune.mixing`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from paretune.errors import ConfigError
from paretune.policy import LEVELS, Policy
from paretune.trunk import branch_point, branched, run_head, stacked_share

__all__ = ["FactorMix", "HiddenMix", "LogitMix", "ParameterMix", "ReferencePolicy"]


@LEVELS.register("parameter")
class ParameterMix(Policy):
    """The exact soup of the adapters, its own for every row.

    Source: rewarded soups (2306.04488), whose formula averages full weights.
    Differs: unmerged and per row; what is averaged is what the adapters add (B A), not their factors (B and A).
    Hides: nothing between the experts was trained, so that under conflict the soup can be worse than the reference.
    """

    parts_need_gates = True
    one_forward = True

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
    """All K experts in one forward: the batch repeated K times, block k under adapter k, one cache of K * N rows.

    Where adapters begin above the first decoder layer, the layers below are run once, on N rows: see `trunk.py`.
    """

    @property
    def copies(self) -> int:
        return self.K

    @property
    def forwards_per_token(self) -> float:
        """One, and the part above the shared trunk (by its weights, head included) once more for every other copy."""
        return 1 + (self.copies - 1) * stacked_share(self.bank)

    @contextlib.contextmanager
    def _stacked(self, mode: contextlib.AbstractContextManager[None], *inputs: Any) -> Iterator[dict[str, Any]]:
        """The model's arguments, in a context (`mode` chooses the adapters) where its output has `copies` * N rows."""
        first = branch_point(self.bank)
        with mode, branched(self.bank.stack, first, self.copies) if first else contextlib.nullcontext():
            yield self._inputs(1 if first else self.copies, *inputs)


@LEVELS.register("logit")
class LogitMix(_Stacked):
    """A product of the experts, token by token: log pi(y_t) = sum_k g_k log pi_k(y_t) + constant.

    Source: MOD (2406.18853), the reverse-KL case.
    Differs: all experts share one stacked forward and one cache. Logits are mixed instead of their log-softmaxes: the normalisers
        are constants over V for each row, and drop out.
    Hides: the sequence-level product is optimal for linear preferences, the token-level one is not; K forwards per token (of the
        layers with adapters and those above).
    """

    def parts(self, input_ids_NT, attention_mask=None, position_ids=None, cache=None, gates_NK=None, last_only=False):
        """(K, N, T, V) logits of the experts, in the model's dtype."""
        with self._stacked(self.bank.blocks(), input_ids_NT, attention_mask, position_ids, cache) as inputs:
            logits = self._logits(inputs, last_only)
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
        with self._stacked(self.bank.blocks(), input_ids_NT, attention_mask, position_ids, cache) as inputs:
            hidden = self.decoder(**inputs).last_hidden_state
        return hidden[:, -int(last_only) :].unflatten(0, (self.K, -1))

    def combine(self, parts: Tensor, gates_NK: Tensor | None) -> Tensor:
        """The causal LM's own head on the mixed states."""
        with self.bank.gates(gates_NK):
            return run_head(self.model, _weighted(parts, gates_NK).to(parts.dtype))


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
