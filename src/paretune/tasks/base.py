"""What a task is: prompts, objectives, a reference policy and, where it can be known, the exact front.

A task is a frozen dataclass registered in `TASKS`; its fields are its dials. Everything expensive (weights, tables) is
loaded lazily and cached on the instance, so that describing a task costs nothing.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from paretune.objectives.terms import Terms
from paretune.types import Objectives, Prompt, canonical_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
from paretune.tasks.preferences import judged_preferences

__all__ = ["Task", "first_device", "keep_reference", "reference", "sharing_weights"]


class Task(ABC):
    """Prompts, M objectives, a reference policy, and beta: what every method is given and judged on.

    Subclasses provide `objectives`, `beta` (nats are worth beta units of return) and `max_new_tokens` as fields or properties.
    """

    registered_name: ClassVar[str]
    version: ClassVar[int]
    is_exact: ClassVar[bool] = False  # True: see `tasks.exact.ExactTask` for what more it knows

    objectives: Objectives
    beta: float
    max_new_tokens: int
    guards: Objectives | None = None  # scores that are looked at and never trained or traded: see `score_guards`
    terms: Terms | None = None  # gated rewards, weights by step, targets, constraints: see `objectives.terms`

    @abstractmethod
    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A fresh copy of the reference model (eval mode, no adapter) and its tokenizer. Safe to modify."""

    @abstractmethod
    def prompts(self, split: str) -> Sequence[Prompt]:
        """The prompts of split "train" or "test"; the same order every time."""

    @abstractmethod
    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        """(N, M) float64 raw rewards of N completions (text without special tokens); NaN where an objective could not score.

        Raises RewardError where an objective raises or returns something that is no score.
        """

    def observe(self, prompts: Sequence[Prompt], completions: Sequence[str], *, streams: Sequence[int]) -> np.ndarray:
        """(N, M) what a learner sees of `score`: the same, unless the task's rewards are noisy. `streams` names one seed per row."""
        return self.score(prompts, completions)

    def validation(self) -> Sequence[Prompt]:
        """Prompts on which trainings are watched, neither trained nor judged on: the best policy there is kept. () is none."""
        return ()

    def unlabelled(self, count: int) -> Sequence[Prompt]:
        """At most so many prompts that nobody scores, none of the others: a learner may go on at them with a reward model. () is none."""
        return ()

    def score_guards(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        """(N, G) raw scores of the `guards`, as `score`."""
        return np.empty((len(completions), 0))

    def trusts(self, *, scoring: bool = True) -> tuple[str, ...]:
        """What it runs, or sends texts to, on the word of whoever described it: to load its model, and with `scoring` to score."""
        return ()

    def gated(self, rewards: np.ndarray, guards: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
        """(..., M) rewards under the conditions of the task's terms, and as they are without any; `guards` are those that these ask."""
        return rewards if self.terms is None else self.terms.gated(rewards, self.objectives, guards)

    def check(self) -> None:  # noqa: B027
        """Raise ConfigError for what can be found wrong before a model is loaded; suites and `fit` ask before anything is trained."""

    def base(self) -> Mapping[str, Any]:
        """How a saved family finds the reference model: {"model": path or hub id, "revision": ...} or {"task": description}."""
        from paretune.registry import describe

        return {"task": describe(self)}

    def prompt_form(self) -> Mapping[str, Any]:
        """How its prompts are made of texts, as fields of `Family`: {} for plain texts, {"chat": True, "system": text or None}."""
        return {}

    def judged(self) -> np.ndarray:
        """(W, M) preferences that results are judged at; never trained on (see `sample_preferences`)."""
        return judged_preferences(self.objectives.count)


# The reference model of a worker, which trains on the same one again and again

_kept: dict[str, tuple[Any, Any, list[int]]] | None = None  # at most one: what it is -> model, tokenizer, sums of its weights


def keep_reference() -> None:
    """From now on this process keeps the model that `reference` loaded last."""
    global _kept
    _kept = {} if _kept is None else _kept


def reference(
    task: Task, *, device: str = "cpu", dtype: str | None = None, place: Callable[[Any], Any] = lambda model: model
) -> tuple[Any, Any]:
    """The task's reference model as `Task.load` gives it, and its tokenizer; `place` brings the model to the device and dtype.

    Where the process keeps models (`keep_reference`), a copy of the kept one: modules of its own, so that no adapter of an earlier
    training is left in them, around the same weights, which are frozen. A model into whose weights somebody wrote is loaded again.
    Quantized weights are no plain tensors; such a model is not kept.
    """
    if _kept is None:
        loaded, tokenizer = task.load()
        return place(loaded), tokenizer
    content = task.content() if hasattr(task, "content") else {}
    name = canonical_json([task.base(), content.get("model"), device, dtype])
    if name not in _kept or _kept[name][2] != _sums(_kept[name][0]):
        _kept.clear()  # before the next one needs its room
        loaded, tokenizer = task.load()
        model = place(loaded)
        if not _plain(model, device):
            return model, tokenizer
        _kept[name] = model, tokenizer, _sums(model)
    model, tokenizer, _ = _kept[name]
    return sharing_weights(model), copy.deepcopy(tokenizer)


def first_device() -> str:
    """Where models go that nobody gave a place: the first GPU where there is one, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _plain(model: Any, device: str) -> bool:
    import torch

    weights = list(model.parameters())
    plain = all(type(p) is torch.nn.Parameter and type(p.data) is torch.Tensor for p in weights)
    where = {p.device.type for p in weights}
    return plain and not getattr(model, "is_quantized", False) and where == {torch.device(device).type}


def sharing_weights(model: Any) -> Any:
    """A copy of a model: modules of its own around the same weights."""
    import torch

    weights = {id(p): torch.nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, weights)


def _sums(model: Any) -> list[int]:
    """One number per weight, of its bits."""
    import torch

    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return torch.stack([p.detach().view(whole[p.element_size()]).sum(dtype=torch.int64) for p in model.parameters()]).tolist()
