"""The text task: a counsellor's reflection after a client's statement, with a small language model that ships with the package.

The seed line's task (EMORL, 2505.02579, on PAIR and Psych8k) in a size at which every method runs on a laptop. Statements come from a
grammar; no situation of the test prompts occurs in training prompts or in the corpus of the reference model. Nothing is known about
the true front: everything is sampled, with intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from paretune.errors import TaskError, nearest
from paretune.objectives.base import Objective, score_all
from paretune.objectives.models import Fluency
from paretune.objectives.terms import Declared, Terms
from paretune.registry import GIVEN, TASKS
from paretune.tasks.base import Task
from paretune.tasks.pretrained import load_pretrained
from paretune.tasks.reflection.language import SPLITS, prompt_of, statements
from paretune.tasks.reflection.objectives import Brevity, Empathy, Reflection
from paretune.types import Objectives, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["MODEL", "ReflectionTask"]

MODEL = Path(__file__).parent / "weights"  # made by tools/counsellor.py
MOST = 4096  # statements of a split
AIMS = {
    "reflection": Reflection(),
    "empathy": Empathy(),
    "brevity": Brevity(),
    "fluency": Fluency(model=str(MODEL), cap=8.0),
}


@TASKS.register("reflection")
@dataclass(frozen=True)
class ReflectionTask(Task):
    """Answer a client: give back what was said, name the feeling, be brief; `fluency` can be a fourth aim.

    seed: which statements are the prompts. `train_count`, `validation_count` and `test_count` say how many; situations (pairs of event
    and noun) of one split occur in no other. Aims may be any two or more of the four, in any order; each is scored in [0, 1].
    Hides: the language is a grammar of 29 events, and the objectives are word lists that know it: what is learned here says how
    methods trade objectives off on sampled text, and nothing about counselling.
    """

    aims: tuple[str, ...] = ("reflection", "empathy", "brevity")
    beta: float = 0.05
    max_new_tokens: int = 28
    train_count: int = 192
    validation_count: int = 64
    test_count: int = 64
    seed: int = 0
    terms: Declared | None = field(default=None, metadata=GIVEN)  # gated rewards, weights by step, targets, constraints

    def __post_init__(self):
        unknown = [aim for aim in self.aims if aim not in AIMS]
        if unknown or len(set(self.aims)) != len(self.aims) or len(self.aims) < 2:
            raise TaskError(
                f"aims are two or more different ones of {', '.join(AIMS)}",
                found=", ".join(self.aims) or "none",
                remedy=nearest(unknown[0], AIMS) if unknown else "leave it out for reflection, empathy and brevity",
            )
        ranges = {"beta": (self.beta, 1e-3, 10.0), "max_new_tokens": (self.max_new_tokens, 4, 64)}
        ranges |= {name: (getattr(self, name), 1, MOST) for name in ("train_count", "validation_count", "test_count")}
        for name, (value, low, high) in ranges.items():
            if not low <= value <= high:
                raise TaskError(
                    f"{name} lies between {low:g} and {high:g}", found=f"{name} = {value:g}", remedy=f"choose {name} in that range"
                )
        object.__setattr__(self, "terms", Terms.of(self.terms, self.aims))
        if self.terms is not None:
            self.terms.check(self.objectives)

    @property
    def objectives(self) -> Objectives:  # type: ignore[override]
        scorers = [scorer for _, scorer in self._scorers]
        return Objectives(names=self.aims, low=tuple(s.low for s in scorers), high=tuple(s.high for s in scorers))

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_pretrained(str(MODEL))

    def prompts(self, split: str) -> Sequence[Prompt]:
        return self._prompts[split]

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        return self.gated(score_all(self._scorers, prompts, completions))

    @cached_property
    def _prompts(self) -> dict[str, list[Prompt]]:
        counts = dict(zip(SPLITS, (self.train_count, self.validation_count, self.test_count), strict=True))
        return {
            split: [
                Prompt(text=prompt_of(s.text), columns={"statement": s.text, "feelings": list(s.feelings)})
                for s in statements(split, count, self.seed)
            ]
            for split, count in counts.items()
        }

    @property
    def _scorers(self) -> list[tuple[str, Objective]]:
        return [(aim, AIMS[aim]) for aim in self.aims]
