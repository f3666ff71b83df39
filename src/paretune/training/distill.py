"""Weighted multi-teacher on-policy distillation: a student learns, at every preference, the mixture of frozen teachers.

The student samples; at every token of its responses the teachers' mixture says which distribution is wanted. No reward enters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paretune.errors import ConfigError
from paretune.policy.base import Policy
from paretune.registry import GATE_RULES, LEARNERS
from paretune.tasks.base import Task
from paretune.training.batch import Responses, draw
from paretune.training.policy_gradient import Batch, PolicyGradient
from paretune.training.spec import TrainSpec
from paretune.training.weightings.base import State

__all__ = ["Distillation", "mixture_kl"]


def mixture_kl(student_NTV: Tensor, teacher_NTV: Tensor) -> Tensor:
    """(N, T) KL(student || teacher) in nats of next-token distributions given as logits, with gradient to the student.

    Source: sum_k w_k KL(pi || pi_k) = KL(pi || prod pi_k^w_k / Z) - log Z, so the weighted sum over teachers is, up to a constant, the
        KL to their geometric mixture; MOPD (2606.30406) uses its sampled form. Differs: all of V is summed, not the sampled token.
    Hides: tokens alone are matched; how the student's choice changes what it meets later has no gradient.
    """
    student_NTV, teacher_NTV = student_NTV.float().log_softmax(-1), teacher_NTV.float().log_softmax(-1)
    return (student_NTV.exp() * (student_NTV - teacher_NTV)).sum(-1)


@dataclass(frozen=True)
class DistillBatch(Batch):
    """A batch with the teachers' logits on the student's own responses."""

    teacher_NTV: Tensor


@LEARNERS.register("distill")
@dataclass(frozen=True, kw_only=True)
class Distillation(PolicyGradient):
    """On-policy distillation of `spec.frozen_adapters`, mixed by the rule `teacher`, into the adapters that are trained.

    Source: on-policy distillation from several weighted teachers, MOPD (2606.30406); generalized to all preferences at once.
    Differs: the teachers' mixture is that of their logits, conditioned on the preference; the KL of a token is summed over V.
    Hides: the student can be no better than the mixture; M and more forwards per token while it learns, one when it serves.
    """

    teacher: Mapping[str, Any] = field(default_factory=lambda: {"name": "identity"})

    def __post_init__(self):
        super().__post_init__()
        if self.epochs != 1 or self.kl_in != "reward" or self.stop_cv is not None:
            raise ConfigError(
                "a distillation has one epoch a batch, no KL to the reference and no validation",
                found=f"epochs={self.epochs}, kl_in={self.kl_in!r}, stop_cv={self.stop_cv}",
                remedy="leave these fields out",
            )

    @classmethod
    def like(cls, learner: Any, teacher: Mapping[str, Any]) -> Distillation:
        """With the shape, budget and optimizer of another learner; an exact one counts as a batch of samples per step."""
        same = {f.name: getattr(learner, f.name) for f in dataclasses.fields(cls) if hasattr(learner, f.name)}
        same |= {"epochs": 1, "kl_in": "reward", "kl_estimator": "k1", "stop_cv": None, "teacher": teacher}
        if not isinstance(learner, PolicyGradient):
            default = cls()
            same |= {"samples": default.batch * learner.steps, "lr": default.lr, "momentum": default.momentum}
        return cls(**same)

    def collect(self, policy: Policy, task: Task, spec: TrainSpec, step: int, state: State | None = None) -> DistillBatch:
        count = self.batch // self.group
        made = draw(policy, task, spec, step=step, first=step * count, prompts=count, group=self.group, temperature=self.temperature)
        gates_NK = torch.from_numpy(GATE_RULES.build(self.teacher).gates(made.w_NM)).float().to(policy.device)
        if gates_NK.shape[1] > policy.K:
            raise ConfigError(
                "the teachers' rule gives a gate to each frozen adapter",
                found=f"{gates_NK.shape[1]} gates, {policy.K} adapters in all",
                remedy="name a rule for the adapters in `frozen_adapters`",
            )
        teacher_NTV: Tensor | None = None
        with torch.no_grad():
            reference_NT = self._logp(policy, made, slice(0, self.batch), gates_NK=None)
            for k in range(gates_NK.shape[1]):
                alone_NK = torch.zeros(len(gates_NK), policy.K, device=policy.device)
                alone_NK[:, k] = 1.0
                part_NTV = _response_logits(policy, made, self.group, alone_NK).float() * gates_NK[:, k, None, None]
                teacher_NTV = part_NTV if teacher_NTV is None else teacher_NTV + part_NTV
        assert teacher_NTV is not None
        kl_N = ((made.logp_NT - reference_NT) * made.mask_NT).sum(1).double().cpu().numpy()
        return DistillBatch(made, reference_NT, kl_N, made.w_NM, np.zeros(len(kl_N)), state or {}, teacher_NTV)

    def gradient(self, policy: Policy, batch: Batch, *, beta: float) -> float:
        """Add the gradient of the mean over responses of the KL to the teachers' mixture; returns it, in nats per response."""
        assert isinstance(batch, DistillBatch)
        made = batch.responses
        student_NTV = _response_logits(policy, made, self.group, made.gates_NK)
        loss = (mixture_kl(student_NTV, batch.teacher_NTV) * made.mask_NT).sum() / len(batch.kl_N)
        loss.backward()
        return float(loss.detach())


def _response_logits(policy: Policy, made: Responses, group: int, gates_NK: Tensor) -> Tensor:
    """(N, T, V) logits at the tokens of the responses."""
    ids_NT = torch.cat([made.prompt_ids_PT.repeat_interleave(group, 0), made.tokens_NT[:, :-1]], 1)
    ones_NT = torch.ones_like(made.tokens_NT[:, :-1])
    mask_NT = torch.cat([made.prompt_mask_PT.repeat_interleave(group, 0), ones_NT], 1)
    return policy.forward(ids_NT, gates_NK=gates_NK, attention_mask=mask_NT, last_only=made.tokens_NT.shape[1])
