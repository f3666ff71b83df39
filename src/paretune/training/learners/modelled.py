"""Training on prompts that nobody scores: a reward model, fitted to responses to the training prompts, gives their rewards.

A policy that is trained on a few prompts learns these prompts. What their scores say of others, a regression knows better, and the policy
learns it where the regression may be asked about as many prompts as there are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from paretune.errors import ConfigError, RewardError
from paretune.files import disk_errors, write_json
from paretune.hub import text_config
from paretune.objectives.base import refuse_unscored
from paretune.policy.base import Policy
from paretune.policy.rollout import encode
from paretune.registry import GIVEN
from paretune.seeds import generator, seed_for
from paretune.tasks.base import Task
from paretune.tasks.exact.task import ExactTask
from paretune.training.batch import draw
from paretune.training.spec import TrainSpec
from paretune.types import Count, Natural, Positive, Prompt

__all__ = ["RewardModel", "Unlabelled"]

AT_ONCE = 2**23  # products of tokens: 64 MiB
FOLDS = 4  # of prompts, by which is measured what a reward model knows of prompts that it was not fitted to
FILE = "reward_model.json"

Scored = tuple[int, np.ndarray, np.ndarray, np.ndarray]
"""Of one prompt, its number: features (R, F) and rewards (R, M) of responses, and the share of each, (R,), which sum to 1."""


class RewardModel:
    """Ridge regression of rewards on hidden states of the reference, by which every token of a response has a worth of its own.

        reward(x, y) = level + sum over tokens t of  state(x, y_<t)' W [y_t]

    The state is what the reference's own head is given before token t, so that W is a head of the same shape for every objective. It is
    fitted as weights of random products of state and token, `features` of them, which span all such heads where these have fewer numbers.

    Source: a linear head on the policy's base (Ziegler et al. 2019, 1909.08593), by random products (Kar and Karnick 2012, 1201.6530).
    Differs: closed form, and only what differs between responses to one prompt is fitted, which is all that a group's baseline leaves.
    Hides: the level of a prompt is not known, so utilities that bend are wrong by it; scores far from what was seen are extrapolated, up to
    the declared ranges.
    """

    def __init__(self, policy: Policy, *, seed: int, features: int = 1024):
        if not policy.splits_head:
            raise ConfigError(
                "a reward model reads the states that the reference's head is given",
                found="a model whose head has adapters, or none of its own",
                remedy="leave the head out of learner.targets, or train without unlabelled prompts",
            )
        config, rng = text_config(policy.model.config), generator(seed, "reward features")
        self._policy, self._count = policy, features
        self._state_HF = torch.from_numpy(rng.normal(0, (config.hidden_size + 1) ** -0.5, (config.hidden_size + 1, features)))
        pieces = [rng.choice([-1, 1], (min(4096, config.vocab_size - v), features)) for v in range(0, config.vocab_size, 4096)]
        self._token_VF = torch.from_numpy(np.concatenate([piece.astype(np.int8) for piece in pieces]))
        self.weights_FM, self.level_M = np.zeros((features, 0)), np.zeros(0)

    def tree_RF(self, task: ExactTask, row: int) -> np.ndarray:
        """(R, F) features of every response to one training prompt of an exact task."""
        inputs, tree = task.inputs("train"), task.tree
        state_IF = self._states(
            inputs.input_ids_PT[row : row + 1],
            inputs.mask_11TT,
            tree.internal,
            position_ids=inputs.position_ids_PT[row : row + 1],
        )[0]
        return tree.response_logp(state_IF.T[:, :, None] * self._token_VF[: tree.alphabet + 1].T[:, None]).T.numpy()  # sums along paths

    def text_NF(self, prompts: Sequence[Prompt], completions: Sequence[str], *, limit: int) -> np.ndarray:
        """(N, F) features of responses as texts; those of fewer than `limit` tokens ended by themselves."""
        policy = self._policy
        ids_NT, mask_NT = encode(policy.tokenizer, prompts, policy.device)
        said = [policy.tokenizer(text, add_special_tokens=False)["input_ids"][:limit] for text in completions]
        said = [row if len(row) == limit else [*row, policy.eos_ids[0]] for row in said]
        length = max(map(len, said))
        tokens_NT = torch.tensor([[*row, *[policy.pad_id] * (length - len(row))] for row in said], device=policy.device)
        real_NT1 = torch.tensor([[[i < len(row)] for i in range(length)] for row in said])
        mask_NT = functional.pad(mask_NT, (0, length - 1), value=1)
        ids_NT, found, step = torch.cat([ids_NT, tokens_NT[:, :-1]], 1), [], max(1, AT_ONCE // (length * self._count))
        for rows in (slice(first, first + step) for first in range(0, len(said), step)):
            state_NTF = self._states(ids_NT[rows], mask_NT[rows], length)
            found.append((state_NTF * self._token_VF[tokens_NT[rows].cpu()] * real_NT1[rows]).sum(1))
        return torch.cat(found).numpy()

    @torch.inference_mode()
    def _states(self, ids_NT: Tensor, mask: Tensor, last: int, **given: Tensor) -> Tensor:
        """(N, last, F) products with the last states of each row, on the CPU."""
        device = self._policy.device
        with self._policy.headless():
            h_NTH = self._policy.forward(
                ids_NT.to(device),
                gates_NK=None,
                attention_mask=mask.to(device),
                last_only=last,
                **{name: value.to(device) for name, value in given.items()},
            )
        return functional.pad(h_NTH.double().cpu(), (0, 1), value=1.0) @ self._state_HF

    def fit(self, scored: Iterable[Scored], *, ridge: float) -> list[float | None]:
        """Fit to scored responses, prompt by prompt; returns the share of each objective's variance that is explained on other prompts.

        None where it never varies, and nothing for a single prompt. RewardError where all responses to each prompt score alike.
        """
        folds: list[list[Any]] = [[0.0, 0.0, 0.0] for _ in range(FOLDS)]
        count, feature_F, reward_M = 0, np.zeros(self._count), np.zeros(0)
        for number, features_RF, rewards_RM, share_R in scored:
            mean_F, mean_M = share_R @ features_RF, share_R @ rewards_RM
            apart_RF, above_RM = features_RF - mean_F, rewards_RM - mean_M
            fold = folds[number % FOLDS]
            fold[0] += apart_RF.T @ (share_R[:, None] * apart_RF)
            fold[1] += apart_RF.T @ (share_R[:, None] * above_RM)
            fold[2] += share_R @ above_RM**2
            count, feature_F, reward_M = count + 1, feature_F + mean_F, reward_M + mean_M if count else mean_M

        def solved(kept: list[list[Any]]) -> np.ndarray:
            gram_FF, with_FM = (sum(fold[i] for fold in kept) for i in (0, 1))
            return np.linalg.solve(gram_FF + ridge * np.trace(gram_FF) / self._count * np.eye(self._count), with_FM)

        folds = [fold for fold in folds if np.any(fold[2])]
        if not folds:
            raise RewardError(
                "a reward model is fitted to responses to one prompt whose scores differ",
                found=f"{count} groups of responses, each with equal scores" if count else "no prompt with two responses that are scored",
                remedy="look at the rewards with `paretune preview`; where they are rare, raise learner.scored",
            )
        self.weights_FM = solved(folds)
        self.level_M = reward_M / count - feature_F / count @ self.weights_FM
        if len(folds) < 2:
            return []
        left_M = np.zeros_like(reward_M)
        for fold in folds:
            others_FM = solved([other for other in folds if other is not fold])
            left_M = left_M + fold[2] - 2 * (others_FM * fold[1]).sum(0) + (others_FM * (fold[0] @ others_FM)).sum(0)
        all_M = sum(fold[2] for fold in folds)
        return [1 - left / whole if whole > 0 else None for left, whole in zip(left_M.tolist(), all_M.tolist(), strict=True)]

    def rewards(self, features_NF: np.ndarray, task: Task) -> np.ndarray:
        """(N, M) scores within the declared ranges."""
        return np.clip(self.level_M + features_NF @ self.weights_FM, task.objectives.low, task.objectives.high)


@dataclass(frozen=True, kw_only=True)
class Unlabelled:
    """Settings of learners that go on at prompts without rewards, scored by a `RewardModel`.

    All training prompts are then scored by the model, those that it was fitted to, too, unless they keep their `own_scores`; prompts for
    validation always do. A training's folder has the model and what it explains in reward_model.json.
    """

    unlabelled: Natural = field(default=0, metadata=GIVEN)  # prompts without rewards, at most, to train on beside the others; 0: none
    ridge: Positive = field(default=0.01, metadata=GIVEN)  # of the reward model, times its features' mean variance
    features: Count = field(default=1024, metadata=GIVEN)  # of the reward model; as many as a head has numbers say all that it can
    own_scores: bool = field(default=False, metadata=GIVEN)  # whether prompts with rewards are scored by these, at a call a response

    def prompts_without(self, task: Task) -> list[Prompt]:
        """As many of the task's prompts without rewards as are asked for; ConfigError where it has none."""
        more = list(task.unlabelled(self.unlabelled))
        if self.unlabelled and not more:
            raise ConfigError(
                "learner.unlabelled asks for prompts without rewards",
                found=f"learner.unlabelled={self.unlabelled}, and none in task {task.registered_name}",
                remedy="name a file of them in prompts: {unlabelled: more.jsonl}, or leave learner.unlabelled out",
            )
        return more

    def trained_on(self, policy: Policy, spec: TrainSpec, task: Task, work: Path) -> tuple[Task, dict[str, int]]:
        """The task with unlabelled prompts and the model's rewards, and what it cost to score responses for it; without, as it is."""
        if not self.unlabelled:
            return task, {}
        more = self.prompts_without(task)
        model, path = RewardModel(policy, seed=spec.seed, features=self.features), work / FILE
        if not path.is_file():
            scored, cost = self._scored(model, policy, spec, task)
            explained = dict(zip(task.objectives.names, model.fit(scored, ridge=self.ridge), strict=False))
            said = {**cost, "unlabelled": len(more), "explained_on_other_prompts": explained}
            with disk_errors(work):
                work.mkdir(parents=True, exist_ok=True)
                write_json(path, {**said, "level_M": model.level_M.tolist(), "weights_FM": model.weights_FM.tolist()})
        known = json.loads(path.read_text(encoding="utf-8"))
        model.level_M, model.weights_FM = np.array(known["level_M"]), np.array(known["weights_FM"])
        cost = {"samples": known["scored"], "tokens": known["tokens"]}
        if isinstance(task, ExactTask):
            return task.retrained(more, _tabulated(model, task.rewards_PRM("train") if self.own_scores else None)), cost
        return _Modelled(task, more, model, own=self.own_scores), cost

    def _scored(self, model: RewardModel, policy: Policy, spec: TrainSpec, task: Task) -> tuple[Iterable[Scored], dict[str, int]]:
        """The responses that the model is fitted to, and what drawing them cost: for learners that enumerate, all of exact tasks."""
        assert isinstance(task, ExactTask)
        shares_PR, rewards_PRM = np.exp(task.reference_logp_PR("train")), task.rewards_PRM("train")
        return ((p, model.tree_RF(task, p), rewards_PRM[p], shares_PR[p]) for p in range(len(shares_PR))), {"scored": 0, "tokens": 0}


def sampled(learner: Any, model: RewardModel, policy: Policy, spec: TrainSpec, task: Task) -> tuple[list[Scored], dict[str, int]]:
    """`learner.scored` responses of the reference to training prompts, batch by batch, with the scores that a learner sees."""
    apart, group, each = replace(spec, seed=seed_for(spec.seed, "scored")), learner.group, learner.batch // learner.group
    numbers = {prompt.digest: number for number, prompt in enumerate(task.prompts("train"))}
    found, unscored_M, tokens = [], np.zeros(task.objectives.count, dtype=int), 0
    for step in range(learner.scored // learner.batch):
        made = draw(policy, task, apart, step=step, first=step * each, prompts=each, group=group, reference=True)
        features_NF = model.text_NF(made.prompts, made.texts, limit=task.max_new_tokens)
        unscored_M, tokens = unscored_M + np.isnan(made.rewards_NM).sum(0), tokens + int(made.mask_NT.sum())
        for start in range(0, learner.batch, group):
            rows = start + np.flatnonzero(~np.isnan(made.rewards_NM[start : start + group]).any(1))
            if len(rows) > 1:
                number = numbers[made.prompts[start].digest]
                found.append((number, features_NF[rows], made.rewards_NM[rows], np.full(len(rows), 1 / len(rows))))
    count = learner.scored // learner.batch * learner.batch
    refuse_unscored(task.objectives.names, unscored_M.tolist(), count, limit=learner.max_unscored)
    return found, {"scored": count, "tokens": tokens}


def _tabulated(model: RewardModel, own_PRM: np.ndarray | None) -> Callable[[ExactTask], np.ndarray]:
    """(P, R, M) the model's rewards of all responses to the training prompts of an exact task, of which the first may have their own."""
    own_PRM = np.empty((0, 0, 0)) if own_PRM is None else own_PRM
    return lambda task: np.stack([*own_PRM, *(model.rewards(model.tree_RF(task, p), task) for p in range(len(own_PRM), task.prompt_count))])


class _Modelled(Task):
    """A task whose training prompts are more, and scored by a reward model; everything else is the task's own."""

    def __init__(self, task: Task, more: Sequence[Prompt], model: RewardModel, *, own: bool = False):
        self._task, self._model = task, model
        self._train = [*task.prompts("train"), *more]
        self._guess = {prompt.digest for prompt in (more if own else self._train)}
        for name in ("objectives", "beta", "max_new_tokens", "guards", "terms", "validation", "score_guards", "base", "prompt_form"):
            if hasattr(task, name):
                setattr(self, name, getattr(task, name))

    def load(self) -> Any:
        return self._task.load()

    def prompts(self, split: str) -> Sequence[Prompt]:
        return self._train if split == "train" else self._task.prompts(split)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        rewards_NM = np.empty((len(completions), self.objectives.count))
        modelled_N = np.array([prompt.digest in self._guess for prompt in prompts], dtype=bool)
        for rows, score in ((np.flatnonzero(modelled_N), self._guessed), (np.flatnonzero(~modelled_N), self._task.score)):
            if len(rows):
                rewards_NM[rows] = score([prompts[i] for i in rows.tolist()], [completions[i] for i in rows.tolist()])
        return rewards_NM

    def _guessed(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        return self._model.rewards(self._model.text_NF(prompts, completions, limit=self.max_new_tokens), self._task)
