"""Multi-objective DPO: a policy learns from pairs of the reference's responses, compared by one objective, with margins for the others.

The optimum of J_w has beta log(pi / pi_ref) = w . r + constant, so r_1 = (beta log(pi / pi_ref) - w_2: . r_2:) / w_1 + constant: a policy
is a reward model of its objective number 1, and is fitted as one, on comparisons. Nothing is drawn from the policy while it learns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor
from torch.nn import functional

from paretune.errors import ConfigError
from paretune.policy.base import Policy
from paretune.registry import LEARNERS
from paretune.seeds import generator
from paretune.tasks.base import Task
from paretune.training.batch import Responses
from paretune.training.combine import Combine
from paretune.training.learners.base import draw_step
from paretune.training.learners.embedded import Batch, EmbeddedLearner
from paretune.training.spec import TrainSpec
from paretune.training.weightings.base import State
from paretune.types import Natural

__all__ = ["LACKS", "Modpo", "Pairs", "check_labeled", "compared", "modpo_loss"]


def modpo_loss(ratio: Tensor, margin: Tensor, weight: Tensor, wins: Tensor, *, beta: float) -> Tensor:
    """The loss of each pair: -log sigmoid((beta * ratio - margin) / weight) where the first response wins, of its negative where not.

    Of the first response minus the second: `ratio` is the difference of log pi - log pi_ref, `margin` that of the weighted rewards of
    all objectives but the labeled one, whose weight is `weight`. `wins` is 1 where the first is preferred, 0 where the second is,
    or the chance of it.
    Source: MODPO (2310.03708); DPO (2305.18290) where the weight is 1 and there is no margin. Differs: a label may be a chance.
    Hides: below a small `weight` the loss is steep, and all of it is the margin's.
    """
    reward = (beta * ratio - margin) / weight
    return -(wins * functional.logsigmoid(reward) + (1 - wins) * functional.logsigmoid(-reward))


Labels = Literal["expected", "drawn", "hard"]


def check_labeled(labeled: int | None, spec: TrainSpec, names: Sequence[str]) -> None:
    """ConfigError where pairs cannot be compared by the objective number `labeled`."""
    if labeled is None:
        return
    if not 0 <= labeled < len(names):
        raise ConfigError(
            "the labeled objective is one of the task's, counted from 0",
            found=f"labeled={labeled} of {len(names)}",
            remedy="leave it out: the largest weight's is taken",
        )
    if spec.preference is None or spec.preference[labeled] == 0:
        raise ConfigError(
            "modpo divides by the weight of the labeled objective, which must be above 0",
            found=f"{names[labeled]} with {'sampled preferences' if spec.preference is None else 'weight 0'}",
            remedy="leave `labeled` out: the largest weight's is taken",
        )


def compared(
    made: Responses, spec: TrainSpec, step: int, *, group: int, labeled: int | None, labels: Labels
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Margin, weight, wins and known of all pairs, (P, pairs of a group) each; see `Pairs`."""
    w_PM = made.w_NM[::group]
    first, second = np.triu_indices(group, 1)
    rewards_PGM = made.rewards_NM.reshape(len(w_PM), group, -1)
    apart = rewards_PGM[:, first] - rewards_PGM[:, second]
    known = ~(np.isnan(apart) & (w_PM > 0)[:, None]).any(-1)  # what has no weight need not be scored
    apart = np.where(known[..., None], np.nan_to_num(apart, nan=0.0), 0.0)
    is_largest_PM = w_PM > w_PM.max(1, keepdims=True) - 1e-9
    k_P = np.where(is_largest_PM, (apart**2).sum(1), -1.0).argmax(1)  # at a tie not the first: objectives have no order
    if labeled is not None:
        k_P = np.full(len(w_PM), labeled)
    is_k_PM = np.eye(w_PM.shape[1])[k_P]
    label, margin = (apart * is_k_PM[:, None]).sum(-1), (apart * (w_PM * (1 - is_k_PM))[:, None]).sum(-1)
    wins = expit(label)
    if labels == "drawn":
        wins = (generator(spec.seed, "labels", step).random(wins.shape) < wins).astype(float)
    elif labels == "hard":
        wins = (np.sign(label) + 1) / 2  # a tie is half a win
    weight = np.broadcast_to((w_PM * is_k_PM).sum(1)[:, None], wins.shape)
    return margin, weight, wins, known


_PLAIN = "modpo has no KL in a loss of its own, no advantages to normalize, and whole responses"
_LEAVE = "leave these fields out: it trains as kl_in='reward', normalize='none', and length='sum' say"
LACKS = dict.fromkeys(("kl_in", "kl_estimator", "normalize", "length"), (_PLAIN, _LEAVE))


@dataclass(frozen=True)
class Pairs(Batch):
    """Responses of the reference, all pairs within a group compared: tensors (P, pairs of a group), see `modpo_loss`."""

    margin: Tensor
    weight: Tensor
    wins: Tensor
    known: Tensor  # 1 where both responses were scored, else 0


@LEARNERS.register("modpo", version=5)
@dataclass(frozen=True, kw_only=True)
class Modpo(EmbeddedLearner):
    """MODPO on pairs that are built from the task: `samples` responses of the reference, `group` to a prompt, all pairs of a group.

    labeled: the objective by which pairs are compared; None is the one with the largest weight, so that w_1 is at least 1 / M, and of
        several such the one whose rewards differ most between a prompt's responses.
    labels: the first of two responses wins with the chance sigmoid(r_1 - r_1'), as the Bradley-Terry model of the loss has it.
    "expected" puts that chance into the loss, "drawn" draws the winner, "hard" takes the one with the larger reward.

    Source: MODPO (2310.03708), the loss.
    Differs: pairs come from the task's rewards instead of people, margins from the rewards instead of learned reward models; the
        source's labeled objective is fixed, so that its loss has no value where that weight is 0. beta is the task's.
    Hides: it sees only what the reference says, so what the reference hardly ever says is not learned. With "hard" labels the larger
        reward wins however close the two are: the optimum is then not that of J_w, and without an early end KL grows.
    """

    lacks: ClassVar[Mapping[str, tuple[str, str]]] = LACKS
    on_policy: ClassVar[bool] = False

    labeled: Natural | None = None
    labels: Labels = "expected"

    def accept(self, spec: TrainSpec) -> None:
        Combine.of(spec).check(sampled=spec.preference is None, offline="modpo")

    def train(self, spec, task, work, *, parents=None, progress=None):
        check_labeled(self.labeled, spec, task.objectives.names)
        return super().train(spec, task, work, parents=parents, progress=progress)

    def collect(self, policy: Policy, task: Task, spec: TrainSpec, step: int, state: State | None = None) -> Pairs:
        """Pairs of the reference's responses; `kl_N` has the mean KL(reference || policy), the direction that can be seen offline."""
        made = draw_step(self, policy, task, spec, step, reference=True)
        logp_NT = self.reference_logp(policy, made, gates_NK=made.gates_NK)
        reference_NT = made.logp_NT.float()
        kl_N = ((reference_NT - logp_NT) * made.mask_NT).sum(1).double().cpu().numpy()
        sides = compared(made, spec, step, group=self.group, labeled=self.labeled, labels=self.labels)
        tensors = (torch.from_numpy(np.array(x)).float().to(policy.device) for x in sides)
        return Pairs(made, reference_NT, kl_N, made.w_NM, np.zeros(len(kl_N)), state or {}, *tensors)

    def passes(self, made: Responses) -> list[slice]:
        """Whole groups, so that no pair is torn."""
        return made.passes(rows=self.micro_batch, tokens=self.micro_tokens, group=self.group, whole=True)

    def loss(self, policy: Policy, batch: Batch, rows: slice, *, beta: float) -> Tensor:
        """The mean over all known pairs of the batch of `modpo_loss`, the part of these rows."""
        assert isinstance(batch, Pairs)
        made, group = batch.responses, self.group
        first, second = torch.triu_indices(group, group, 1, device=policy.device)
        logp_NT = self.logp(policy, made, rows, gates_NK=made.gates_NK[rows])
        ratio_PG = ((logp_NT - batch.reference_logp_NT[rows]) * made.mask_NT[rows]).sum(1).view(-1, group)
        prompts = slice(rows.start // group, rows.stop // group)
        apart = ratio_PG[:, first] - ratio_PG[:, second]
        loss = modpo_loss(apart, batch.margin[prompts], batch.weight[prompts], batch.wins[prompts], beta=beta)
        return (loss * batch.known[prompts]).sum() / batch.known.sum().clamp(min=1)
