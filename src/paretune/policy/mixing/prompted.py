"""The preference as text: one adapter, and a prompt that begins with the weights of the objectives, written in digits."""

from __future__ import annotations

from string import ascii_lowercase, digits
from typing import Any

import torch
from torch import Tensor

from paretune.errors import ConfigError
from paretune.policy.base import MIXINGS, Weights
from paretune.policy.mixing.parameter import ParameterMix, claim_cache

__all__ = ["PromptedMix", "digit_ids"]


def digit_ids(tokenizer: Any) -> list[int]:
    """Tokens that can stand for digits: the ten decimal ones where all are tokens, or else the letters that are, in their order."""
    special, unknown = set(getattr(tokenizer, "all_special_ids", ())), getattr(tokenizer, "unk_token_id", None)
    known = [
        [i for i in map(tokenizer.convert_tokens_to_ids, symbols) if i is not None and i != unknown and i not in special]
        for symbols in (digits, ascii_lowercase)
    ]
    found = known[0] if len(set(known[0])) == len(digits) else known[1]
    if len(set(found)) < 2:
        raise ConfigError(
            "a preference in the prompt is written in digits, each a token of its own",
            found="a tokenizer with neither decimal digits nor letters as tokens",
            remedy='use method "conditioned", whose adapters are gated by the preference',
        )
    return found


@MIXINGS.register("prompted")
class PromptedMix(ParameterMix):
    """One adapter; the gates of a row are its preference, whose weights stand as digits before the prompt: `digits` for each objective.

    A weight is written as the nearest multiple of 1 / (base^digits - 1), the most significant digit first. All rows have as many digits
    before them, so that batches, caches and packed prefix trees stay as they are. The reference (no gates) reads the prompt alone.
    Source: the preference in the prompt, as RiC (2402.10207) and MO-ODPO (2503.00295) have it.
    Differs: digits of fixed width without words around them, before everything, chat template included; on exact tasks they are
        letters of the alphabet. RiC writes the wanted reward levels, not the weights.
    Hides: the untrained policy is not the reference, which has never seen such a beginning; preferences between two steps of the last
        digit are one; a prompt may itself begin with digits.
    """

    token_gates = False
    vertices_are_experts = False
    symmetric = False
    stepwise = True
    zero_is_reference = False
    attribution = "shapley"

    def single_weights(self, gates_K: Tensor) -> Weights | str:
        return Weights("delta", self._on, tuple(self.prefix(gates_K[None])[0].tolist()))

    def __init__(self, bank: Any, tokenizer: Any, *, objectives: int, digits: int = 2):
        super().__init__(bank, tokenizer)
        if bank.count != 1 or objectives < 1 or digits < 1:
            raise ConfigError(
                "a prompted policy has one adapter, and at least one objective and one digit",
                found=f"{bank.count} adapters, objectives={objectives}, digits={digits}",
                remedy='train it with `fresh=(rank,)` and the rule "prompted"',
            )
        self.objectives, self.digits = objectives, digits
        self._on = torch.ones(1, device=self.device)  # the adapter's gate, one object: decoding recognizes it
        self.symbols = torch.tensor(digit_ids(tokenizer), device=self.device)

    @property
    def settings(self) -> dict[str, Any]:
        return {"objectives": self.objectives, "digits": self.digits}

    @property
    def K(self) -> int:
        return self.objectives

    @property
    def extra_positions(self) -> int:
        return self.objectives * self.digits

    def prefix(self, gates_NK: Tensor) -> Tensor:
        """(N, objectives * digits) ids: what stands before the prompts."""
        if not bool(((gates_NK > -1e-6) & (gates_NK < 1 + 1e-6)).all()):
            raise ConfigError(
                "a preference that is written into the prompt has weights from 0 to 1",
                found=f"{gates_NK.min().item():g} to {gates_NK.max().item():g}",
                remedy="use a rule that gives the preference itself",
            )
        base = len(self.symbols)
        whole_NK = (gates_NK.double().clamp(0, 1) * (base**self.digits - 1)).round().long()
        places = base ** torch.arange(self.digits - 1, -1, -1, device=whole_NK.device)
        return self.symbols[whole_NK[..., None] // places % base].flatten(1)

    def parts(self, input_ids_NT, attention_mask=None, position_ids=None, cache=None, gates_NK=None, last_only=False):
        assert gates_NK is not None
        if gates_NK.dim() != 2:
            raise ConfigError(
                "a preference in the prompt is the same for all tokens of a row",
                found=f"gates {tuple(gates_NK.shape)}",
                remedy="give one row of gates per row of the batch",
            )
        opens = cache is None or cache.get_seq_length() == 0  # else the digits are in the cache already
        if cache is not None:
            claim_cache(cache, gates_NK)
        keep = int(last_only) or input_ids_NT.shape[1]
        if opens:
            input_ids_NT = torch.cat([self.prefix(gates_NK), input_ids_NT], 1)
        past = 0 if opens else cache.get_seq_length()
        if attention_mask is not None and (opens or attention_mask.shape[-1] < past + input_ids_NT.shape[1]):  # a mask may count the digits
            attention_mask = _widened(attention_mask, self.extra_positions, opens)
        if position_ids is not None:
            position_ids = position_ids + self.extra_positions
            if opens:
                first = torch.arange(self.extra_positions, device=position_ids.device).expand(len(position_ids), -1)
                position_ids = torch.cat([first, position_ids], 1)
        with self.bank.gates(self._on):
            return self._logits(self._inputs(1, input_ids_NT, attention_mask, position_ids, cache), keep)


def _widened(mask: Tensor, count: int, opens: bool) -> Tensor:
    """The mask with `count` more tokens on the left that all others may look at; with `opens` they are among the inputs."""
    if mask.dim() == 2:
        return torch.cat([mask.new_ones(len(mask), count), mask], 1)
    see, hide = (0.0, torch.finfo(mask.dtype).min) if mask.is_floating_point() else (True, False)
    mask = torch.cat([mask.new_full((*mask.shape[:3], count), see), mask], 3)
    if not opens:
        return mask
    above = mask.new_full((*mask.shape[:2], count, mask.shape[3]), hide)
    below = torch.ones(count, count, dtype=torch.bool, device=mask.device).tril()
    above[..., :count] = above[..., :count].masked_fill(below, see)
    return torch.cat([above, mask], 2)
