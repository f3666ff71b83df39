"""Weighted multi-teacher on-policy distillation: a student learns, at every preference, the mixture of frozen teachers.

The student samples; at every token of its responses the teachers' mixture says which distribution is wanted. No reward enters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from paretune.errors import ConfigError
from paretune.policy.base import Policy
from paretune.registry import GATE_RULES, LEARNERS
from paretune.tasks.base import Task
from paretune.training.batch import Responses
from paretune.training.combine import Combine
from paretune.training.learners.embedded import Batch, EmbeddedLearner
from paretune.training.spec import TrainSpec
from paretune.training.weightings.base import State

__all__ = ["Distillation", "mixture_kl"]


def mixture_kl(student_NTV: Tensor, teacher_NTV: Tensor) -> Tensor:
    """(N, T) KL(student || teacher) in nats of next-token distributions given as logits, with gradient to the student.

    Source: sum_k w_k KL(pi || pi_k) = KL(pi || prod pi_k^w_k / Z) - log Z, so the weighted sum over teachers is, up to a constant, the
        KL to their geometric mixture; MOPD (2606.30406) uses its sampled form. Differs: all of V is summed, not the sampled token.
    Hides: the KL is per token: the effect of a token on later states of the student has no gradient.
    """
    student_NTV, teacher_NTV = student_NTV.float().log_softmax(-1), teacher_NTV.float().log_softmax(-1)
    return (student_NTV.exp() * (student_NTV - teacher_NTV)).sum(-1)


RULE = "a distillation has one epoch a batch and no KL to the reference"


@dataclass(frozen=True)
class DistillBatch(Batch):
    """A batch with the gates of the teachers, whose logits are wanted at the tokens of the student's own responses."""

    teachers_NK: Tensor


@LEARNERS.register("distill", version=4)
@dataclass(frozen=True, kw_only=True)
class Distillation(EmbeddedLearner):
    """On-policy distillation of `spec.frozen_adapters`, mixed by the rule `teacher`, into the adapters that are trained.

    Source: on-policy distillation from several weighted teachers, MOPD (2606.30406); generalized to all preferences at once.
    Differs: the teachers' mixture is that of their logits, conditioned on the preference; the KL of a token is summed over V.
    Hides: the student can be no better than the mixture; M and more forwards per token while it learns, one when it serves.
    """

    weighs: ClassVar[bool] = True
    keeps: ClassVar[Mapping[str, Any]] = {"epochs": 1}
    lacks: ClassVar[Mapping[str, tuple[str, str]]] = dict.fromkeys(("kl_in", "kl_estimator"), (RULE, "leave these fields out"))

    teacher: Mapping[str, Any] = field(default_factory=lambda: {"name": "identity"})

    def rules(self) -> dict[str, bool]:
        return {**super().rules(), f"{RULE}: epochs is 1": self.epochs == 1}

    def accept(self, spec: TrainSpec) -> None:
        super().accept(spec)
        Combine.of(spec).check(sampled=spec.preference is None)

    def collect(self, policy: Policy, task: Task, spec: TrainSpec, step: int, state: State | None = None) -> DistillBatch:
        made = self.drawn(policy, task, spec, step)
        gates_NK = torch.from_numpy(GATE_RULES.build(self.teacher).gates(made.w_NM)).float().to(policy.device)
        if gates_NK.shape[1] > policy.K:
            raise ConfigError(
                "the teachers' rule gives a gate to each frozen adapter",
                found=f"{gates_NK.shape[1]} gates, {policy.K} adapters in all",
                remedy="name a rule for the adapters in `frozen_adapters`",
            )
        reference_NT = self.reference_logp(policy, made)
        kl_N = made.kl_N(reference_NT)
        return DistillBatch(made, reference_NT, kl_N, made.w_NM, np.zeros(len(kl_N)), state or {}, gates_NK)

    def loss(self, policy: Policy, batch: Batch, rows: slice, *, beta: float) -> Tensor:
        """The mean over responses of the KL to the teachers' mixture, in nats per response."""
        assert isinstance(batch, DistillBatch)
        made = batch.responses
        student_NTV = _response_logits(policy, made, self.group, made.gates_NK, rows)
        teacher_NTV: Tensor | float = 0.0
        with torch.no_grad():  # of these rows alone: the vocabulary is long
            for k in range(batch.teachers_NK.shape[1]):
                alone_NK = torch.zeros(len(batch.teachers_NK), policy.K, device=policy.device)
                alone_NK[:, k] = 1.0
                part_NTV = _response_logits(policy, made, self.group, alone_NK, rows).float() * batch.teachers_NK[rows, k, None, None]
                teacher_NTV = teacher_NTV + part_NTV
        assert isinstance(teacher_NTV, Tensor), "there are teachers"
        t = self.temperature  # of the student that samples, and of its teachers
        kl_RT = mixture_kl(student_NTV / t, teacher_NTV / t) * made.mask_NT[rows]
        kl_RT = kl_RT if made.weight_N is None else kl_RT * made.weight_N[rows, None].float()
        return kl_RT.sum() / len(batch.kl_N)


def _response_logits(policy: Policy, made: Responses, group: int, gates_NK: Tensor, rows: slice) -> Tensor:
    """(rows, T, V) logits at the tokens of the responses."""
    ids_NT = torch.cat([made.prompt_ids_PT.repeat_interleave(group, 0), made.tokens_NT[:, :-1]], 1)[rows]
    ones_NT = torch.ones_like(made.tokens_NT[:, :-1])
    mask_NT = torch.cat([made.prompt_mask_PT.repeat_interleave(group, 0), ones_NT], 1)[rows]
    return policy.forward(ids_NT, gates_NK=gates_NK[rows], attention_mask=mask_NT, last_only=made.tokens_NT.shape[1])
