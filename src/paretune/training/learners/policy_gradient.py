"""The policy-gradient learner: the embedded loop with a clipped policy-gradient loss.

    J_w(pi) = mean over prompts of E[w . r(x, y) - beta * (log pi(y|x) - log pi_ref(y|x))]

`PolicyGradient` with its defaults climbs exactly this: responses are drawn from the policy itself, the KL penalty is part of each
response's return, its baseline is the mean return of the *other* responses to the same prompt, and log-probabilities are summed over
the response. Its expected gradient is the gradient of J_w, before clipping and Adam; the tests hold it to that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from paretune.policy.base import Policy
from paretune.registry import GIVEN, LEARNERS
from paretune.tasks.base import Task
from paretune.tasks.exact.optimum import landmarks
from paretune.training.advantages import group_covariance
from paretune.training.batch import Responses
from paretune.training.combine import Combine
from paretune.training.learners.base import annealed
from paretune.training.learners.embedded import SMALLER, Batch, EmbeddedLearner
from paretune.training.learners.jacobian import Jacobian, response_jacobian
from paretune.training.learners.loss import clipped_share, kl_terms, policy_loss
from paretune.training.loop.run import memory_explained, not_finite
from paretune.training.spec import TrainSpec
from paretune.training.weightings.base import State
from paretune.types import Positive

__all__ = ["PolicyBatch", "PolicyGradient", "PolicySettings"]


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """Settings of the policy-gradient loss, whichever loop runs it."""

    baseline: Literal["leave_one_out", "group_mean"] = "leave_one_out"  # the mean return of the others of a group, or of all
    normalize: Literal["none", "batch", "group", "batch_returns"] = "none"  # by whose spread advantages are divided
    kl_in: Literal["reward", "loss"] = "reward"  # where the price of KL is: part of the return, or a term of the loss
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"  # see `kl_terms`: k1 in the reward; k2 or k3 in the loss
    length: Literal["sum", "token_mean"] = "sum"  # over the tokens of a response, or their mean
    ratio: Literal["sequence", "token"] = "sequence"  # of new to old probabilities, from the second of several epochs on
    clip_eps: Positive = 0.2  # of the ratio, from the second of several epochs on

    def rules(self) -> dict[str, bool]:
        unbiased = "kl_in reward takes kl_estimator k1, which alone is unbiased there; kl_in loss takes k2 or k3"
        kept = (self.kl_in == "reward") == (self.kl_estimator == "k1")  # inside a loss the gradient of k1 has expectation 0
        return {**super().rules(), unbiased: kept}  # type: ignore[misc]

    def combine(self, spec: TrainSpec) -> Combine:
        """How the training combines its objectives under this learner."""
        return Combine.of(spec, baseline=self.baseline, normalize=self.normalize)


@dataclass(frozen=True)
class PolicyBatch(Batch):
    """A batch with the objectives' gradients, where the weighting asked for them."""

    jacobian: Jacobian | None = field(default=None, kw_only=True)


@LEARNERS.register("pg", version=4)
@dataclass(frozen=True, kw_only=True)
class PolicyGradient(PolicySettings, EmbeddedLearner):
    """The embedded policy-gradient loop on LoRA. A step draws `batch` responses, `group` to each of `batch // group` prompts.

    Source: REINFORCE with a leave-one-out baseline (Kool et al. 2019; RLOO, 2402.14740), the KL penalty in the return.
    Differs: whole responses are the actions; sums over tokens; no division by a group's spread.
    Hides: `normalize="group"`, `kl_in="loss"`, `length="token_mean"`, `epochs` above 1 and `temperature` other than 1 are there for
        comparison and climb something other than J_w; `normalize="batch"` rescales each step by one positive number.
    """

    weighs: ClassVar[bool] = True

    anneal: Positive = field(default=1.0, metadata=GIVEN)  # times its own price is that of KL at first, see `learner.annealed`

    def rules(self) -> dict[str, bool]:
        return {**super().rules(), "anneal is of kl_in reward": self.anneal == 1 or self.kl_in == "reward"}

    def accept(self, spec: TrainSpec) -> None:
        super().accept(spec)
        self.combine(spec).check(sampled=spec.preference is None, epochs=self.epochs, kl_in=self.kl_in)

    @memory_explained(SMALLER)
    def collect(self, policy: Policy, task: Task, spec: TrainSpec, step: int, state: State | None = None) -> PolicyBatch:
        combine, made = self.combine(spec), self.drawn(policy, task, spec, step)
        ratio_N = np.ones(len(made.w_NM)) if made.weight_N is None else made.weight_N.cpu().numpy()
        reference_NT = self.reference_logp(policy, made)
        kl_N = made.kl_N(reference_NT)
        beta = task.beta * annealed(self.anneal, step / self.steps)
        returns_NM = made.rewards_NM - beta * kl_N[:, None]
        jacobian = None
        if combine.needs_gramian:
            credit_NM = combine.credits(returns_NM, group=self.group)
            jacobian = self.jacobian(policy, made, credit_NM * ratio_N[:, None])
            if not np.isfinite(jacobian.gramian_MM).all():
                raise not_finite("gradients of the objectives that are no numbers", step, self.lr)
        weights_NM, after = combine.weights(
            state,
            task.objectives,
            step=step,
            steps=self.steps,
            w_NM=made.w_NM,
            returns_NM=returns_NM,
            covariance_MM=group_covariance(made.rewards_NM, group=self.group),
            prompts=made.prompts,
            landmarks=landmarks(task) if task.is_exact else None,
            seed=spec.seed,
            gramian_MM=None if jacobian is None else jacobian.gramian_MM,
        )
        penalty_N = beta * kl_N if self.kl_in == "reward" else np.zeros_like(kl_N)
        advantage_N = combine.advantages(made.rewards_NM, weights_NM, penalty_N, task.objectives, group=self.group)
        return PolicyBatch(made, reference_NT, kl_N, weights_NM, advantage_N * ratio_N, after, jacobian=jacobian)

    def jacobian(self, policy: Policy, made: Responses, credit_NM: np.ndarray) -> Jacobian:
        """The estimated gradients of the objectives' returns, by one backward."""
        mask_NT = made.mask_NT.float()
        share_NT = mask_NT / len(mask_NT) / (1.0 if self.length == "sum" else mask_NT.sum(1, keepdim=True).clamp(min=1.0))
        return response_jacobian(
            policy, made, credit_NM, share_NT, group=self.group, temperature=self.temperature, micro_batch=self.passes(made)[0].stop
        )

    def gradient(self, policy: Policy, batch: Batch, *, beta: float) -> float:
        jacobian = getattr(batch, "jacobian", None)
        if jacobian is None:
            return super().gradient(policy, batch, beta=beta)
        jacobian.descend(policy.bank.parameters(), batch.weights_NM[0])  # all that is needed has been computed
        return -float(batch.advantage_N.mean())

    def clipped(self, batch: Batch) -> float | None:
        made, seen = batch.responses, batch.seen_NT()
        if self.epochs == 1 or seen is None:
            return None
        advantage_N = torch.from_numpy(batch.advantage_N).to(seen.device)
        settings: dict[str, Any] = {"clip_eps": self.clip_eps, "ratio": self.ratio, "length": self.length}
        return clipped_share(seen, made.mask_NT, advantage_N, old_logp_NT=made.logp_NT.float(), **settings)

    def loss(self, policy: Policy, batch: Batch, rows: slice, *, beta: float) -> Tensor:
        made, n = batch.responses, len(batch.kl_N)
        logp_NT, mask_NT = self.logp(policy, made, rows, gates_NK=made.gates_NK[rows]), made.mask_NT[rows]
        batch.scored(rows, logp_NT)
        loss = policy_loss(
            logp_NT,
            mask_NT,
            torch.from_numpy(batch.advantage_N).to(policy.device)[rows],
            rows=n,
            old_logp_NT=made.logp_NT.float()[rows] if self.epochs > 1 else None,
            clip_eps=self.clip_eps,
            ratio=self.ratio,
            length=self.length,
        )
        if self.kl_in == "loss":
            terms_NT = kl_terms(logp_NT, batch.reference_logp_NT[rows], self.kl_estimator) * mask_NT
            share_N1 = 1.0 if self.length == "sum" else 1.0 / mask_NT.sum(1, keepdim=True)
            share_N1 = share_N1 if made.weight_N is None else share_N1 * made.weight_N[rows, None].float()
            loss = loss + beta * (terms_NT * share_N1).sum() / n
        return loss
