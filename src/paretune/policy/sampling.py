"""How a token is drawn from logits: temperature, top-p, top-k and penalties, a row's own, with a uniform of its own.

Penalties come first, then the temperature, then top-k, then top-p, as in transformers and vLLM. The draw inverts the cumulative
distribution in float64.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from paretune.errors import ConfigError, nearest, shown
from paretune.types import is_number

__all__ = ["Sampling", "Said", "draw", "shaped", "stop_at", "stop_ids"]

LARGEST = sys.float_info.max  # of a number that can be computed with: neither infinity nor an integer of 400 digits


@dataclass(frozen=True)
class Sampling:
    """What is drawn from: 1, 1, 0, 1, 0, 0 is the policy itself. Raises ConfigError where a number is none that it can be."""

    temperature: float = 1.0  # 0 takes the most likely token
    top_p: float = 1.0  # the fewest most likely tokens that have this mass together
    top_k: int = 0  # so many of the most likely tokens; 0 is all
    repetition_penalty: float = 1.0  # divides logits above 0, and multiplies those below, of tokens in the prompt or the response
    presence_penalty: float = 0.0  # is taken off the logits of tokens in the response
    frequency_penalty: float = 0.0  # is taken off once for each time that the token is in the response

    def __post_init__(self):
        rules = (
            ("temperature", "a finite number of at least 0 (above 0, at least 1e-6)", lambda x: x == 0 or 1e-6 <= x < math.inf),
            ("top_p", "above 0 and at most 1", lambda x: 0 < x <= 1),
            ("top_k", "a whole number of at least 0 (0 is all tokens)", lambda x: x >= 0 and x == int(x)),
            ("repetition_penalty", "a finite number above 0", lambda x: 0 < x < math.inf),
            ("presence_penalty", "a number from -2 to 2", lambda x: -2 <= x <= 2),
            ("frequency_penalty", "a number from -2 to 2", lambda x: -2 <= x <= 2),
        )
        for name, rule, holds in rules:
            value = getattr(self, name)
            good = is_number(value) and (abs(value) <= LARGEST and holds(value))
            if not good:
                raise ConfigError(f"{name} is {rule}", found=shown(value), remedy=f"correct {name}, or leave it out")

    @classmethod
    def of(cls, **given: Any) -> Sampling:
        """From named numbers; ConfigError for a name that is none of the fields."""
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise ConfigError("what is drawn from is set by existing names", found=name, remedy=nearest(name, known))
        return cls(**given)

    @property
    def penalizes(self) -> bool:
        """Whether logits depend on what was said."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def cuts(self) -> bool:
        """Whether some tokens are left out."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0)


class Said:
    """The tokens of one row, for its penalties."""

    def __init__(self, prompt: Sequence[int]):
        self.prompt = set(prompt)
        self.counts: dict[int, int] = {}

    def add(self, token: int) -> None:
        """One more token of the response."""
        self.counts[token] = self.counts.get(token, 0) + 1


def shaped(logits_NV: Tensor, samplings: Sequence[Sampling], said: Sequence[Said | None]) -> Tensor:
    """The logits with penalties, and -inf for tokens that top-k and top-p leave out; before the temperature. It writes into them."""
    for n, (sampling, words) in enumerate(zip(samplings, said, strict=True)):
        if sampling.penalizes and words is not None:
            _penalize(logits_NV[n], sampling, words)
    rows = [n for n, sampling in enumerate(samplings) if sampling.cuts]
    if rows:
        logits_NV[rows] = _cut(logits_NV[rows], [samplings[n] for n in rows])
    return logits_NV


def _penalize(logits_V: Tensor, sampling: Sampling, words: Said) -> None:
    device = logits_V.device
    if sampling.repetition_penalty != 1 and (seen := sorted(words.prompt | words.counts.keys())):
        seen_S = torch.tensor(seen, device=device)
        kept_S = logits_V[seen_S]
        logits_V[seen_S] = torch.where(kept_S > 0, kept_S / sampling.repetition_penalty, kept_S * sampling.repetition_penalty)
    if words.counts and (sampling.presence_penalty or sampling.frequency_penalty):
        counts_S = torch.tensor(list(words.counts.values()), device=device, dtype=logits_V.dtype)
        logits_V[torch.tensor(list(words.counts), device=device)] -= sampling.presence_penalty + sampling.frequency_penalty * counts_S


def _cut(logits_RV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    most = max(sampling.top_k for sampling in samplings)
    if most:
        vocabulary = logits_RV.shape[1]
        keep_R1 = torch.tensor([[min(s.top_k or vocabulary, vocabulary)] for s in samplings], device=logits_RV.device)
        least_R1 = logits_RV.topk(min(most, vocabulary), dim=1).values.gather(1, (keep_R1 - 1).clamp(max=min(most, vocabulary) - 1))
        least_R1 = torch.where(keep_R1 < vocabulary, least_R1, -torch.inf)
        logits_RV = logits_RV.masked_fill(logits_RV < least_R1, -torch.inf)
    if all(sampling.top_p == 1 for sampling in samplings):
        return logits_RV
    heat_R1 = torch.tensor([[s.temperature] for s in samplings], device=logits_RV.device, dtype=logits_RV.dtype)
    mass_R1 = torch.tensor([[s.top_p if s.top_p < 1 else 2.0] for s in samplings], device=logits_RV.device, dtype=logits_RV.dtype)
    sorted_RV, order_RV = (logits_RV / heat_R1).softmax(1).sort(stable=True, dim=1, descending=True)
    beyond_RV = sorted_RV.cumsum(1) - sorted_RV >= mass_R1  # the tokens above have the mass already
    return logits_RV.masked_fill(torch.zeros_like(beyond_RV).scatter(1, order_RV, beyond_RV), -torch.inf)


def draw(logits_NV: Tensor, uniform_N1: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (N, 1) by inversion of the cumulative distribution, and their log-probabilities (N, 1); float64 throughout.

    `temperature` is a number, or (N, 1); 0 takes the most likely token.
    """
    if isinstance(temperature, Tensor):
        greedy_N1 = temperature == 0
        token_N1, logp_N1 = draw(logits_NV / temperature.masked_fill(greedy_N1, 1.0), uniform_N1, 1.0)
        return torch.where(greedy_N1, logits_NV.argmax(1, keepdim=True), token_N1), logp_N1.masked_fill(greedy_N1, 0.0)
    if temperature == 0:
        return logits_NV.argmax(1, keepdim=True), torch.zeros_like(uniform_N1)
    logits_NV = logits_NV if temperature == 1 else logits_NV / temperature
    highest_N1 = logits_NV.amax(1, keepdim=True)
    cumulative_NV = (logits_NV - highest_N1).exp_().cumsum_(1)
    total_N1 = cumulative_NV[:, -1:]
    # The first token whose cumulative mass exceeds the aim: never one of mass 0, because the aim stays below the total.
    token_N1 = torch.searchsorted(cumulative_NV, uniform_N1 * total_N1, right=True)
    token_N1.clamp_(max=logits_NV.shape[1] - 1)  # logits that are no numbers: their log-probability will say so
    return token_N1, logits_NV.gather(1, token_N1) - highest_N1 - total_N1.log()


def stop_at(text: str, stops: Sequence[str]) -> int | None:
    """Where a text ends that stops before the first of `stops` that is complete; None where none is in it."""
    found = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def stop_ids(tokenizer: Any, stops: Sequence[str]) -> frozenset[int]:
    """Those of `stops` that are one special token of the tokenizer's. Texts leave these out, so that a response ends at the token."""
    if not stops:
        return frozenset()
    added = getattr(tokenizer, "added_tokens_decoder", {})  # tokenizers that are not of transformers' files have none
    special = {str(token): i for i, token in added.items() if token.special}
    special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return frozenset(special[stop] for stop in stops if stop in special)
