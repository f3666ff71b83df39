"""Multi-objective DPO: a policy learns from pairs of the reference's responses, compared by one objective, with margins for the others.

The optimum of J_w has beta log(pi / pi_ref) = w . r + constant, so r_1 = (beta log(pi / pi_ref) - w_2: . r_2:) / w_1 + constant: a policy
is a reward model of its objective number 1, and is fitted as one, on comparisons. Nothing is drawn from the policy while it learns.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor
from torch.nn import functional

from paretune.batches import Responses, draw
from paretune.errors import ConfigError
from paretune.policy import Policy
from paretune.policy_gradient import Batch, PolicyGradient
from paretune.registry import LEARNERS
from paretune.seeds import generator
from paretune.tasks import Task
from paretune.types import TrainSpec
from paretune.weightings import State

__all__ = ["Modpo", "modpo_loss"]


def modpo_loss(ratio: Tensor, margin: Tensor, weight: Tensor, wins: Tensor, *, beta: float) -> Tensor:
    """The loss of each pair: -log sigmoid((beta * ratio - margin) / weight) where the first response wins, of its negative where not.

    Of the first response minus the second: `ratio` is the difference of log pi - log pi_ref, `margin` that of the weighted rewards of
    all objectives but the labelled one, whose weight is `weight`. `wins` is 1 where the first is preferred, 0 where the second is,
    or the chance of it.
    Source: MODPO (2310.03708); DPO (2305.18290) where the weight is 1 and there is no margin. Differs: a label may be a chance.
    Hides: below a small `weight` the loss is steep, and all of it is the margin's.
    """
    reward = (beta * ratio - margin) / weight
    return -(wins * functional.logsigmoid(reward) + (1 - wins) * functional.logsigmoid(-reward))


@dataclass(frozen=True)
class Pairs(Batch):
    """Responses of the reference, all pairs within a group compared: tensors (P, pairs of a group), see `modpo_loss`."""

    margin: Tensor
    weight: Tensor
    wins: Tensor
    known: Tensor  # 1 where both responses were scored, else 0


@LEARNERS.register("modpo", version=2)
@dataclass(frozen=True, kw_only=True)
class Modpo(PolicyGradient):
    """MODPO on pairs that are built from the task: `samples` responses of the reference, `group` to a prompt, all pairs of a group.

    labelled: the objective by which pairs are compared; None is the one with the largest weight, so that w_1 is at least 1 / M, and of
        several such the one whose rewards differ most between a prompt's responses.
    labels: the first of two responses wins with the chance sigmoid(r_1 - r_1'), as the Bradley-Terry model of the loss has it.
    "expected" puts that chance into the loss, "drawn" draws the winner, "hard" takes the one with the larger reward.

    Source: MODPO (2310.03708), the loss.
    Differs: pairs come from the task's rewards instead of people, margins from the rewards instead of learnt reward models; the
        source's labelled objective is fixed, so that its loss has no value where that weight is 0. beta is the task's.
    Hides: it sees only what the reference says, so what the reference hardly ever says is not learnt. With "hard" labels the larger
        reward wins however close the two are: the optimum is then not that of J_w, and without an early end KL grows.
    """

    labelled: int | None = None
    labels: Literal["expected", "drawn", "hard"] = "expected"

    def __post_init__(self):
        super().__post_init__()
        plain = (self.kl_in, self.normalise, self.length, self.stop_cv)
        if plain != ("reward", "none", "sum", None):
            raise ConfigError(
                "modpo has no KL in a loss of its own, no advantages to normalise, whole responses and no validation",
                found="kl_in={!r}, normalise={!r}, length={!r}, stop_cv={}".format(*plain),
                remedy="leave these fields out",
            )

    @classmethod
    def like(cls, learner: Any, **fields: Any) -> Modpo:
        """With the shape, budget and optimiser of another learner; an exact one counts as a batch of samples per step."""
        same = {f.name: getattr(learner, f.name) for f in dataclasses.fields(cls) if hasattr(learner, f.name)}
        same |= {"kl_in": "reward", "kl_estimator": "k1", "normalise": "none", "length": "sum", "stop_cv": None}
        if not isinstance(learner, PolicyGradient):
            default = cls()
            same |= {"samples": default.batch * learner.steps, "lr": default.lr, "momentum": default.momentum}
        return cls(**{**same, **fields})

    def train(self, spec, task, work, *, parents=None, progress=None):
        self._check_compared(spec, task)
        return super().train(spec, task, work, parents=parents, progress=progress)

    def _check_compared(self, spec: TrainSpec, task: Task) -> None:
        given = (spec.scalariser["name"], spec.aggregation["name"], spec.weighting["name"])
        if given != ("linear", "learner", "fixed"):
            raise ConfigError(
                "modpo weighs the objectives with the preference itself",
                found="scalariser {}, aggregation {}, weighting {}".format(*given),
                remedy='leave these fields out, or use learner "pg"',
            )
        if self.labelled is not None:
            names, w_M = task.objectives.names, spec.preference
            if not 0 <= self.labelled < len(names):
                raise ConfigError(
                    "the labelled objective is one of the task's, counted from 0",
                    found=f"labelled={self.labelled} of {len(names)}",
                    remedy="leave it out: the largest weight's is taken",
                )
            if w_M is None or w_M[self.labelled] == 0:
                raise ConfigError(
                    "modpo divides by the weight of the labelled objective, which must be above 0",
                    found=f"{names[self.labelled]} with {'sampled preferences' if w_M is None else 'weight 0'}",
                    remedy="leave `labelled` out: the largest weight's is taken",
                )

    def collect(self, policy: Policy, task: Task, spec: TrainSpec, step: int, state: State | None = None) -> Pairs:
        """Pairs of the reference's responses; `kl_N` has the mean KL(reference || policy), the direction that can be seen offline."""
        made = self.drawn(policy, task, spec, step)
        with torch.no_grad():
            logp_NT = self._logp(policy, made, slice(0, self.batch), gates_NK=made.gates_NK)
        reference_NT = made.logp_NT.float()
        kl_N = ((reference_NT - logp_NT) * made.mask_NT).sum(1).double().cpu().numpy()
        sides = (torch.from_numpy(np.array(x)).float().to(policy.device) for x in self.compared(made, spec, step))
        return Pairs(made, reference_NT, kl_N, made.w_NM, np.zeros(len(kl_N)), state or {}, *sides)

    def drawn(self, policy: Policy, task: Task, spec: TrainSpec, step: int) -> Responses:
        """The reference's responses of one step, scored; they do not depend on the policy."""
        count = self.batch // self.group
        return draw(
            policy, task, spec, step=step, first=step * count, prompts=count, group=self.group, temperature=self.temperature, reference=True
        )

    def compared(self, made: Responses, spec: TrainSpec, step: int) -> tuple[np.ndarray, ...]:
        """Margin, weight, wins and known of all pairs, (P, pairs of a group) each; see `Pairs`."""
        group = self.group
        w_PM = made.w_NM[::group]
        first, second = np.triu_indices(group, 1)
        rewards_PGM = made.rewards_NM.reshape(len(w_PM), group, -1)
        apart = rewards_PGM[:, first] - rewards_PGM[:, second]
        known = ~np.isnan(apart).any(-1)
        apart = np.where(known[..., None], apart, 0.0)
        is_largest_PM = w_PM > w_PM.max(1, keepdims=True) - 1e-9
        k_P = np.where(is_largest_PM, (apart**2).sum(1), -1.0).argmax(1)  # at a tie not the first: objectives have no order
        if self.labelled is not None:
            k_P = np.full(len(w_PM), self.labelled)
        is_k_PM = np.eye(w_PM.shape[1])[k_P]
        label, margin = (apart * is_k_PM[:, None]).sum(-1), (apart * (w_PM * (1 - is_k_PM))[:, None]).sum(-1)
        wins = expit(label)
        if self.labels == "drawn":
            wins = (generator(spec.seed, "labels", step).random(wins.shape) < wins).astype(float)
        elif self.labels == "hard":
            wins = (np.sign(label) + 1) / 2  # a tie is half a win
        weight = np.broadcast_to((w_PM * is_k_PM).sum(1)[:, None], wins.shape)
        return margin, weight, wins, known

    def gradient(self, policy: Policy, batch: Batch, *, beta: float) -> float:
        """Add the gradient of the mean loss of the pairs, group by group; returns the loss."""
        assert isinstance(batch, Pairs)
        made, group, n = batch.responses, self.group, len(batch.kl_N)
        first, second = torch.triu_indices(group, group, 1)
        size = max(group, (self.micro_batch or n) // group * group)
        total = 0.0
        for start in range(0, n, size):
            rows = slice(start, min(n, start + size))
            logp_NT = self._logp(policy, made, rows, gates_NK=made.gates_NK[rows])
            change_N = ((logp_NT - batch.reference_logp_NT[rows]) * made.mask_NT[rows]).sum(1)
            ratio_PG = change_N.view(-1, group)
            prompts = slice(rows.start // group, rows.stop // group)
            loss = modpo_loss(
                ratio_PG[:, first] - ratio_PG[:, second], batch.margin[prompts], batch.weight[prompts], batch.wins[prompts], beta=beta
            )
            mean = (loss * batch.known[prompts]).sum() / batch.known.sum().clamp(min=1)
            mean.backward()
            total += float(mean.detach())
        return total
