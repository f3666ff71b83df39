"""What a task is: prompts, objectives, a reference policy and, where it can be known, the exact front.

A task is a frozen dataclass registered in `TASKS`; its fields are its dials. Everything expensive (weights, tables) is
loaded lazily and cached on the instance, so that describing a task costs nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from paretune.types import Objectives, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
from paretune.tasks.preferences import judged_preferences

__all__ = ["Task"]


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

    def trusts(self, *, scoring: bool = True) -> tuple[str, ...]:
        """What it runs, or sends texts to, on the word of whoever described it: to load its model, and with `scoring` to score."""
        return ()

    def base(self) -> Mapping[str, Any]:
        """How a saved family finds the reference model: {"model": path or hub id, "revision": ...} or {"task": description}."""
        from paretune.registry import describe

        return {"task": describe(self)}

    def judged(self) -> np.ndarray:
        """(W, M) preferences that results are judged at; never trained on (see `sample_preferences`)."""
        return judged_preferences(self.objectives.count)
