"""Atomic writes, and errors of the disk as messages with a remedy."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from paretune.errors import StoreError

__all__ = ["disk_errors", "is_disk_full", "no_room", "write_json"]

ASIDE = ".aside-"  # a file that is being written
FULL = (errno.ENOSPC, errno.EDQUOT)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write strict JSON, one line per entry: beside `path`, forced to disk, then renamed, so that readers never see a part of it."""
    dumps = functools.partial(json.dumps, allow_nan=False, ensure_ascii=False)
    _write(path, "{\n" + ",\n".join(f"{dumps(name)}: {dumps(entry)}" for name, entry in value.items()) + "\n}\n")


@contextlib.contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """Turn what the operating system says about the disk into a StoreError with a way out."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        if is_disk_full(error):
            raise no_room(root, error) from error
        raise StoreError(
            "the run directory can be read and written",
            found=f"{error.filename or root}: {error.strerror or error}",
            remedy="check its permissions and its disk, or give another --root",
        ) from error


def no_room(root: Path, error: BaseException) -> StoreError:
    """What to say, and to do, when the disk is full."""
    return StoreError(
        "the run directory has room on its disk",
        found=f"{root}: {error}",
        remedy="free some space and run the same command again: what is published and every checkpoint is kept",
    )


def is_disk_full(error: BaseException | None) -> bool:
    """True where the error, or one that it came from, says that the disk or the quota is full (also in the words of safetensors)."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in FULL) or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _write(path: Path, text: str) -> None:
    aside = path.with_name(ASIDE + path.name)
    with open(aside, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(aside, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Force a file's content, or a directory's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
