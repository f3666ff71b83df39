"""Objectives for counsellor reflection: whether an answer gives back what the client said, names the feeling, and is short.

They read words and nothing else: a small lexicon of synonyms, families of feelings, and signs of questions and advice. That makes them
fast, deterministic and open to inspection, and easy to satisfy without being understood; each says what it hides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from paretune.objectives.text import TextObjective, words_of
from paretune.registry import OBJECTIVES

__all__ = ["FEELINGS", "Brevity", "Empathy", "Reflection", "content_of", "feelings_in"]

FEELINGS: Mapping[str, tuple[str, ...]] = {  # family -> its words
    "angry": ("angry", "furious", "mad"),
    "frustrated": ("frustrated", "annoyed", "irritated"),
    "hurt": ("hurt", "betrayed", "wounded"),
    "sad": ("sad", "unhappy", "heartbroken"),
    "lonely": ("lonely", "isolated", "alone"),
    "anxious": ("anxious", "worried", "nervous", "afraid"),
    "overwhelmed": ("overwhelmed", "stressed", "swamped"),
    "tired": ("exhausted", "tired", "drained"),
    "guilty": ("guilty", "ashamed", "remorseful"),
    "confused": ("confused", "torn", "unsure"),
    "disappointed": ("disappointed", "discouraged", "dejected"),
    "proud": ("proud", "accomplished"),
    "happy": ("happy", "delighted", "joyful"),
    "relieved": ("relieved", "reassured"),
    "hopeful": ("hopeful", "excited", "optimistic"),
}
FAMILY = {word: family for family, words in FEELINGS.items() for word in words}

SYNONYMS = (  # words of one line may stand for each other; a word may be in several
    "fight argued disagree quarrel",
    "listens talk mention heard ignores say walks",
    "agree gave settled came round",
    "lost took longer gone",
    "got applied received gave yours",
    "finish complete due wants boss deadline",
    "tore pieces criticism criticised fault found",
    "praised loved admired impressed front everyone",
    "waiting come came news arrived",
    "good fine favour",
    "passed better hoped succeeded success",
    "failed disaster badly succeed",
    "coming face",
    "told everyone public made spread gave",
    "hide find keep know",
    "forgot missed slipped mind",
    "invite left kept wanted",
    "know sell want decide go back forth selling",
    "destroyed ruined wrecked ruins storm fire",
    "hospital doctors ill treated",
    "care needs look takes night",
    "start begins opens new",
    "someone turned gave another person got denied",
    "won prize took place earned award honoured",
    "laughed fun made mocked ridiculed",
    "injury knee body keeps stops cannot let going want",
    "time able once nothing lets stops want",
    "moved nobody calls know company friends around",
    "wants move going where",
    "sleep lie awake",
    "told kept quiet idea",
    "think mind follows",
    "understand see fails sympathy",
    "know say lack words",
    "cried saw tears",
    "yelled raised voice",
    "called know right away",
    "celebrated shared joy",
    "smile warms",
    "care cold",
)
STOP = frozenset(
    words_of(
        "a an the and or but so because that this it its is are was were be been being am i me my you your us we our he she they them "
        "his her their of to in on at by for from with about over towards into up down out off as if then than when whether how what "
        "which who do does did not no has have had will would can could may might must should there here now just very really quite too "
        "also feel sound sounds seem seems like makes leaves well honestly lately yes all some any more most much one day days still both "
        "end after since first finally again because often"
    )
)
TURNED = {"i": "you", "me": "you", "my": "your", "am": "are"}
ADVICE = re.compile(r"\b(should|try to|maybe you|perhaps you|why don't|why not|you could|you need to|let's|if i were)\b")
WARMTH = re.compile(r"\b(sorry|must be hard|hear you|thank you for|is a lot)\b")
VALIDATES = re.compile(r"\b(makes sense that you|no wonder you|anyone would|of course you|understandable|natural that you)\b")
NEGATIONS = frozenset(("not", "never", "no", "hardly", "don't"))
SENTENCE = re.compile(r"[.!?;\n]+")
COPIED = 6  # words in a row that make a copy


@lru_cache(maxsize=4096)
def meanings(word: str) -> frozenset[str]:
    """What a word may stand for: the lines of SYNONYMS that hold it, and itself."""
    return frozenset([word, *(line for line in SYNONYMS if word in line.split())])


def content_of(text: str) -> list[str]:
    """The words that carry what happened: neither function words nor feelings."""
    return [word for word in words_of(text) if word not in STOP and word not in FAMILY]


def feelings_in(text: str) -> list[str]:
    """Families of the feelings that are ascribed to the listener: in a sentence with "you", and not just after a negation."""
    found = []
    for sentence in SENTENCE.split(text):
        words = words_of(sentence)
        if {"you", "your", "anyone"} & set(words):
            before = ["", *words]
            found += [FAMILY[w] for w, last in zip(words, before, strict=False) if w in FAMILY and last not in NEGATIONS]
    return found


@OBJECTIVES.register("reflection")
@dataclass(frozen=True, kw_only=True)
class Reflection(TextObjective):
    """Whether the completion restates what the client said in other words: F1 of content words, times what is not to be done.

    Content words are those of the `column` without function words and feelings. A word of the completion is right where it, or a
    synonym from the lexicon, is in the statement; said twice, it is right once. Runs of `copied` words or more that stand in the
    statement, pronouns turned, cost their share of `parrot`. A question, advice, the client's own "my", and more than seven content words
    in ten halve the score, each.

    Source: reflective listening as coded for motivational interviewing (simple and complex reflections against questions and
        advice); the reward "reflection" of DynaOpt (2403.13578) and EMORL (2505.02579), which is a trained classifier.
    Differs: a lexicon, not a classifier: it needs no model and can be read.
    Hides: who did what to whom is not read, so a sentence with the right words in a wrong order scores as the right one. Words outside
        of the lexicon are their own only synonym, which is strict on texts from elsewhere.
    """

    column: str = "statement"
    copied: int = COPIED
    parrot: float = 0.75

    def __post_init__(self):
        super().__post_init__()
        if self.copied < 2 or not 0 <= self.parrot <= 1:
            raise self.refuse(
                "copied is at least 2 words, parrot lies between 0 and 1",
                found=f"copied={self.copied}, parrot={self.parrot:g}",
                remedy="leave them out for 6 words and 0.75",
            )

    def needs(self) -> tuple[str, ...]:
        return (self.column,)

    def fraction(self, text: str, columns: dict[str, Any]) -> float | None:
        given = columns[self.column]
        if given is None or not content_of(str(given)):
            return None
        words = words_of(text)
        score = _overlap(content_of(text), content_of(str(given)))
        copied = _copied(_turned(words), _turned(words_of(str(given))), self.copied)
        score *= 1 - self.parrot * copied / max(1, len(words))
        faults = (
            "?" in text,
            ADVICE.search(text.casefold()) is not None,
            "my" in words or "me" in words,
            len(content_of(text)) > 0.7 * len(words),
        )
        return score * 0.5 ** sum(faults)


@OBJECTIVES.register("empathy", version=2)
@dataclass(frozen=True, kw_only=True)
class Empathy(TextObjective):
    """Whether the completion names what the client feels: the share of right ones among the feelings that it ascribes to "you".

    `column` is the family of feelings that is right, or lists several: the one that the client named, or those that the situation
    implies. Any word of a family will do. A right feeling that is also called natural ("no wonder you are ...") is worth 1, without
    that `named`; without any feeling, a formula of sympathy earns `formula`. Wrong ones count against it: one right and one wrong are
    half.

    Source: empathy as naming the client's feeling (reflection of feeling); the reward "empathy" of EMORL (2505.02579), a classifier.
    Differs: a list of words, not a classifier; what a situation implies was written down with the task, not judged.
    Hides: tone, timing and truth: a feeling named coldly counts. Words outside of the fifteen families are no feelings.
    """

    column: str = "feelings"
    named: float = 0.8
    formula: float = 0.15

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.formula < self.named <= 1:
            raise self.refuse(
                "0 <= formula < named <= 1",
                found=f"formula={self.formula:g}, named={self.named:g}",
                remedy="leave them out for 0.15 and 0.8",
            )

    def needs(self) -> tuple[str, ...]:
        return (self.column,)

    def fraction(self, text: str, columns: dict[str, Any]) -> float | None:
        given = columns[self.column]
        right = [given] if isinstance(given, str) else given
        if not given:
            return None
        named = set(feelings_in(text))
        if not named:
            return self.formula if WARMTH.search(text.casefold()) else 0.0
        worth = 1.0 if VALIDATES.search(text.casefold()) else self.named
        return worth * len(named & set(right)) / len(named)


@OBJECTIVES.register("brevity")
@dataclass(frozen=True, kw_only=True)
class Brevity(TextObjective):
    """Shorter is better, down to a floor: 1 for `floor` words, half as much for each `half` words more; words / floor below it.

    Source: a length penalty with a half-life, as `length`; the floor is ours.
    Differs: `length` with target 0 is best satisfied by saying nothing; here nothing is worth nothing.
    Hides: which words. Any phrase of `floor` words is perfect, so that alone it asks for a stock phrase.
    """

    floor: int = 4
    half: float = 8.0

    def __post_init__(self):
        super().__post_init__()
        if self.floor < 1 or not self.half > 0:
            raise self.refuse(
                "floor is at least 1 word, half is positive",
                found=f"floor={self.floor}, half={self.half:g}",
                remedy="leave them out for 4 and 8 words",
            )

    def fraction(self, text: str, columns: dict[str, Any]) -> float:
        count = len(words_of(text))
        return count / self.floor if count < self.floor else float(2.0 ** (-(count - self.floor) / self.half))


def _overlap(said: Sequence[str], wanted: Sequence[str]) -> float:
    """F1 of content words up to synonyms. What is said again is wrong the second time."""
    if not said:
        return 0.0
    meant = frozenset().union(*(meanings(word) for word in said))
    recall = sum(bool(meanings(word) & meant) for word in dict.fromkeys(wanted)) / len(dict.fromkeys(wanted))
    known = frozenset().union(*(meanings(word) for word in wanted))
    precision = sum(bool(meanings(word) & known) for word in dict.fromkeys(said)) / len(said)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _turned(words: Sequence[str]) -> list[str]:
    """The client's pronouns as the counsellor would say them."""
    return [TURNED.get(word, word) for word in words]


def _copied(words: Sequence[str], source: Sequence[str], least: int) -> int:
    """How many of `words` lie in runs of `least` or more that stand in `source`."""
    runs = {tuple(source[i : i + least]) for i in range(len(source) - least + 1)}
    covered: set[int] = set()
    for start in range(len(words) - least + 1):
        if tuple(words[start : start + least]) in runs:
            covered.update(range(start, start + least))
    return len(covered)
