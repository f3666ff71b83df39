"""Objectives that only look at the text: its length, its format, its words. Cheap, deterministic, and easy to satisfy badly.

Each computes a fraction in [0, 1] and stretches it to [low, high]. They read completions in both of TRL's forms.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from paretune.errors import ConfigError
from paretune.objectives.base import Objective, text_of
from paretune.registry import OBJECTIVES

__all__ = ["Format", "Length", "Lexical"]

WORD = re.compile(r"\w+(?:['’]\w+)*")


def words_of(text: str) -> list[str]:
    """Lower-case words: runs of letters, digits and underscores, with apostrophes inside them."""
    return WORD.findall(text.casefold())


@dataclass(frozen=True, kw_only=True)
class TextObjective(Objective):
    """What the built-in objectives share: a range, and a fraction per completion that is stretched to it."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        self.check_range()

    @abstractmethod
    def fraction(self, text: str, columns: dict[str, Any]) -> float | None:
        """A number in [0, 1] for one completion, given its own item of every column; None where it cannot be scored."""

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        needed = {name: columns[name] for name in self.needs()}
        scores: list[float | None] = []
        for row, completion in enumerate(completions):
            fraction = self.fraction(text_of(completion), {name: values[row] for name, values in needed.items()})
            scores.append(None if fraction is None else self.squashed(fraction))
        return scores

    def refuse(self, rule: str, *, found: str, remedy: str) -> ConfigError:
        return ConfigError(f"objective {self.registered_name}: {rule}", found=found, remedy=remedy)


@OBJECTIVES.register("length")
@dataclass(frozen=True, kw_only=True)
class Length(TextObjective):
    """How close the length is to `target`: the fraction 2 ** (-|length - target| / half). With target 0, shorter is better.

    Source: a soft form of the length penalties used with most RL trainers; the half-life makes the number readable.
    Differs: bounded, and falling on both sides of the target, so that it can neither dominate the other objectives nor be farmed.
    Hides: with target 0 the empty completion is the best one; nothing is said about what the words mean. "tokens" are those of
    `completion_ids`, so two tokenizers give two scores, and whether EOS counts depends on who calls.
    """

    unit: Literal["characters", "words", "tokens"] = "words"
    target: float = 0.0
    half: float = 20.0

    def __post_init__(self):
        super().__post_init__()
        if not (self.half > 0 and self.target >= 0):
            raise self.refuse(
                "half is positive and target at least 0",
                found=f"half={self.half:g}, target={self.target:g}",
                remedy=f"half is the distance, in {self.unit}, at which the score has fallen by one half",
            )

    def needs(self) -> tuple[str, ...]:
        return ("completion_ids",) if self.unit == "tokens" else ()

    def fraction(self, text: str, columns: dict[str, Any]) -> float:
        if self.unit == "tokens":
            length = len(columns["completion_ids"])
        else:
            length = len(text) if self.unit == "characters" else len(text.split())
        return float(2.0 ** (-abs(length - self.target) / self.half))


@OBJECTIVES.register("format")
@dataclass(frozen=True, kw_only=True)
class Format(TextObjective):
    """Whether the completion has the wanted form: all of it matches `pattern`, or it is JSON (an object with `keys`, if given).

    Source: the format rewards of reasoning recipes (a regular expression over the whole completion), and JSON validity.
    Differs: the pattern is tried on the text without surrounding white space, and a dot matches line ends; with `keys`, a JSON object
    scores (1 + its share of the keys) / 2, so that there is something to climb.
    Hides: any content passes. A pattern with nested repetition can take exponential time on an unlucky text.
    """

    pattern: str | None = None
    json: bool = False
    keys: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if (self.pattern is None) != self.json or (self.keys and not self.json):
            raise self.refuse(
                "either a pattern or json: true is wanted; keys go with json",
                found=f"pattern={self.pattern!r}, json={self.json}, keys={list(self.keys)}",
                remedy="give one of the two",
            )
        try:
            assert self.pattern is None or self.regex is not None
        except re.error as error:
            raise self.refuse(
                "the pattern is a Python regular expression",
                found=f"{self.pattern!r}: {error}",
                remedy="escape special characters with a backslash, and put the pattern in single quotes in YAML",
            ) from None

    @cached_property
    def regex(self) -> re.Pattern[str] | None:
        return None if self.pattern is None else re.compile(self.pattern, re.DOTALL)

    def fraction(self, text: str, columns: dict[str, Any]) -> float:
        if self.regex is not None:
            return float(self.regex.fullmatch(text.strip()) is not None)
        try:
            value = json.loads(text, parse_constant=_not_json)
        except (ValueError, RecursionError):
            return 0.0
        if not self.keys:
            return 1.0
        return (1 + sum(key in value for key in self.keys) / len(self.keys)) / 2 if isinstance(value, dict) else 0.0


@OBJECTIVES.register("lexical")
@dataclass(frozen=True, kw_only=True)
class Lexical(TextObjective):
    """Which words are used. What is looked for comes from `keywords`, or from a `column` of the prompts (a text, or a list of them).

    `measure` is "contains" (the share of the phrases that occur as whole words, whatever their case), "overlap" (F1 of the words,
    with their counts, against those of the column or keywords) or "distinct" (different n-grams of words / n-grams of words, for
    `n` words: 1 where nothing repeats). With `avoid` the fraction is turned round.

    Source: F1 of words as in question answering (SQuAD); distinct-n of Li et al., 1510.03055.
    Differs: distinct-n is per completion, not over a corpus; a completion with fewer than n words repeats nothing and gets 1.
    Hides: words are counted, not understood: a list of the keywords scores as a sentence does. An empty completion has no
    repetition and avoids every word. A column that is empty for a prompt leaves its completions unscored.
    """

    measure: Literal["contains", "overlap", "distinct"] = "contains"
    keywords: tuple[str, ...] = ()
    column: str | None = None
    n: int = 2
    avoid: bool = False

    def __post_init__(self):
        super().__post_init__()
        sources = (bool(self.keywords)) + (self.column is not None)
        if self.measure == "distinct" and (sources or self.n < 1):
            raise self.refuse(
                "distinct looks at the completion alone, in runs of n >= 1 words",
                found=f"keywords={list(self.keywords)}, column={self.column!r}, n={self.n}",
                remedy="leave keywords and column out",
            )
        if self.measure != "distinct" and sources != 1:
            raise self.refuse(
                f"{self.measure} looks for keywords or for a column of the prompts: exactly one of them",
                found=f"keywords={list(self.keywords)}, column={self.column!r}",
                remedy="for example keywords: [thank you, sorry], or column: answer",
            )
        if any(not words_of(phrase) for phrase in self.keywords):
            raise self.refuse("every keyword has a word in it", found=repr(list(self.keywords)), remedy="remove the empty one")

    def needs(self) -> tuple[str, ...]:
        return () if self.column is None else (self.column,)

    def fraction(self, text: str, columns: dict[str, Any]) -> float | None:
        found = self._found(words_of(text), columns)
        return 1.0 - found if self.avoid and found is not None else found

    def _found(self, words: list[str], columns: dict[str, Any]) -> float | None:
        if self.measure == "distinct":
            runs = [tuple(words[i : i + self.n]) for i in range(len(words) - self.n + 1)]
            return len(set(runs)) / len(runs) if runs else 1.0
        phrases = self._phrases(columns)
        if not phrases:
            return None
        if self.measure == "contains":
            return sum(_occurs(phrase, words) for phrase in phrases) / len(phrases)
        wanted, used = Counter(word for phrase in phrases for word in phrase), Counter(words)
        return 2 * (wanted & used).total() / (wanted.total() + used.total())

    def _phrases(self, columns: dict[str, Any]) -> list[list[str]]:
        given = self.keywords if self.column is None else columns[self.column]
        if given is None:
            return []
        listed = [given] if isinstance(given, str) or not isinstance(given, Sequence) else given
        return [words for words in (words_of(str(phrase)) for phrase in listed if phrase is not None) if words]


def _occurs(phrase: list[str], words: list[str]) -> bool:
    return any(words[i : i + len(phrase)] == phrase for i in range(len(words) - len(phrase) + 1))


def _not_json(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")
