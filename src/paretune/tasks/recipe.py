"""The task of a recipe: your own model, prompts and objectives. `runs.recipes.recipe` reads the file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from paretune.errors import ConfigError, nearest
from paretune.objectives.base import Objective, check_callable, score_all
from paretune.objectives.terms import Declared, Terms
from paretune.registry import GIVEN, OBJECTIVES, TASKS, describe
from paretune.tasks.base import Task
from paretune.tasks.pretrained import check_pretrained, check_quantize, content_of, context_length, load_pretrained, load_tokenizer
from paretune.tasks.prompts import PromptSource, chat_text
from paretune.types import Objectives, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["RecipeTask"]

CHARACTERS = 64  # of one token, at most: far more than those of texts, so that what is longer is no matter of the tokenizer


@TASKS.register("recipe")
@dataclass(frozen=True, kw_only=True)
class RecipeTask(Task):
    """A causal LM, prompts and objectives of one's own. Returns are sampled: nothing is known about the true front.

    Each objective and guard reads {name, use, low, high, fields...}: `use` is a built-in objective or `file.py:function`.
    Hides: scores are raw, so an objective with a wide range outweighs one with a narrow range at equal weights.
    """

    model: str  # a directory, a GGUF file, or a name on the hub
    prompt_source: PromptSource
    objective_specs: tuple[dict[str, Any], ...]
    guard_specs: tuple[dict[str, Any], ...] = ()  # the same, for scores that are looked at and never trained
    revision: str | None = None
    beta: float = 0.1  # units of return per nat of KL from the reference
    max_new_tokens: int = 64
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    quantize: Literal["4bit", "8bit", "torchao-int8"] | None = None  # load the base in so many bits; None: as the checkpoint is
    trust_remote_code: bool = False
    terms: Declared | None = field(default=None, metadata=GIVEN)  # gated rewards, weights by step, targets, constraints

    def __post_init__(self):
        if not (self.beta > 0 and math.isfinite(self.beta)):
            raise ConfigError(
                "beta, the price of one nat of KL, is positive",
                found=f"beta={self.beta:g}",
                remedy="0.05 to 0.3 suits scores within [0, 1]",
            )
        if self.max_new_tokens < 1:
            raise ConfigError("an answer has room for a token", found=f"max_new_tokens={self.max_new_tokens}", remedy="try 64")
        if len(self.objective_specs) < 2:
            raise ConfigError(
                "a trade-off needs at least two objectives",
                found=", ".join(_name_of(s) for s in self.objective_specs) or "none",
                remedy="add one under objectives:, for example {name: brief, use: length}",
            )
        names, guards = ([_name_of(spec) for spec in specs] for specs in (self.objective_specs, self.guard_specs))
        object.__setattr__(self, "terms", Terms.of(self.terms, names, guards))

    @cached_property
    def scorers(self) -> tuple[tuple[str, Objective], ...]:
        """(name, objective) in the order of axis M."""
        return _scorers(self.objective_specs)

    @cached_property
    def objectives(self) -> Objectives:  # type: ignore[override]
        return _objectives(self.scorers)

    @cached_property
    def guarding(self) -> tuple[tuple[str, Objective], ...]:
        """As `scorers`, of the guards."""
        return _scorers(self.guard_specs)

    @cached_property
    def guards(self) -> Objectives | None:  # type: ignore[override]
        if not self.guarding:
            return None
        _objectives((*self.scorers, *self.guarding))  # names that are not taken
        return _objectives(self.guarding)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.model, revision=self.revision, trust_remote_code=self.trust_remote_code)

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        trusted = self.trust_remote_code
        return load_pretrained(self.model, revision=self.revision, dtype=self.dtype, quantize=self.quantize, trust_remote_code=trusted)

    def prompts(self, split: str) -> Sequence[Prompt]:
        if split not in self.prompt_source.splits:
            raise ConfigError("the prompts are split", found=repr(split), remedy=nearest(split, self.prompt_source.splits))
        return self.prompt_source.splits[split]

    def validation(self) -> Sequence[Prompt]:
        return self.prompt_source.splits.get("validation", ())

    def unlabelled(self, count: int) -> Sequence[Prompt]:
        return self.prompt_source.splits.get("unlabelled", ())[:count]

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        """(N, M) raw scores, gated by the terms. `completion_ids` are the completions tokenized again, without special tokens."""
        asked = {when.reward for when in ((self.terms and self.terms.when) or {}).values()}
        guards = [(name, guard) for name, guard in self.guarding if name in asked]
        rewards_NM = self._score([*self.scorers, *guards], prompts, completions)
        m = len(self.scorers)
        return self.gated(rewards_NM[:, :m], {name: rewards_NM[:, m + g] for g, (name, _) in enumerate(guards)})

    def score_guards(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        return self._score(self.guarding, prompts, completions)

    def _score(self, scorers: Sequence[tuple[str, Objective]], prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        ids = self.tokenizer(list(completions), add_special_tokens=False)["input_ids"] if len(completions) else []
        return score_all(scorers, prompts, completions, completion_ids=ids)

    def trusts(self, *, scoring: bool = True) -> tuple[str, ...]:
        own = (f"the code of the model {self.model}",) if self.trust_remote_code else ()
        return own + tuple(one for _, objective in (*self.scorers, *self.guarding) if scoring for one in objective.trusts())

    def base(self) -> Mapping[str, Any]:
        """Without `trust_remote_code`: a family that one was given must not decide to run code."""
        base = {"model": self.model, "revision": self.revision, "dtype": self.dtype}
        return base if self.quantize is None else base | {"quantize": self.quantize}

    def prompt_form(self) -> Mapping[str, Any]:
        """Of conversations, with the system message that all of them begin with, if they do."""
        if not self.prompt_source.conversational:
            return {}
        firsts = [(prompt.messages or ({},))[0] for prompt in self.prompts("train")]
        systems = {first.get("content") if first.get("role") == "system" else None for first in firsts}
        return {"chat": True, "system": systems.pop() if len(systems) == 1 else None}

    def content(self) -> dict[str, Any]:
        """Hashes of the prompts, of the local weights (or the hub's commit), and each objective with the hashes of its files."""
        return self._content

    @cached_property
    def _content(self) -> dict[str, Any]:
        return {
            "prompts": self.prompt_source.content(),
            "objectives": {name: describe(objective) for name, objective in self.scorers},
            "model": content_of(self.model, self.revision),
            **({"guards": {name: describe(objective) for name, objective in self.guarding}} if self.guarding else {}),
        }

    def check(self) -> None:
        """Everything that can be found wrong before a model is loaded; raises ConfigError. Asked again, it costs nothing."""
        assert self._checked

    @cached_property
    def _checked(self) -> bool:
        check_pretrained(self.model)
        check_quantize(self.model, self.quantize, revision=self.revision, trust_remote_code=self.trust_remote_code)
        columns = self.prompt_source.columns
        assert self.objectives.count == len(self.scorers)
        assert self.guards is None or self.guards.count
        if self.guards is not None and len({prompt.digest for prompt in self.validation()}) == 1:
            raise ConfigError(
                "guards are judged by how much they change over prompts for validation, two at least",
                found=f"one prompt for validation, and the guards {', '.join(self.guards.names)}",
                remedy="set more apart, for example validation: 32 in prompts; or leave the guards out",
            )
        if self.terms is not None:
            self.terms.check(self.objectives, self.guards)
        for name, objective in (*self.scorers, *self.guarding):
            check_callable(name, objective, columns)
        if self.prompt_source.conversational and not self.tokenizer.chat_template:
            raise ConfigError(
                "prompts made of messages need a tokenizer with a chat template",
                found=f"none in the tokenizer of {self.model}",
                remedy="give plain texts, for example with template:, or save a chat template with the tokenizer",
            )
        self._check_lengths()
        return True

    def _check_lengths(self) -> None:
        room, why = context_length(self.model, revision=self.revision, trust_remote_code=self.trust_remote_code)
        prompts = [prompt for split in self.prompt_source.splits.values() for prompt in split]
        if self.prompt_source.conversational:
            texts = [chat_text(self.tokenizer, p.messages or ()) for p in prompts]
        else:
            texts = [str(p.text) for p in prompts]
        longest = max(map(len, texts))
        if room is not None and longest > CHARACTERS * room:  # a tokenizer would take minutes for what cannot fit
            raise ConfigError(
                "prompt and answer fit into the model's context",
                found=f"a prompt of {longest} characters for a context of {room} tokens",
                remedy="shorten the prompts, or leave them out with longest:",
            )
        lengths = [len(ids) for ids in self.tokenizer(texts)["input_ids"]]
        if min(lengths) == 0:
            raise ConfigError(
                "a prompt has at least one token", found=repr(texts[lengths.index(0)]), remedy="remove it, or use another tokenizer"
            )
        if room is not None and max(lengths) + self.max_new_tokens > room:
            raise ConfigError(
                "prompt and answer fit into the model's context",
                found=f"a prompt of {max(lengths)} tokens + max_new_tokens {self.max_new_tokens} > {room} ({why})",
                remedy="shorten the prompts, or lower max_new_tokens",
            )


def _scorers(specs: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, Objective], ...]:
    return tuple((_name_of(spec), _objective(spec)) for spec in specs)


def _objectives(scorers: Sequence[tuple[str, Objective]]) -> Objectives:
    low, high = (tuple(float(getattr(objective, bound)) for _, objective in scorers) for bound in ("low", "high"))
    return Objectives(tuple(name for name, _ in scorers), low, high)


def _name_of(spec: Mapping[str, Any]) -> str:
    use = str(spec.get("use", ""))
    return str(spec.get("name") or use.rpartition(":")[2] or "unnamed")


def _objective(spec: Mapping[str, Any]) -> Objective:
    """From {name, use, low, high, fields...}."""
    given = {key: value for key, value in spec.items() if key not in ("name", "use")}
    use = spec.get("use")
    if not isinstance(use, str):
        raise ConfigError(
            "an objective says what it uses",
            found=f"{_name_of(spec)!r} with {', '.join(spec)}",
            remedy=f"use: rewards.py:function, or one of {', '.join(n for n in OBJECTIVES if n != 'function')}",
        )
    if ":" not in use:
        return OBJECTIVES.build({**given, "name": use})
    missing = [bound for bound in ("low", "high") if bound not in given]
    if missing:
        raise ConfigError(
            f"objective {_name_of(spec)!r}: a function of your own comes with its range",
            found=f"no {' and no '.join(missing)}",
            remedy="add low: and high:, the worst and the best score that it gives",
        )
    return OBJECTIVES.build({**given, "name": "function", "use": use})
