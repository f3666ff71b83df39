"""A short probe: do the gradients of the objectives point the same way? One gradient per objective, on the adapters that would be trained.

    cosine  of the gradients of J_j and J_k
    rate    what J_j gains while J_k gains 1, along the gradient of J_k: trade-offs as the parameters see them
    norm    length of each gradient: who dominates a plain sum

At initialization every B of LoRA is 0: only B has a gradient, and it is the gradient of the full weights seen through the random A, in
which angles are kept up to an error that falls with the rank. After `steps` of training at equal weights both factors have one.

On an exact task the gradients are exact. Elsewhere `batches` batches are drawn, and inner products are means over pairs of *different*
batches: within a batch the noise of two gradients is correlated as the rewards are, and would be taken for agreement. Where the mean
squared length comes out negative, the gradient is smaller than its noise: unknown (NaN). Intervals leave out a batch at a time (jackknife).

Source: gradient conflict as in PCGrad (Yu et al. 2020); inner products without the batch's own noise are a U-statistic (Hoeffding 1948).
Differs: whole-response returns with a leave-one-out baseline, no normalization, the KL of J_k included.
Hides: one place in parameter space; conflict may come and go during a training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from paretune.errors import ConfigError
from paretune.evaluation.metrics import plain
from paretune.evaluation.stats import LEVEL, MIN_UNITS
from paretune.registry import describe
from paretune.training.exact import ExactGradient, enumerated_returns
from paretune.training.loss import policy_loss
from paretune.training.policy_gradient import PolicyGradient
from paretune.training.spec import TrainSpec

if TYPE_CHECKING:
    from paretune.policy.mixing.parameter import ParameterMix
    from paretune.tasks.base import Task

__all__ = ["Probe", "probe"]

BATCHES = MIN_UNITS
WIDE = {0.95: 1.96}


@dataclass(frozen=True)
class Probe:
    """(M, M) matrices, [j, k] as above; `low` and `high` bound the cosine (NaN: unknown; the cosine itself where exact)."""

    names: tuple[str, ...]
    cosine_MM: np.ndarray
    low_MM: np.ndarray
    high_MM: np.ndarray
    rate_MM: np.ndarray
    norm_M: np.ndarray
    steps: int
    samples: int
    exact: bool

    def to_json(self) -> Mapping[str, Any]:
        """Strict JSON; unknown is None."""
        return plain({name.removesuffix("_MM").removesuffix("_M"): value for name, value in vars(self).items()})


def probe(
    task: Task,
    *,
    steps: int = 0,
    batches: int = BATCHES,
    learner: PolicyGradient | None = None,
    seed: int = 0,
    exact: bool | None = None,
) -> Probe:
    """Gradients of every objective's return after `steps` of training at equal weights; `learner` says how large and where adapters are.

    Raises ConfigError for a task of one objective, or fewer than 2 batches.
    """
    m = task.objectives.count
    exact = task.is_exact if exact is None else exact
    if m < 2 or steps < 0 or batches < 2:
        raise ConfigError(
            "a probe compares at least two objectives, on at least 2 batches, after 0 steps or more",
            found=f"{m} objectives, {batches} batches, {steps} steps",
            remedy=f"batches={BATCHES}, steps=0, for example",
        )
    if exact:
        gradients_BMD, samples = _exact(task, steps, seed, learner), 0
        products = np.einsum("bmd,bnd->mn", gradients_BMD, gradients_BMD)
        cosine_MM, rate_MM, norm_M = _read(products)
        low_MM = high_MM = cosine_MM
    else:
        gradients_BMD, samples = _sampled(task, steps, batches, seed, learner or PolicyGradient())
        inner = np.einsum("bmd,cnd->bcmn", gradients_BMD, gradients_BMD, optimize=True)
        cosine_MM, rate_MM, norm_M = _read(_across(inner))
        low_MM, high_MM = _jackknife(inner, cosine_MM)
    return Probe(task.objectives.names, cosine_MM, low_MM, high_MM, rate_MM, norm_M, steps, samples, exact)


def _across(inner_BBMM: np.ndarray) -> np.ndarray:
    """(M, M) mean inner product over pairs of different batches."""
    b = len(inner_BBMM)
    return (inner_BBMM.sum((0, 1)) - np.einsum("bbmn->mn", inner_BBMM)) / (b * (b - 1))


def _read(products_MM: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cosines, trade-off rates and lengths from inner products; NaN where a squared length is not positive."""
    square_M = np.diagonal(products_MM)
    norm_M = np.sqrt(np.where(square_M > 0, square_M, np.nan))
    cosine_MM = np.clip(products_MM / (norm_M[:, None] * norm_M), -1, 1)
    return cosine_MM, products_MM / np.square(norm_M), norm_M


def _jackknife(inner_BBMM: np.ndarray, cosine_MM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intervals of the cosines: each batch left out once; unknown below 10 batches, or where a replicate is."""
    b = len(inner_BBMM)
    if b < MIN_UNITS:
        return np.full_like(cosine_MM, np.nan), np.full_like(cosine_MM, np.nan)
    kept = [np.delete(np.delete(inner_BBMM, out, axis=0), out, axis=1) for out in range(b)]
    left_out = np.stack([_read(_across(inner))[0] for inner in kept])
    half_MM = WIDE[LEVEL] * np.sqrt((b - 1) / b * np.square(left_out - left_out.mean(0)).sum(0))
    return np.clip(cosine_MM - half_MM, -1, 1), np.clip(cosine_MM + half_MM, -1, 1)


def _spec(task: Task, learner: Any, seed: int) -> TrainSpec:
    m = task.objectives.count
    return TrainSpec(task=describe(task), learner=describe(learner), preference=(1 / m,) * m, seed=seed)


def _flat(values: list[torch.Tensor], weights: list[torch.Tensor]) -> np.ndarray:
    """(M, D) float64 gradients of M values."""
    rows = [torch.autograd.grad(value, weights, retain_graph=True) for value in values]
    return np.stack([torch.cat([g.flatten() for g in row]).double().cpu().numpy() for row in rows])


def _exact(task: Any, steps: int, seed: int, like: PolicyGradient | None) -> np.ndarray:
    """(1, M, D) by enumeration."""
    shape = {name: getattr(like, name) for name in ("rank", "alpha", "targets", "device", "dtype")} if like else {}
    learner = ExactGradient(**shape)
    spec = _spec(task, learner, seed)
    policy = learner.start(spec, task, {})
    weights = policy.bank.parameters()
    optimizer = torch.optim.Muon(weights, lr=learner.lr, weight_decay=0.0, momentum=learner.momentum)
    for step in range(steps):
        learner.update(policy, optimizer, task, spec, step)
    reward_PM, kl_P, _ = enumerated_returns(policy, task, torch.ones(task.prompt_count, 1, device=policy.device))
    returns_M = (reward_PM - task.beta * kl_P[:, None]).mean(0)
    return _flat(list(returns_M), weights)[None]


def _sampled(task: Task, steps: int, batches: int, seed: int, learner: PolicyGradient) -> tuple[np.ndarray, int]:
    """(B, M, D), one per batch of the learner's size, and how many responses were drawn."""
    learner = replace(learner, samples=max(learner.samples, learner.batch * max(steps, 1)))
    spec = _spec(task, learner, seed)
    policy = learner.start(spec, task, {})
    weights = policy.bank.parameters()
    optimizer = learner.new_optimizer(weights)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learner.lr * learner.pace(step)
        learner.update(policy, optimizer, learner.collect(policy, task, spec, step), beta=task.beta, step=step)
    found = [_of_batch(policy, task, spec, learner, steps + number) for number in range(batches)]
    return np.stack(found), (steps + batches) * learner.batch


def _of_batch(policy: ParameterMix, task: Task, spec: TrainSpec, learner: PolicyGradient, step: int) -> np.ndarray:
    """(M, D) policy gradients of the M returns from one batch, with one forward."""
    plain_learner = replace(learner, baseline="leave_one_out", normalize="none", kl_in="reward", kl_estimator="k1", length="sum", epochs=1)
    batch = plain_learner.collect(policy, task, spec, step)
    made, m = batch.responses, task.objectives.count
    logp_NT = plain_learner.logp(policy, made, slice(0, learner.batch), gates_NK=made.gates_NK)
    penalty_N, combine = task.beta * batch.kl_N, plain_learner.combine(spec)
    values = []
    for e_M in np.eye(m):
        advantage_N = combine.advantages(made.rewards_NM, np.tile(e_M, (learner.batch, 1)), penalty_N, task.objectives, group=learner.group)
        loss = policy_loss(logp_NT, made.mask_NT, torch.from_numpy(advantage_N).to(policy.device), rows=learner.batch)
        values.append(-loss)
    return _flat(values, weights=policy.bank.parameters())
