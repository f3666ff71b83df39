"""A reward function for TRL's own trainers that keeps several objectives apart until the last step.

    reward = MultiObjectiveReward([helpful, brief], (0.7, 0.3), group=8, scalarize_at="advantage", normalize="group")
    trainer = GRPOTrainer(model, reward_funcs=[reward], args=GRPOConfig(..., **reward.settings()), ...)

TRL asks it for one number per completion. It scores every objective, gathers the batch from all processes, and combines the vectors as the
embedded learner does: weighting, scalarizer, normalization, aggregation. The number has such group means that the baseline which TRL
subtracts leaves the advantage as it was meant. Means, unscored counts and present weights go to TRL's logs; what a weighting
remembers goes to the trainer's state, and so into its checkpoints.

A reward function sees no log-probabilities. The price of KL is therefore TRL's own (`beta` of its configuration): RLOOTrainer subtracts it
from the number, GRPOTrainer adds it to the loss. Neither is inside what is normalized here, and weights that do not sum to 1 do not
multiply it. Weightings that look at returns see rewards minus `beta` times the mean KL that the trainer logged last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from paretune.errors import ConfigError, ParetuneError
from paretune.objectives.base import check_callable, score_given
from paretune.objectives.utilities import Landmarks
from paretune.training.advantages import group_covariance
from paretune.training.combine import Combine
from paretune.training.learner import watch_unscored
from paretune.training.weightings.base import State
from paretune.types import Objectives, Preference, Prompt

__all__ = ["MultiObjectiveReward"]

Scorer = Callable[[Mapping[str, Any], int, int], np.ndarray]
"""(what TRL gives, number of the batch, place of the first row in the whole batch) -> (N, M) rewards, NaN = unscored."""

STATE = "paretune"  # where a weighting's memory lies in the trainer's state
TRL_BASELINE = {"grpo": "group_mean", "rloo": "leave_one_out"}


class MultiObjectiveReward:
    """Pass it as the only reward function, and `**settings()` to the trainer's configuration. `trainer` says which of the two it is.

    objectives: functions with TRL's reward signature, or Paretune's objectives; or names and ranges (`Objectives`) together with
    `scorer`, which scores all of them at once. `group` is TRL's num_generations. The other fields are those of a `TrainSpec` and of the
    learner `pg`; `low` and `high`, the objectives' ranges, matter to weightings and to scalarizers other than "linear".
    Evaluation calls the same function: with a weighting that remembers, give the evaluation a trainer and a reward of its own.
    """

    def __init__(
        self,
        objectives: Sequence[Callable[..., Any]] | Mapping[str, Callable[..., Any]] | Objectives,
        preference: Mapping[str, float] | Sequence[float] | str,
        *,
        group: int,
        trainer: Literal["grpo", "rloo"] = "grpo",
        scalarizer: str | Mapping[str, Any] = "linear",
        scalarize_at: str = "reward",
        aggregation: str | Mapping[str, Any] = "learner",
        weighting: str | Mapping[str, Any] = "fixed",
        baseline: Literal["leave_one_out", "group_mean"] | None = None,
        normalize: Literal["none", "batch", "group"] = "none",
        low: Sequence[float] | None = None,
        high: Sequence[float] | None = None,
        beta: float = 0.0,
        landmarks: Landmarks | None = None,
        max_unscored: float = 0.1,
        seed: int = 0,
        scorer: Scorer | None = None,
        name: str = "utility",
    ):
        if trainer not in TRL_BASELINE:
            raise ConfigError("a drop-in serves one of TRL's two online trainers", found=f"trainer={trainer!r}", remedy='"grpo" or "rloo"')
        if group < 2:
            raise ConfigError(
                "group is at least 2: a response is compared with the others to its prompt",
                found=f"group={group}",
                remedy="give the drop-in the group that the trainer has as num_generations",
            )
        self.__name__ = name  # what TRL prints beside the number
        self.trainer, self.group, self.seed = trainer, group, seed
        self.beta, self.landmarks, self.max_unscored = beta, landmarks, max_unscored
        self.objectives, self.scorer = _scored_by(objectives, scorer, low, high)
        self.w_M = np.asarray(Preference.of(self.objectives.names, preference).weights, dtype=np.float64)
        described = [{"name": given} if isinstance(given, str) else dict(given) for given in (scalarizer, aggregation, weighting)]
        self.combine = Combine(
            scalarizer=described[0],
            scalarize_at=scalarize_at,
            aggregation=described[1],
            weighting=described[2],
            baseline=baseline or TRL_BASELINE[trainer],
            normalize=normalize,
        )
        self.combine.check(sampled=False, through_rewards=True)
        self.restart()

    def restart(self) -> None:
        """Forget every batch, as before the first."""
        self.step = self.samples = self.tokens = 0
        self.weights_state: State | None = None
        self.recent: list[list[int]] = []  # per batch: completions, then unscored ones per objective
        self.rewards_NM = np.empty((0, self.objectives.count))  # of the last batch, all processes
        self._started = False

    def state_dict(self) -> dict[str, Any]:
        """What the next batch depends on, JSON."""
        kept = {"step": self.step, "samples": self.samples, "tokens": self.tokens}
        return {**kept, "weighting": self.weights_state, "recent": [list(map(int, row)) for row in self.recent]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.step, self.samples, self.tokens = state["step"], state["samples"], state["tokens"]
        self.weights_state, self.recent = state["weighting"], [list(row) for row in state["recent"]]

    def settings(self) -> dict[str, Any]:
        """Keyword arguments for GRPOConfig or RLOOConfig under which the number becomes the advantage that was asked for."""
        return self.settings_of(self.trainer, self.group)

    @staticmethod
    def settings_of(trainer: str, group: int) -> dict[str, Any]:
        """`settings` of a drop-in for `trainer` with that group."""
        if trainer == "rloo":
            return {"num_generations": group, "normalize_advantages": False, "reward_clip_range": None, "reward_weights": None}
        summed = {"scale_rewards": "none", "multi_objective_aggregation": "sum_then_normalize"}
        return {"num_generations": group, **summed, "reward_weights": None}

    def check(self, args: Any) -> None:
        """ConfigError where TRL's configuration `args` would turn the number into something else."""
        for name, value in self.settings().items():
            given = getattr(args, name, value)
            if given != value and not (name == "reward_weights" and list(given) == [1.0]):
                raise ConfigError(
                    "the trainer leaves the number of a multi-objective reward as it is",
                    found=f"{name}={given!r} in the trainer's configuration",
                    remedy=f"give it {name}={value!r}: pass **reward.settings()",
                )

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **given: Any) -> list[float]:
        """One number per completion; NaN, which TRL leaves out, where nothing could be scored."""
        state = given.get("trainer_state")
        self._resume(state)
        mine, all_of = self._gathered(prompts, completions, given)
        rewards_NM = np.concatenate([each["rewards"] for each in all_of])
        asked = [prompt for each in all_of for prompt in each["prompts"]]
        self._check_groups(asked)
        self._count(rewards_NM, sum(each["tokens"] for each in all_of))
        weights_NM = self._weights(rewards_NM, asked, state)
        number_N = self._numbers(rewards_NM, weights_NM)
        self.rewards_NM, self.step = rewards_NM, self.step + 1
        if state is not None and getattr(state, "stateful_callbacks", None) is not None:
            state.stateful_callbacks[STATE] = self.state_dict()
        self._log(given, rewards_NM, weights_NM, mine)
        return number_N[mine].tolist()

    def _resume(self, state: Any) -> None:
        """A fresh object in a resumed training goes on with what the checkpoint holds."""
        if not self._started and self.step == 0:
            kept = (getattr(state, "stateful_callbacks", None) or {}).get(STATE)
            if kept is not None:
                self.load_state_dict(kept)
        self._started = True

    def _gathered(self, prompts: Sequence[Any], completions: Sequence[Any], given: Mapping[str, Any]) -> tuple[slice, list[dict[str, Any]]]:
        """Which rows of the whole batch are this process's, and what every process has. An error in one is raised in all."""
        import torch.distributed as dist

        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        rank, n = (dist.get_rank() if several else 0), len(completions)
        own: dict[str, Any] = {"prompts": list(prompts), "tokens": sum(map(len, given.get("completion_ids") or ())), "error": None}
        try:
            own["rewards"] = self.scorer({"prompts": prompts, "completions": completions, **given}, self.step, rank * n)
        except ParetuneError as error:
            if not several:
                raise
            own["error"] = error
        if not several:
            return slice(0, n), [own]
        all_of: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(all_of, own)
        for each in all_of:
            if each["error"] is not None:
                raise each["error"]
        return slice(rank * n, (rank + 1) * n), all_of

    def _check_groups(self, prompts: Sequence[Any]) -> None:
        group, n = self.group, len(prompts)
        if n % group:
            raise ConfigError(
                "a batch of all processes consists of whole groups",
                found=f"{n} completions, groups of {group}",
                remedy="make per_device_train_batch_size x processes x gradient_accumulation_steps a multiple of num_generations = group",
            )
        for start in range(0, n, group):
            if any(prompts[i] != prompts[start] for i in range(start + 1, start + group)):
                raise ConfigError(
                    "a group holds the completions of one prompt",
                    found=f"different prompts among the completions {start} to {start + group - 1}, group={group}",
                    remedy="give the drop-in the group that the trainer has as num_generations",
                )

    def _count(self, rewards_NM: np.ndarray, tokens: int) -> None:
        """Charge the batch; stop where too much of the recent ones could not be scored."""
        self.samples, self.tokens = self.samples + len(rewards_NM), self.tokens + tokens
        self.recent = watch_unscored(self.recent, rewards_NM, self.objectives.names, limit=self.max_unscored)

    def _weights(self, rewards_NM: np.ndarray, prompts: Sequence[Any], state: Any) -> np.ndarray:
        """(N, M) the weights of this batch; the weighting's memory moves on."""
        weights_NM, self.weights_state = self.combine.weights(
            self.weights_state,
            self.objectives,
            step=self.step,
            steps=int(getattr(state, "max_steps", 0) or 0),
            w_NM=np.tile(self.w_M, (len(rewards_NM), 1)),
            returns_NM=rewards_NM - (self.beta * _last_kl(state) if self.beta else 0.0),
            covariance_MM=group_covariance(rewards_NM, group=self.group),
            prompts=[Prompt(text=p) if isinstance(p, str) else Prompt(messages=tuple(p)) for p in prompts],
            landmarks=self.landmarks,
            seed=self.seed,
        )
        return weights_NM

    def _numbers(self, rewards_NM: np.ndarray, weights_NM: np.ndarray) -> np.ndarray:
        """(N,) what TRL's baseline turns into the advantages; the scalarized reward itself where nothing is normalized."""
        free_N = np.zeros(len(rewards_NM))  # the price of KL is the trainer's
        advantage_N = self.combine.advantages(rewards_NM, weights_NM, free_N, self.objectives, group=self.group)
        values_NX, weights_NX = self.combine.compared(rewards_NM, weights_NM, self.objectives)
        known_PG = ~np.isnan(values_NX).all(1).reshape(-1, self.group)
        number_PG = np.where(known_PG, advantage_N.reshape(-1, self.group), np.nan)
        if self.trainer == "rloo":  # what is subtracted is the mean of the others: it stretches by n / (n - 1)
            n_P1 = known_PG.sum(1, keepdims=True)
            number_PG = number_PG * (np.maximum(n_P1 - 1, 0) / np.maximum(n_P1, 1))
        if self.combine.normalize == "none" and not self.combine.aggregates:  # a level that people can read in the logs
            each_PGX = (weights_NX * values_NX).reshape(len(number_PG), self.group, -1)
            scored_PX = (~np.isnan(each_PGX)).sum(1)
            number_PG = number_PG + (np.nansum(each_PGX, axis=1) / np.maximum(scored_PX, 1)).sum(1, keepdims=True)
        return number_PG.reshape(-1)

    def _log(self, given: Mapping[str, Any], rewards_NM: np.ndarray, weights_NM: np.ndarray, mine: slice) -> None:
        """Batch means of all processes, the same in each, to TRL's logs; this process's rows to its table of completions."""
        metric, extra = given.get("log_metric"), given.get("log_extra")
        for k, name in enumerate(self.objectives.names):
            scored_N = rewards_NM[~np.isnan(rewards_NM[:, k]), k]
            if metric is not None:
                if len(scored_N):
                    metric(f"objectives/{name}", float(scored_N.mean()))
                metric(f"unscored/{name}", float(len(rewards_NM) - len(scored_N)))
                metric(f"weights/{name}", float(weights_NM[:, k].mean()))
            if extra is not None:
                extra(f"objectives/{name}", rewards_NM[mine, k].tolist())


def _scored_by(objectives: Any, scorer: Scorer | None, low: Any, high: Any) -> tuple[Objectives, Scorer]:
    """The names and ranges of the objectives, and what scores a batch."""
    if scorer is not None:
        return objectives, scorer
    named = list(objectives.items()) if isinstance(objectives, Mapping) else [(_name(given), given) for given in objectives]
    for name, function in named:
        if not callable(function) or hasattr(function, "forward"):
            raise ConfigError(
                "an objective of a drop-in is a function with TRL's reward signature",
                found=f"{name}: {type(function).__name__}",
                remedy="for a reward model use Paretune's objective `reward-model`, or wrap it in a function",
            )
        check_callable(name, function, None)
    low = [getattr(f, "low", 0.0) for _, f in named] if low is None else low
    high = [getattr(f, "high", 1.0) for _, f in named] if high is None else high
    known = Objectives(tuple(name for name, _ in named), tuple(map(float, low)), tuple(map(float, high)))
    return known, lambda given, step, first: score_given(named, given)


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", None) or type(function).__name__)


def _last_kl(state: Any) -> float:
    """Nats per response, from the trainer's last line of logs that has it (TRL logs a mean per token, and the mean length)."""
    for line in reversed((getattr(state, "log_history", None) or [])[-4:]):
        if line.get("kl") is not None:
            return float(line["kl"]) * float(line.get("completions/mean_length") or 1.0)
    return 0.0
