"""Prompts of one's own: read from JSON lines, CSV or a `datasets` name, checked line by line, and split for testing.

Every mistake in a file names the file and the line. A prompt is plain text or a list of chat messages; all the columns of its row
go to the objectives by name.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from paretune.errors import ConfigError, nearest
from paretune.objectives import RESERVED
from paretune.seeds import seed_for
from paretune.types import Prompt

__all__ = ["PromptSource", "read_rows"]

Row = tuple[str, dict[str, Any]]  # where it stands ("prompts.jsonl, line 3"), and its columns
MESSAGES = '[{"role": "user", "content": "..."}]'


@dataclass(frozen=True, kw_only=True)
class PromptSource:
    """Where prompts come from: a file (`path`) or a `dataset` (a hub name or a local folder that `datasets` can load)."""

    path: str | None = None  # .jsonl, .json (one object per line) or .csv
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str = "prompt"  # its values are texts, or lists of messages
    template: str | None = None  # e.g. "Customer: {prompt}\nReply:", in place of `column`
    chat: bool = False  # wrap a plain text as one user message
    system: str | None = None  # with chat: a system message before it
    test: str | float = 0.2  # a share of the prompts, or another file, or another split of the dataset
    seed: int = 0  # which prompts are for testing
    limit: int | None = None  # only the first ones of each file or split

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
        if self.system is not None and not self.chat:
            raise ConfigError("a system message goes with chat: true", found="chat: false", remedy="add chat: true to prompts")
        if self.limit is not None and self.limit < 1:
            raise ConfigError("limit is at least 1", found=f"limit={self.limit}", remedy="leave limit out to use every prompt")

    @cached_property
    def splits(self) -> Mapping[str, tuple[Prompt, ...]]:
        """{"train": prompts, "test": prompts}, in the order of their file. No prompt is in both."""
        prompts = self._read(self.path or self.dataset, self.split)
        if not isinstance(self.test, str):
            return _split(prompts, share=self.test, seed=self.seed)
        test = self._read(self.test, self.split) if self.dataset is None else self._read(self.dataset, self.test)
        common = {p.digest for p in prompts} & {p.digest for p in test}
        if common:
            raise ConfigError(
                "no prompt is used for training and for testing",
                found=f"{len(common)} prompts are in both",
                remedy="remove them from one, or give a share, for example test: 0.2, and one file",
            )
        return {"train": prompts, "test": test}

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that objectives are offered: those that every prompt has."""
        prompts = [*self.splits["train"], *self.splits["test"]]
        return tuple(name for name in prompts[0].columns if all(name in p.columns for p in prompts))

    @property
    def conversational(self) -> bool:
        return self.splits["train"][0].messages is not None

    def content(self) -> dict[str, str]:
        """Split -> hash of its prompts and all their columns."""
        return {name: _digest(prompts) for name, prompts in self.splits.items()}

    def _read(self, place: str | None, split: str) -> tuple[Prompt, ...]:
        assert place is not None
        rows = read_rows(Path(place).expanduser()) if self.dataset is None else self._dataset_rows(split)
        prompts = tuple(self._prompt(where, row) for where, row in itertools.islice(rows, self.limit))
        name = Path(place).name if self.dataset is None else f"{place}, split {split}"
        if not prompts:
            raise ConfigError(
                "there is at least one prompt", found=f"none in {name}", remedy="write one JSON object per line, or choose another file"
            )
        if len({p.messages is None for p in prompts}) > 1:
            raise ConfigError(
                "the prompts are all texts or all lists of messages", found=f"both in {name}", remedy="write the texts as " + MESSAGES
            )
        return prompts

    def _dataset_rows(self, split: str) -> Iterator[Row]:
        import datasets

        try:
            rows = datasets.load_dataset(self.dataset, self.config, split=split, revision=self.revision)
        except Exception as error:  # a dozen kinds, from the network, the hub, the file formats and the names of splits
            raise ConfigError(
                "the prompts' dataset can be loaded",
                found=f"{self.dataset!r}, config {self.config!r}, split {split!r}: {type(error).__name__}: {error}",
                remedy="check the names with datasets.load_dataset; without a network the dataset must be a folder, or in the cache",
            ) from error
        return ((f"{self.dataset}, split {split}, row {place}", dict(row)) for place, row in enumerate(rows))

    def _prompt(self, where: str, row: dict[str, Any]) -> Prompt:
        value = self._value(where, row)
        columns = {name: item for name, item in row.items() if name not in RESERVED}
        if isinstance(value, str):
            if not value.strip():
                raise ConfigError("a prompt has some text", found=f"an empty one in {where}", remedy="remove that line")
            if not self.chat:
                return Prompt(text=value, columns=columns)
            value = [{"role": "user", "content": value}]
            if self.system is not None:
                value.insert(0, {"role": "system", "content": self.system})
        _check_messages(where, value)
        return Prompt(messages=tuple(value), columns=columns)

    def _value(self, where: str, row: dict[str, Any]) -> Any:
        wanted = [self.column] if self.template is None else _names_in(self.template)
        for name in wanted:
            if name not in row:
                raise ConfigError(
                    f"every prompt has the column {name!r}" + ("" if self.template is None else ", which the template names"),
                    found=f"the columns {', '.join(map(repr, row)) or 'of an empty object'} in {where}",
                    remedy=f"name it with column: ({nearest(name, map(str, row))})",
                )
        return row[self.column] if self.template is None else self.template.format_map(row)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSON-lines or CSV file; ConfigError, with the line, at the first that is broken."""
    readers = {".jsonl": _json_rows, ".json": _json_rows, ".ndjson": _json_rows, ".csv": _csv_rows}
    if path.suffix.lower() not in readers:
        raise ConfigError("prompts are JSON lines (.jsonl) or CSV (.csv)", found=path.name, remedy="convert the file, or rename it")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            "the prompt file can be read",
            found=f"{path}: {error.strerror}",
            remedy="paths in a recipe are relative to the recipe's own folder",
        ) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(
            "prompt files are UTF-8", found=f"{path.name}, line {line}: byte {data[error.start]:#x}", remedy="save the file as UTF-8"
        ) from None
    return readers[path.suffix.lower()](path.name, text)


def _json_rows(name: str, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: a JSON string may hold U+2028
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            row = json.loads(line, parse_constant=_no_constant)
        except ValueError as error:
            raise ConfigError(
                "every line of a JSON-lines file is one JSON object",
                found=f"{where}: {error}",
                remedy=f"mend that line: {_short(line)}",
            ) from None
        if not isinstance(row, dict):
            raise ConfigError(
                "every line of a JSON-lines file is one JSON object",
                found=f"{where}: a {type(row).__name__}",
                remedy='write {"prompt": "..."} on one line per prompt',
            )
        yield where, row


def _csv_rows(name: str, text: str) -> Iterator[Row]:
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


def _names_in(template: str) -> list[str]:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(
            "a template is text with {column} in it", found=f"{template!r}: {error}", remedy="write a literal brace twice: {{ or }}"
        ) from None
    if not names:
        raise ConfigError("a template names at least one column", found=repr(template), remedy='for example "Question: {prompt}"')
    return names


def _check_messages(where: str, value: Any) -> None:
    good = isinstance(value, Sequence) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )
    if not good or not value or value[-1]["role"] == "assistant":
        raise ConfigError(
            "a prompt is a text, or messages of which the last is not the assistant's",
            found=f"{_short(json.dumps(value, default=str, ensure_ascii=False))} in {where}",
            remedy="write " + MESSAGES,
        )


def _split(prompts: tuple[Prompt, ...], *, share: float, seed: int) -> dict[str, tuple[Prompt, ...]]:
    """Whole groups of equal prompts go to one side; each draws its own place, so adding prompts moves few of the others."""
    distinct = sorted({p.digest for p in prompts}, key=lambda digest: seed_for(seed, "test split", digest))
    if len(distinct) < 2:
        raise ConfigError(
            "a share for testing needs at least two different prompts",
            found=f"{len(distinct)}",
            remedy="add prompts, or name a file of test prompts with test:",
        )
    held = set(distinct[: min(max(1, round(share * len(distinct))), len(distinct) - 1)])
    return {
        "train": tuple(p for p in prompts if p.digest not in held),
        "test": tuple(p for p in prompts if p.digest in held),
    }


def _digest(prompts: Sequence[Prompt]) -> str:
    rows = [[p.text, p.messages, p.columns] for p in prompts]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()[:20]


def _no_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
