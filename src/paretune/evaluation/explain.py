"""Why a family said what it said: which expert moved each token, and what each weight of the preference does to each return.

For a response y the log-ratio log pi(y_t) - log pi_ref(y_t) of every token is split over the experts. How, each mixing says (see
`Policy.attribution`):

    product   logit mixing (and hidden states under a linear head): log pi = sum_k g_k log pi_k - log Z, so that expert k moved the token
              by g_k (log pi_k - log pi_ref), and the normalizer -log Z - (1 - sum_k g_k) log pi_ref, shown as its own term, is the rest.
              Z is at most 1 where gates are weights: the more the experts disagree, the more it gives to all tokens alike.
    path      soups of parameters: the gates go from 0 (the reference) to g on a straight line, and expert k is credited with
              g_k times the integral of d log pi / d g_k along it. The credits sum to the log-ratio; what the quadrature misses is shown.
    shapley   every other mixing: the mean of what expert k changes when it joins, over all orders in which the experts can join. A group
              is the family with the gates of the others set to 0 (and, where no gate at all is not the reference, divided by what is
              left); the empty group is the reference. Sums to the log-ratio exactly; 2^K groups are evaluated.

A product whose terms miss their sum, as under a head with a bias or a soft cap, is no product: shapley takes its place.

Source: product is our reading of MOD (2406.18853); path is integrated gradients (1703.01365) over gates; shapley is Shapley (1953).
Differs: what is explained are experts, not inputs.
Hides: credits of correlated experts depend on the method. The part of the log-ratio that all experts share is split by gate, not by
    merit, and a token that no expert moved may still be the consequence of an earlier one that was moved.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paretune.errors import ConfigError
from paretune.evaluation.metrics import plain
from paretune.evaluation.stats import over_prompts
from paretune.policy.base import Policy
from paretune.policy.family import Family
from paretune.policy.returns import returns_of
from paretune.policy.rollout import check_length, encode, generate
from paretune.policy.scoring import token_logp
from paretune.tasks.base import Task
from paretune.types import Preference, Prompt

__all__ = ["Explanation", "Sensitivity", "explain", "sensitivity"]

POINTS, MOST_POINTS = 16, 128  # of the quadrature, doubled while it misses more than SLACK
ROWS = 64  # of one forward with gradient
SLACK = 1e-3  # nats by which parts may miss their sum
MOST = 8  # adapters whose groups are enumerated
END = "\N{MATHEMATICAL LEFT ANGLE BRACKET}end\N{MATHEMATICAL RIGHT ANGLE BRACKET}"


@dataclass(frozen=True)
class Explanation:
    """One response, token by token; logarithms in nats.

    contribution_TK, summed over K, with normalizer_T and remainder_T, is logp_T - reference_T.
    """

    prompt: str
    response: str
    preference: dict[str, float]
    mixing: str
    how: str  # product | path | shapley
    adapters: tuple[str, ...]  # the names of axis K: of the objectives, where the preference is text
    gates_K: np.ndarray
    tokens_T: tuple[str, ...]
    logp_T: np.ndarray
    reference_T: np.ndarray
    opinion_TK: np.ndarray  # log pi_k - log pi_ref: what each expert alone says
    contribution_TK: np.ndarray
    normalizer_T: np.ndarray  # of a product; else 0
    remainder_T: np.ndarray  # what no term explains: rounding and quadrature

    @property
    def ratio_T(self) -> np.ndarray:
        """What is explained."""
        return self.logp_T - self.reference_T

    def to_json(self) -> dict[str, Any]:
        """Strict JSON, with the sums over the response."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        sums = {"ratio": self.ratio_T.sum(), "contribution_K": self.contribution_TK.sum(0), "normalizer": self.normalizer_T.sum()}
        return plain({**fields, "ratio_T": self.ratio_T, "sum": sums})


@dataclass(frozen=True)
class Sensitivity:
    """slope_MM[k, j]: how fast return k grows while the preference moves from w towards objective j, per unit of the way.

    The direction is e_j - w, which stays on the simplex, so that sum_j w_j slope_MM[:, j] is 0 for a smooth family.
    """

    objectives: tuple[str, ...]
    w_M: np.ndarray
    returns_M: np.ndarray
    slope_MM: np.ndarray
    error_MM: np.ndarray  # standard errors; NaN where exact
    split: str
    exact: bool
    step: float
    unscored: int
    stepwise: bool  # the rule jumps between its points: a slope is 0, or a jump divided by the step

    def to_json(self) -> dict[str, Any]:
        """Strict JSON."""
        return plain({name: getattr(self, name) for name in self.__dataclass_fields__})


def explain(
    family: Family,
    prompt: str | Prompt | Sequence[Mapping[str, str]],
    preference: Preference | Mapping[str, float] | Sequence[float] | str,
    *,
    n: int = 1,
    response: str | None = None,
    tokens: Sequence[int] | None = None,
    seed: int = 0,
    max_new_tokens: int | None = None,
    system: str | None = None,
    raw: bool = False,
) -> list[Explanation]:
    """Explanations of `n` sampled responses (the ones that `Family.sample` gives), or of one that is given: as a `response`, taken to end
    with EOS, or as the `tokens` that were drawn, which may have been cut.

    `prompt`, `system` and `raw` are as for `Family.sample`: a text, or the messages of one conversation.
    """
    names = family.objectives.names
    chosen = preference if isinstance(preference, Preference) else Preference.of(names, preference)
    (given,) = family.prompts([prompt], system=system, raw=raw)
    gates_K = torch.from_numpy(family.gates(chosen.w_M[None], [given]).reshape(family.policy.K)).float().to(family.policy.device)
    ids_1T, mask_1T = encode(family.policy.tokenizer, [given], family.policy.device)
    if tokens is not None:
        check_length(family.policy, family.policy.extra_positions + ids_1T.shape[1] + len(tokens), 1.0)
        rows = [torch.tensor([list(tokens)], device=family.policy.device)]
    elif response is None:
        limit = family.longest(max_new_tokens)
        (made,) = generate(family.policy, [given] * n, gates_NK=gates_K, max_new_tokens=limit, seed=seed)
        rows = [tokens[mask][None] for tokens, mask in zip(made.responses.tokens_NT, made.responses.mask_NT, strict=True)]
    else:
        inner = family.policy.tokenizer(response, add_special_tokens=False)["input_ids"]
        check_length(family.policy, family.policy.extra_positions + ids_1T.shape[1] + len(inner) + 1, 1.0)
        rows = [torch.tensor([[*inner, family.policy.eos_ids[0]]], device=family.policy.device)]
    explained = []
    for tokens_1T in rows:
        pieces = _pieces(family.policy, tokens_1T[0].tolist())
        explained.append(
            Explanation(
                prompt=str(given.raw),
                response="".join(piece for piece in pieces if piece != END),
                preference=dict(zip(names, map(float, chosen.weights), strict=True)),
                mixing=family.policy.mixing,
                adapters=family.gate_names,
                gates_K=gates_K.double().cpu().numpy(),
                tokens_T=tuple(pieces),
                **_split(family.policy, ids_1T, mask_1T, tokens_1T, gates_K),
            )
        )
    return explained


def _pieces(policy: Policy, ids: list[int]) -> list[str]:
    """What each token adds to the text; characters made of several tokens show with the last of them."""
    shown: list[str] = []
    before = ""
    for place, token in enumerate(ids):
        if token in policy.eos_ids and place == len(ids) - 1:
            shown.append(END)
            continue
        now = policy.tokenizer.decode(ids[: place + 1])
        whole = now.rstrip("\N{REPLACEMENT CHARACTER}")
        shown.append(whole[len(before) :] if whole.startswith(before) else policy.tokenizer.decode([token]))
        before = whole if whole.startswith(before) else now
    return shown


def _split(policy: Policy, ids_1T: Tensor, mask_1T: Tensor, tokens_1T: Tensor, gates_K: Tensor) -> dict[str, Any]:
    """The numbers of one response."""
    k, length = policy.K, tokens_1T.shape[1]

    def logp_T(gates: Tensor | None) -> np.ndarray:
        with torch.no_grad():
            return token_logp(policy, ids_1T, mask_1T, tokens_1T, gates_NK=None if gates is None else gates[None])[0].double().cpu().numpy()

    mine_T, reference_T = logp_T(gates_K), logp_T(None)
    opinion_TK = (
        np.stack([logp_T(row) for row in torch.eye(k, device=gates_K.device)], 1) - reference_T[:, None] if k else np.zeros((length, 0))
    )
    gates = gates_K.double().cpu().numpy()
    normalizer_T, how = np.zeros(length), policy.attribution
    if how == "product":
        contribution_TK = gates * opinion_TK
        normalizer_T = (gates.sum() - 1) * reference_T - _log_normalizer(policy, ids_1T, mask_1T, tokens_1T, gates_K)
        if np.abs(mine_T - reference_T - contribution_TK.sum(1) - normalizer_T).max() > SLACK:
            how, normalizer_T = "shapley", np.zeros(length)
    elif how == "path":
        points = POINTS
        contribution_TK = gates * _along(policy, ids_1T, mask_1T, tokens_1T, gates_K, points)
        while points < MOST_POINTS and np.abs(mine_T - reference_T - contribution_TK.sum(1)).max() > SLACK:
            points *= 2
            contribution_TK = gates * _along(policy, ids_1T, mask_1T, tokens_1T, gates_K, points)
    if how == "shapley":
        contribution_TK = _shapley(gates_K, reference_T, logp_T, share=not policy.zero_is_reference)
    return {
        "how": how,
        "logp_T": mine_T,
        "reference_T": reference_T,
        "opinion_TK": opinion_TK,
        "contribution_TK": contribution_TK,
        "normalizer_T": normalizer_T,
        "remainder_T": mine_T - reference_T - contribution_TK.sum(1) - normalizer_T,
    }


def _log_normalizer(policy: Policy, ids_1T: Tensor, mask_1T: Tensor, tokens_1T: Tensor, gates_K: Tensor) -> np.ndarray:
    """(T,) log sum_v exp(sum_k g_k log pi_k(v)), from the experts' own distributions."""
    length = tokens_1T.shape[1]
    ids = torch.cat([ids_1T, tokens_1T[:, :-1]], 1)
    mask = torch.cat([mask_1T, torch.ones_like(tokens_1T[:, :-1])], 1)
    total: Tensor | float = 0.0
    with torch.no_grad():
        for k, gate in enumerate(gates_K.tolist()):
            one = torch.eye(policy.K, device=gates_K.device)[k : k + 1]
            total = total + gate * policy.forward(ids, gates_NK=one, attention_mask=mask, last_only=length).double().log_softmax(-1)
    assert isinstance(total, Tensor)
    return total.logsumexp(-1)[0].cpu().numpy()


def _along(policy: Policy, ids_1T: Tensor, mask_1T: Tensor, tokens_1T: Tensor, gates_K: Tensor, points: int) -> np.ndarray:
    """(T, K) integral over s in (0, 1) of d log pi(y_t; s g) / d g_k, by Gauss-Legendre quadrature with `points` points.

    Row t of a batch asks for token t, so that one backward gives the gradients of all tokens.
    """
    nodes, weights = np.polynomial.legendre.leggauss(points)
    length = tokens_1T.shape[1]
    total_TK = torch.zeros(length, policy.K, dtype=torch.float64, device=gates_K.device)
    if not policy.K:
        return total_TK.cpu().numpy()
    for (node, weight), start in itertools.product(zip(nodes, weights, strict=True), range(0, length, ROWS)):
        rows = torch.arange(start, min(start + ROWS, length), device=gates_K.device)
        n = len(rows)
        gates_NK = (gates_K * (node + 1) / 2).repeat(n, 1).requires_grad_()
        logp_NT = token_logp(policy, ids_1T.repeat(n, 1), mask_1T.repeat(n, 1), tokens_1T.repeat(n, 1), gates_NK=gates_NK)
        if not logp_NT.requires_grad:  # a policy that does not look at its gates
            break
        (slope_NK,) = torch.autograd.grad(logp_NT[torch.arange(n), rows].sum(), gates_NK)
        total_TK[rows] += slope_NK.double() * (weight / 2)
    return total_TK.cpu().numpy()


def _shapley(gates_K: Tensor, reference_T: np.ndarray, logp_T: Any, *, share: bool) -> np.ndarray:
    """(T, K) Shapley values of the adapters with a gate; `share` divides a group's gates by what is left of their sum."""
    k = len(gates_K)
    players = [i for i in range(k) if float(gates_K[i]) != 0]
    if len(players) > MOST:
        raise ConfigError(
            f"at this mixing every group of adapters is evaluated, for at most {MOST} of them",
            found=f"{len(players)} adapters with a gate",
            remedy="explain a family at mixing logit or parameter",
        )
    worth: dict[tuple[int, ...], np.ndarray] = {(): reference_T}
    for size in range(1, len(players) + 1):
        for group in itertools.combinations(players, size):
            gates = torch.zeros_like(gates_K)
            gates[list(group)] = gates_K[list(group)]
            worth[group] = logp_T(gates * (gates_K.sum() / gates.sum()) if share and float(gates.sum()) != 0 else gates)
    value_TK = np.zeros((len(reference_T), k))
    for player in players:
        others = [i for i in players if i != player]
        for size in range(len(others) + 1):
            orders = math.factorial(size) * math.factorial(len(others) - size) / math.factorial(len(players))
            for group in itertools.combinations(others, size):
                value_TK[:, player] += orders * (worth[tuple(sorted((*group, player)))] - worth[group])
    return value_TK


def sensitivity(
    task: Task,
    family: Family,
    preference: Preference | Mapping[str, float] | Sequence[float] | str,
    *,
    split: str = "train",
    step: float | None = None,
    samples: int = 256,
    seed: int = 0,
) -> Sensitivity:
    """Slopes of all returns in all directions: exact differences on exact tasks, else samples that share prompts and noise.

    Differences are central (0.01 of the way; 0.1 where sampled). Where a weight is so small that the preference cannot move away from
    its objective, they look forward only, with the same order of error.
    """
    names = family.objectives.names
    chosen = preference if isinstance(preference, Preference) else Preference.of(names, preference)
    w_M, m = chosen.w_M, len(names)
    step = step or (0.01 if task.is_exact else 0.1)
    asked, factors = [w_M], []
    for j in range(m):
        away = np.eye(m)[j] - w_M
        central = bool((w_M - step * away >= 0).all())
        places, scale = ((-1, 1), (-0.5, 0.5)) if central else ((1, 2), (2.0, -0.5))
        factors.append((0.0 if central else -1.5, scale))
        asked += [w_M + place * step * away for place in places]
    drawn = returns_of(task, family.policy, split, samples=samples, seed=seed).at(family.gates(np.stack(asked), task.prompts(split)))
    returns_WSM = drawn.returns_WSM
    slope_MM, error_MM = np.zeros((m, m)), np.full((m, m), np.nan)
    for j, (here, scale) in enumerate(factors):
        one, two = returns_WSM[1 + 2 * j], returns_WSM[2 + 2 * j]
        each_SM = (here * returns_WSM[0] + scale[0] * one + scale[1] * two) / step
        slope_MM[:, j] = np.nanmean(each_SM, 0)
        if not task.is_exact:
            error_MM[:, j] = over_prompts(each_SM, drawn.prompt_S).error
    return Sensitivity(
        objectives=names,
        w_M=w_M,
        returns_M=np.nanmean(returns_WSM[0], 0),
        slope_MM=slope_MM,
        error_MM=error_MM,
        split=split,
        exact=task.is_exact,
        step=step,
        unscored=int(np.isnan(returns_WSM).sum()),
        stepwise=family.stepwise,
    )
