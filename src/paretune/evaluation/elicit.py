"""Preference elicitation: what somebody wants, from which of two responses they prefer.

A posterior over the weights, the next pair to ask, the weights to use now, and what more questions could still gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import log_softmax, softmax

from paretune.errors import ConfigError
from paretune.progress import counted
from paretune.seeds import generator
from paretune.tasks.base import Task
from paretune.types import Prompt

if TYPE_CHECKING:
    from paretune.policy.family import Family

__all__ = ["EACH", "PROMPTS", "TIE", "Elicitation", "Pool", "Question", "draw_pool", "hundredths", "pool_of", "pool_preferences"]

EACH = 24  # responses to each prompt of a pool
PROMPTS = 8  # of the task's test prompts, where none are given

TIE = -1  # the answer to a question whose options are equally good
PAIRS = 2000  # of the pool's pairs, drawn anew for each question
MOVES = 4  # of every particle after an answer
# Natural logarithms, mean and spread. CONSISTENCY: a user's scale times the typical difference of two responses' utilities; at 1.6 four in
# five answers to random pairs are consistent, at .8 seven in ten, at 7 nineteen in twenty. TIES: how often equal responses are a tie.
CONSISTENCY, TIES = (np.log(1.6), 0.8), (np.log(0.3), 1.0)


@dataclass(frozen=True)
class Question:
    """A prompt, and rows of the pool that are responses to it: which is the best?"""

    prompt: int
    options: tuple[int, ...]


@dataclass(frozen=True)
class Pool:
    """What questions are made of: responses, their rewards, and the prompt of each (its place in `prompts`)."""

    prompts: tuple[Prompt, ...]
    responses_N: tuple[str, ...]
    rewards_NM: np.ndarray
    prompt_N: np.ndarray


def pool_preferences(count: int, each: int, seed: int = 0) -> np.ndarray:
    """(W, M) preferences of a pool: the vertices, even weights, and others drawn uniformly; `each`, and M + 1 at least."""
    drawn_WM = generator(seed, "elicit", "pool").dirichlet(np.ones(count), max(each - count - 1, 0))
    return np.concatenate([np.eye(count), np.full((1, count), 1 / count), drawn_WM])


def draw_pool(
    task: Task,
    family: Family,
    prompts: Sequence[Prompt],
    *,
    each: int = EACH,
    seed: int = 0,
) -> Pool:
    """A pool of responses to each prompt, one at each of `pool_preferences`."""
    turns = enumerate(counted("preferences drawn at", list(pool_preferences(family.objectives.count, each, seed))))
    made = [family.sample(list(prompts), w_M.tolist(), seed=seed + turn) for turn, w_M in turns]
    return pool_of(task, prompts, [[texts[0] for texts in answers] for answers in made])


def pool_of(task: Task, prompts: Sequence[Prompt], texts_WP: Sequence[Sequence[str]]) -> Pool:
    """A pool of responses, scored; `texts_WP` has one to each prompt, many times. Those that came twice stand there once."""
    found = dict.fromkeys((place, text) for texts in texts_WP for place, text in enumerate(texts))
    asked = [prompts[place] for place, _ in found]
    texts = tuple(text for _, text in found)
    return Pool(tuple(prompts), texts, task.score(asked, texts), np.array([place for place, _ in found]))


def hundredths(weights: Sequence[float]) -> list[float]:
    """Weights in hundredths that sum to 1, the largest remainders rounded up: what can be pasted."""
    whole = [int(100 * w) for w in weights]
    for k in sorted(range(len(weights)), key=lambda k: whole[k] - 100 * weights[k])[: 100 - sum(whole)]:
        whole[k] += 1
    return [n / 100 for n in whole]


class Elicitation:
    """Bayesian preference elicitation over a pool of responses whose rewards are known.

    Of responses with rewards r_i somebody with weights w chooses i with probability proportional to exp(s w . r_i), and calls it a tie with
    probability proportional to v exp(s w . mean r): Bradley and Terry's model with Davidson's ties. w has a uniform prior on the
    simplex. s, how consistent somebody is, and v are unknown too, with wide priors relative to the pool's own differences.

    The posterior is a set of particles, resampled and moved (Metropolis) after each answer. For a utility w . J whose price is KL, using
    weights u loses the share (u - w)' S (u - w) / w' S w of what w would gain, to second order, where S is the covariance of rewards over
    responses to one prompt. `weights` minimize the expected share, and a question is the pair after whose answer it is smallest.

    Args:
        rewards_NM: rewards of the pool's responses. A response with an unscored objective is never asked about; `unscored` counts them.
        prompt_N: which prompt each responds to.
        options: how many responses a question shows.

    Raises ConfigError where no prompt has two scored responses that differ, or none in one of the objectives: its weight is then unknown
    whatever is answered.

    Source: Bradley and Terry 1952; Davidson 1970; Chopin 2002 (resample and move). Differs: the question is chosen by the expected loss
    of the decision, as in the knowledge gradient, and not by information about w. Hides: rewards are taken to be what somebody sees, and
    preferences to be linear in them; whoever wants what no objective measures gets the weights that explain their answers least badly.
    """

    def __init__(self, rewards_NM: np.ndarray, prompt_N: np.ndarray, *, options: int = 2, particles: int = 1500, seed: int = 0):
        rewards_NM = np.asarray(rewards_NM, dtype=np.float64)
        self.rewards_NM, self.prompt_N = rewards_NM, np.asarray(prompt_N)
        self.options, self.seed = options, seed
        self.answers: list[tuple[Question, int]] = []
        known_N = np.isfinite(rewards_NM).all(1)
        self.unscored = int((~known_N).sum())
        self._groups = [
            rows for p in np.unique(self.prompt_N[known_N]) if len(rows := np.flatnonzero(known_N & (self.prompt_N == p))) >= options
        ]
        inside = [rewards_NM[rows] - rewards_NM[rows].mean(0) for rows in self._groups]
        if options < 2 or not inside or not np.ptp(np.concatenate(inside), axis=0).any():
            raise ConfigError(
                "a question shows at least two responses to one prompt whose rewards differ",
                found=f"{options} options; {len(rewards_NM)} responses ({self.unscored} unscored), {len(np.unique(self.prompt_N))} prompts",
                remedy="draw more responses to each prompt, at several preferences",
            )
        within_NM = np.concatenate(inside)
        if len(alike := np.flatnonzero(np.ptp(within_NM, axis=0) <= 1e-9 * np.ptp(within_NM))):
            raise ConfigError(
                "answers tell the weights of objectives whose rewards differ between responses to one prompt",
                found=f"equal rewards of objective {', '.join(str(k + 1) for k in alike)} of {within_NM.shape[1]}",
                remedy="draw more responses to each prompt; where it is always so, the policy cannot change that objective",
            )
        self._S = within_NM.T @ within_NM / len(within_NM)
        rng = generator(seed, "elicit", "prior")
        m = rewards_NM.shape[1]
        typical = np.median(np.abs(rng.dirichlet(np.ones(m), 200) @ self._differences(rng).T))
        self._center = np.array([CONSISTENCY[0] - np.log(max(typical, 1e-12)), TIES[0]])
        w_IM = rng.dirichlet(np.ones(m), particles)
        rest_I2 = self._center + np.array([CONSISTENCY[1], TIES[1]]) * rng.standard_normal((particles, 2))
        self._x_IX = np.concatenate([np.log(w_IM[:, :-1]) - np.log(w_IM[:, -1:]), rest_I2], axis=1)

    @property
    def w_IM(self) -> np.ndarray:
        """Particles of the posterior over weights."""
        return _weights(self._x_IX)

    @property
    def weights(self) -> np.ndarray:
        """(M,) the weights with the smallest expected loss."""
        w_IM, loss_I = self._scaled()
        return (loss_I @ w_IM) / loss_I.sum()

    @property
    def regret(self) -> float:
        """Expected share of the possible gain that `weights` lose: no number of further answers can gain more than this, in expectation."""
        w_IM, loss_I = self._scaled()
        off_IM = w_IM - self.weights
        return float((loss_I * np.einsum("im,mn,in->i", off_IM, self._S, off_IM)).mean())

    def interval(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """(M,) lower and upper ends of each weight's central interval."""
        low_M, high_M = np.quantile(self.w_IM, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return low_M, high_M

    def ask(self) -> Question:
        """The question, of PAIRS drawn from the pool, after whose answer the expected loss is smallest. The same until it is answered."""
        rng = generator(self.seed, "elicit", "ask", len(self.answers))
        candidates = self._draw(rng, PAIRS)
        w_IM, loss_I = self._scaled()
        weighted_IX = np.concatenate([w_IM * loss_I[:, None], loss_I[:, None]], axis=1)
        shown_OCM = np.stack([self.rewards_NM[list(question.options)] for question in candidates], axis=1)
        sums_OCX = np.exp(self._log_choices(shown_OCM, self._x_IX)) @ weighted_IX
        gain_C = (np.einsum("ocm,mn,ocn->oc", sums_OCX[..., :-1], self._S, sums_OCX[..., :-1]) / sums_OCX[..., -1]).sum(0)
        return candidates[int(gain_C.argmax())]

    def answer(self, question: Question, chosen: int) -> None:
        """Record which of a question's options is the best: its place from 0, or TIE. Raises ConfigError where it is neither."""
        if chosen != TIE and not 0 <= chosen < len(question.options):
            raise ConfigError(
                "an answer is the place of an option, or TIE", found=repr(chosen), remedy=f"answer 0 to {len(question.options) - 1}"
            )
        self.answers.append((question, chosen))
        rng = generator(self.seed, "elicit", "move", len(self.answers))
        weight_I = softmax(self._log_likelihood(self._x_IX, self.answers[-1:]))
        count = len(weight_I)
        kept_I = np.searchsorted(np.cumsum(weight_I), (rng.random() + np.arange(count)) / count).clip(max=count - 1)
        x_IX = self._x_IX[kept_I]
        step_XX = np.linalg.cholesky(np.atleast_2d(np.cov(x_IX.T)) + 1e-9 * np.eye(x_IX.shape[1])) * 2.38 / np.sqrt(x_IX.shape[1])
        density_I = self._log_density(x_IX)
        for _ in range(MOVES):
            proposed_IX = x_IX + rng.standard_normal(x_IX.shape) @ step_XX.T
            new_I = self._log_density(proposed_IX)
            accept_I = np.log(rng.random(count)) < new_I - density_I
            x_IX, density_I = np.where(accept_I[:, None], proposed_IX, x_IX), np.where(accept_I, new_I, density_I)
        self._x_IX = x_IX

    def to_json(self) -> dict[str, Any]:
        """What is known: weights, their 95 % intervals, regret, and the answers by which all of it can be made again."""
        low_M, high_M = self.interval()
        told = [{"prompt": int(q.prompt), "options": [int(o) for o in q.options], "chosen": int(chosen)} for q, chosen in self.answers]
        return {"weights": self.weights.tolist(), "low": low_M.tolist(), "high": high_M.tolist(), "regret": self.regret, "answers": told}

    def _scaled(self) -> tuple[np.ndarray, np.ndarray]:
        """Particles of w, and what a unit of squared error costs each: 1 / w' S w."""
        w_IM = self.w_IM
        return w_IM, 1 / np.maximum(np.einsum("im,mn,in->i", w_IM, self._S, w_IM), 1e-12)

    def _draw(self, rng: np.random.Generator, count: int) -> list[Question]:
        sizes = np.array([len(rows) for rows in self._groups], dtype=np.float64)
        groups = rng.choice(len(self._groups), size=count, p=sizes / sizes.sum())
        drawn = (rng.choice(self._groups[g], size=self.options, replace=False) for g in groups)
        return [Question(int(self.prompt_N[rows[0]]), tuple(int(row) for row in rows)) for rows in drawn]

    def _differences(self, rng: np.random.Generator) -> np.ndarray:
        """(C, M) differences of rewards between two responses to one prompt."""
        return np.stack([self.rewards_NM[q.options[0]] - self.rewards_NM[q.options[1]] for q in self._draw(rng, PAIRS)])

    def _log_choices(self, rewards_OCM: np.ndarray, x_IX: np.ndarray) -> np.ndarray:
        """(O + 1, C, I) log-probabilities of each option of each question, and of a tie."""
        w_IM, scale_I, ties_I = _weights(x_IX), np.exp(x_IX[:, -2]), x_IX[:, -1]
        utility_OCI = rewards_OCM @ (w_IM * scale_I[:, None]).T
        return log_softmax(np.concatenate([utility_OCI, utility_OCI.mean(0, keepdims=True) + ties_I]), axis=0)

    def _log_likelihood(self, x_IX: np.ndarray, answers: Sequence[tuple[Question, int]]) -> np.ndarray:
        total_I = np.zeros(len(x_IX))
        for question, chosen in answers:
            total_I += self._log_choices(self.rewards_NM[list(question.options)][:, None], x_IX)[chosen, 0]
        return total_I

    def _log_density(self, x_IX: np.ndarray) -> np.ndarray:
        """(I,) log posterior, but for a constant, of log-ratios of weights (a uniform w has density prod w_k there), log s and log v."""
        prior_I = np.log(np.maximum(_weights(x_IX), 1e-300)).sum(1)
        prior_I -= (((x_IX[:, -2:] - self._center) / (CONSISTENCY[1], TIES[1])) ** 2).sum(1) / 2
        return prior_I + self._log_likelihood(x_IX, self.answers)


def _weights(x_IX: np.ndarray) -> np.ndarray:
    """(I, M) weights from their M - 1 log-ratios to the last, which stand first in x."""
    return softmax(np.concatenate([x_IX[:, :-2], np.zeros((len(x_IX), 1))], axis=1), axis=1)
