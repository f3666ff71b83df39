"""A first recipe for a model and a file of prompts: what can be read off them, and shipped objectives to begin with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretune.errors import ConfigError
from paretune.hub import check_pretrained, is_local
from paretune.runs.config import dump
from paretune.tasks.pretrained import context_length, load_tokenizer
from paretune.tasks.prompts import PromptSource, chat_text, read_rows, read_transcript

__all__ = ["Proposal", "propose"]

PROMPTS = ("prompt", "messages", "question", "instruction", "conversation", "conversations", "query", "problem", "input", "text", "chosen")
ANSWERS = ("answer", "final_answer", "solution", "ground_truth", "label", "target", "reference")
BRIEF = 200  # characters: a longer reference is a text, and not an answer that a program compares
VALIDATION, FEW = 32, 64  # prompts set apart, where there are more than FEW
ANSWER, LONG = 64, 128  # tokens of an answer, to a text and in a conversation


@dataclass(frozen=True)
class Proposal:
    """The recipe's text, and in sentences what was found."""

    text: str
    remarks: list[str]


def propose(model: str, prompts: Path, out: Path) -> Proposal:
    """A recipe to be written to `out`. ConfigError where the model, or the file, cannot be one of a recipe."""
    if is_local(model):
        model = str(Path(model).expanduser())
    check_pretrained(model)
    rows = [row for _, row in read_rows(prompts)]
    if not rows:
        raise ConfigError("there is at least one prompt", found=f"none in {prompts}", remedy="write one JSON object per line")
    tokenizer, folder = load_tokenizer(model), out.resolve().parent
    column, form = _column(rows, prompts.name)
    source: dict[str, Any] = {"path": _from(folder, prompts), **({} if column == "prompt" else {"column": column})}
    if form == "transcript":
        source["transcript"] = "messages" if tokenizer.chat_template else "text"
    elif form == "text" and tokenizer.chat_template:
        source["chat"] = True
    elif form == "messages" and not tokenizer.chat_template:
        found, remedy = f"messages in {prompts.name}, and none in the tokenizer of {model}", "give a file of texts, or an instruct model"
        raise ConfigError("prompts made of messages need a tokenizer with a chat template", found=found, remedy=remedy)
    split = _splits(rows, column, prompts)
    read = PromptSource(**{**source, **split, "path": str(prompts)})
    source |= split | ({"test": _from(folder, Path(split["test"]))} if isinstance(split["test"], str) else {})
    lengths, limit, longest = _lengths(read, tokenizer, model)
    source |= {} if longest is None else {"longest": longest}
    names = [name for name in ANSWERS if all(_is_answer(row.get(name)) for row in rows)]
    answers = [name for name in names if max(len(str(row[name])) for row in rows) <= BRIEF]
    said = {"messages": "conversations", "text": "texts", "transcript": "transcripts"}[form]
    remarks = [f"{len(rows)} prompts, {said} in the column {column!r}, {_range(lengths)} tokens long"]
    remarks += ["the tokenizer has a chat template: a text becomes what a user says"] if source.get("chat") else []
    remarks += [f"prompts of more than {longest} characters are left out: they do not fit the model's context"] if longest else []
    remarks += [f"the column {answers[0]!r} holds answers: they are compared"] if answers else []
    place = _from(folder, Path(model)) if is_local(model) else model
    return Proposal(_text(place, source, answers[:1], limit, bool(tokenizer.chat_template)), remarks)


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[str, str]:
    """The column that holds prompts, and whether they are "messages", a "text" or a "transcript"."""
    forms = {key: form for key in rows[0] if (form := _form([row.get(key) for row in rows]))}
    if not forms:
        found = f"the columns {', '.join(map(repr, rows[0])) or 'of an empty object'} in {name}"
        raise ConfigError("a column holds prompts: texts, or lists of messages, in every row", found=found, remedy="name it prompt")
    known = [key for key in PROMPTS if key in forms]
    longest = max(forms, key=lambda key: sum(len(str(row[key])) for row in rows))
    column = known[0] if known else longest
    return column, forms[column]


def _form(values: Sequence[Any]) -> str | None:
    if all(isinstance(value, list) and value and all(isinstance(one, Mapping) and "role" in one for one in value) for value in values):
        return "messages"
    if not all(isinstance(value, str) and value.strip() for value in values):
        return None
    if all(value.lstrip().startswith("[") and '"role"' in value for value in values):
        return "messages"  # as a cell of a CSV file spells them
    try:
        for value in values:
            read_transcript("", value)
        return "transcript"
    except ConfigError:
        return "text"


def _is_answer(value: Any) -> bool:
    """Whether a program can compare it: 0 is an answer, true is a mark."""
    return value is not None and not isinstance(value, bool) and bool(str(value).strip())


def _splits(rows: Sequence[Mapping[str, Any]], column: str, prompts: Path) -> dict[str, Any]:
    """Test and validation prompts: a file of the same name with test for train, else a share; some set apart where there are many."""
    other = prompts.with_name(prompts.name.replace("train", "test"))
    found: dict[str, Any] = {"test": str(other)} if other != prompts and other.is_file() else {"test": 0.2}
    kept = len({str(row[column]) for row in rows})
    found |= {"validation": min(VALIDATION, kept // 8)} if kept > FEW else {}
    return found | ({"unique": True} if kept < len(rows) else {})


def _lengths(source: PromptSource, tokenizer: Any, model: str) -> tuple[list[int], int, int | None]:
    """Tokens of the prompts, the longest answer, and the longest prompt in characters, where some do not fit the context."""
    prompts = [prompt for split in source.splits.values() for prompt in split]
    texts = [str(p.text) if p.messages is None else chat_text(tokenizer, p.messages) for p in prompts]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    room, limit = context_length(model)[0], LONG if source.conversational else ANSWER
    if room is None or max(lengths) + limit <= room:
        return lengths, limit, None
    limit = min(limit, max(room // 2, 1))
    sizes = [len(p.text or "") + sum(len(m["content"]) for m in p.messages or ()) for p in prompts]
    too_long = [size for size, length in zip(sizes, lengths, strict=True) if length + limit > room]
    if min(too_long) <= min(sizes):
        found = f"the shortest of {min(lengths)} tokens, for a context of {room}"
        raise ConfigError(
            "prompt and answer fit into the model's context", found=found, remedy="shorten the prompts, or take another model"
        )
    return lengths, limit, min(too_long) - 1


def _from(folder: Path, path: Path) -> str:
    """A path as a recipe in `folder` writes it."""
    relative = os.path.relpath(path.resolve(), folder)
    return relative if relative.startswith("..") else f"./{relative}"


def _range(lengths: Sequence[int]) -> str:
    return " to ".join(map(str, dict.fromkeys((min(lengths), max(lengths)))))


def _line(key: str, value: Any) -> str:
    return dump({key: value})[1:-1]


def _text(model: str, source: Mapping[str, Any], answers: Sequence[str], limit: int, chat: bool) -> str:
    correct = [dump({"name": "correct", "use": "answer", "column": answers[0]})] if answers else []
    fluent = dump({"name": "fluent", "use": "fluency", "cap": 100})
    guards = ["guards:                        # looked at, never trained", f"  - {fluent}"] if correct else []
    system = ["  # system: Answer in one sentence.   # goes before every conversation"] if chat and source.get("chat") else []
    lines = [
        "# Written by `paretune init`. Paths are relative to this file; any value can be changed on the command line: beta=0.2.",
        "#   paretune preview RECIPE     prompts as the model sees them, and the rewards of real responses",
        "#   paretune fit RECIPE --dry-run, then paretune fit RECIPE",
        "",
        _line("model", model),
        "dtype: float32                 # or bfloat16, float16, auto",
        "",
        "prompts:",
        *(f"  {_line(key, value)}" for key, value in source.items()),
        *system,
        "",
        "objectives:                    # at least two; every one is maximized, and traded against the others",
        f"  - {dump({'name': 'brief', 'use': 'length', 'unit': 'words', 'target': 20, 'half': 20})}   # 1 at 20 words, 0.5 at 0 and 40",
        *(f"  - {one}" for one in correct or [fluent]),
        '  # - {name: own, use: "rewards.py:score", low: 0, high: 1}     # a function of yours, as for TRL: prompts, completions, columns',
        "  # - {name: good, use: reward-model, model: ./reward, low: -4, high: 4}",
        "  # - {name: helpful, use: judge, url: http://127.0.0.1:8000/v1, model: served, rubric: 1 is useless and 10 is perfect.}",
        *guards,
        "",
        "method: bridge                 # one expert per objective and a bridge between them; `paretune ls methods` has the others",
        "learner: {name: pg, samples: 6400}   # responses per training; `paretune show pg` has all settings",
        "beta: 0.1                      # what one nat of KL from the untrained model costs, in units of score",
        f"max_new_tokens: {limit}",
        "seed: 0",
        "output: runs                   # trainings, results and the finished family",
    ]
    return "\n".join(lines) + "\n"
