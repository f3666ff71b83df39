"""The exact learner: gradient ascent on J_w itself, by enumeration of every response. Exact tasks only.

No sampling noise is left, so what a family of its experts lacks is capacity, optimization or composition, and nothing else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paretune.errors import ConfigError
from paretune.policy.mixing.parameter import ParameterMix
from paretune.registry import GIVEN, LEARNERS
from paretune.tasks.exact.optimum import landmarks
from paretune.tasks.exact.task import ExactTask
from paretune.training.batch import preferences
from paretune.training.combine import Combine
from paretune.training.cost import Cost
from paretune.training.learners.base import Learner, StoppingRule, annealed
from paretune.training.learners.jacobian import autograd_jacobian
from paretune.training.learners.modelled import Unlabelled
from paretune.training.loop.run import Run, not_finite, run_loop
from paretune.training.spec import TrainSpec, gates_of
from paretune.training.weightings.base import State
from paretune.types import Count, Fraction, Positive

__all__ = ["Enumerated", "ExactGradient", "aggregated", "enumerated", "enumerated_returns"]


@LEARNERS.register("exact", version=2)
@dataclass(frozen=True, kw_only=True)
class ExactGradient(Unlabelled, StoppingRule, Learner):
    """Full-batch ascent on the enumerated J_w: every response to every training prompt, one forward and backward a step.

    Source: the gradient in closed form; the optimizer is Muon (Jordan et al. 2024), as PyTorch ships it.
    Differs: Muon instead of Adam, which needed about twice the steps (development seeds; the log has the figures).
    Hides: a training costs no samples, but every step costs a forward over all prefixes; `tokens` counts them.
    """

    steps: int = 200
    lr: float = 2e-2
    momentum: Fraction = 0.8
    anneal: Positive = field(default=1.0, metadata=GIVEN)  # times its own price is that of KL at first, see `annealed`
    validate_every: Count = 3  # so that a window is about as large a part of the default budget as the sampled learner's
    log_every: int = 10
    checkpoint_every: int = 50

    def __post_init__(self):
        at_least_1 = ("steps", "stop_window", "validate_every", "log_every", "checkpoint_every")
        if min(getattr(self, name) for name in at_least_1) < 1 or self.lr <= 0:
            raise ConfigError(
                "steps, stop_window, validate_every, log_every and checkpoint_every are at least 1 and lr is positive",
                found=", ".join(f"{name}={getattr(self, name)}" for name in (*at_least_1, "lr")),
                remedy="`paretune show exact` prints the defaults",
            )
        if self.dtype == "float16":
            raise ConfigError(
                "the exact gradient needs more range than float16 has: a probability's part of it is as small as the probability",
                found="dtype=float16",
                remedy="leave dtype out, or set bfloat16",
            )
        if self.own_scores and not self.unlabelled:
            raise ConfigError(
                "own_scores are of trainings with unlabelled prompts", found="own_scores=True, unlabelled=0", remedy="leave own_scores out"
            )

    def scaled(self, effort: float) -> ExactGradient:
        return dataclasses.replace(self, steps=max(1, round(self.steps * effort)))

    def accept(self, spec: TrainSpec) -> None:
        Combine.of(spec).check(sampled=spec.preference is None, enumerated=True)

    def train(self, spec, task, work, *, parents=None, progress=None) -> Cost:
        if not isinstance(task, ExactTask):
            raise ConfigError(
                "the exact learner enumerates every response",
                found=f"task {task.registered_name}",
                remedy='use an exact task, or learner "pg"',
            )
        return run_loop(self, spec, task, work, parents, progress)

    def new_optimizer(self, weights: Sequence[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Muon(weights, lr=self.lr, weight_decay=0.0, momentum=self.momentum)

    def finished(self, run: Run) -> bool:
        return run.step >= self.steps or run.converged

    def advance(self, policy: ParameterMix, optimizer: torch.optim.Optimizer, task: ExactTask, spec: TrainSpec, run: Run) -> dict[str, Any]:
        told: dict[str, Any] = {}
        value, rewards_M, kl, run.weighting = self.update(policy, optimizer, task, spec, run.step, run.weighting, told=told)
        if not (math.isfinite(value) and math.isfinite(told["gradient_norm"])):
            raise not_finite(f"J_w {value:g}, gradient norm {told['gradient_norm']:g}", run.step, self.lr)
        read, size = task.inputs("train").input_ids_PT.numel(), sum(p.numel() for p in policy.model.parameters())
        run.step, run.updates, run.tokens, run.flops = run.step + 1, run.updates + 1, run.tokens + read, run.flops + 6.0 * size * read
        self.watch(policy, task, spec, run)
        return {"value": value, "rewards": dict(zip(task.objectives.names, rewards_M.tolist(), strict=True)), "kl": kl, **told}

    def record(
        self, task: ExactTask, spec: TrainSpec, run: Run, window: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        record = {"step": run.step, "samples": 0, "tokens": run.tokens, **window[-1]}
        return record | ({"validation": run.validations[-1]} if run.validations else {})

    def validate(self, policy: ParameterMix, task: ExactTask, spec: TrainSpec, run: Run) -> float:
        """By enumeration."""
        w_PM = preferences(spec, run.step, task.prompt_count, task.objectives.count)
        with torch.no_grad():
            found = enumerated(policy, task, torch.from_numpy(gates_of(spec, w_PM, policy.K)).float().to(policy.device))
        run.evaluations += 1
        run.tokens += task.inputs("train").input_ids_PT.numel()
        return float((found.p_PR * _scores_PR(Combine.of(spec), found, w_PM, task)).sum(1).mean())

    def update(
        self,
        policy: ParameterMix,
        optimizer: torch.optim.Optimizer,
        task: ExactTask,
        spec: TrainSpec,
        step: int,
        state: State | None = None,
        *,
        told: dict[str, Any] | None = None,
    ) -> tuple[float, np.ndarray, float, State]:
        """One step up; returns J_w, the expected rewards (M,) and the KL in nats before it, means, and the weighting's state.

        `told` gets what else the log says of it: all of it exact, entropy in nats per response.
        """
        for group in optimizer.param_groups:
            group["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        w_PM = preferences(spec, step, task.prompt_count, task.objectives.count)
        gates_PK = torch.from_numpy(gates_of(spec, w_PM, policy.K)).float().to(policy.device)
        all_of = enumerated(policy, task, gates_PK)
        reward_PM, kl_P = all_of.rewards_PM, all_of.kl_P
        beta = task.beta * annealed(self.anneal, step / self.steps)
        return_PM = reward_PM - beta * kl_P[:, None]
        combine, parameters = Combine.of(spec), policy.parameters()
        jacobian = autograd_jacobian(return_PM.mean(0), parameters) if combine.needs_gramian else None
        weights_PM, state = combine.weights(
            state,
            task.objectives,
            step=step,
            steps=self.steps,
            w_NM=w_PM,
            returns_NM=return_PM.detach().cpu().numpy(),
            covariance_MM=all_of.covariance_MM,
            prompts=task.prompts("train"),
            exact=True,
            landmarks=landmarks(task),
            seed=spec.seed,
            gramian_MM=None if jacobian is None else jacobian.gramian_MM,
        )
        utility = (torch.from_numpy(weights_PM).to(return_PM) * return_PM).sum(1).mean()
        if not combine.linear:
            utility = ((all_of.p_PR * _scores_PR(combine, all_of, w_PM, task)).sum(1) - beta * kl_P).mean()
        optimizer.zero_grad(set_to_none=True)
        if jacobian is not None:
            jacobian.descend(parameters, weights_PM[0])
        else:
            (-(aggregated(all_of, combine, weights_PM, task, beta) if combine.aggregates else utility)).backward()
        if told is not None:
            spread_M = np.sqrt(np.maximum(np.diagonal(all_of.covariance_MM), 0.0)).tolist()
            told |= {"spread": dict(zip(task.objectives.names, spread_M, strict=True)), "kl_max": kl_P.detach().max().item()}
            told["entropy"] = -(all_of.p_PR * all_of.logp_PR).detach().sum(1).mean().item()
            told["gradient_norm"] = float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
            told["lr"] = optimizer.param_groups[0]["lr"]
            if weights := combine.told(weights_PM, task.objectives):
                told["weights"] = {name.removeprefix("weights/"): value for name, value in weights.items()}
        optimizer.step()
        return utility.item(), reward_PM.detach().mean(0).cpu().numpy(), kl_P.detach().mean().item(), state


@dataclass(frozen=True)
class Enumerated:
    """Every response to every prompt, float64: log-probabilities with gradient, under the policy and the reference, and rewards."""

    logp_PR: Tensor
    reference_PR: Tensor
    rewards_PRM: Tensor

    @cached_property
    def p_PR(self) -> Tensor:
        return self.logp_PR.exp()

    @cached_property
    def rewards_PM(self) -> Tensor:
        return torch.einsum("pr,prm->pm", self.p_PR, self.rewards_PRM)

    @cached_property
    def kl_P(self) -> Tensor:
        return (self.p_PR * (self.logp_PR - self.reference_PR)).sum(1)

    @property
    def covariance_MM(self) -> np.ndarray:
        p_PR, mean_PM = self.p_PR.detach(), self.rewards_PM.detach()
        centered_PRM = self.rewards_PRM - mean_PM[:, None]
        return (torch.einsum("pr,prj,prk->jk", p_PR, centered_PRM, centered_PRM) / len(p_PR)).cpu().numpy()


def _scores_PR(combine: Combine, found: Enumerated, w_PM: np.ndarray, task: ExactTask) -> Tensor:
    """The scalarizer's number for every response."""
    p, r, m = found.rewards_PRM.shape
    scores_N = combine.scores(found.rewards_PRM.reshape(-1, m).cpu().numpy(), w_PM.repeat(r, axis=0), task.objectives)
    return torch.from_numpy(scores_N.reshape(p, r)).to(found.p_PR)


def enumerated(policy: ParameterMix, task: ExactTask, gates_PK: Tensor, split: str = "train") -> Enumerated:
    """What the policy does with every response, in one forward."""

    def forward(ids_PT: Tensor, mask_11TT: Tensor, positions_PT: Tensor) -> Tensor:
        ids_PT, mask_11TT, positions_PT = (x.to(policy.device) for x in (ids_PT, mask_11TT, positions_PT))
        return policy.forward(ids_PT, attention_mask=mask_11TT, position_ids=positions_PT, gates_NK=gates_PK)

    logp_PR = task.logp_PR(forward, split)
    reference_PR = torch.from_numpy(task.reference_logp_PR(split)).to(logp_PR)
    return Enumerated(logp_PR, reference_PR, torch.from_numpy(task.rewards_PRM(split)).to(logp_PR))


def enumerated_returns(policy: ParameterMix, task: ExactTask, gates_PK: Tensor, split: str = "train") -> tuple[Tensor, Tensor, np.ndarray]:
    """Expected rewards (P, M) and KL to the reference (P,) in nats, exact, float64, with gradient; covariance of the rewards (M, M)."""
    found = enumerated(policy, task, gates_PK, split)
    return found.rewards_PM, found.kl_P, found.covariance_MM


def aggregated(found: Enumerated, combine: Combine, weights_PM: np.ndarray, task: ExactTask, beta: float) -> Tensor:
    """A number whose gradient is the expected policy gradient under the training's aggregation, for groups without end."""
    with torch.no_grad():
        returns_PRM = found.rewards_PRM - beta * (found.logp_PR - found.reference_PR)[:, :, None]
    p, r, m = returns_PRM.shape
    returns_NM, weights_NM = returns_PRM.reshape(-1, m).cpu().numpy(), np.repeat(weights_PM, r, axis=0)
    mass_N = found.p_PR.detach().reshape(-1).cpu().numpy()
    advantage_N = combine.advantages(returns_NM, weights_NM, np.zeros(p * r), task.objectives, group=r, mass_N=mass_N)
    advantage_PR = torch.from_numpy(advantage_N.reshape(p, r)).to(found.logp_PR)
    return (found.p_PR.detach() * advantage_PR * found.logp_PR).sum(1).mean()
