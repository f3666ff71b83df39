"""Prompts from files: JSON lines, a JSON array, CSV, Parquet or a `datasets` name, checked row by row, and split for testing.

A prompt is plain text, a list of chat messages, or a transcript ("Human: ... Assistant: ...", as the HH-RLHF data have them). All the
columns of its row go to the objectives by name. Every error names the file, and the line or row.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from paretune.errors import ConfigError, nearest
from paretune.hub import how_to_get, is_local
from paretune.objectives.base import RESERVED
from paretune.objectives.functions import names_in
from paretune.registry import GIVEN
from paretune.seeds import seed_for
from paretune.types import Prompt, canonical_json

__all__ = ["PromptSource", "Row", "Transcript", "as_prompt", "chat_text", "read_requests", "read_rows", "read_transcript", "short"]

REPLY = "reply"  # the column that takes what a transcript's assistant said last


KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function")  # a template that takes others names them


ADDRESS = re.compile(r"<.* at 0x[0-9a-fA-F]+")  # in the text of an object that says nothing else of itself
MESSAGES = '[{"role": "user", "content": "..."}]'


@dataclass(frozen=True, kw_only=True)
class PromptSource:
    """Where prompts come from: a file (`path`) or a `dataset` (a hub name or a local folder that `datasets` can load)."""

    path: str | None = None  # .jsonl, .json (an array, or one object per line), .csv or .parquet
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str = "prompt"  # its values are texts, or lists of messages
    map: dict[str, str] = field(default_factory=dict)  # new column: where it is, as {answer: reward_model.ground_truth}
    transcript: Literal["text", "messages"] | None = None  # the column holds "Human: ... Assistant: ..."; its last words become `reply`
    template: str | None = None  # e.g. "Customer: {prompt}\nReply:", in place of `column`
    chat: bool = False  # wrap a plain text as one user message
    system: str | None = None  # with chat: a system message before it
    test: str | float = 0.2  # a share of the prompts, or another file, or another split of the dataset
    validation: str | int = 0  # so many of the others, or another file or split: trainings are watched on them and never trained
    unlabelled: str | None = field(default=None, metadata=GIVEN)  # another file or split, without rewards: see `learner.unlabelled`
    seed: int = 0  # which prompts are for testing and validation
    limit: int | None = None  # only the first ones of each file or split
    shortest: int = 0  # characters of a prompt; shorter ones are left out
    longest: int | None = None  # characters of a prompt; longer ones are left out
    unique: bool = False  # keep one of equal prompts, and of those for training and testing the one for training
    skip: bool = False  # leave out rows without a usable prompt, instead of stopping at the first

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self):
        if (self.path is None) == (self.dataset is None):
            raise ConfigError(
                "prompts come from a path or from a dataset",
                found=f"path={self.path!r}, dataset={self.dataset!r}",
                remedy="give one of them, for example prompts: {path: prompts.jsonl}",
            )
        if not isinstance(self.test, str) and not 0 < self.test < 1:
            raise ConfigError(
                "the share of test prompts lies between 0 and 1",
                found=f"test={self.test}",
                remedy="for example test: 0.2, or the name of a file of test prompts",
            )
        if not isinstance(self.validation, str) and self.validation < 0:
            raise ConfigError(
                "validation is a number of prompts, a file or a split",
                found=f"validation={self.validation}",
                remedy="for example validation: 32",
            )
        if self.system is not None and not self.chat:
            raise ConfigError("a system message goes with chat: true", found="chat: false", remedy="add chat: true to prompts")
        if self.limit is not None and self.limit < 1:
            raise ConfigError("limit is at least 1", found=f"limit={self.limit}", remedy="leave limit out to use every prompt")
        if self.transcript is not None and (self.template is not None or self.chat):
            raise ConfigError(
                "a transcript is the whole prompt",
                found=f"transcript: {self.transcript} with {'chat' if self.chat else 'template'}",
                remedy="transcript: messages gives a conversation for the chat template, transcript: text leaves it as it is",
            )

    @cached_property
    def splits(self) -> Mapping[str, tuple[Prompt, ...]]:
        """{"train": prompts, "test": prompts}, "validation" and "unlabelled" where asked for, in the file's order; none is in two."""
        prompts = self._read(self.path or self.dataset, self.split)
        found = {"train": prompts}
        if isinstance(self.test, str):
            found |= self._other("test", self.test, found)
        else:
            found = _split(prompts, share=self.test, seed=self.seed)
        if isinstance(self.validation, str):
            found |= self._other("validation", self.validation, found)
        elif self.validation:
            found |= _taken(found["train"], self.validation, seed=self.seed)
        if self.unlabelled is not None:
            read = (self.column,) if self.template is None else names_in(self.template)  # other columns are the objectives'
            bare = replace(self, map={name: place for name, place in self.map.items() if name in read})
            found |= bare._other("unlabelled", self.unlabelled, found)
            self.left_out.update(bare.left_out)
        self._one_form([prompt for those in found.values() for prompt in those], ", ".join(found))
        return found

    def _other(self, name: str, place: str, known: Mapping[str, Sequence[Prompt]]) -> dict[str, tuple[Prompt, ...]]:
        """The prompts of another file or split, which are in none of the `known`."""
        prompts = self._read(place, self.split) if self.dataset is None else self._read(self.dataset, place)
        for other, others in known.items():
            seen, doing = {p.digest for p in others}, {"train": "training", "test": "testing"}
            if self.unique:
                self.left_out[f"used for {doing.get(other, other)}"] += sum(p.digest in seen for p in prompts)
                prompts = tuple(p for p in prompts if p.digest not in seen)
                self._some(prompts, place)
            if common := seen & {p.digest for p in prompts}:
                instead = "a share, for example test: 0.2, and one file" if name == "test" else "a number, for example validation: 32"
                instead = "other prompts" if name == "unlabelled" else instead
                raise ConfigError(
                    f"no prompt is used for {doing.get(other, other)} and for {doing.get(name, name)}",
                    found=f"{len(common)} prompts are in both",
                    remedy=f"remove them from one, set unique: true, or give {instead}",
                )
        return {name: prompts}

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that objectives are offered: those that every prompt has which they score."""
        prompts = [prompt for split, those in self.splits.items() if split != "unlabelled" for prompt in those]
        return tuple(name for name in prompts[0].columns if all(name in p.columns for p in prompts))

    @property
    def conversational(self) -> bool:
        return self.splits["train"][0].messages is not None

    @cached_property
    def left_out(self) -> Counter[str]:
        """Reason -> rows that became no prompt; filled by reading `splits`."""
        return Counter()

    def content(self) -> dict[str, str]:
        """Split -> hash of its prompts and all their columns."""
        return {name: _digest(prompts) for name, prompts in self.splits.items()}

    def _read(self, place: str | None, split: str) -> tuple[Prompt, ...]:
        assert place is not None
        rows = read_rows(Path(place).expanduser()) if self.dataset is None else self._dataset_rows(split)
        name = Path(place).name if self.dataset is None else f"{place}, split {split}"
        prompts = tuple(itertools.islice(self._kept(rows), self.limit))
        self._some(prompts, name)
        self._one_form(prompts, name)
        return prompts

    def _one_form(self, prompts: Sequence[Prompt], name: str) -> None:
        if len({p.messages is None for p in prompts}) > 1:
            raise ConfigError(
                "the prompts are all texts or all lists of messages", found=f"both in {name}", remedy="write the texts as " + MESSAGES
            )

    def _some(self, prompts: Sequence[Prompt], name: str) -> None:
        if not prompts:
            left_out = ", ".join(f"{reason}: {count}" for reason, count in self.left_out.items())
            raise ConfigError(
                "there is at least one prompt",
                found=f"none in {name}" + (f" (left out: {left_out})" if left_out else ""),
                remedy="write one JSON object per line, or choose another file",
            )

    def _kept(self, rows: Iterator[Row]) -> Iterator[Prompt]:
        """The prompts that pass the filters, in order; the others are counted."""
        seen: set[str] = set()
        for where, row in rows:
            try:
                prompt = self._prompt(where, self._mapped(where, row))
            except ConfigError:
                if not self.skip:
                    raise
                self.left_out["no prompt"] += 1
                continue
            length = len(prompt.text or "") + sum(len(m["content"]) for m in prompt.messages or ())
            digest = prompt.digest if self.unique else ""
            if length < self.shortest:
                self.left_out["too short"] += 1
            elif self.longest is not None and length > self.longest:
                self.left_out["too long"] += 1
            elif self.unique and digest in seen:
                self.left_out["repeated"] += 1
            else:
                seen.add(digest)
                yield prompt

    def _mapped(self, where: str, row: dict[str, Any]) -> dict[str, Any]:
        """The row with the columns of `map`; a place reads `column.key.key`, with numbers for the items of a list."""
        made = {}
        for name, wanted in self.map.items():
            value: Any = row
            for step in [wanted] if wanted in row else wanted.split("."):
                known = [str(n) for n in range(len(value))] if isinstance(value, list) else list(value) if isinstance(value, dict) else []
                if step not in known:
                    raise ConfigError(
                        f"every prompt has what the column {name!r} is mapped to, {wanted}",
                        found=f"no {step!r}; there are {', '.join(map(repr, known[:12])) or 'no keys'} in {where}",
                        remedy=f"correct map: ({nearest(step, known)})" if known else "correct map:",
                    )
                value = value[int(step)] if isinstance(value, list) else value[step]
            made[name] = value
        return {**row, **made}

    def _dataset_rows(self, split: str) -> Iterator[Row]:
        import datasets

        try:
            rows = datasets.load_dataset(self.dataset, self.config, split=split, revision=self.revision)
        except Exception as error:  # a dozen kinds, from the network, the hub, the file formats and the names of splits
            name = str(self.dataset)
            local = "check the folder, config: and split: with datasets.load_dataset"
            raise ConfigError(
                "the prompts' dataset can be loaded",
                found=f"{name!r}, config {self.config!r}, split {split!r}: {type(error).__name__}: {error}",
                remedy=local if is_local(name) else how_to_get(name, key="dataset", revision=self.revision, data=True),
            ) from error
        return ((f"{self.dataset}, split {split}, row {place}", dict(row)) for place, row in enumerate(rows))

    def _prompt(self, where: str, row: dict[str, Any]) -> Prompt:
        _check_characters(where, json.dumps(row, ensure_ascii=False, default=str))
        value = self._value(where, row)
        columns = {name: item for name, item in row.items() if name not in RESERVED}
        if self.transcript is not None:
            if not isinstance(value, str):
                raise ConfigError("a transcript is a text", found=f"a {type(value).__name__} in {where}", remedy="leave transcript: out")
            read = read_transcript(where, value)
            columns[REPLY] = read.reply
            return Prompt(text=read.text, columns=columns) if self.transcript == "text" else Prompt(messages=read.messages, columns=columns)
        return as_prompt(where, value, chat=self.chat, system=self.system, columns=columns)

    def _value(self, where: str, row: dict[str, Any]) -> Any:
        wanted = [self.column] if self.template is None else names_in(self.template)
        for name in wanted:
            if name not in row:
                raise ConfigError(
                    f"every prompt has the column {name!r}" + ("" if self.template is None else ", which the template names"),
                    found=f"the columns {', '.join(map(repr, row)) or 'of an empty object'} in {where}",
                    remedy=f"{'name it with column:' if self.template is None else 'correct template:'} ({nearest(name, map(str, row))})",
                )
            if row[name] is None:
                raise ConfigError("a prompt has some text", found=f"nothing in the column {name!r} of {where}", remedy="remove that line")
        if self.template is None:
            return row[self.column]
        try:
            return self.template.format_map(row)
        except (ValueError, TypeError, AttributeError, LookupError) as error:  # {n:.1f} where n is a text, and its like
            raise ConfigError(
                "every prompt fits the template",
                found=f"{type(error).__name__}: {error} in {where}",
                remedy=f"correct that line, or template: {self.template!r}",
            ) from None


def as_prompt(where: str, value: Any, *, chat: bool, system: str | None = None, columns: Mapping[str, Any] | None = None) -> Prompt:
    """A text or a list of messages as a prompt; ConfigError, with the place, for what is neither.

    Under `chat` a text is one user message. `system` becomes a message before the others.
    """
    value = _messages_in(where, value)
    if isinstance(value, str):
        if not value.strip():
            raise ConfigError("a prompt has some text", found=f"an empty one in {where}", remedy="remove that line")
        if not chat:
            return Prompt(text=value, columns=columns or {})
        value = [{"role": "user", "content": value}]
    _check_messages(where, value)
    value = [{key: item for key, item in message.items() if item is not None} for message in value]  # structs have all rows' keys
    if system is not None:
        if any(message["role"] == "system" for message in value):
            raise ConfigError(
                "a conversation has one system message",
                found=f"one in {where}, and system: beside it",
                remedy="leave system: out, or remove the system messages from the prompts",
            )
        value = [{"role": "system", "content": system}, *value]
    return Prompt(messages=tuple(value), columns=columns or {})


def read_requests(path: Path) -> list[Any]:
    """The texts and conversations of a file whose rows have a column `prompt` or `messages`, for those who sample."""
    found = []
    for where, row in read_rows(path):
        values = [row[name] for name in ("prompt", "messages") if row.get(name) is not None]
        if len(values) != 1:
            raise ConfigError(
                "a prompt to sample from stands in the column prompt or messages",
                found=f"{'both' if values else ', '.join(map(repr, row)) or 'no columns'} in {where}",
                remedy='write {"prompt": "..."} or {"messages": ' + MESSAGES + "} on one line per prompt",
            )
        found.append(values[0])
    return found


def _messages_in(where: str, value: Any) -> Any:
    """The value; of a text that spells a list of messages (as a cell of a CSV file must), that list."""
    if not isinstance(value, str):
        return value
    if not re.match(r"\s*\[\s*\{", value) or not re.search(r"['\"]role['\"]", value):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            "messages that stand in a text are JSON",
            found=f"{short(value)} in {where}: {error}",
            remedy="write the column with json.dumps (Python's own spelling of a list is not JSON), or use JSON lines",
        ) from None


def _check_characters(where: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            "a prompt is text that can be written as UTF-8",
            found=f"half of a surrogate pair, {text[error.start]!r}, in {where}",
            remedy="write the character itself, or remove that line",
        ) from None


def _check_messages(where: str, value: Any) -> None:
    good = isinstance(value, Sequence) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )
    if not good or not value or value[-1]["role"] == "assistant":
        raise ConfigError(
            "a prompt is a text, or messages of which the last is not the assistant's",
            found=f"{short(json.dumps(value, default=str, ensure_ascii=False))} in {where}",
            remedy="write " + MESSAGES,
        )
    for message in value:
        _check_characters(where, message["content"])
    try:
        canonical_json([dict(message) for message in value])
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "a message holds what JSON can",
            found=f"{error}, beside role and content in {where}",
            remedy="write dates as texts, or leave these keys out of the messages",
        ) from None


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation under the tokenizer's chat template, the assistant's turn opened; ConfigError where it has no place for a message."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise ConfigError(
            "prompts made of messages need a tokenizer with a chat template",
            found=f"{type(tokenizer).__name__} without one",
            remedy="give plain text prompts, or set tokenizer.chat_template",
        )

    def told(given: Sequence[Mapping[str, str]]) -> str:
        return str(tokenizer.apply_chat_template([dict(message) for message in given], tokenize=False, add_generation_prompt=True))

    try:
        text = told(messages)
        for place, message in enumerate(messages):
            if message["role"] not in KNOWN_ROLES and message["role"] not in str(template):
                raise ValueError(f"the template does not name the role {message['role']!r}")
            # What the assistant said may lose its thinking, and what a tool said may be quoted.
            if message["role"] in KNOWN_ROLES[:3] and message["content"].strip() not in text:
                raise ValueError(f"the template drops what {message['role']} said: {short(message['content'].strip())!r}")
            if message["role"] in KNOWN_ROLES[4:]:  # what is quoted is found by the difference that other words make
                other = {**message, "content": f"{message['content']} and more"}
                if told([*messages[:place], other, *messages[place + 1 :]]) == text:
                    raise ValueError(f"the template drops what {message['role']} said: {short(message['content'].strip())!r}")
        return text
    except Exception as error:  # a template is a program: it raises what it likes
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise ConfigError(
            "a conversation fits the model's chat template",
            found=f"roles {roles}: {type(error).__name__}: {error}",
            remedy="change the messages: some templates take no system message, or want user and assistant in turn",
        ) from error


def _split(prompts: tuple[Prompt, ...], *, share: float, seed: int) -> dict[str, tuple[Prompt, ...]]:
    """Whole groups of equal prompts go to one side; each draws its own place, so adding prompts moves few of the others."""
    order = _order(prompts, "test split", seed)
    if len(order) < 2:
        raise ConfigError(
            "a share for testing needs at least two different prompts",
            found=f"{len(order)}",
            remedy="add prompts, or name a file of test prompts with test:",
        )
    return _held(prompts, "test", order[: min(max(1, round(share * len(order))), len(order) - 1)])


def _taken(prompts: tuple[Prompt, ...], count: int, *, seed: int) -> dict[str, tuple[Prompt, ...]]:
    """`count` of the training prompts for validation, in the same way; one is left at least."""
    order = _order(prompts, "validation split", seed)
    if count >= len(order):
        raise ConfigError(
            "prompts for validation leave some for training",
            found=f"validation: {count} of {len(order)} different prompts",
            remedy="ask for fewer, or name a file of them",
        )
    return _held(prompts, "validation", order[:count])


def _order(prompts: Sequence[Prompt], stream: str, seed: int) -> list[str]:
    """The different prompts, by digest, in the order in which they are held back."""
    return sorted({p.digest for p in prompts}, key=lambda digest: seed_for(seed, stream, digest))


def _held(prompts: Sequence[Prompt], name: str, digests: Sequence[str]) -> dict[str, tuple[Prompt, ...]]:
    held = set(digests)
    return {"train": tuple(p for p in prompts if p.digest not in held), name: tuple(p for p in prompts if p.digest in held)}


def _digest(prompts: Sequence[Prompt]) -> str:
    rows = [[p.text, p.messages, p.columns] for p in prompts]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=_named).encode()).hexdigest()[:20]


def _named(value: Any) -> Any:
    """What names a value that JSON does not have: the content of an array or an image, the text of anything else, such as a date."""
    if hasattr(value, "tobytes") and getattr(value, "ndim", None) != 0:  # numpy shortens the text of a long array
        form = [str(getattr(value, name, "")) for name in ("dtype", "mode", "shape", "size")]
        return [type(value).__name__, *form, hashlib.sha256(value.tobytes()).hexdigest()]
    if ADDRESS.match(text := str(value)):
        raise ConfigError(
            "columns of prompts hold values that are the same in the next run",
            found=text,
            remedy="drop that column from the data, or write its values as texts",
        )
    return text


Row = tuple[str, dict[str, Any]]  # where it stands ("prompts.jsonl, line 3"), and its columns


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file; ConfigError, with the line, at the first that is broken."""
    readers = {".jsonl": _json_rows, ".json": _json_rows, ".ndjson": _json_rows, ".csv": _csv_rows}
    suffix = path.suffix.lower()
    if suffix not in (*readers, ".parquet"):
        raise ConfigError(
            "prompts are JSON lines (.jsonl), JSON (.json), CSV (.csv) or Parquet (.parquet)",
            found=path.name,
            remedy="convert the file, or rename it",
        )
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EISDIR, "not a regular file")
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise ConfigError(
            "the prompt file can be read",
            found=f"{printable(path)}: {getattr(error, 'strerror', None) or error}",
            remedy="paths in a recipe are relative to the recipe's own folder",
        ) from None
    if suffix == ".parquet":
        return _parquet_rows(path.name, data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(
            "prompt files are UTF-8", found=f"{path.name}, line {line}: byte {data[error.start]:#x}", remedy="save the file as UTF-8"
        ) from None
    return readers[suffix](path.name, text)


def _parquet_rows(name: str, data: bytes) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        batches = pq.ParquetFile(io.BytesIO(data)).iter_batches()
        rows = [row for batch in batches for row in batch.to_pylist()]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(
            "a Parquet file can be read",
            found=f"{name}: {' '.join(str(error).split())[:120]}",
            remedy="download or write it again; an LFS pointer of 130 bytes is not the file",
        ) from None
    return ((f"{name}, row {place}", row) for place, row in enumerate(rows))


def _json_rows(name: str, text: str) -> Iterator[Row]:
    if text.lstrip().startswith("[") and name.lower().endswith(".json"):
        yield from _array_rows(name, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: a JSON string may hold U+2028
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            row = _json(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                "every line of a JSON-lines file is one JSON object",
                found=f"{where}: {error}",
                remedy=f"mend that line: {short(line)}",
            ) from None
        if not isinstance(row, dict):
            raise ConfigError(
                "every line of a JSON-lines file is one JSON object",
                found=f"{where}: a {type(row).__name__}",
                remedy='write {"prompt": "..."} on one line per prompt',
            )
        yield where, row


def _array_rows(name: str, text: str) -> Iterator[Row]:
    try:
        items = _json(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError("a JSON file can be parsed", found=f"{name}: {error}", remedy="mend it there, or write JSON lines") from None
    for place, row in enumerate(items):
        if not isinstance(row, dict):
            raise ConfigError(
                "a JSON array of prompts holds objects",
                found=f"{name}, item {place}: a {type(row).__name__}",
                remedy='write [{"prompt": "..."}, ...]',
            )
        yield f"{name}, item {place}", row


def _csv_rows(name: str, text: str) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # of all readers: 131,072 characters are less than some prompts have
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    try:
        for fields in reader:
            where = f"{name}, line {reader.line_num}"
            if not any(fields):
                continue
            if not header:
                header = fields
                if len(set(header)) != len(header) or "" in header:
                    raise ConfigError(
                        "the columns of a CSV file have distinct names", found=f"{where}: {', '.join(header)}", remedy="rename one"
                    )
            elif len(fields) != len(header):
                raise ConfigError(
                    "every line of a CSV file has as many fields as its header",
                    found=f"{where}: {len(fields)} fields for {len(header)} columns",
                    remedy="put texts that hold commas or line ends in double quotes",
                )
            else:
                yield where, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise ConfigError(
            "prompts in CSV can be parsed", found=f"{name}, line {reader.line_num}: {error}", remedy="check the quotes on that line"
        ) from None


def _json(text: str) -> Any:
    """JSON in which no key stands twice and every number is one."""
    return json.loads(text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_distinct)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key {Counter(name for name, _ in pairs).most_common(1)[0][0]!r} stands twice")
    return found


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _no_constant(text)


def _no_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def printable(path: Path) -> str:
    """A path as a message shows it: control characters as their escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(path))


def short(text: str) -> str:
    """At most 80 characters of it."""
    return text if len(text) <= 80 else text[:77] + "..."


TURN = re.compile(r"(?:^|\n\n)[ \t]*(Human|Assistant):")


ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Transcript:
    """A conversation up to the place where the assistant speaks last, and what it said there ("" where it has yet to speak)."""

    messages: tuple[dict[str, str], ...]
    text: str  # the same as the file wrote it, ending in "Assistant:"
    reply: str


def read_transcript(where: str, text: str) -> Transcript:
    """Cut a transcript before the assistant's last words; ConfigError, with the place, where it is none."""
    marks = list(TURN.finditer(text))
    turns = []
    for place, mark in enumerate(marks):
        said = text[mark.end() : marks[place + 1].start() if place + 1 < len(marks) else None]
        turns.append((ROLES[mark[1]], said.strip()))
    begins = bool(marks) and not text[: marks[0].start()].strip()
    if not begins or "user" not in [role for role, _ in turns] or turns[-1][0] != "assistant":
        raise ConfigError(
            "a transcript reads Human: ... Assistant: ..., each after an empty line, and ends with the assistant",
            found=f"{short(text.strip()) or 'an empty text'!r} in {where}",
            remedy="leave transcript: out for other texts, or remove that line",
        )
    messages = tuple({"role": role, "content": said} for role, said in turns[:-1])
    return Transcript(messages=messages, text=text[: marks[-1].end()], reply=turns[-1][1])
