"""Looks at prompts that are set apart: what a policy is worth there, which policy is the best so far, and what its guards have lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from paretune.objectives.base import refuse_unscored
from paretune.policy.base import Policy
from paretune.seeds import seed_for
from paretune.tasks.base import Task
from paretune.tasks.exact.optimum import landmarks
from paretune.training.batch import Responses, cut_off, draw, in_shares
from paretune.training.loop.run import Run
from paretune.training.loop.watch import as_record, guard_slack, guarded, named_means
from paretune.training.spec import TrainSpec

__all__ = ["charge", "look", "respond"]

SHOWN = 4  # prompts, where a learner does not say how many


def look(learner: Any, policy: Policy, task: Task, spec: TrainSpec, run: Run) -> None:
    """Measure the policy of an `EmbeddedLearner` on the task's validation prompts: always the same ones, preferences and random numbers.

    Kept in `run`: utility, which is the mean combined reward less what the KL costs; rewards, guards and the share of answers that were
    cut; what the guards lost against the untrained model, with its standard error; the weights, where they are the best so far. That is
    the highest utility where no guard lost more than `guard_drop`, at 95 % confidence; where none holds, the least loss. A constraint
    comes next: the least `violation`, before utility. A training that climbs a utility of returns is worth that utility, whether the
    task's terms or the method asked for it. Nothing is done where the task has no such prompts.
    """
    known = task.validation()
    if not known:
        return
    apart = dataclasses.replace(spec, seed=seed_for(spec.seed, "validation prompts"))
    prompts = min(len(known), learner.look_samples)
    group = min(learner.batch, learner.look_samples // prompts)
    total = prompts * max(1, learner.look_samples // (group * prompts))  # few prompts come again, under other random numbers
    at_once = max(1, learner.batch // group)  # prompts, so that a look needs no more memory than a batch

    def drawn(**more: Any) -> Iterator[Responses]:
        for first in range(0, total, at_once):
            shape = {"prompts": min(at_once, total - first), "group": group, "temperature": learner.temperature}
            made = draw(policy, task, apart, step=first, first=first, known=known, by=learner.draws(spec), **shape, **more)
            charge(run, made)
            run.flops += 4 * policy.model.num_parameters() * (made.prompt_ids_PT.numel() + made.tokens_NT.numel())
            yield made

    if task.guards is not None and not run.looks and (spec.frozen_adapters or spec.init_from):
        for made in drawn(reference=True, scored=False):  # a bridge begins as the soup, which may have lost some of its guards
            run.first_guards += as_record(in_shares(made, task.score_guards))
    parts, prompt_N = [], list[str]()
    for made in drawn():
        prompt_N += [prompt.digest for prompt in made.prompts]
        parts.append(_measured(learner, policy, task, made, group))
    run.evaluations += 1
    rewards_NM, w_NM, kl_N, cut_N, guards_NG = (np.concatenate(column) for column in zip(*parts, strict=True))
    refuse_unscored(task.objectives.names, np.isnan(rewards_NM).sum(0), len(kl_N), limit=learner.max_unscored)
    combine = learner.combine(spec)
    reward = combine.mean_score(rewards_NM, w_NM, task.objectives)
    found: dict[str, Any] = {"step": run.step, "utility": reward - task.beta * float(kl_N.mean()), "kl": float(kl_N.mean())}
    found |= {"cut": float(cut_N.mean()), "rewards": named_means(task.objectives, rewards_NM)}
    if task.guards is not None:  # what is not scored is no guard: the change of a policy that it cannot score is unknown
        refuse_unscored(task.guards.names, np.isnan(guards_NG).sum(0), len(kl_N), limit=learner.max_unscored)
        found |= guarded(task.guards, guards_NG, run.first_guards, prompt_N)
    found |= {} if combine.weighting_rule.arrived(run.step, learner.steps) else {"moving": True}
    if spec.preference is not None and combine.weighting_rule.of_returns:  # what is to be kept, or come near to
        marks = landmarks(task) if task.is_exact else None
        found |= combine.measures(run.weighting, rewards_NM - task.beta * kl_N[:, None], w_NM[0], task.objectives, marks)
    run.looks.append(found)

    def worth(seen: dict[str, Any]) -> tuple[float, float, float]:
        return min(0.0, guard_slack(seen, task.guards, learner.guard_drop)), -seen.get("violation", 0.0), seen["utility"]

    if run.best is None or worth(found) >= worth(run.looks[run.best]):
        run.best = len(run.looks) - 1
        run.kept = [weight.detach().clone() for weight in policy.parameters()] if learner.keep == "best" else None


def respond(learner: Any, policy: Policy, task: Task, spec: TrainSpec, run: Run) -> None:
    """Keep in `run`, for the log, what the policy answers to a few fixed prompts, where it is time to: from the begin to the end.

    These are prompts set apart for validation, or else training prompts; always the same, with the same random numbers and preferences,
    so that what differs is the policy. They are neither scored nor charged: nothing is learned from them, and a judge costs money.
    """
    count = (0 if task.is_exact else SHOWN) if learner.log_samples is None else min(learner.log_samples, learner.batch)
    every = learner.log_samples_every or max(10, learner.steps // 10)
    if not count or not (run.step % every == 0 or learner.finished(run)):
        return
    known = task.validation() or task.prompts("train")
    count = min(count, len(known))
    apart = dataclasses.replace(spec, seed=seed_for(spec.seed, "logged responses"))
    shape: dict[str, Any] = {"prompts": count, "group": 1, "temperature": learner.temperature, "known": known}
    made = draw(policy, task, apart, step=0, first=0, scored=False, by=learner.draws(spec), **shape)
    rows = zip(made.prompts, made.texts, made.w_NM.tolist(), strict=True)
    answers = [{"prompt": prompt.raw, "response": text, "preference": w_M} for prompt, text, w_M in rows]
    run.responses.append({"step": run.step, "answers": answers})


def charge(run: Run, made: Responses) -> None:
    """Charge the responses of a validation to the run."""
    run.validation_samples += len(made.w_NM)
    run.tokens += int(made.mask_NT.sum())


def _measured(learner: Any, policy: Policy, task: Task, made: Responses, group: int) -> tuple[np.ndarray, ...]:
    """Of each response: rewards (N, M), preference (N, M), KL (N,) in nats, whether it was cut off (N,), guards (N, G)."""
    kl_N = made.kl_N(learner.reference_logp(policy, made, group=group))
    return made.rewards_NM, made.w_NM, kl_N, cut_off(policy, made, task.max_new_tokens), in_shares(made, task.score_guards)
