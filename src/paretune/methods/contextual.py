"""A contextual bandit over continuous combinations of experts, and the best combination that does not look at the prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from paretune.errors import ConfigError, TrainingError
from paretune.evaluation.metrics import nondominated
from paretune.methods.base import SPLIT, Card, OnExperts, adapters_for, vertex_trainings
from paretune.policy.base import Policy, build_policy
from paretune.policy.contextual import Contextual, Features, GateBasis, Pooled, box_lattice
from paretune.policy.family import Family
from paretune.policy.returns import metered, returns_of
from paretune.policy.rules import rows_of
from paretune.registry import METHODS
from paretune.seeds import generator, seed_for
from paretune.tasks.base import Task
from paretune.tasks.preferences import sample_preferences
from paretune.training.learners.base import Learner
from paretune.training.spec import Artifact

__all__ = ["ContextualBandit", "Learned", "Ridge", "StaticGates", "learn_gates"]

ARMS = 130  # gates among which the bandit chooses, at most
FORGET = 0.9  # the noise estimate's memory from round to round

Pull = Callable[[int, np.ndarray, np.ndarray], np.ndarray]
"""(round, which prompts (N,), gates (N, K)) -> returns (N, M), KL included; NaN where an objective was not scored."""


class Ridge:
    """Linear regression of M outputs on Z inputs with a penalty `ridge` * |theta|^2, one observation after the other."""

    def __init__(self, inputs: int, outputs: int):
        self._gram_ZZ, self._moment_ZM = np.zeros((inputs, inputs)), np.zeros((inputs, outputs))

    def add(self, z_NZ: np.ndarray, y_NM: np.ndarray) -> None:
        self._gram_ZZ += z_NZ.T @ z_NZ
        self._moment_ZM += z_NZ.T @ y_NM

    def solve(self, ridge: float) -> tuple[np.ndarray, np.ndarray]:
        """theta (Z, M), and the inverse of the Cholesky factor L (gram + ridge = L L^T): the width at z is |L^-1 z|."""
        inverse_ZZ = np.linalg.inv(np.linalg.cholesky(self._gram_ZZ + ridge * np.eye(len(self._gram_ZZ))))
        return inverse_ZZ.T @ (inverse_ZZ @ self._moment_ZM), inverse_ZZ


@dataclass(frozen=True)
class Learned:
    """The model of the returns, and how learning it went."""

    theta_DQM: np.ndarray
    utility_T: np.ndarray  # mean w . returns of each round's pulls, at the preferences sampled for it
    pulls: int
    unscored: int


def learn_gates(
    pull: Pull,
    features_PF: np.ndarray,
    arms_CK: np.ndarray,
    basis: GateBasis,
    *,
    objectives: int,
    rounds: int,
    batch: int,
    algorithm: str,
    explore: float,
    ridge: float,
    between: float,
    seed: int,
) -> Learned:
    """Round by round: prompts in a shuffled cycle, a sampled preference for each, the arm that looks best for both, and its returns.

    An arm's value is linear in features times basis, the same parameters for all arms, so that every pull informs about gates near it.
    "linucb" adds `explore` standard deviations to the mean of w . returns, "thompson" draws the parameters with `explore` of them. The
    first tenth of the rounds pulls arms at random. The noise is estimated from the errors of prediction before each update. The penalty is
    `ridge` plus `between` times the pulls per prompt: what prompts differ by beyond their features does not average out with more pulls.
    """
    rng = generator(seed, "bandit")
    psi_CQ = basis.of(arms_CK)
    phi_PD = np.concatenate([np.ones((len(features_PF), 1)), features_PF], axis=1)
    d, q = phi_PD.shape[1], basis.terms
    model = Ridge(d * q, objectives)
    noise_M = np.ones(objectives)
    queue = np.empty(0, dtype=np.int64)
    utility_T, pulls, unscored = [], 0, 0
    for number in range(rounds):
        while len(queue) < batch:
            queue = np.concatenate([queue, rng.permutation(len(phi_PD))])
        prompt_N, queue = queue[:batch], queue[batch:]
        w_NM = sample_preferences(rng, batch, objectives)
        theta_ZM, inverse_ZZ = model.solve(ridge + between * pulls / len(phi_PD))
        phi_ND = phi_PD[prompt_N]
        if number < max(1, rounds // 10):
            arm_N = rng.integers(len(arms_CK), size=batch)
        else:
            drawn_ZM = theta_ZM
            if algorithm == "thompson":
                drawn_ZM = theta_ZM + explore * np.sqrt(noise_M) * (inverse_ZZ.T @ rng.normal(size=theta_ZM.shape))
            value_NC = np.einsum("nd,dqm,nm,cq->nc", phi_ND, drawn_ZM.reshape(d, q, -1), w_NM, psi_CQ, optimize=True)
            if algorithm == "linucb":
                inverse_ZQD = inverse_ZZ.reshape(-1, d, q).transpose(0, 2, 1)
                variance_NC = np.stack([((inverse_ZQD @ phi_D @ psi_CQ.T) ** 2).sum(0) for phi_D in phi_ND])
                value_NC += explore * np.sqrt((w_NM**2 @ noise_M)[:, None] * variance_NC)
            arm_N = value_NC.argmax(1)
        y_NM = pull(number, prompt_N, arms_CK[arm_N])
        known_N = np.isfinite(y_NM).all(1)
        z_NZ = np.einsum("nd,nq->ndq", phi_ND, psi_CQ[arm_N]).reshape(batch, -1)[known_N]
        pulls, unscored = pulls + batch, unscored + int((~known_N).sum())
        if known_N.any():
            error_M = ((y_NM[known_N] - z_NZ @ theta_ZM) ** 2).mean(0)
            noise_M = error_M if number == 0 else FORGET * noise_M + (1 - FORGET) * error_M
            utility_T.append(float((w_NM * y_NM)[known_N].sum(1).mean()))
            model.add(z_NZ, y_NM[known_N])
    theta_ZM, _ = model.solve(ridge + between * pulls / len(phi_PD))
    return Learned(theta_ZM.reshape(d, q, objectives), np.array(utility_T), pulls, unscored)


@METHODS.register("contextual")
@dataclass(frozen=True)
class ContextualBandit(OnExperts):
    """M experts, one per objective; their gates follow from the prompt and the preference, by a model that a bandit learned.

    rounds: of `batch` prompts each (all of them where the task is exact). top: the largest gate. landmarks and width: how finely the
    returns may depend on the gates. explore: standard deviations. share: the size of a prompt's features beside the 1 that all prompts
    have in common. ridge and between: the strength of the penalty, the latter for each pull of a prompt.
    """

    mixing: Literal["parameter", "logit"] = "parameter"
    algorithm: Literal["linucb", "thompson"] = "thompson"
    features: Literal["auto", "letters", "words", "none"] = "auto"
    rounds: int = 100
    batch: int = 16
    top: float = 1.25
    landmarks: int = 36
    width: float = 0.3
    explore: float = 2.0
    share: float = 0.15
    ridge: float = 0.1
    between: float = 0.004

    card: ClassVar[Card] = Card(
        category="meta-policy",
        summary="a contextual bandit learns gates of the experts, their scale included, from the prompt's text and the preference",
        source="contextual Gaussian process bandits (Krause and Ong 2011); LinUCB (1003.0146), Thompson sampling with linear payoffs "
        "(1209.3352)",
        differs="one model over continuous gates, linear in the prompt's features, of every objective's return, so that all preferences "
        "learn from every pull; after learning, the model's best gates between the arms",
        hides="pulls are paid before the first question and see training prompts only; on exact tasks a pull is the expected return of "
        "a prompt, without noise; what the features do not tell apart is treated alike",
        trainings="M",
        forwards_per_token="parameter: 1; logit: M",
        zero_shot=True,
    )

    def __post_init__(self):
        counts, positive = (self.rounds, self.batch, self.landmarks), (self.top, self.width, self.ridge)
        if min(counts) < 1 or min(positive) <= 0 or min(self.explore, self.share, self.between) < 0:
            raise ConfigError(
                "method contextual: rounds, batch, landmarks are at least 1, top, width, ridge positive, the rest at least 0",
                found=f"rounds, batch, landmarks = {counts}, top, width, ridge = {positive}, "
                f"explore, share, between = {self.explore, self.share, self.between}",
                remedy="`paretune show contextual` prints the defaults",
            )

    def policy(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Family:
        adapters = adapters_for(vertex_trainings(task, learner, seed), done)
        policy = build_policy(task, self.mixing, adapters)
        prompts = task.prompts(SPLIT)
        features = Features.fitting(self.features, prompts, share=self.share)
        features_PF = features.of(prompts)
        with metered() as meter:
            learned = learn_gates(
                _puller(task, policy, seed=seed),
                features_PF,
                _gates(policy, self.top, ARMS),
                GateBasis(policy.K, landmarks=self.landmarks, width=self.width, top=self.top),
                objectives=task.objectives.count,
                rounds=self.rounds,
                batch=len(prompts) if task.is_exact else self.batch,
                algorithm=self.algorithm,
                explore=self.explore,
                ridge=self.ridge,
                between=self.between,
                seed=seed,
            )
        _require_scores(learned.pulls - learned.unscored)
        rule = Contextual(
            features=features,
            mean_F=tuple(map(float, features_PF.mean(0))),
            adapters=policy.K,
            landmarks=self.landmarks,
            width=self.width,
            top=self.top,
            theta_DQM=tuple(tuple(tuple(map(float, row_M)) for row_M in rows) for rows in learned.theta_DQM),
        )
        meta = {"bandit": {"pulls": learned.pulls, "unscored": learned.unscored, "utility": _tenths(learned.utility_T)}}
        return self.family(task, policy, rule, adapters, seed, meta=meta, search_cost=meter.cost)


@METHODS.register("static-gates")
@dataclass(frozen=True)
class StaticGates(OnExperts):
    """M experts; for every preference the best gates of an even grid in [0, top]^M, the same for every prompt.

    What `contextual` is compared with: the same gates to choose from, measured on all training prompts. budget: points of the grid.
    """

    mixing: Literal["parameter", "logit"] = "parameter"
    top: float = 1.25
    budget: int = 256
    samples: int = 64  # responses for each point, where the task is not exact

    card: ClassVar[Card] = Card(
        category="meta-policy",
        summary="experts mixed with the best fixed gates of a dense grid, chosen for every preference by what was measured once",
        source="none: a grid search, as a baseline for gates that look at the prompt",
        differs="nothing",
        hides="one grid answers every preference, because it is measured in every objective; it sees training prompts only",
        trainings="M",
        forwards_per_token="parameter: 1; logit: M",
        zero_shot=True,
    )
    symmetric: ClassVar[bool] = True

    def __post_init__(self):
        if self.budget < 4 or self.samples < 1 or self.top <= 0:
            raise ConfigError(
                "method static-gates: budget is at least 4, samples at least 1, top positive",
                found=f"budget = {self.budget}, samples = {self.samples}, top = {self.top}",
                remedy="`paretune show static-gates` prints the defaults",
            )

    def policy(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Family:
        adapters = adapters_for(vertex_trainings(task, learner, seed), done)
        policy = build_policy(task, self.mixing, adapters)
        gates_GK = _gates(policy, self.top, self.budget)
        with metered() as meter:
            returns = returns_of(task, policy, SPLIT, samples=self.samples, seed=seed_for(seed, "static gates"))
            returns_GM = returns.at(gates_GK).means_WM
        known_G = np.isfinite(returns_GM).all(1)
        _require_scores(int(known_G.sum()))
        gates_GK, returns_GM = gates_GK[known_G], returns_GM[known_G]
        kept_G = nondominated(returns_GM)  # the others are the best of no preference
        rule = Pooled(gates_GK=rows_of(gates_GK[kept_G]), returns_GM=rows_of(returns_GM[kept_G]))
        return self.family(task, policy, rule, adapters, seed, search_cost=meter.cost)


def _gates(policy: Policy, top: float, budget: int) -> np.ndarray:
    """(C, K) gates to choose from: without those that are all 0, where they are another policy than the reference."""
    gates_CK = box_lattice(policy.K, top, budget)
    return gates_CK if policy.zero_is_reference else gates_CK[gates_CK.sum(1) > 0]


def _puller(task: Task, policy: Policy, *, seed: int) -> Pull:
    """What a bandit pulls on: expected returns of the prompts on an exact task, else one response each."""
    returns = returns_of(task, policy, SPLIT, samples=len(task.prompts(SPLIT)), seed=seed_for(seed, "bandit's responses"))
    return lambda number, prompt_N, gates_NK: returns.once(prompt_N, gates_NK, number)


def _require_scores(known: int) -> None:
    if not known:
        raise TrainingError("gates are chosen by scores", found="no response was scored in every objective", remedy="repair the objectives")


def _tenths(utility_T: np.ndarray) -> list[float]:
    """Means of up to ten equal stretches, for a reader to see whether it learned."""
    return [round(float(part.mean()), 6) for part in np.array_split(utility_T, min(10, len(utility_T)))]
