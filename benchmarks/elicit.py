"""Ten questions to a preference: what a user loses who is asked, where the true optimum is known.

    python benchmarks/elicit.py [--seeds 10] [--users 20] [--only M3] [--development] [--out FILE]

Tasks are `exact-v1`, whose best policy pi*_w at any weights is known, and the family is these: no training is judged here, only asking. A
user has weights drawn uniformly from the simplex and answers by Bradley and Terry's model, at the scale at which a given share of their
answers to random pairs agrees with their weights. The pool is what `paretune elicit` draws by default: EACH responses to each of the eight
training prompts, of the policies at the vertices, at even weights and at others. Regret is the share of the possible gain in J_w that pi*
at the weights found so far loses: 1 - attainment.

Asked by: `ours`; `random`, our posterior with random pairs; `pref`, PReF (2503.06358): regularized maximum likelihood, and the pair that
is longest in the inverse Hessian; `ample`, AMPLe (2411.00524, and its code): a posterior under (1 - 2 g) sigmoid + g, its mean, and the
pair that halves it best, of those the one with equal variance in both halves. The last two are told the user's true scale, which ours
must infer.

    regret_after_5, regret_after_10   median over seeds and users, M = 3, rho = 0, 80 % consistent
    elicit_vs_random                  random pairs' regret after 10 answers by ours
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import brentq, minimize
from scipy.special import expit

from common import emit
from paretune.evaluation.elicit import EACH, Elicitation, Question, pool_preferences
from paretune.registry import TASKS
from paretune.seeds import generator

JUDGED, DEVELOPMENT = range(100, 110), range(10)
ASKED = (1, 2, 3, 5, 7, 10, 15, 20)
SETTINGS = {
    "M2 rho 0": (2, 0.0),
    "M2 rho -.8": (2, -0.8),
    "M3 rho 0": (3, 0.0),
    "M3 rho -.4": (3, -0.4),
    "M5 rho 0": (5, 0.0),
}
CONSISTENT = (0.7, 0.8, 0.95)
MAIN = ("M3 rho 0", 0.8)
HEDGE, MARGIN, RIDGE = 0.05, 0.05, 0.1  # AMPLe's g and margin; PReF's regularization


class Pool:
    """One task's responses: rewards, the prompt of each, and J of the optimum at any weights."""

    def __init__(self, count: int, rho: float, seed: int):
        self.task = TASKS.build({"name": "exact-v1", "objective_count": count, "rho": rho, "seed": seed})
        rng = generator(seed, "pool")
        rewards_PRM = self.task.rewards_PRM("train")
        rewards, prompts = [], []
        for w_M in pool_preferences(count, EACH, seed):
            p_PR = np.exp(self.task.optimum_logp_PR(w_M, "train"))
            for prompt, p_R in enumerate(p_PR):
                rewards.append(rewards_PRM[prompt, rng.choice(len(p_R), p=p_R / p_R.sum())])
                prompts.append(prompt)
        self.rewards_NM, self.prompt_N = np.array(rewards), np.array(prompts)
        pairs = [(a, b) for a in range(len(prompts)) for b in range(a) if prompts[a] == prompts[b]]
        self.pairs_C2 = np.array(pairs)
        self.differences_CM = self.rewards_NM[self.pairs_C2[:, 0]] - self.rewards_NM[self.pairs_C2[:, 1]]
        differ_C = np.abs(self.differences_CM).max(1) > 1e-9  # of equal responses nobody is asked
        self.pairs_C2, self.differences_CM = self.pairs_C2[differ_C], self.differences_CM[differ_C]
        self.start_M = self.task.J_M(self.task.reference_logp_PR("train"), "train")

    def regret(self, w_M: np.ndarray, found_M: np.ndarray) -> float:
        """1 - attainment at w of the optimum for the weights found."""
        best, mine = (w_M @ (self.task.J_M(self.task.optimum_logp_PR(u_M, "train"), "train") - self.start_M) for u_M in (w_M, found_M))
        return float(1 - mine / best)


class Ours:
    """Paretune's, or its posterior with random pairs."""

    def __init__(self, pool: Pool, scale: float, seed: int, *, random: bool = False):
        self.inner, self.pool, self.random, self.seed = Elicitation(pool.rewards_NM, pool.prompt_N, seed=seed), pool, random, seed

    def ask(self) -> np.ndarray:
        if self.random:
            return generator(self.seed, "random", len(self.inner.answers)).choice(self.pool.pairs_C2)
        return np.array(self.inner.ask().options)

    def answer(self, pair: np.ndarray, first: bool) -> None:
        self.inner.answer(Question(int(self.pool.prompt_N[pair[0]]), tuple(pair.tolist())), 0 if first else 1)

    def weights(self) -> np.ndarray:
        return self.inner.weights


class PReF:
    """Regularized logistic regression without a simplex; the estimate is then clipped to it. Source: 2503.06358."""

    def __init__(self, pool: Pool, scale: float, seed: int):
        self.pool, self.scale, self.seen, self.sign = pool, scale, np.empty((0, pool.rewards_NM.shape[1])), np.empty(0)
        self.theta_M = np.full(pool.rewards_NM.shape[1], 1 / pool.rewards_NM.shape[1])

    def ask(self) -> np.ndarray:
        x_CM, slope = self.pool.differences_CM * self.scale, expit(self.seen @ self.theta_M)
        hessian_MM = (self.seen * (slope * (1 - slope))[:, None]).T @ self.seen + RIDGE * np.eye(x_CM.shape[1])
        return self.pool.pairs_C2[np.einsum("cm,mn,cn->c", x_CM, np.linalg.inv(hessian_MM), x_CM).argmax()]

    def answer(self, pair: np.ndarray, first: bool) -> None:
        x_M = (self.pool.rewards_NM[pair[0]] - self.pool.rewards_NM[pair[1]]) * self.scale
        self.seen, self.sign = np.vstack([self.seen, x_M]), np.append(self.sign, 1.0 if first else -1.0)
        center_M = np.full(len(x_M), 1 / len(x_M))

        def loss(theta_M: np.ndarray) -> float:
            return float(np.logaddexp(0, -self.sign * (self.seen @ theta_M)).sum() + RIDGE / 2 * ((theta_M - center_M) ** 2).sum())

        self.theta_M = minimize(loss, self.theta_M).x

    def weights(self) -> np.ndarray:
        w_M = np.maximum(self.theta_M, 1e-6)
        return w_M / w_M.sum()


class AMPLe:
    """Bayes on the simplex with a hedged likelihood, generalized binary search. Source: 2411.00524 and its code."""

    def __init__(self, pool: Pool, scale: float, seed: int):
        self.pool, self.scale, self.rng = pool, scale, generator(seed, "ample", "ask")
        self.w_IM = generator(seed, "ample").dirichlet(np.ones(pool.rewards_NM.shape[1]), 20_000)
        self.p_I = np.full(len(self.w_IM), 1 / len(self.w_IM))

    def _likelihood(self, x_CM: np.ndarray, w_IM: np.ndarray) -> np.ndarray:
        return (1 - 2 * HEDGE) * expit(self.scale * w_IM @ x_CM.T) + HEDGE

    def ask(self) -> np.ndarray:
        drawn = self.rng.choice(len(self.p_I), 1000, p=self.p_I)
        w_IM = self.w_IM[drawn]
        first_IC = self._likelihood(self.pool.differences_CM, w_IM)
        halves_C = np.abs(first_IC.mean(0) - (1 - first_IC).mean(0))
        near = np.flatnonzero(halves_C <= halves_C.min() + MARGIN)
        spread = []
        for p_IC in (first_IC[:, near], 1 - first_IC[:, near]):
            mean_CM = np.einsum("ic,im->cm", p_IC, w_IM) / len(w_IM)
            spread.append((((w_IM[:, None] - mean_CM) ** 2).sum(2) * p_IC).mean(0))
        return self.pool.pairs_C2[near[np.abs(spread[0] - spread[1]).argmin()]]

    def answer(self, pair: np.ndarray, first: bool) -> None:
        p_I = self._likelihood((self.pool.rewards_NM[pair[0]] - self.pool.rewards_NM[pair[1]])[None], self.w_IM)[:, 0]
        self.p_I = self.p_I * (p_I if first else 1 - p_I)
        self.p_I = self.p_I / self.p_I.sum()

    def weights(self) -> np.ndarray:
        return self.p_I @ self.w_IM


ASKERS: dict[str, Callable[[Pool, float, int], Any]] = {
    "ours": Ours,
    "random": lambda pool, scale, seed: Ours(pool, scale, seed, random=True),
    "pref": PReF,
    "ample": AMPLe,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--only", help="settings whose names begin so")
    parser.add_argument("--consistent", type=float, nargs="+", default=CONSISTENT)
    parser.add_argument("--askers", nargs="+", default=list(ASKERS), choices=list(ASKERS))
    parser.add_argument("--development", action="store_true", help="task seeds from 0 on, on which rules were chosen")
    parser.add_argument("--out", type=Path, help="settings that another run left there with as many users stay")
    given = parser.parse_args()
    before = json.loads(given.out.read_text(encoding="utf-8")) if given.out and given.out.exists() else {}
    found: dict[str, Any] = before.get("found", {})
    users: dict[str, int] = before.get("users", {})
    for name, (count, rho) in SETTINGS.items():
        if given.only and not name.startswith(given.only):
            continue
        pools = {seed: Pool(count, rho, seed) for seed in (DEVELOPMENT if given.development else JUDGED)[: given.seeds]}
        for consistent in given.consistent:
            setting = f"{name}, {consistent:.0%} consistent"
            if users.get(setting, 0) >= given.users:
                continue
            regrets = {
                asker: np.array([session(pools[s], asker, s, u, consistent) for s in pools for u in range(given.users)])
                for asker in given.askers
            }
            found[setting] = {asker: _summary(values, given.users) for asker, values in regrets.items()}
            users[setting] = given.users
            print(
                name, consistent, {asker: np.round(np.median(values, axis=0), 4).tolist() for asker, values in regrets.items()}, flush=True
            )
    figures = {}
    main_case = found.get(f"{MAIN[0]}, {MAIN[1]:.0%} consistent", {})
    if {"ours", "random"} <= set(main_case):
        ours, random = main_case["ours"], main_case["random"]
        figures = {f"regret_after_{q}": ours[str(q)]["median"] for q in (5, 10)}
        figures["elicit_vs_random"] = random["10"]["median"] / ours["10"]["median"]
    emit(figures, out=given.out, asked=ASKED, users=users, found=found)


def session(pool: Pool, asker: str, seed: int, user: int, consistent: float) -> list[float]:
    """Regret after each number of answers in ASKED, of one user."""
    rng = generator(seed, "user", user)
    w_M = rng.dirichlet(np.ones(pool.rewards_NM.shape[1]))
    gaps_C = np.abs(pool.differences_CM @ w_M)
    scale = brentq(lambda s: expit(s * gaps_C).mean() - consistent, 1e-3, 1e6)
    asking, regrets = ASKERS[asker](pool, scale, 1000 * seed + user), []
    uniforms = rng.random(max(ASKED))
    for asked in range(1, max(ASKED) + 1):
        pair = asking.ask()
        first = uniforms[asked - 1] < expit(scale * w_M @ (pool.rewards_NM[pair[0]] - pool.rewards_NM[pair[1]]))
        asking.answer(pair, bool(first))
        if asked in ASKED:
            regrets.append(pool.regret(w_M, asking.weights()))
    return regrets


def _summary(values_NQ: np.ndarray, users: int) -> dict[str, Any]:
    """For each number of answers the median, its interval (95 %, bootstrap over seeds and then users), and the mean."""
    rng = generator(0, "bootstrap")
    by_seed = values_NQ.reshape(-1, users, values_NQ.shape[1])
    drawn = []
    for _ in range(1000):
        seeds = rng.integers(len(by_seed), size=len(by_seed))
        drawn.append(np.median([by_seed[s, rng.integers(users, size=users)] for s in seeds], axis=(0, 1)))
    low_Q, high_Q = np.quantile(drawn, [0.025, 0.975], axis=0)
    rows = zip(ASKED, np.median(values_NQ, axis=0), low_Q, high_Q, values_NQ.mean(0), strict=True)
    return {str(asked): {"median": float(m), "low": float(lo), "high": float(hi), "mean": float(mean)} for asked, m, lo, hi, mean in rows}


if __name__ == "__main__":
    main()
