"""Exact tasks: a real causal LM whose every response can be enumerated, so that the true Pareto front is known.

Regularized return of objective k: J_k = mean over prompts of (E[r_k] - beta * KL(pi || pi_ref)), KL over whole responses in nats.
For a preference w the optimum of w . J is pi*_w(y|x) proportional to pi_ref(y|x) exp(w . r(x, y) / beta): the front is closed form.

`exact-v1` with its default dials is the first judged family: task seeds 0-9 are for development, 100-109 for judging. Under its frozen head
the optimum cannot be represented everywhere. In `exact-v2` it can: the reference's head begins five times larger, with the same loss of
pre-training, and the ceiling is at least 0.998 at every judged preference; and its language depends on the whole prompt, through the
features through which rewards depend on it. Seeds 10-19 are for development, 200-209 for judging.

The dials, verified when the rewards are first built (a task that misses one raises TaskError):

    rho              correlation of every pair of objectives under the reference, mean over prompts, within 0.03; the prompts
                     are split so that training and test prompts differ as little from it as 500 seeded splits allow
    objective_count  M, 2 to 8; rho is at least -1/(M-1)
    interaction      how much neighboring symbols matter to each other in the rewards (stopping, squashing and the language
                     itself couple symbols too, so token-by-token mixing is not exact even at 0)
    strength         nats from the reference to each objective's own optimum

and those of `tasks.dials`, off by default:

    scale            objective_1 has this times the spread of each other objective, within 1 %. Ranges are sqrt(scale) and
                     1 / sqrt(scale), beta stays: the strength of objective_1 grows, that of the others shrinks
    sparse           the last objective pays 0 or one payoff, and pays at this rate under the reference, mean over prompts, within 10 %
                     of it; rho then holds for the scores whose best responses pay, because the correlation of a rare event with
                     anything is small; `verified` has both
    noise            `observe`, which learners call, adds Gaussian noise of this times the objective's spread, from named seeds, within
                     10 %; `score`, `rewards_PRM`, the front and every exact number, a search's too, stay without noise
    context          a prompt that begins with the first letter of the alphabet has correlation rho + context, one that begins with
                     the second rho - context, each within 0.03; half of each split, so that what is learned on training
                     prompts holds on test prompts. `contexts` says which is which, `features` has the letters

`terms` (`objectives.terms`) may gate rewards; then everything exact, the front too, is that of the gated ones, noise is added to these, and
the dials were verified before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from dataclasses import fields as fields_of
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from scipy.special import logit, logsumexp

from paretune.errors import TaskError
from paretune.objectives.base import score_all
from paretune.objectives.terms import Declared, Terms
from paretune.registry import GIVEN, TASKS
from paretune.seeds import generator
from paretune.tasks.base import Task, reference
from paretune.tasks.exact.ceiling import ceiling_W
from paretune.tasks.exact.known import posterior_mean
from paretune.tasks.exact.language import (
    ReferenceSpec,
    alphabet_of,
    check_width,
    load_reference,
    one_thread,
    prompt_features,
    sample_language,
)
from paretune.tasks.exact.rewards import (
    CONTEXTS,
    add_noise,
    choose_prompts,
    correlations,
    correlations_P,
    design,
    factors,
    fields,
    mix_to_correlation,
    pays_rarely,
    prompts_of_contexts,
    spreads,
    stretch,
    verify_noise,
)
from paretune.tasks.exact.tree import PrefixTree, TreeInputs
from paretune.types import Count, Front, Objectives, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ExactTask", "Forward"]

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(input_ids (P, T), additive mask (1, 1, T, T), position_ids (P, T)) -> logits (P, T, V)."""

SPLITS = ("train", "test")
MARGIN = 0.01  # the reference point lies this share of the front's range below its nadir


@TASKS.register("exact-v1")
@dataclass(frozen=True)
class ExactTask(Task):
    """A task whose front is known in closed form; see the module's docstring for the dials."""

    rho: float = 0.0
    objective_count: int = 2
    interaction: float = 1.0
    strength: float = 0.58
    beta: float = 0.15
    alphabet: int = 8
    length: int = 4
    prompt_count: int = 8
    width: Count = 128
    layers: Count = 2
    seed: int = 0
    scale: float = 1.0
    sparse: float = 0.0
    noise: float = 0.0
    context: float = 0.0
    terms: Declared | None = field(default=None, metadata=GIVEN)  # gated rewards, weights by step, targets, constraints

    is_exact: ClassVar[bool] = True

    def __post_init__(self):
        m = self.objective_count
        ranges = {
            "objective_count": (m, 2, 8),
            "rho": (self.rho, -1 / (max(m, 2) - 1) - 1e-9, 0.99),
            "interaction": (self.interaction, 0.0, 100.0),
            "strength": (self.strength, 0.01, 5.0),
            "beta": (self.beta, 1e-3, 10.0),
            "alphabet": (self.alphabet, 2, 26),
            "length": (self.length, 1, 8),
            "prompt_count": (self.prompt_count, 1, 512),
            "scale": (self.scale, 1.0, 100.0),
            "sparse": (self.sparse, 1e-3 if self.sparse else 0.0, 0.5),
            "noise": (self.noise, 0.0, 10.0),
            "context": (self.context, 0.0, 0.99),
        }
        for name, (value, low, high) in ranges.items():
            if not low <= value <= high:
                raise TaskError(
                    f"{name} lies between {low:.4g} and {high:.4g}" + (f" for {m} objectives" if name == "rho" else ""),
                    found=f"{name} = {value:g}",
                    remedy=f"choose {name} in that range",
                )
        if self.alphabet**self.length > 20_000:
            raise TaskError(
                "every response can be enumerated",
                found=f"{self.alphabet} symbols and length {self.length}: {self.alphabet**self.length:,} full-length responses",
                remedy="keep alphabet ** length at or below 20,000",
            )
        if self.prompt_count + self.tested > self.alphabet**3:
            raise TaskError(
                "training and test prompts are distinct strings of 3 symbols",
                found=f"{self.prompt_count} + {self.tested} prompts from {self.alphabet} symbols",
                remedy=f"at most {self.alphabet**3} prompts together, or a larger alphabet",
            )
        check_width(self.width)
        _check_dials(self)
        self._take_terms()

    def _take_terms(self) -> None:
        object.__setattr__(self, "terms", Terms.of(self.terms, self.objectives.names))
        if self.terms is not None:
            self.terms.check(self.objectives)

    # What every task has

    @property
    def tested(self) -> int:
        """How many test prompts there are."""
        return self.prompt_count

    @property
    def objectives(self) -> Objectives:  # type: ignore[override]
        m = self.objective_count
        names = tuple(f"objective_{k + 1}" for k in range(m))
        return Objectives(names=names, low=(0.0,) * m, high=tuple(factors(m, self.scale).tolist()))

    @property
    def max_new_tokens(self) -> int:  # type: ignore[override]
        return self.length

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_reference(self._reference)

    def prompts(self, split: str) -> Sequence[Prompt]:
        return [Prompt(text=self._text(row)) for row in self._prompts_PT[self._rows[split]]]

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        return score_all([(name, self._objective(k)) for k, name in enumerate(self.objectives.names)], prompts, completions)

    def observe(self, prompts: Sequence[Prompt], completions: Sequence[str], *, streams: Sequence[int]) -> np.ndarray:
        rewards_NM = self.score(prompts, completions)
        return add_noise(rewards_NM, self.noise * self._spread_M, streams) if self.noise else rewards_NM

    def unlabelled(self, count: int) -> Sequence[Prompt]:
        """Further prompts of the reference's language."""
        drawn = sample_language(self._reference, generator(self.seed, "unlabelled prompts"), 50 * self.alphabet**3, self._reference.context)
        known = {prompt.text for split in SPLITS for prompt in self.prompts(split)}
        return [Prompt(text=text) for text in dict.fromkeys(map(self._text, drawn)) if text not in known][:count]

    # What only an exact task knows

    def retrained(self, more: Sequence[Prompt], guess: Callable[[ExactTask], np.ndarray]) -> ExactTask:
        """The same task with more training prompts, on all of which the rewards are what `guess` says of it, (P, R, M), without noise."""
        names = alphabet_of(self.alphabet)
        more_PT = np.array([[names.index(symbol) for symbol in str(prompt.text)] for prompt in more])
        count = len(self._prompts_PT)
        rows = np.concatenate([self._rows["train"], np.arange(count, count + len(more))])
        made = object.__new__(type(self))
        made.__dict__.update({f.name: getattr(self, f.name) for f in fields_of(self)}, prompt_count=len(rows), noise=0.0)
        made.__dict__["_prompts_PT"] = np.concatenate([self._prompts_PT, more_PT])
        made.__dict__["_rows"] = {"train": rows, "test": self._rows["test"]}
        rewards_PRM = np.concatenate([self._rewards_all_PRM, np.empty((len(more), *self._rewards_all_PRM.shape[1:]))])
        rewards_PRM[rows] = guess(made)
        made.__dict__["_rewards_all_PRM"] = rewards_PRM
        return made

    def contexts(self, split: str) -> np.ndarray:
        """(P,) the context of each prompt: 0 has correlation rho + context, 1 has rho - context. All 0 where context is off."""
        return self._contexts_P[self._rows[split]]

    def features(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """(N, 3 A) what a router may read of a prompt: its letters, one indicator per place and letter. The context is linear in it."""
        letters = alphabet_of(self.alphabet)
        return np.stack([np.eye(len(letters))[[letters.index(c) for c in str(p.text)]].ravel() for p in prompts])

    @cached_property
    def tree(self) -> PrefixTree:
        return PrefixTree(self.alphabet, self.length)

    @cached_property
    def responses(self) -> list[str]:
        """(R,) all responses as text; "" is the empty one."""
        return [self._text(row[row >= 0]) for row in self.tree.symbols_RL]

    def inputs(self, split: str) -> TreeInputs:
        """The packed prefix trees of the split's prompts."""
        return self._inputs[split]

    def logp_PR(self, forward: Forward, split: str) -> torch.Tensor:
        """(P, R) exact log-probabilities (float64, with gradient) of every response under the policy behind `forward`: one forward."""
        inputs = self.inputs(split)
        logits = forward(inputs.input_ids_PT, inputs.mask_11TT, inputs.position_ids_PT)
        return self.logp_from_logits(logits, split)

    def logp_from_logits(self, logits_PTV: torch.Tensor, split: str) -> torch.Tensor:
        """(P, R) from the (P, T, V) logits of the packed sequences."""
        return self.tree.response_logp(logits_PTV[:, self.inputs(split).prompt_length - 1 :].double().log_softmax(-1))

    def reference_logp_PR(self, split: str) -> np.ndarray:
        return self._reference_all_PR[self._rows[split]]

    def rewards_PRM(self, split: str) -> np.ndarray:
        return self._rewards_all_PRM[self._rows[split]]

    def optimum_logp_PR(self, w_M: np.ndarray, split: str) -> np.ndarray:
        """(P, R) log-probabilities of pi*_w."""
        return self._tilted_logp_PR(self.rewards_PRM(split), w_M, split)

    def _tilted_logp_PR(self, rewards_PRM: np.ndarray, w_M: np.ndarray, split: str) -> np.ndarray:
        """(P, R) log-probabilities of the policy that is optimal at w where rewards are these."""
        tilt_PR = self.reference_logp_PR(split) + rewards_PRM @ np.asarray(w_M) / self.beta
        return tilt_PR - logsumexp(tilt_PR, axis=1, keepdims=True)

    def composition_limit_logp_PR(self, w_M: np.ndarray, split: str) -> np.ndarray:
        """(P, R) log-probabilities of the optimal experts pi*_k mixed token by token with weights w: the limit of logit mixing.

        (P, M) weights are for each prompt its own.
        """
        experts = [self.optimum_logp_PR(e_M, split) for e_M in np.eye(self.objective_count)]
        w_MP11 = np.broadcast_to(w_M, (len(experts[0]), self.objective_count)).T[..., None, None].copy()
        mixed_PIV = sum(
            torch.from_numpy(w_P11) * self.tree.next_logp(torch.from_numpy(logp_PR)) for w_P11, logp_PR in zip(w_MP11, experts, strict=True)
        )
        assert isinstance(mixed_PIV, torch.Tensor)
        return self.tree.response_logp(mixed_PIV.log_softmax(-1)).numpy()

    def returns(self, logp_PR: np.ndarray, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Expected rewards (P, M) and KL to the reference (P,) in nats, per prompt; a response may have the probability 0."""
        p_PR = np.exp(logp_PR)
        kl_P = (p_PR * np.where(p_PR > 0, logp_PR - self.reference_logp_PR(split), 0.0)).sum(1)
        return np.einsum("pr,prm->pm", p_PR, self.rewards_PRM(split)), kl_P

    def ceiling_W(self, w_WM: np.ndarray, split: str) -> np.ndarray:
        """(W,) the best attainment at each preference of any policy with the reference's own head; see `tasks.exact.ceiling`."""
        return self._ceiling_W(w_WM, split, self.rewards_PRM(split))

    def _ceiling_W(self, w_WM: np.ndarray, split: str, rewards_PRM: np.ndarray) -> np.ndarray:
        return ceiling_W(reference(self)[0], self.tree, self.reference_logp_PR(split), rewards_PRM, self.beta, w_WM)

    def known_W(self, w_WM: np.ndarray, split: str) -> dict[str, np.ndarray]:
        """Line -> (W,) attainment at each preference: what the frozen head allows, and what the training prompts' rewards tell.

        "representable" is `ceiling_W`; "blind" and "posterior" are the optima under the rewards as `tasks.exact.known` knows them. A line
        that this task does not have is left out.
        """
        found = {}
        with contextlib.suppress(TaskError):
            found["representable"] = self.ceiling_W(w_WM, split)

        def worth_W(rewards_PRM: np.ndarray) -> np.ndarray:
            """(W,) w . J of the policies that are optimal where rewards are these."""
            return np.array([w_M @ self.J_M(self._tilted_logp_PR(rewards_PRM, w_M, split), split) for w_M in w_WM])

        start_W, best_W = w_WM @ self.J_M(self.reference_logp_PR(split), split), worth_W(self.rewards_PRM(split))
        for name, guess in (("blind", self.blind_PRM), ("posterior", self.posterior_PRM)):
            with contextlib.suppress(TaskError):
                found[name] = (worth_W(guess(split)) - start_W) / (best_W - start_W)
        return found

    def blind_PRM(self, split: str) -> np.ndarray:
        """(P, R, M) the mean over training prompts of every response's rewards, the same for every prompt."""
        mean_RM = self.rewards_PRM("train").mean(0)
        return np.broadcast_to(mean_RM, (len(self.prompts(split)), *mean_RM.shape))

    def posterior_PRM(self, split: str) -> np.ndarray:
        """(P, R, M) posterior means of the rewards given those of the training prompts. TaskError where they are not squashed normals."""
        gated = self.terms is not None and self.terms.when is not None
        if self.sparse or self.context or gated:
            raise TaskError(
                "the posterior is that of rewards that one map makes of normal weights",
                found=f"sparse = {self.sparse:g}, context = {self.context:g}" + (", gated rewards" if gated else ""),
                remedy="leave the line out for this task",
            )
        dense_PRM = posterior_mean(self.designs("train"), self.dense_PRM("train"), self.designs(split), self.deviation_M)
        x_RM, y_RM = self.dense_PRM("train")[0], self.rewards_PRM("train")[0]  # scale is one line for all
        return y_RM[0] + (dense_PRM - x_RM[0]) * (y_RM[1] - y_RM[0]) / (x_RM[1] - x_RM[0])

    def J_M(self, logp_PR: np.ndarray, split: str) -> np.ndarray:
        """(M,) regularized returns, mean over prompts."""
        rewards_PM, kl_P = self.returns(logp_PR, split)
        return (rewards_PM - self.beta * kl_P[:, None]).mean(0)

    def front(self, split: str, w_KM: np.ndarray | None = None) -> Front:
        """The exact front at the preferences `w_KM` (default: 101 for two objectives; vertices and 300 seeded interior ones for more).

        For 7 and 8 objectives 60 interior ones: the exact hypervolume of 300 points takes minutes there.
        """
        if w_KM is None:
            m = self.objective_count
            first = np.linspace(0.0, 1.0, 101)
            more = generator(0, "front", m).dirichlet(np.ones(m), size=300 if m < 7 else 60)
            w_KM = np.stack([first, 1 - first], axis=1) if m == 2 else np.concatenate([np.eye(m), more])
        points_KM = np.stack([self.J_M(self.optimum_logp_PR(w_M, split), split) for w_M in w_KM])
        return Front(points_KM=points_KM, w_KM=w_KM, policies="kl", beta=self.beta, proof="closed form")

    def reference_point(self, split: str) -> np.ndarray:
        """(M,) the hypervolume's reference point: the nadir of the exact front minus 1 % of its range."""
        points_KM = self.front(split).points_KM
        return points_KM.min(0) - MARGIN * np.ptp(points_KM, axis=0)

    def verified(self) -> dict[str, Any]:
        """What the dials came to, measured: correlations, strengths in nats, and the worst composition limit over judged preferences."""
        found: dict[str, Any] = {}
        for split in SPLITS:
            logp_PR = self.reference_logp_PR(split)
            optima = [self.returns(self.optimum_logp_PR(e, split), split)[1].mean() for e in np.eye(self.objective_count)]
            start_M = self.J_M(logp_PR, split)
            limits = []
            for w_M in self.judged():
                best = w_M @ (self.J_M(self.optimum_logp_PR(w_M, split), split) - start_M)
                limits.append(w_M @ (self.J_M(self.composition_limit_logp_PR(w_M, split), split) - start_M) / best)
            rows = self._rows[split]
            found[split] = {
                "correlations": correlations(self.rewards_PRM(split), logp_PR).round(4).tolist(),
                **self._verified_dials(rows, self._dense_all_PRM[rows], self._rewards_all_PRM[rows], logp_PR),
                "strength_nats": [round(float(s), 4) for s in optima],
                "worst_composition_limit": round(float(min(limits)), 4),
            }
        return found

    def _verified_dials(self, rows: np.ndarray, dense_PRM: np.ndarray, rewards_PRM: np.ndarray, logp_PR: np.ndarray) -> dict[str, Any]:
        """The further dials on the prompts `rows`, as far as they are on."""
        found: dict[str, Any] = {}
        if self.scale != 1:
            found["spreads"] = spreads(rewards_PRM, logp_PR).round(4).tolist()
        if self.sparse:
            paid_PR = rewards_PRM[:, :, -1] > 0
            found["rate"] = round(float((np.exp(logp_PR) * paid_PR).sum(1).mean()), 5)
            found["payoff"] = round(float(rewards_PRM[:, :, -1].max()), 4)
            found["dense_correlations"] = correlations(dense_PRM, logp_PR).round(4).tolist()
        if self.noise:
            found["noise"] = verify_noise(self.noise, self.objective_count, self.seed)
        if self.context:
            here_P = self._contexts_P[rows]
            each = [correlations(dense_PRM[here_P == c], logp_PR[here_P == c]) for c in range(CONTEXTS)]
            found["context_correlations"] = [c.round(4).tolist() for c in each]
        return found

    # How it is made

    def dense_PRM(self, split: str) -> np.ndarray:
        """Rewards in (0, 1), before scale and sparsity: squashed linear functions of normal weights, see `designs`."""
        return self._dense_all_PRM[self._rows[split]]

    def designs(self, split: str) -> list[np.ndarray]:
        """(R, D) of every prompt: what is squashed to rewards is linear in weights by it, each of variance `deviation_M` ** 2."""
        return [self._design(row) for row in np.arange(len(self._prompts_PT))[self._rows[split]]]

    def _design(self, row: int) -> np.ndarray:
        features_F = None if self._features_PF is None else self._features_PF[row]
        raw_RD = design(self.tree, self._prompts_PT[row], self.interaction, features_F)
        return raw_RD - np.exp(self._reference_all_PR[row]) @ raw_RD

    @cached_property
    def deviation_M(self) -> np.ndarray:
        """(M,) standard deviation of each weight behind an objective, after coloring and gain. One map for all prompts: no `context`."""
        first = self._rows["train"][:2]
        features_PF = None if self._features_PF is None else self._features_PF[first]
        fields_PRM = fields(self.tree, self._prompts_PT[first], self.objective_count, self.interaction, self.seed, features_PF)
        drawn_PRM = fields_PRM - (np.exp(self._reference_all_PR[first])[:, :, None] * fields_PRM).sum(1, keepdims=True)
        drawn_NM, seen_NM = (x_PRM.reshape(-1, self.objective_count) for x_PRM in (drawn_PRM, logit(self._dense_all_PRM[first])))
        return np.linalg.norm(np.linalg.lstsq(drawn_NM, seen_NM, rcond=None)[0], axis=0)

    @property
    def _reference(self) -> ReferenceSpec:
        return ReferenceSpec(alphabet=self.alphabet, seed=self.seed, width=self.width, layers=self.layers, length=self.length)

    @cached_property
    def _prompts_PT(self) -> np.ndarray:
        """(P, 3) distinct prompts of both splits, drawn from the reference's language."""
        count = self.prompt_count + self.tested
        many = (200 if not self.context else 100 * self.alphabet) * count
        drawn = sample_language(self._reference, generator(self.seed, "prompts"), many, self._reference.context)
        return choose_prompts(drawn, count, by_letter=[sum(both) for both in self._prompts_of_contexts] if self.context else ())

    @property
    def _prompts_of_contexts(self) -> list[tuple[int, int]]:
        return prompts_of_contexts(self.prompt_count, self.tested)

    @property
    def _features_PF(self) -> np.ndarray | None:
        """What rewards read of the prompts of both splits; None is their symbols, place by place."""
        return None

    @cached_property
    def _contexts_P(self) -> np.ndarray:
        """(P,) the context of every prompt of both splits."""
        return self._prompts_PT[:, 0] if self.context else np.zeros(len(self._prompts_PT), dtype=np.int64)

    @cached_property
    def _rows(self) -> dict[str, np.ndarray]:
        """Which prompts belong to each split: of 500 seeded splits the one whose parts are closest to rho.

        Both parts have their share of each context, and are compared context by context.
        """
        pairs = ~np.eye(self.objective_count, dtype=bool)
        off_P = np.stack([c_MM[pairs] for c_MM in correlations_P(self._dense_all_PRM, self._reference_all_PR)]) - self._rho_P[:, None]
        rng = generator(self.seed, "split")
        if not self.context:
            orders = [rng.permutation(len(off_P)) for _ in range(500)]
            order = min(orders, key=lambda rows: _off(off_P, rows, self.prompt_count))
            return {split: np.sort(rows) for split, rows in zip(SPLITS, np.split(order, [self.prompt_count]), strict=True)}
        parts: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        for context, (cut, _) in enumerate(self._prompts_of_contexts):
            here = np.flatnonzero(self._contexts_P == context)
            orders = [rng.permutation(here) for _ in range(500)]
            order = min(orders, key=lambda rows: _off(off_P, rows, cut))
            parts["train"].append(order[:cut])
            parts["test"].append(order[cut:])
        return {split: np.sort(np.concatenate(rows)) for split, rows in parts.items()}

    @cached_property
    def _inputs(self) -> dict[str, TreeInputs]:
        return {split: self.tree.pack(self._prompts_PT[rows]) for split, rows in self._rows.items()}

    @cached_property
    def _reference_all_PR(self) -> np.ndarray:
        model, _ = reference(self)
        parts = []
        with one_thread(), torch.no_grad():
            for row in self._prompts_PT:
                packed = self.tree.pack(row[None])
                logits = model(input_ids=packed.input_ids_PT, attention_mask=packed.mask_11TT, position_ids=packed.position_ids_PT).logits[
                    :, packed.prompt_length - 1 :
                ]
                parts.append(self.tree.response_logp(logits.double().log_softmax(-1)))
        return torch.cat(parts).numpy()

    @property
    def _rho_P(self) -> np.ndarray:
        """(P,) the correlation that each prompt is to have, of both splits."""
        return self.rho + self.context * np.array([1.0, -1.0])[self._contexts_P]

    @cached_property
    def _dense_all_PRM(self) -> np.ndarray:
        """Rewards in (0, 1) of the wanted correlation and strength, context by context, before scale and sparsity."""
        fields_PRM = fields(self.tree, self._prompts_PT, self.objective_count, self.interaction, self.seed, self._features_PF)
        rewards_PRM = np.empty_like(fields_PRM)
        for rho in np.unique(self._rho_P):
            here = self._rho_P == rho
            rewards_PRM[here] = mix_to_correlation(fields_PRM[here], self._reference_all_PR[here], float(rho), self.strength, self.beta)
        return rewards_PRM

    @cached_property
    def _rewards_all_PRM(self) -> np.ndarray:
        rewards_PRM, logp_PR = self._dense_all_PRM, self._reference_all_PR
        if self.noise:
            verify_noise(self.noise, self.objective_count, self.seed)
        if self.scale != 1:
            rewards_PRM = stretch(rewards_PRM, logp_PR, self.scale)
        if self.sparse:
            rare_PR = pays_rarely(rewards_PRM[:, :, -1], logp_PR, self.sparse, self.strength, self.beta)
            rewards_PRM = np.concatenate([rewards_PRM[:, :, :-1], rare_PR[:, :, None]], axis=2)
        rewards_PRM = self.gated(rewards_PRM)
        self._check_rewards(rewards_PRM)
        return rewards_PRM

    def _check_rewards(self, rewards_PRM: np.ndarray) -> None:
        """Raise TaskError where rewards, of the prompts of both splits, make no such task. Before they are used for anything."""

    @cached_property
    def _spread_M(self) -> np.ndarray:
        return spreads(self._rewards_all_PRM, self._reference_all_PR)

    @cached_property
    def _tables(self) -> dict[str, dict[str, np.ndarray]]:
        """prompt text -> response text -> (M,) rewards."""
        return {
            self._text(row): dict(zip(self.responses, rewards_RM, strict=True))
            for row, rewards_RM in zip(self._prompts_PT, self._rewards_all_PRM, strict=True)
        }

    def _objective(self, k: int) -> Callable[..., list[float | None]]:
        def objective(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
            return [float(self._tables[p][c][k]) for p, c in zip(prompts, completions, strict=True)]

        return objective

    def _text(self, symbols: Sequence[int] | np.ndarray) -> str:
        names = alphabet_of(self.alphabet)
        return "".join(names[s] for s in symbols)


@TASKS.register("exact-v2")
@dataclass(frozen=True)
class RepresentableTask(ExactTask):
    """An exact task whose optimum a policy with the frozen head can be, and whose reference knows of the prompt what rewards depend on.

    Language and rewards read the whole prompt through the same `shared` features, each with weights of its own; `memory` is how much they
    move a logit of the language. Prompts that were not trained on have the same features, so what was learned can hold there.

    `ceiling` is the least share of the possible gain that is representable, at every judged preference and on both splits, checked when
    the rewards are first built.
    """

    prompt_count: int = 32
    test_count: int = 32
    head: float = 5.0
    shared: int = 4
    memory: float = 0.8
    ceiling: float = 0.998

    def __post_init__(self):
        for name, value, low, high in (
            ("test_count", self.test_count, 1, 512),
            ("head", self.head, 0.1, 100),
            ("shared", self.shared, 1, 64),
            ("memory", self.memory, 0, 10),
            ("ceiling", self.ceiling, 0, 1),
        ):
            if not low <= value <= high:
                raise TaskError(f"{name} lies between {low:g} and {high:g}", found=f"{name} = {value:g}", remedy="choose it in that range")
        super().__post_init__()

    @property
    def tested(self) -> int:
        return self.test_count

    @property
    def _reference(self) -> ReferenceSpec:
        # 200 steps leave a sixth of what the prompt adds unlearned
        return replace(super()._reference, head=self.head, features=self.shared, memory=self.memory, steps=400)

    @property
    def _features_PF(self) -> np.ndarray:
        return prompt_features(self._reference, self._prompts_PT)

    def _check_rewards(self, rewards_PRM: np.ndarray) -> None:
        worst = min(float(self._ceiling_W(self.judged(), split, rewards_PRM[self._rows[split]]).min()) for split in SPLITS)
        if worst < self.ceiling:
            raise TaskError(
                f"a policy with the frozen head can reach {self.ceiling:g} of the possible gain at every judged preference",
                found=f"{worst:.4f} with a head of {self.head:g}",
                remedy="choose a larger head, a smaller strength or scale, or a lower ceiling",
            )


def _off(off_P: np.ndarray, rows: np.ndarray, cut: int) -> float:
    """How far the parts of a split, rows[:cut] and the rest, are from the wanted correlations."""
    return max(float(np.abs(off_P[part].mean(0)).max()) for part in (rows[:cut], rows[cut:]))


def _check_dials(task: ExactTask) -> None:
    """Raise TaskError for dials that contradict each other or leave a context empty; their ranges were checked before."""
    m = task.objective_count
    if task.scale != 1 and task.sparse:
        raise TaskError(
            "the spread of a sparse objective follows from its rate, so scale cannot set it too",
            found=f"scale = {task.scale:g} with sparse = {task.sparse:g}",
            remedy="leave scale at 1, or sparse at 0",
        )
    if not task.context:
        return
    low = -1 / (m - 1)
    both = (task.rho + task.context, task.rho - task.context)
    if both[0] > 0.99 or both[1] < low - 1e-9:
        raise TaskError(
            f"both contexts have a correlation between {low:.4g} and 0.99 for {m} objectives",
            found=f"rho + context = {both[0]:.4g}, rho - context = {both[1]:.4g}",
            remedy=f"at rho = {task.rho:g}, context is at most {max(0.0, min(0.99 - task.rho, task.rho - low)):.4g}",
        )
    fewest, name = min((task.prompt_count, "prompt_count"), (task.tested, "test_count"))
    if fewest < CONTEXTS:
        raise TaskError(
            "no context is empty: each has a training prompt and a test prompt",
            found=f"{name} = {fewest} for {CONTEXTS} contexts",
            remedy="ask for at least 2 prompts, or leave context at 0",
        )
    each = max(map(sum, prompts_of_contexts(task.prompt_count, task.tested)))
    if each > task.alphabet**2:
        raise TaskError(
            "prompts of one context are distinct strings of 3 symbols with the same first one",
            found=f"{each} prompts of each context from {task.alphabet} symbols",
            remedy=f"at most {task.alphabet**2} prompts, or a larger alphabet",
        )
