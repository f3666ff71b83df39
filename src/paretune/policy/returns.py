"""Returns of a policy at given gates: exact where every response can be enumerated, else from samples that share their noise.

`returns_of(task, policy, split, ...)` chooses between `ExactReturns` and `SampledReturns`, which answer the same calls. Searches of
the outer level and evaluations both measure with them, so that what a search maximizes is what is later judged.

Whoever measures to find gates or trainings is charged for it by one rule: `with metered() as meter:` around it, then `meter.cost`. Every
call counts in full, also at gates that were measured before: that these are remembered is a convenience of this file.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch

from paretune.policy.base import Policy
from paretune.policy.rollout import Rollout, generate, occurrences
from paretune.policy.scoring import token_logp
from paretune.progress import counted
from paretune.seeds import seed_for
from paretune.tasks.base import Task
from paretune.tasks.exact.task import ExactTask
from paretune.types import Cost

__all__ = [
    "BATCH_ROWS",
    "KNOWN",
    "ExactReturns",
    "Measured",
    "Meter",
    "Returns",
    "SampledReturns",
    "covariance_within",
    "metered",
    "returns_of",
]

BATCH_ROWS = 64
KNOWN = 0.9  # the share of responses that have a value, at least
Gates = np.ndarray | Sequence[None]
"""(W, K) gates, or (W, P, K) where every prompt has its own; None in place of a row is the reference."""
Value = Callable[[np.ndarray], np.ndarray]
"""Rewards (..., M) -> a number for each response (...)."""


@dataclass
class Meter:
    """What was measured within a `metered` block; its seconds are known at the end."""

    cost: Cost = field(default_factory=Cost)


_METERS: ContextVar[tuple[Meter, ...]] = ContextVar("meters", default=())


@contextlib.contextmanager
def metered() -> Iterator[Meter]:
    """Charge what all `Returns` measure within to a meter: gate vectors (rounds of `once`), responses, tokens, and the block's seconds."""
    meter, began = Meter(), time.perf_counter()
    token = _METERS.set((*_METERS.get(), meter))
    try:
        yield meter
    finally:
        _METERS.reset(token)
        if meter.cost.evaluations:
            meter.cost = replace(meter.cost, seconds=time.perf_counter() - began)


def _charge(evaluations: int, samples: int, tokens: int) -> None:
    for meter in _METERS.get():
        meter.cost = meter.cost.then(Cost(evaluations=evaluations, validation_samples=samples, tokens=tokens))


@dataclass(frozen=True)
class Measured:
    """Rewards and KL at W gate vectors. S are the prompts (expectations) where exact, else single responses.

    Row s has the same prompt, and where sampled the same uniforms, at every gate vector and for every policy.
    """

    rewards_WSM: np.ndarray  # NaN = unscored
    kl_WS: np.ndarray  # nats; sampled: log pi(y) - log pi_ref(y), unbiased for the KL, and possibly negative
    prompt_S: np.ndarray  # which prompt of the split; of equal ones the first
    beta: float
    tokens: int = 0  # generated, or enumerated, for the distinct ones of these gates
    texts_WS: Sequence[Sequence[str]] = ()  # of sampled responses

    @property
    def returns_WSM(self) -> np.ndarray:
        return self.rewards_WSM - self.beta * self.kl_WS[..., None]

    @property
    def means_WM(self) -> np.ndarray:
        """(W, M) mean rewards over what was scored (NaN where nothing was), minus beta times the mean KL."""
        known_WSM = ~np.isnan(self.rewards_WSM)
        total_WM, count_WM = np.where(known_WSM, self.rewards_WSM, 0.0).sum(1), known_WSM.sum(1)
        rewards_WM = np.where(count_WM > 0, total_WM / np.maximum(count_WM, 1), np.nan)
        return rewards_WM - self.beta * self.kl_WS.mean(1)[:, None]


class Returns(ABC):
    """What one policy earns on one split of a task. Its weights must not change while the object is in use."""

    exact: ClassVar[bool]

    def __init__(self, task: Task, policy: Policy, split: str):
        self.task, self.policy, self.split = task, policy, split

    @property
    @abstractmethod
    def samples(self) -> int:
        """Responses that one gate vector costs; 0 where exact."""

    @abstractmethod
    def at(self, gates_W: Gates) -> Measured:
        """Rewards and KL at each of W gate vectors; equal ones are measured once."""

    @abstractmethod
    def expected(self, gates_K: np.ndarray, value: Value, price: float) -> float:
        """E[value(rewards) - price * (log pi - log pi_ref)] at gates (K,), mean over prompts; sampled: over what has a value.

        NaN where more than a tenth of the responses has none: then those that have one may be of another kind.
        """

    @abstractmethod
    def covariance_MM(self, gates_K: np.ndarray | None) -> np.ndarray:
        """(M, M) covariance of the rewards of one prompt's responses, mean over prompts; sampled: of responses that are scored in full.

        Charged only at gates that were not measured before: the same responses give both.
        """

    @abstractmethod
    def once(self, prompt_N: np.ndarray, gates_NK: np.ndarray, step: int) -> np.ndarray:
        """(N, M) returns of one response to each of these prompts at gates of its own, noise named by `step`; expectations where exact."""


class ExactReturns(Returns):
    """Expectations over all responses of an exact task.

    All prompts go through the model as one batch of packed prefix trees. Where the mixing allows (logit, hidden), the model runs once and
    only the combination is computed for each gate vector.
    """

    exact = True
    samples = 0

    def __init__(self, task: Task, policy: Policy, split: str):
        assert isinstance(task, ExactTask)
        super().__init__(task, policy, split)
        self._exact: ExactTask = task
        inputs = task.inputs(split)
        self._inputs = [t.to(policy.device) for t in (inputs.input_ids_PT, inputs.mask_11TT, inputs.position_ids_PT)]
        self._parts: torch.Tensor | None = None
        self._known: dict[bytes | None, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def prompts(self) -> int:
        """P."""
        return len(self._inputs[0])

    @property
    def tokens(self) -> int:
        """Read to enumerate every response to every prompt once."""
        return self._inputs[0].numel()

    def logp_PR(self, gates: np.ndarray | None) -> np.ndarray:
        """(P, R) float64 log-probabilities of every response at gates (K,), or (P, K) for each prompt its own; None is the reference."""
        ids_PT, mask_11TT, positions_PT = self._inputs
        gates_PK = _for_prompts(gates, self.prompts, self.policy)
        with torch.no_grad():
            if gates_PK is None or self.policy.parts_need_gates:
                logits = self.policy.forward(ids_PT, attention_mask=mask_11TT, position_ids=positions_PT, gates_NK=gates_PK)
            else:
                if self._parts is None:
                    self._parts = self.policy.parts(ids_PT, mask_11TT, positions_PT)
                logits = self.policy.combine(self._parts, gates_PK)
            return self._exact.logp_from_logits(logits, self.split).cpu().numpy()

    def at(self, gates_W: Gates) -> Measured:
        found = [self._returns(gates) for gates in counted("measuring preference", list(gates_W))]
        rewards_WPM, kl_WP = (np.stack(parts) for parts in zip(*found, strict=True))
        distinct = len({_name_of(gates) for gates in gates_W})
        _charge(distinct, 0, distinct * self.tokens)
        return Measured(rewards_WPM, kl_WP, np.arange(self.prompts), self.task.beta, distinct * self.tokens)

    def expected(self, gates_K: np.ndarray, value: Value, price: float) -> float:
        _charge(1, 0, self.tokens)
        logp_PR, reference_PR = self.logp_PR(gates_K), self._exact.reference_logp_PR(self.split)
        values_PR = value(self._exact.rewards_PRM(self.split))
        return float((np.exp(logp_PR) * (values_PR - price * (logp_PR - reference_PR))).sum(1).mean())

    def covariance_MM(self, gates_K: np.ndarray | None) -> np.ndarray:
        if _name_of(gates_K) not in self._known:
            _charge(1, 0, self.tokens)
        p_PR, rewards_PRM = np.exp(self.logp_PR(gates_K)), self._exact.rewards_PRM(self.split)
        centered_PRM = rewards_PRM - np.einsum("pr,prm->pm", p_PR, rewards_PRM)[:, None]
        return np.einsum("pr,prj,prk->jk", p_PR, centered_PRM, centered_PRM) / len(p_PR)

    def once(self, prompt_N: np.ndarray, gates_NK: np.ndarray, step: int) -> np.ndarray:
        _charge(1, 0, self.tokens)
        gates_PK = np.empty_like(gates_NK)
        gates_PK[prompt_N] = gates_NK
        rewards_PM, kl_P = self._exact.returns(self.logp_PR(gates_PK), self.split)
        return (rewards_PM - self.task.beta * kl_P[:, None])[prompt_N]

    def _returns(self, gates: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        name = _name_of(gates)
        if name not in self._known:
            self._known[name] = self._exact.returns(self.logp_PR(gates), self.split)
        return self._known[name]


class SampledReturns(Returns):
    """Single responses: `samples` at each gate vector, spread evenly over the split's prompts in their order.

    With fewer samples than prompts only the first `samples` prompts are used: the same ones for everything that is compared. With `each`
    there are so many responses to every prompt that is used, or more: a covariance within prompts needs two.
    """

    exact = False

    def __init__(self, task: Task, policy: Policy, split: str, *, samples: int, seed: int, each: int = 1):
        super().__init__(task, policy, split)
        self._samples, self.seed = samples, seed
        self._used = min(len(task.prompts(split)), max(1, samples // each))
        self._known: dict[bytes | None, tuple[np.ndarray, np.ndarray, list[str], int]] = {}

    @property
    def samples(self) -> int:
        return self._samples

    def at(self, gates_W: Gates) -> Measured:
        prompts, place_S = self.task.prompts(self.split), np.arange(self.samples) % self._used
        rows = [prompts[p] for p in place_S.tolist()]
        names = [_name_of(gates) for gates in gates_W]
        for name, gates in counted("measuring preference", list(zip(names, gates_W, strict=True))):
            if name not in self._known:
                gates_PK = _for_prompts(gates, len(prompts), self.policy)
                gates_SK = None if gates_PK is None else gates_PK[place_S]
                self._known[name] = self._responses(rows, gates_SK, seed_for(self.seed, "returns", self.split), occurrences(rows))
        rewards, kl, texts, _ = zip(*(self._known[name] for name in names), strict=True)
        distinct = set(names)
        tokens = sum(self._known[name][3] for name in distinct)
        _charge(len(distinct), len(distinct) * self.samples, tokens)
        return Measured(np.stack(rewards), np.stack(kl), self._prompt_S, self.task.beta, tokens, texts)

    def expected(self, gates_K: np.ndarray, value: Value, price: float) -> float:
        made = self.at(gates_K[None])
        value_S = value(made.rewards_WSM[0])
        known_S = ~np.isnan(value_S)
        return float(value_S[known_S].mean() - price * made.kl_WS[0].mean()) if known_S.mean() >= KNOWN else float("nan")

    def covariance_MM(self, gates_K: np.ndarray | None) -> np.ndarray:
        if _name_of(gates_K) not in self._known:
            self.at([None] if gates_K is None else gates_K[None])
        return covariance_within(self._known[_name_of(gates_K)][0], self._prompt_S)

    @property
    def _prompt_S(self) -> np.ndarray:
        """Which prompt each response is to; of equal prompts of the split, the first."""
        first: dict[str, int] = {}
        place_P = [first.setdefault(repr(prompt), place) for place, prompt in enumerate(self.task.prompts(self.split)[: self._used])]
        return np.array(place_P)[np.arange(self.samples) % self._used]

    def once(self, prompt_N: np.ndarray, gates_NK: np.ndarray, step: int) -> np.ndarray:
        prompts = self.task.prompts(self.split)
        rewards_NM, kl_N, _, tokens = self._responses([prompts[p] for p in prompt_N], gates_NK, self.seed, [0] * len(prompt_N), step=step)
        _charge(1, len(prompt_N), tokens)
        return rewards_NM - self.task.beta * kl_N[:, None]

    def _responses(
        self, rows: Sequence[Any], gates_NK: Any, seed: int, numbers: Sequence[int], *, step: int = 0
    ) -> tuple[np.ndarray, np.ndarray, list[str], int]:
        """One response per row: rewards (N, M), log pi - log pi_ref (N,), the texts, and how many tokens were drawn."""
        made = [
            (self.task.score(drawn.prompts, drawn.texts), self._kl_N(drawn), drawn.texts, int(drawn.responses.mask_NT.sum()))
            for drawn in generate(
                self.policy,
                rows,
                gates_NK=gates_NK,
                max_new_tokens=self.task.max_new_tokens,
                seed=seed,
                step=step,
                numbers=numbers,
                batch=BATCH_ROWS,
            )
        ]
        rewards, kl, texts, tokens = zip(*made, strict=True)
        return np.concatenate(rewards), np.concatenate(kl), [text for part in texts for text in part], sum(tokens)

    def _kl_N(self, drawn: Rollout) -> np.ndarray:
        tokens_NT, mask_NT = drawn.responses.tokens_NT, drawn.responses.mask_NT
        with torch.no_grad():
            reference_NT = token_logp(
                self.policy,
                drawn.prompt_ids_PT,
                drawn.prompt_mask_PT,
                tokens_NT,
                gates_NK=None,
                group=drawn.group,
                mask_NT=mask_NT,
            )
        return ((drawn.responses.logp_NT - reference_NT.double()) * mask_NT).sum(1).cpu().numpy()


def returns_of(task: Task, policy: Policy, split: str, *, samples: int, seed: int, exact: bool | None = None, each: int = 1) -> Returns:
    """Exact returns where the task is exact (or `exact` says so), else `samples` responses at each gate vector, noise named by `seed`.

    `each` is for `SampledReturns`.
    """
    if task.is_exact if exact is None else exact:
        return ExactReturns(task, policy, split)
    return SampledReturns(task, policy, split, samples=samples, seed=seed, each=each)


def covariance_within(rewards_SM: np.ndarray, prompt_S: np.ndarray) -> np.ndarray:
    """(M, M) covariance within prompts, over the samples in which everything was scored; NaN where no prompt has two of them."""
    known_S = ~np.isnan(rewards_SM).any(1)
    total_MM, degrees = np.zeros((rewards_SM.shape[1],) * 2), 0
    for prompt in np.unique(prompt_S[known_S]):
        own_NM = rewards_SM[known_S & (prompt_S == prompt)]
        centered_NM = own_NM - own_NM.mean(0)
        total_MM, degrees = total_MM + centered_NM.T @ centered_NM, degrees + len(own_NM) - 1
    return total_MM / degrees if degrees else np.full_like(total_MM, np.nan)


def _name_of(gates: np.ndarray | None) -> bytes | None:
    return None if gates is None else (np.asarray(gates, dtype=np.float64) + 0.0).tobytes()  # + 0: there is one zero


def _for_prompts(gates: np.ndarray | None, count: int, policy: Policy) -> torch.Tensor | None:
    """(count, K) float32 of gates (K,) for all prompts, or (count, K) for each its own."""
    if gates is None:
        return None
    gates_T = torch.as_tensor(gates, dtype=torch.float32)
    return (gates_T.repeat(count, 1) if gates_T.dim() == 1 else gates_T).to(policy.device)
