"""What a policy earns at given gates: exactly, where every response can be enumerated, or from samples with shared noise.

Outer-level search and evaluation both measure with this, so that what a search optimizes is what is later judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from paretune.policy.rollout import encode, row_uniforms, sample, texts, token_logp
from paretune.seeds import seed_for
from paretune.tasks.base import Task
from paretune.types import Prompt

if TYPE_CHECKING:
    from paretune.policy.base import Policy
    from paretune.tasks.exact.task import ExactTask

__all__ = ["BATCH_ROWS", "ExactReturns", "Sampled", "responses_at", "sampled_returns"]

BATCH_ROWS = 64


class ExactReturns:
    """Exact log-probabilities and returns of one policy on one split, at any number of gates.

    All prompts go through the model as one batch of packed prefix trees. Where the level allows (logit, hidden), the model runs once
    and only the combination is computed for each gate vector. The weights must not change while this object is in use.
    """

    def __init__(self, task: ExactTask, policy: Policy, split: str):
        self.task, self.policy, self.split = task, policy, split
        inputs = task.inputs(split)
        self._inputs = [t.to(policy.device) for t in (inputs.input_ids_PT, inputs.mask_11TT, inputs.position_ids_PT)]
        self._parts: torch.Tensor | None = None
        self._known: dict[bytes | None, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def prompts(self) -> int:
        """P."""
        return len(self._inputs[0])

    def logp_PR(self, gates: np.ndarray | None) -> np.ndarray:
        """(P, R) float64 log-probabilities of every response at gates (K,), or (P, K) for each prompt its own; None is the reference."""
        ids_PT, mask_11TT, positions_PT = self._inputs
        gates_PK = None if gates is None else _for_rows(gates, self.prompts).to(self.policy.device)
        with torch.no_grad():
            if gates_PK is None or self.policy.parts_need_gates:
                logits = self.policy.forward(ids_PT, attention_mask=mask_11TT, position_ids=positions_PT, gates_NK=gates_PK)
            else:
                if self._parts is None:
                    self._parts = self.policy.parts(ids_PT, mask_11TT, positions_PT)
                logits = self.policy.combine(self._parts, gates_PK)
            return self.task.logp_from_logits(logits, self.split).cpu().numpy()

    def at(self, gates_W: np.ndarray | Sequence[None]) -> tuple[np.ndarray, np.ndarray]:
        """Expected rewards (W, P, M) and KL to the reference in nats (W, P), at each of W gates; equal ones are computed once.

        Gates are (W, K), or (W, P, K) where every prompt has its own.
        """
        found = [self._returns(gates) for gates in gates_W]
        return np.stack([rewards_PM for rewards_PM, _ in found]), np.stack([kl_P for _, kl_P in found])

    def _returns(self, gates: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        key = None if gates is None else (np.asarray(gates, dtype=np.float64) + 0.0).tobytes()  # + 0: there is one zero
        if key not in self._known:
            self._known[key] = self.task.returns(self.logp_PR(gates), self.split)
        return self._known[key]


def _for_rows(gates: np.ndarray, count: int) -> torch.Tensor:
    """(count, K) float32 of gates (K,) for all rows, or (count, K) for each its own."""
    gates_T = torch.as_tensor(gates, dtype=torch.float32)
    return gates_T.repeat(count, 1) if gates_T.dim() == 1 else gates_T


@dataclass(frozen=True)
class Sampled:
    """Single samples, raw. Row s has the same prompt and the same uniforms at every gate vector, and for every policy."""

    rewards_WSM: np.ndarray  # NaN = unscored
    kl_WS: np.ndarray  # log pi(y) - log pi_ref(y) of the sampled response: unbiased for the KL, and may be negative
    prompt_S: np.ndarray
    tokens: int  # generated
    texts_WS: list[list[str]]


def sampled_returns(
    task: Task,
    policy: Policy,
    split: str,
    gates_W: np.ndarray | Sequence[None],
    *,
    samples: int,
    seed: int,
) -> Sampled:
    """`samples` responses at each of W gates (None is the reference), spread evenly over the split's prompts in their order.

    Gates are (W, K), or (W, P, K) where every prompt has its own; equal ones are sampled once.
    With fewer samples than prompts only the first `samples` prompts are used: the same ones for everything that is compared.
    """
    prompts = task.prompts(split)
    prompt_S = np.arange(samples) % len(prompts)
    rows = [prompts[int(p)] for p in prompt_S]
    occurrences = [s // len(prompts) for s in range(samples)]
    uniforms_ST = row_uniforms(seed_for(seed, "returns", split), 0, [p.digest for p in rows], occurrences, task.max_new_tokens)
    rewards_WSM = np.empty((len(gates_W), samples, task.objectives.count))
    kl_WS = np.empty((len(gates_W), samples))
    tokens = 0
    texts_WS: list[list[str]] = [[] for _ in gates_W]
    names = [
        None if gates is None else (np.asarray(gates, dtype=np.float64) + 0.0).tobytes() for gates in gates_W
    ]  # + 0: there is one zero
    first_W = [names.index(name) for name in names]
    for start in range(0, samples, BATCH_ROWS):
        here = slice(start, start + BATCH_ROWS)
        for number, gates in enumerate(gates_W):
            if first_W[number] < number:
                continue
            gates_NK = None if gates is None else _for_rows(gates, len(prompts))[prompt_S[here]].to(policy.device)
            rewards_WSM[number, here], kl_WS[number, here], said, length = _responses(task, policy, rows[here], gates_NK, uniforms_ST[here])
            texts_WS[number] += said
            tokens += length
    rewards_WSM, kl_WS, texts_WS = rewards_WSM[first_W], kl_WS[first_W], [texts_WS[first] for first in first_W]
    return Sampled(rewards_WSM=rewards_WSM, kl_WS=kl_WS, prompt_S=prompt_S, tokens=tokens, texts_WS=texts_WS)


def responses_at(
    task: Task, policy: Policy, prompts: Sequence[Prompt], gates_PK: np.ndarray, *, seed: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """One response to each prompt at gates of its own: rewards (P, M) and sampled KL in nats (P,). `seed` and `step` name the noise."""
    uniforms_PT = row_uniforms(seed, step, [p.digest for p in prompts], [0] * len(prompts), task.max_new_tokens)
    parts = []
    for start in range(0, len(prompts), BATCH_ROWS):
        here = slice(start, start + BATCH_ROWS)
        gates_NK = torch.as_tensor(gates_PK[here], dtype=torch.float32).to(policy.device)
        parts.append(_responses(task, policy, prompts[here], gates_NK, uniforms_PT[here]))
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _responses(
    task: Task, policy: Policy, rows: Sequence[Prompt], gates_NK: torch.Tensor | None, uniforms_NT: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[str], int]:
    """One response per row: rewards (N, M), log pi - log pi_ref (N,), the texts, and how many tokens were drawn."""
    ids_NT, mask_NT = encode(policy.tokenizer, rows, policy.device)
    with torch.no_grad():
        made = sample(policy, ids_NT, mask_NT, gates_NK=gates_NK, max_new_tokens=task.max_new_tokens, uniforms_NT=uniforms_NT)
        reference_NT = token_logp(policy, ids_NT, mask_NT, made.tokens_NT, gates_NK=None)
    kl_N = ((made.logp_NT - reference_NT.double()) * made.mask_NT).sum(1).cpu().numpy()
    said = texts(policy.tokenizer, made)
    return task.score(rows, said), kl_N, said, int(made.mask_NT.sum())
