"""A reward function for TRL's own trainers that keeps several objectives apart until the last step.

    reward = MultiObjectiveReward([helpful, brief], (0.7, 0.3), group=8, scalarize_at="advantage", normalize="group")
    trainer = GRPOTrainer(model, reward_funcs=[reward], args=GRPOConfig(..., **reward.settings()), ...)

TRL asks it for one number per completion. It scores every objective, gathers the batch from all processes, and combines the vectors as the
embedded learner does: weighting, scalarizer, normalization, aggregation. The number has such group means that the baseline which TRL
subtracts leaves the advantage as it was meant. Means, utility, unscored counts and present weights go to TRL's logs; what a weighting
remembers goes to the trainer's state, and so into its checkpoints.

In an evaluation the number is the response's utility, whatever the group, and nothing is remembered of it. Which of the two it is, the
trainer says: it is known by `log_metric`, the method of its own that TRL hands to every reward function.

A reward function sees no log-probabilities. The price of KL is therefore TRL's own (`beta` of its configuration): RLOOTrainer subtracts it
from the number, GRPOTrainer adds it to the loss. Neither is inside what is normalized here, and weights that do not sum to 1 do not
multiply it. Weightings that look at returns see rewards minus `beta` times the mean KL that the trainer logged last.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from paretune.errors import ConfigError, ParetuneError
from paretune.hub import check_pretrained, load_tokenizer, located, unloadable
from paretune.objectives.base import score_given
from paretune.objectives.terms import Terms
from paretune.objectives.utilities import Landmarks
from paretune.registry import checked
from paretune.training.advantages import group_covariance, weighted_returns
from paretune.training.combine import Combine
from paretune.training.loop.record import watch_unscored
from paretune.training.weightings.base import State, under_terms
from paretune.types import Amount, Objectives, Preference, Prompt, Share

__all__ = ["MultiObjectiveReward"]

Scorer = Callable[[Mapping[str, Any], int, int], np.ndarray]
"""(what TRL gives, number of the batch, place of the first row in the whole batch) -> (N, M) rewards, NaN = unscored."""

STATE = "paretune"  # where a weighting's memory lies in the trainer's state
TRL_BASELINE = {"grpo": "group_mean", "rloo": "leave_one_out"}
MEASURED = {"utility", "violation"}  # what `Combine.measures` adds
CONFIG = {"grpo": "GRPOConfig", "rloo": "RLOOConfig"}


class MultiObjectiveReward:
    """Pass it as the only reward function, and `**settings()` to the trainer's configuration. `trainer` says which of the two it is.

    objectives: what TRL takes as reward functions (functions, async ones too, sequence classifiers as modules or by name), and
    Paretune's objectives; or names and ranges (`Objectives`) together with `scorer`, which scores all of them at once. A module reads
    text with its tokenizer in `reward_processing_classes`, one for each objective, or else with the one under its own name.
    `group` is TRL's num_generations. `terms` are those of a recipe: gated rewards, weights by step, targets, constraints. The other
    fields are those of a `TrainSpec` and of the learner `pg`; `low` and `high`, the objectives' ranges, matter to terms, to weightings
    and to scalarizers other than "linear".
    """

    def __init__(
        self,
        objectives: Sequence[Any] | Mapping[str, Any] | Objectives,
        preference: Mapping[str, float] | Sequence[float] | str,
        *,
        group: int,
        trainer: Literal["grpo", "rloo"] = "grpo",
        scalarizer: str | Mapping[str, Any] = "linear",
        scalarize_at: str = "reward",
        aggregation: str | Mapping[str, Any] = "learner",
        weighting: str | Mapping[str, Any] = "fixed",
        terms: Mapping[str, Any] | None = None,
        baseline: Literal["leave_one_out", "group_mean"] | None = None,
        normalize: Literal["none", "batch", "group", "batch_returns"] = "none",
        low: Sequence[float] | None = None,
        high: Sequence[float] | None = None,
        beta: float = 0.0,
        landmarks: Landmarks | None = None,
        max_unscored: float = 0.1,
        seed: int = 0,
        scorer: Scorer | None = None,
        reward_processing_classes: Any = None,
        name: str = "utility",
    ):
        if trainer not in TRL_BASELINE:
            raise ConfigError("a drop-in serves one of TRL's two online trainers", found=f"trainer={trainer!r}", remedy='"grpo" or "rloo"')
        group, beta = checked("group", int, _plain(group)), checked("beta", Amount, _plain(beta))
        max_unscored = checked("max_unscored", Share, _plain(max_unscored))
        if group < 2:
            raise ConfigError(
                "group is at least 2: a response is compared with the others to its prompt",
                found=f"group={group}",
                remedy="give the drop-in the group that the trainer has as num_generations",
            )
        self.__name__ = name  # what TRL prints beside the number
        self.trainer, self.group, self.seed = trainer, group, seed
        self.beta, self.landmarks, self.max_unscored = beta, landmarks, max_unscored
        parts = {"scalarizer": scalarizer, "aggregation": aggregation, "weighting": weighting}
        described = [
            {"name": given}
            if isinstance(given, str)
            else checked(part, dict[str, Any], dict(given) if isinstance(given, Mapping) else given)
            for part, given in parts.items()
        ]
        self.objectives, scorer = _scored_by(objectives, scorer, low, high, reward_processing_classes)
        asked = Terms.of(terms, self.objectives.names)
        if asked is not None:
            asked.check(self.objectives)
            described[2] = dict(under_terms(described[2], vars(asked)))
        self.scorer = scorer if asked is None else lambda *given: asked.gated(scorer(*given), self.objectives)
        combine = Combine(
            scalarizer=described[0],
            scalarize_at=scalarize_at,
            aggregation=described[1],
            weighting=described[2],
            baseline=baseline or TRL_BASELINE[trainer],
            normalize=normalize,
        )
        combine.check(sampled=False, through_rewards=True)
        self._settings = self.settings_of(trainer, group, combine)
        inside = self._settings.get("normalize_advantages", False)
        self.combine = dataclasses.replace(combine, normalize="none") if inside else combine
        self.w_M = np.asarray(Preference.of(self.objectives.names, preference).weights, dtype=np.float64)
        self.restart()

    def restart(self) -> None:
        """Forget every batch, as before the first."""
        self.step = self.samples = self.tokens = 0
        self.weights_state: State | None = None
        self.recent: list[list[int]] = []  # per batch: completions, then unscored ones per objective
        self.rewards_NM = np.empty((0, self.objectives.count))  # of the last batch, all processes
        self.told: dict[str, float] = {}  # its weights, where they are not the preference

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
        return dict(self._settings)

    @staticmethod
    def settings_of(trainer: str, group: int, combine: Combine) -> dict[str, Any]:
        """`settings` of a drop-in that serves `trainer`: RLOOTrainer divides by the batch's spread itself, with the KL inside."""
        if trainer == "rloo":
            plain = combine.scalarize_at == "reward" and not combine.aggregates and combine.baseline == TRL_BASELINE["rloo"]
            divides = plain and combine.normalize == "batch"
            return {"num_generations": group, "normalize_advantages": divides, "reward_clip_range": None, "reward_weights": None}
        summed = {"scale_rewards": "none", "multi_objective_aggregation": "sum_then_normalize"}
        return {"num_generations": group, **summed, "reward_weights": None}

    def check(self, args: Any) -> None:
        """ConfigError where TRL's configuration `args` would turn the number into something else. Asked at every batch, too."""
        lacking = [name for name in self._settings if not hasattr(args, name)]
        if lacking:
            raise ConfigError(
                f"a drop-in with trainer={self.trainer!r} stands under {CONFIG[self.trainer]}, or a subclass",
                found=f"{type(args).__name__}, which has no {', '.join(lacking)}",
                remedy='trainer="grpo" is for GRPOTrainer and GRPOConfig, trainer="rloo" for RLOOTrainer and RLOOConfig',
            )
        for name, value in self._settings.items():
            given = getattr(args, name)
            if given != value and not (name == "reward_weights" and list(given) == [1.0]):
                raise ConfigError(
                    "the trainer leaves the number of a multi-objective reward as it is",
                    found=f"{name}={given!r} in the trainer's configuration",
                    remedy=f"give it {name}={value!r}: pass **reward.settings()",
                )
        if self.beta and getattr(args, "beta", self.beta) != self.beta:
            raise ConfigError(
                "beta of a drop-in is that of the trainer: weightings see returns with its price of KL",
                found=f"beta={self.beta:g} here, beta={args.beta:g} in the trainer's configuration",
                remedy="give both the same number; leave it out of the drop-in for weightings that see rewards alone",
            )

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **given: Any) -> list[float]:
        """One number per completion; NaN, which TRL leaves out, where nothing could be scored."""
        state, asking = given.get("trainer_state"), trainer_of(given)
        if asking is not None:
            self._check_trainer(asking)
        if asking is not None and not asking.model.training:
            return self._evaluated(prompts, completions, given)
        kept = getattr(state, "stateful_callbacks", None)  # the trainer's state is the memory, so that each training has its own
        if kept is not None:
            self.load_state_dict(kept[STATE]) if STATE in kept else self.restart()
        mine, all_of = self._gathered(prompts, completions, given)
        rewards_NM = np.concatenate([each["rewards"] for each in all_of])
        asked = [prompt for each in all_of for prompt in each["prompts"]]
        self._check_groups(asked)
        self._count(rewards_NM, sum(each["tokens"] for each in all_of))
        weights_NM = self._weights(rewards_NM, asked, state, asking)
        self.told = self.combine.told(weights_NM, self.objectives)
        number_N = self._numbers(rewards_NM, weights_NM)
        self.rewards_NM, self.step = rewards_NM, self.step + 1
        if kept is not None:
            kept[STATE] = self.state_dict()
        self._log(given, rewards_NM, mine, weights_NM)
        return number_N[mine].tolist()

    def _check_trainer(self, asking: Any) -> None:
        self.check(asking.args)
        if len(asking.reward_funcs) > 1:
            raise ConfigError(
                "a drop-in is its trainer's only reward function: TRL would add the others to a number that is already combined",
                found=", ".join(map(str, asking.reward_func_names)),
                remedy="put the other functions among the drop-in's objectives, each with a weight in the preference",
            )

    def _evaluated(self, prompts: Sequence[Any], completions: Sequence[Any], given: Mapping[str, Any]) -> list[float]:
        """The utility of each response, whose mean is w times the objectives' means: an unscored objective counts as the batch's mean."""
        mine, all_of = self._gathered(prompts, completions, given)
        rewards_NM = np.concatenate([each["rewards"] for each in all_of])
        values_NX, weights_NX = self.combine.compared(rewards_NM, np.tile(self.w_M, (len(rewards_NM), 1)), self.objectives)
        self._log(given, rewards_NM, mine)
        return weighted_returns(values_NX[None], weights_NX[None])[0, mine].tolist()

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
        first = sum(len(each["rewards"]) for each in all_of[:rank])
        return slice(first, first + n), all_of

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
                    remedy="give the drop-in the group that the trainer has as num_generations; a wrapper hands log_metric on, by which an "
                    "evaluation is known",
                )

    def _count(self, rewards_NM: np.ndarray, tokens: int) -> None:
        """Charge the batch; stop where too much of the recent ones could not be scored."""
        self.samples, self.tokens = self.samples + len(rewards_NM), self.tokens + tokens
        self.recent = watch_unscored(self.recent, rewards_NM, self.objectives.names, limit=self.max_unscored)

    def _weights(self, rewards_NM: np.ndarray, prompts: Sequence[Any], state: Any, asking: Any) -> np.ndarray:
        """(N, M) the weights of this batch; the weighting's memory moves on."""
        weights_NM, self.weights_state = self.combine.weights(
            self.weights_state,
            self.objectives,
            step=self.step,
            steps=_batches(int(getattr(state, "max_steps", 0) or 0), getattr(asking, "args", None)),
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

    def _log(self, given: Mapping[str, Any], rewards_NM: np.ndarray, mine: slice, weights_NM: np.ndarray | None = None) -> None:
        """Batch means of all processes, the same in each, to TRL's logs; this process's rows to its table of completions."""
        metric, extra = given.get("log_metric"), given.get("log_extra")
        for k, name in enumerate(self.objectives.names):
            scored_N = rewards_NM[~np.isnan(rewards_NM[:, k]), k]
            if metric is not None:
                if len(scored_N):
                    metric(f"objectives/{name}", float(scored_N.mean()))
                metric(f"unscored/{name}", float(len(rewards_NM) - len(scored_N)))
                if weights_NM is not None:
                    metric(f"weights/{name}", float(weights_NM[:, k].mean()))
            if extra is not None:
                extra(f"objectives/{name}", rewards_NM[mine, k].tolist())
        if metric is not None:
            for name, value in self.combine.measures(self.weights_state, rewards_NM, self.w_M, self.objectives, self.landmarks).items():
                metric(f"objectives/{name}", value)


class _Classifier:
    """A sequence classifier as TRL's trainers read it: prompt and completion joined, or the conversation under its chat template; the
    first output, for the last token that is no padding."""

    def __init__(self, name: str, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model.eval(), tokenizer
        config = getattr(model, "config", None)
        if tokenizer is None:
            source = getattr(config, "_name_or_path", "")
            try:
                self.tokenizer = load_tokenizer(source)
            except Exception as error:
                raise ConfigError(
                    f"objective {name!r}, a module, reads text with a tokenizer",
                    found=f"none under {source!r}, the name in the module's configuration",
                    remedy="give reward_processing_classes, a list with the tokenizer of each objective (None for functions)",
                ) from error
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if config is not None:
            config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
            outputs = getattr(config, "num_labels", 1)
            if outputs != 1:
                warnings.warn(
                    f"objective {name!r} has {outputs} outputs; the first one is the score, as in TRL. Paretune's objective "
                    "reward-model names another one by its label",
                    stacklevel=5,
                )

    @classmethod
    def named(cls, name: str, model: str, tokenizer: Any) -> _Classifier:
        """The model with one output in a folder or on the hub, loaded now."""
        from transformers import AutoModelForSequenceClassification as Loader

        if tokenizer is None:
            check_pretrained(model)
        try:
            where = located(model, weights=True)
            loaded, info = Loader.from_pretrained(**where, num_labels=1, use_safetensors=True, output_loading_info=True)
        except Exception as error:  # a dozen kinds, from the network, the hub and the files
            raise unloadable(f"the reward model {name!r}", model, None, error, loader="AutoModelForSequenceClassification") from error
        if info["missing_keys"]:
            raise ConfigError(
                "every weight of a reward model comes from its files",
                found=f"{model} has no {', '.join(sorted(info['missing_keys'])[:4])}: TRL would draw them at random",
                remedy="name a model that was saved as AutoModelForSequenceClassification with one output",
            )
        return cls(name, loaded, tokenizer)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], log_metric: Any = None, **_: Any) -> list[float]:
        import torch
        from trl import apply_chat_template

        asking = trainer_of({"log_metric": log_metric})
        if asking is not None and getattr(self.model, "hf_device_map", None) is None:
            self.model.to(asking.accelerator.device)
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        if not isinstance(texts[0], str):
            more = getattr(asking, "chat_template_kwargs", {})
            texts = [apply_chat_template({"messages": messages}, self.tokenizer, **more)["text"] for messages in texts]
        given = self.tokenizer(text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
        device = next((p.device for p in self.model.parameters()), None)
        with torch.inference_mode():
            return self.model(**given.to(device)).logits[:, 0].tolist()


def trainer_of(given: Mapping[str, Any]) -> Any:
    """The trainer that asks a reward function, where it can be known: `log_metric` is a method of TRL's trainers."""
    asking = getattr(given.get("log_metric"), "__self__", None)
    return asking if hasattr(asking, "reward_funcs") else None


def _scored_by(objectives: Any, scorer: Scorer | None, low: Any, high: Any, tokenizers: Any) -> tuple[Objectives, Scorer]:
    """The names and ranges of the objectives, and what scores a batch."""
    if scorer is not None:
        return objectives, scorer
    if callable(objectives) or isinstance(objectives, str):
        objectives = [objectives]
    named = list(objectives.items()) if isinstance(objectives, Mapping) else [(_name(given), given) for given in objectives]
    each = tokenizers if isinstance(tokenizers, list | tuple) else [tokenizers] * len(named)
    if len(each) != len(named):
        raise ConfigError(
            "reward_processing_classes has one tokenizer, or None, for each objective",
            found=f"{len(each)} for {len(named)} objectives",
            remedy="list them in the objectives' order",
        )
    if MEASURED & {name for name, _ in named}:
        raise ConfigError(
            "objectives/utility and objectives/violation are columns of their own in TRL's logs",
            found="an objective of that name",
            remedy="rename it: give the objectives as a mapping from names",
        )
    named = [(name, _function(name, given, tokenizer)) for (name, given), tokenizer in zip(named, each, strict=True)]
    low = [getattr(f, "low", 0.0) for _, f in named] if low is None else checked("low", tuple[float, ...], _plain(low))
    high = [getattr(f, "high", 1.0) for _, f in named] if high is None else checked("high", tuple[float, ...], _plain(high))
    known = Objectives(tuple(name for name, _ in named), tuple(map(float, low)), tuple(map(float, high)))
    for name, least, most in zip(known.names, known.low, known.high, strict=True):
        if not least < most:
            raise ConfigError(
                "the range of an objective is finite and low is below high",
                found=f"{name}: low {least:g}, high {most:g}",
                remedy="state the worst and the best score of each objective, in their order",
            )
    return known, lambda given, step, first: score_given(named, given)


def _plain(given: Any) -> Any:
    """NumPy's numbers and arrays as Python's."""
    return [_plain(item) for item in given] if isinstance(given, list | tuple) else getattr(given, "tolist", lambda: given)()


def _function(name: str, given: Any, tokenizer: Any) -> Callable[..., Any]:
    """What scores one objective."""
    import torch

    if isinstance(given, str):
        return _Classifier.named(name, given, tokenizer)
    if isinstance(given, torch.nn.Module):
        return _Classifier(name, given, tokenizer)
    if not callable(given):
        raise ConfigError(
            "an objective of a drop-in is what TRL takes as a reward function",
            found=f"{name}: {type(given).__name__}",
            remedy="a function with TRL's reward signature, a sequence classifier or its name, or one of Paretune's objectives",
        )
    return given


def _name(given: Any) -> str:
    """As TRL names it: that of a function, inside a partial too; the last part of a model's."""
    import torch

    while isinstance(given, functools.partial):
        given = given.func
    source = given if isinstance(given, str) else getattr(getattr(given, "config", None), "_name_or_path", "")
    if isinstance(given, str | torch.nn.Module) and source:
        return str(source).rstrip("/").split("/")[-1]
    return str(getattr(given, "__name__", None) or type(given).__name__)


def _batches(steps: int, args: Any) -> int:
    """How many batches a training of so many updates draws: TRL draws one for `steps_per_generation` x `num_iterations` of its passes."""
    each = getattr(args, "num_iterations", 1) * (getattr(args, "steps_per_generation", None) or 1)
    return math.ceil(steps * (getattr(args, "gradient_accumulation_steps", 1) if args is not None else 1) / each)


def _last_kl(state: Any) -> float:
    """Nats per response, from the trainer's last line of logs that has it (TRL logs a mean per token, and the mean length)."""
    for line in reversed(getattr(state, "log_history", None) or []):
        if line.get("kl") is not None:
            return float(line["kl"]) * float(line.get("completions/mean_length") or 1.0)
    return 0.0
