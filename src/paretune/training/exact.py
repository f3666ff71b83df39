"""The exact learner: gradient ascent on J_w itself, by enumeration of every response. Exact tasks only.

No sampling noise is left, so what a family of its experts lacks is capacity, optimization or composition, and nothing else.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paretune.errors import ConfigError
from paretune.objectives.utilities import check_scalarizer, scalarize
from paretune.policy.mixing.parameter import ParameterMix
from paretune.registry import LEARNERS
from paretune.tasks.base import Task
from paretune.tasks.exact.optimum import landmarks
from paretune.tasks.exact.task import ExactTask
from paretune.training.advantages import aggregate_advantages
from paretune.training.batch import preferences
from paretune.training.checkpoint import Progress, TrainLog, is_finished, load_checkpoint, save_checkpoint
from paretune.training.cost import Cost, read_cost
from paretune.training.gradients import autograd_jacobian
from paretune.training.learner import Learner, converged, gates_of
from paretune.training.spec import Artifact, TrainSpec
from paretune.training.weightings.base import State, StepContext, check_combination, weighting_of

__all__ = ["Enumerated", "ExactGradient", "aggregated", "enumerated", "enumerated_returns"]


@dataclass
class _Run:
    """What a checkpoint must know beside tensors."""

    key: str
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    log_length: int = 0
    weighting: State | None = None
    validations: list[float] = field(default_factory=list)


@LEARNERS.register("exact")
@dataclass(frozen=True, kw_only=True)
class ExactGradient(Learner):
    """Full-batch ascent on the enumerated J_w: every response to every training prompt, one forward and backward a step.

    Source: the gradient in closed form; the optimizer is Muon (Jordan et al. 2024), as PyTorch ships it.
    Differs: Muon instead of Adam, which needed about twice the steps (development seeds; the log has the figures).
    Hides: a training costs no samples, but every step costs a forward over all prefixes; `tokens` counts them.
    """

    steps: int = 200
    lr: float = 2e-2
    momentum: float = 0.8
    stop_cv: float | None = None  # stop when std / |mean| of the last `stop_window` values of J_w is below
    stop_window: int = 20
    log_every: int = 10
    checkpoint_every: int = 50

    def __post_init__(self):
        if min(self.steps, self.stop_window, self.log_every, self.checkpoint_every) < 1 or self.lr <= 0:
            raise ConfigError(
                "steps, stop_window, log_every and checkpoint_every are at least 1 and lr is positive",
                found=f"steps={self.steps}, stop_window={self.stop_window}, lr={self.lr}",
                remedy="`paretune show exact` prints the defaults",
            )

    def scaled(self, effort: float) -> ExactGradient:
        return dataclasses.replace(self, steps=max(1, round(self.steps * effort)))

    def train(
        self,
        spec: TrainSpec,
        task: Task,
        work: Path,
        *,
        parents: Mapping[str, Artifact] | None = None,
        progress: Progress | None = None,
    ) -> Cost:
        if not isinstance(task, ExactTask):
            raise ConfigError(
                "the exact learner enumerates every response",
                found=f"task {task.registered_name}",
                remedy='use an exact task, or learner "pg"',
            )
        if is_finished(work):  # by a process that was killed before it could publish
            return read_cost(work)
        _check(spec)
        policy = self.start(spec, task, parents or {})
        weights = policy.parameters()
        optimizer = torch.optim.Muon(weights, lr=self.lr, weight_decay=0.0, momentum=self.momentum)
        run = _Run(**(load_checkpoint(work, spec.key, weights, optimizer) or {"key": spec.key}))
        began, per_step = time.monotonic() - run.seconds, task.inputs("train").input_ids_PT.numel()
        with TrainLog(work / "train.jsonl", length=run.log_length, began=began, tokens=run.tokens, progress=progress) as log:
            while run.step < self.steps and not converged(run.validations, self.stop_window, self.stop_cv):
                value, rewards_M, kl, run.weighting = self.update(policy, optimizer, task, spec, run.step, run.weighting)
                run.step, run.tokens = run.step + 1, run.tokens + per_step
                run.validations = [*run.validations, value][-self.stop_window :]
                last = run.step == self.steps or converged(run.validations, self.stop_window, self.stop_cv)
                if last or run.step % self.log_every == 0:
                    rewards = dict(zip(task.objectives.names, rewards_M.tolist(), strict=True))
                    record = {"step": run.step, "samples": 0, "tokens": run.tokens, "value": value, "rewards": rewards, "kl": kl}
                    log.write(record, steps=self.steps)
                if last or run.step % self.checkpoint_every == 0:
                    run.seconds, run.log_length = log.seconds, log.length
                    save_checkpoint(work, run.step, weights, optimizer, dataclasses.asdict(run))
        size = sum(p.numel() for p in policy.model.parameters())
        cost = Cost(tokens=run.tokens, steps=run.step, flops=6.0 * size * run.tokens, seconds=run.seconds)
        return self.finish(spec, policy, work, cost)

    def update(
        self,
        policy: ParameterMix,
        optimizer: torch.optim.Optimizer,
        task: ExactTask,
        spec: TrainSpec,
        step: int,
        state: State | None = None,
    ) -> tuple[float, np.ndarray, float, State]:
        """One step up; returns J_w, the expected rewards (M,) and the KL in nats before it, means, and the weighting's state."""
        for group in optimizer.param_groups:
            group["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        w_PM = preferences(spec, step, task.prompt_count, task.objectives.count)
        gates_PK = torch.from_numpy(gates_of(spec, w_PM, policy.K)).float().to(policy.device)
        all_of = enumerated(policy, task, gates_PK)
        reward_PM, kl_P = all_of.rewards_PM, all_of.kl_P
        return_PM = reward_PM - task.beta * kl_P[:, None]
        weighting, parameters = weighting_of(spec), policy.parameters()
        jacobian = autograd_jacobian(return_PM.mean(0), parameters) if weighting.needs_gramian else None
        seen = StepContext(
            step=step,
            steps=self.steps,
            w_NM=w_PM,
            returns_NM=return_PM.detach().cpu().numpy(),
            covariance_MM=all_of.covariance_MM,
            prompts=task.prompts("train"),
            low_M=np.array(task.objectives.low),
            high_M=np.array(task.objectives.high),
            exact=True,
            landmarks=landmarks(task),
            seed=spec.seed,
            gramian_MM=None if jacobian is None else jacobian.gramian_MM,
        )
        weights_PM, state = weighting.weights(weighting.start(task.objectives.count) if state is None else state, seen)
        utility = (torch.from_numpy(weights_PM).to(return_PM) * return_PM).sum(1).mean()
        if spec.scalarizer["name"] != "linear":
            scores_PR = torch.from_numpy(_scores(task, spec.scalarizer, w_PM)).to(all_of.p_PR)
            utility = ((all_of.p_PR * scores_PR).sum(1) - task.beta * kl_P).mean()
        optimizer.zero_grad(set_to_none=True)
        if jacobian is not None:
            jacobian.descend(parameters, weights_PM[0])
        else:
            climbed = aggregated(all_of, spec, weights_PM, beta=task.beta) if spec.aggregation["name"] != "learner" else utility
            (-climbed).backward()
        optimizer.step()
        return utility.item(), reward_PM.detach().mean(0).cpu().numpy(), kl_P.detach().mean().item(), state


def _check(spec: TrainSpec) -> None:
    check_scalarizer(spec.scalarizer)
    check_combination(spec)
    if weighting_of(spec).registered_name != "fixed" and spec.scalarizer["name"] != "linear":
        raise ConfigError(
            "the exact learner weighs a scalarizer other than linear with the preference itself",
            found=f"scalarizer {spec.scalarizer['name']} with the weighting {spec.weighting['name']}",
            remedy='use the weighting "fixed", or the scalarizer "linear"',
        )


def _scores(task: ExactTask, scalarizer: Mapping[str, Any], w_PM: np.ndarray) -> np.ndarray:
    """(P, R) what every response to every training prompt is worth to a scalarizer."""
    rewards_PRM = task.rewards_PRM("train")
    low_M, high_M = np.array(task.objectives.low), np.array(task.objectives.high)
    w_NM = w_PM.repeat(rewards_PRM.shape[1], axis=0)
    return scalarize(rewards_PRM.reshape(len(w_NM), -1), w_NM, scalarizer, low_M=low_M, high_M=high_M).reshape(rewards_PRM.shape[:2])


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
        centred_PRM = self.rewards_PRM - mean_PM[:, None]
        return (torch.einsum("pr,prj,prk->jk", p_PR, centred_PRM, centred_PRM) / len(p_PR)).cpu().numpy()


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


def aggregated(found: Enumerated, spec: TrainSpec, weights_PM: np.ndarray, *, beta: float) -> Tensor:
    """A number whose gradient is the expected policy gradient under the training's aggregation, for groups without end."""
    with torch.no_grad():
        returns_PRM = found.rewards_PRM - beta * (found.logp_PR - found.reference_PR)[:, :, None]
    p, r, m = returns_PRM.shape
    weights_NM = np.repeat(weights_PM, r, axis=0)
    mass_N = found.p_PR.detach().reshape(-1).cpu().numpy()
    advantage_N = aggregate_advantages(spec.aggregation, returns_PRM.reshape(-1, m).cpu().numpy(), weights_NM, group=r, mass_N=mass_N)
    advantage_PR = torch.from_numpy(advantage_N.reshape(p, r)).to(found.logp_PR)
    return (found.p_PR.detach() * advantage_PR * found.logp_PR).sum(1).mean()
