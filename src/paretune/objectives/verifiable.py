"""Objectives that check the completion against a known answer: the final answer of a calculation, and calls of tools.

Each computes a fraction in [0, 1] and stretches it to [low, high]; nothing is run, and no model is asked.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from paretune.errors import shown
from paretune.objectives.text import TextObjective
from paretune.registry import OBJECTIVES

__all__ = ["Answer", "Limit", "ToolCall", "final_answer", "same_answer"]

NUMBER = re.compile(r"[-+\u2212]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\w))?")  # 1,234 or 1e-05
FRACTION = re.compile(r"([-+]?)\\[dt]?frac\{?([-+]?\d+)\}?\{?(\d+)\}?|([-+]?\d+)/(\d+)")
STATED = re.compile(r"(?:final answer|answer)\s*(?:is\s*[:=]?|:|=)\s*(.+)", re.IGNORECASE)
AFTER = re.compile(r"\s*(?:[.,;!?*$)](?!\d)|$|(?<=\s)[A-Za-z]{2})")  # what may follow a number that is the whole answer
WORDS = re.compile(r"\\(?:text|mathrm)\{((?:\\.|[^{}\\]|\{[^{}]*\})*)\}")
DRESSING = re.compile(r"\\(?:left|right|[!,;()\[\]]|\s)|\^?\{?\\circ\}?|[$\s]")
DIGITS = 1000  # of a number that is read; a model that repeats itself writes longer ones than Python converts
CALLS = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


@OBJECTIVES.register("answer", version=3)
@dataclass(frozen=True, kw_only=True)
class Answer(TextObjective):
    """1 where the final answer equals the one in `column`, else 0.

    The final answer is what stands in the last \\boxed{...}, in the last <answer> tag, after the last "answer is" or ####, whichever comes
    later, or (with `anywhere`) the last number. Numbers and fractions are equal by value; everything else by its characters without spaces
    and dressing. The column may hold the answer alone, a solution that ends in one of these forms, or a list of such, of which any counts.

    Source: exact match of final answers, as for GSM8K (2110.14168) and MATH (2103.03874).
    Differs: no computer algebra: x+1 and 1+x differ; a percent sign, a unit in \\text{} beside something else and thousands
    separators are ignored.
    Hides: a lucky guess counts, a right calculation with a slip in the last line does not. A reference without an answer leaves the
    completion unscored.
    """

    column: str = "answer"
    anywhere: bool = False  # take the last number where no form announces the answer

    def needs(self) -> tuple[str, ...]:
        return (self.column,)

    def fraction(self, text: str, columns: dict[str, Any]) -> float | None:
        given = columns[self.column]
        listed = [given] if isinstance(given, str) or not isinstance(given, Sequence) else given
        wanted = [str(one) for one in listed if one is not None and str(one).strip()]
        if not wanted:
            return None
        found = final_answer(text, anywhere=self.anywhere)
        return float(found is not None and any(same_answer(found, final_answer(one) or one) for one in wanted))


@OBJECTIVES.register("tool-call", version=2)
@dataclass(frozen=True, kw_only=True)
class ToolCall(TextObjective):
    """Calls of tools in the form <think>...</think>, then <tool_call> with one JSON object per line, then <response>...</response>.

    `measure` is "format" (1 where the completion has exactly the parts that the reference in `column` has, in this order, else 0) or
    "correct": of 1 point for the names of the tools, and for each wanted call 1 for the names of its parameters and 1 for each value,
    the share that was earned. Names are compared as multisets, by intersection over union. Without a readable call it is 0. For "correct"
    the column may also hold the calls themselves, as a mapping or a list of them, or its JSON: {name, parameters} or
    {function: {name, arguments}}, in which arguments may be a text in JSON.

    Source: the rewards of ToolRL (2504.13958), format in {0, 1} and correctness in [-3, 3]; set low and high so.
    Differs: wanted and found calls are matched as well as possible, not greedily in order; "arguments" is read as "parameters";
    white space between the parts is free; a reference without calls wants none, where the source gives 0 whatever is said.
    Hides: nothing is run: a call that would work with other values is wrong. A reference with a call that cannot be read leaves the
    completion unscored.
    """

    column: str = "answer"
    measure: Literal["format", "correct"] = "correct"

    def needs(self) -> tuple[str, ...]:
        return (self.column,)

    def fraction(self, text: str, columns: dict[str, Any]) -> float | None:
        given = _from_json(columns[self.column])
        if given is None:
            return None
        if self.measure == "format":
            if not isinstance(given, str):
                remedy = 'name a column of texts, or measure: "correct"'
                raise self.refuse('measure "format" compares with a text', found=shown(given), remedy=remedy)
            return float(_well_formed(text, call="<tool_call>" in given, response="<response>" in given))
        wanted = _calls(given) if isinstance(given, str) else self._listed(given)
        if wanted is None and "<tool_call>" in given:
            return None
        if not wanted:
            return float("<tool_call>" not in text)
        found = _calls(text)
        return 0.0 if found is None else _agreement(wanted, found)

    def _listed(self, given: Any) -> list[tuple[str, dict[str, Any]]]:
        """The calls of a column that holds no text."""
        listed = [given] if isinstance(given, Mapping) or not isinstance(given, Sequence) else given
        found = [call for one in listed if (call := _call(_unwrapped(one))) is not None]
        if len(found) < len(listed):
            remedy = 'write {"name": "...", "parameters": {...}}, or a text with <tool_call>'
            raise self.refuse(f"column {self.column!r} holds calls of tools", found=shown(given), remedy=remedy)
        return found


@OBJECTIVES.register("limit")
@dataclass(frozen=True, kw_only=True)
class Limit(TextObjective):
    """1 where the completion is at most `most` long, else 0.

    Source: the length reward of GDPO (2601.05242): 1 within a limit, for reasoning 4,000 tokens.
    Differs: nothing; "tokens" are those of `completion_ids`, so whether EOS counts depends on who calls.
    Hides: a step has no slope: where all or none of a group keep to it, nothing is learned from it (see `length` for a slope).
    """

    most: int
    unit: Literal["characters", "words", "tokens"] = "tokens"

    def __post_init__(self):
        super().__post_init__()
        if self.most < 1:
            raise self.refuse("most is at least 1", found=f"most={self.most}", remedy="most: 4000, for example")

    def needs(self) -> tuple[str, ...]:
        return ("completion_ids",) if self.unit == "tokens" else ()

    def fraction(self, text: str, columns: dict[str, Any]) -> float:
        if self.unit == "tokens":
            return float(len(columns["completion_ids"]) <= self.most)
        return float((len(text) if self.unit == "characters" else len(text.split())) <= self.most)


def final_answer(text: str, *, anywhere: bool = False) -> str | None:
    """What `text` announces as its answer; None where it announces nothing."""
    boxed = _boxed(text)
    if boxed is not None:
        return boxed
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    if tagged:
        return str(tagged[-1]).strip()
    _, marked, after = text.rpartition("####")  # GSM8K's mark, or a heading
    stated = STATED.findall(after)
    if marked and not stated:
        return after.strip().split("\n")[0].strip()
    if stated:
        said = str(stated[-1]).strip().strip("*$ ")
        number = NUMBER.match(said)
        alone = number is not None and AFTER.match(said[number.end() :])
        return number[0] if number and alone else said.rstrip(".")
    numbers = NUMBER.findall(text) if anywhere else []
    return numbers[-1] if numbers else None


def same_answer(found: str, wanted: str) -> bool:
    """By value where both are numbers, else by their characters."""
    values = [_value(text) for text in (found, wanted)]
    if None not in values:
        return values[0] == values[1]
    plain = [_plain(text) for text in (found, wanted)]
    return plain[0] == plain[1] != ""


def _boxed(text: str) -> str | None:
    """The contents of the last \\boxed{...}, braces inside it included."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for place in range(begin - 1, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return text[begin:place].strip()
    return None


def _plain(text: str) -> str:
    """Without dressing. Words in \\text{} are a unit beside something else, and the answer where they stand alone."""
    return _bare(WORDS.sub("", text)) or _bare(WORDS.sub(r"\1", text))


def _bare(text: str) -> str:
    text = DRESSING.sub("", text)
    for written, meant in (("\\%", ""), ("%", ""), ("dfrac", "frac"), ("tfrac", "frac"), ("\u2212", "-")):
        text = text.replace(written, meant)
    return text.rstrip(".").casefold()


def _value(text: str) -> Fraction | None:
    plain = _plain(text)
    if len(plain) > DIGITS:
        return None
    fraction = FRACTION.fullmatch(plain)
    if fraction:
        sign, above, below, top, bottom = fraction.groups()
        numerator, denominator = int(above or top), int(below or bottom)
        return None if denominator == 0 else Fraction(numerator, denominator) * (-1 if sign == "-" else 1)
    return Fraction(plain.replace(",", "")) if NUMBER.fullmatch(plain) else None


def _well_formed(text: str, *, call: bool, response: bool) -> bool:
    """<think>, then <tool_call> where `call`, then <response> where `response`; each once, and nothing between or around them."""
    parts = [r"<think>.*?</think>", *[r"<tool_call>\s*.+?\s*</tool_call>"] * call, *[r"<response>.*?</response>"] * response]
    whole = re.fullmatch(r"\s*".join(parts), text.strip(), re.DOTALL) is not None
    counts = {"think": 1, "tool_call": int(call), "response": int(response)}
    return whole and all(text.count(f"<{tag}>") == text.count(f"</{tag}>") == count for tag, count in counts.items())


def _calls(text: str) -> list[tuple[str, dict[str, Any]]] | None:
    """(name, parameters) of every call; None where the text has none, or one that cannot be read."""
    blocks = CALLS.findall(text)
    lines = [line.strip() for block in blocks for line in block.strip().splitlines() if line.strip()]
    found = []
    for line in lines:
        try:
            call = _call(json.loads(line))
        except (ValueError, RecursionError):
            return None
        if call is None:
            return None
        found.append(call)
    return found or None


def _from_json(given: Any) -> Any:
    """The value; of a text that spells a list or a mapping in JSON (as a cell of a CSV file must), that."""
    if not isinstance(given, str) or not given.lstrip().startswith(("[", "{")):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError):
        return given


def _unwrapped(given: Any) -> Any:
    """A call of a column: in messages of OpenAI's API it stands under "function", and its arguments are a text in JSON."""
    call = _without_none(given)
    if not isinstance(call, Mapping):
        return call
    call = call.get("function", call)
    return {key: _from_json(value) if key == "arguments" else value for key, value in call.items()} if isinstance(call, Mapping) else call


def _without_none(value: Any) -> Any:
    """Rows of structs have the keys of all rows, at any depth: what a row has not is None there."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list | tuple) else value


def _call(given: Any) -> tuple[str, dict[str, Any]] | None:
    """(name, parameters) of {name, parameters or arguments}; None for anything else."""
    parameters = given.get("parameters", given.get("arguments", {})) if isinstance(given, Mapping) else None
    if not isinstance(parameters, Mapping) or not isinstance(given.get("name"), str):
        return None
    return given["name"], dict(parameters)


def _agreement(wanted: Sequence[tuple[str, dict[str, Any]]], found: Sequence[tuple[str, dict[str, Any]]]) -> float:
    """In [0, 1], by the points of the class's docstring."""
    from scipy.optimize import linear_sum_assignment

    points = np.array([[_points(w, f) for f in found] for w in wanted])
    rows, columns = linear_sum_assignment(points, maximize=True)
    earned = _overlap([name for name, _ in wanted], [name for name, _ in found]) + points[rows, columns].sum()
    return float(earned / (1 + sum(1 + len(given) for _, given in wanted)))


def _points(wanted: tuple[str, dict[str, Any]], found: tuple[str, dict[str, Any]]) -> float:
    if wanted[0] != found[0]:
        return 0.0
    right = sum(name in found[1] and found[1][name] == value for name, value in wanted[1].items())
    return _overlap(list(wanted[1]), list(found[1])) + right


def _overlap(a: Sequence[str], b: Sequence[str]) -> float:
    """Intersection over union of multisets; 1 for two empty ones."""
    first, second = Counter(a), Counter(b)
    union = (first | second).total()
    return (first & second).total() / union if union else 1.0
