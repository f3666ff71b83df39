"""Rows of a file: JSON lines, a JSON array, CSV or Parquet, checked one by one. Every mistake names the file and the line or row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paretune.errors import ConfigError

__all__ = ["Row", "read_rows", "short"]

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
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            "the prompt file can be read",
            found=f"{path}: {error.strerror}",
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
    except pa.ArrowException as error:
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
            row = json.loads(line, parse_constant=_no_constant)
        except ValueError as error:
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
        items = json.loads(text, parse_constant=_no_constant)
    except ValueError as error:
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


def _no_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def short(text: str) -> str:
    """At most 80 characters of it."""
    return text if len(text) <= 80 else text[:77] + "..."
