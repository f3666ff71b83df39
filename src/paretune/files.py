"""Files that survive what can happen to them: written aside, forced to disk and renamed; hashed, and compared when they are read.

What replaces something is on the disk before that goes: content first, then the rename, then the folder's list of names. Trouble with
the disk becomes one StoreError (`disk_errors`).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from paretune.errors import ConfigError, ParetuneError, StoreError
from paretune.types import canonical_json

__all__ = [
    *("ASIDE", "card_problems", "changed", "check_new", "digest", "disk_errors", "force", "force_names", "hashes_of", "is_disk_full"),
    *("is_sealed", "manifest", "new_file", "new_folder", "no_room", "note", "read_json", "read_manifest", "remove"),
    *("seal", "seal_problems", "sealed", "write_json", "write_text"),
]

ASIDE = ".aside-"  # a file or folder that is being written, or on its way out
FULL = (errno.ENOSPC, errno.EDQUOT)
SYSTEM = re.compile(r"\(os error \d+\)")  # how libraries in Rust word what the operating system said
RUN = "the run directory"


# Writing


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write strict JSON, one line per entry: beside `path`, forced to disk, then renamed, so that readers never see a part of it."""
    dumps = functools.partial(json.dumps, allow_nan=False, ensure_ascii=False)
    write_text(path, "{\n" + ",\n".join(f"{dumps(name)}: {dumps(entry)}" for name, entry in value.items()) + "\n}\n")


def write_text(path: Path, text: str) -> None:
    """Write the whole file or nothing; into a device or a pipe directly. Raises OSError: see `disk_errors`."""
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_text(text, encoding="utf-8")
        return
    with new_file(path) as aside:
        aside.write_bytes(text.encode())


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Where to write what becomes `path` at the end of the block, forced to disk before."""
    path = path.resolve()  # a link stays one
    aside = path.with_name(ASIDE + path.name)
    try:
        yield aside
        if path.is_file():
            shutil.copymode(path, aside)
        _sync(aside)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def check_new(path: Path, rule: str) -> None:
    """ConfigError where a folder that is made at the end of long work is there already, with something in it."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(rule, found=f"{path} exists", remedy="choose another name, or remove it")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` at the end of the block, whole or not at all.

    Where `path` holds something, every file takes the place of the one of its name, and other files stay. So it is in the root of another
    disk, such as a volume of a container, which cannot be renamed.
    """
    path = path.resolve()
    filled = path.is_dir() and (any(path.iterdir()) or os.path.ismount(path))
    aside = path / f"{ASIDE}new" if filled else path.with_name(f".wip-{path.name}")
    remove(aside)  # of a process that was killed
    try:
        aside.mkdir(parents=True)
        yield aside
        force(aside)
        if filled:
            for file in sorted((p for p in aside.rglob("*") if p.is_file()), key=lambda file: -len(file.parts)):  # index.html last
                place = path / file.relative_to(aside)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, place)
                _sync(place.parent)
        else:
            os.replace(aside, path)
            _sync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def force(folder: Path) -> None:
    """Force everything in a folder to the disk, and its name."""
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(place, name))
        _sync(Path(place))
    _sync(folder.parent)


def force_names(folder: Path) -> None:
    """Force the list of what is in a folder, and its name."""
    _sync(folder)
    _sync(folder.parent)


def remove(folder: Path) -> None:
    """Remove a folder or a file. It goes by one rename, so that half of it is never found under its name."""
    if not os.path.lexists(folder):
        return
    gone = folder if folder.name.startswith(ASIDE) else folder.with_name(ASIDE + folder.name)
    if gone != folder:
        remove(gone)
        os.replace(folder, gone)
        _sync(folder.parent)
    if gone.is_dir() and not gone.is_symlink():
        shutil.rmtree(gone)
    else:
        gone.unlink()


# What is read is what was written


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def hashes_of(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Name in the folder -> hash, of files in it."""
    return {file.relative_to(folder).as_posix(): digest(file) for file in sorted(files)}


def manifest(hashes: Mapping[str, str]) -> str:
    """The content of DONE: file -> hash, and a hash of that, so that a damaged one is known as such."""
    return canonical_json({"files": hashes, "sha256": hashlib.sha256(canonical_json(hashes).encode()).hexdigest()}) + "\n"


def read_manifest(path: Path) -> dict[str, str] | None:
    """File -> hash; None where it is damaged. Raises FileNotFoundError where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
        hashes = {str(name): str(value) for name, value in json.loads(text)["files"].items()}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return hashes if text == manifest(hashes) else None


def seal(folder: Path, name: str, listed: Callable[[Path], bool] = lambda _: True) -> None:
    """Force everything in `folder` to the disk, then write the hashes of its files (those `listed`, by name in it) into its file `name`."""
    force(folder)
    files = (p for p in folder.rglob("*") if p.is_file() and p != folder / name and listed(p.relative_to(folder)))
    write_text(folder / name, manifest(hashes_of(folder, files)))


def changed(folder: Path, hashes: Mapping[str, str], *, remembered: bool = False) -> list[str]:
    """What differs from the hashes, each as "file: what is wrong". `remembered`: a file that nobody touched is read once."""
    problems = []
    for name, expected in sorted(hashes.items()):
        try:
            if (_known(folder / name) if remembered else digest(folder / name)) != expected:
                problems.append(f"{name}: the content is not what was published")
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
    return problems


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON value with its own hash, as "sha256"."""
    plain = {name: entry for name, entry in value.items() if name != "sha256"}
    return {**plain, "sha256": hashlib.sha256(canonical_json(plain).encode()).hexdigest()}


def is_sealed(value: Any) -> bool:
    """Whether a JSON value has the hash of the rest of it."""
    try:
        return isinstance(value, dict) and value == sealed(value)
    except (ValueError, TypeError, RecursionError):
        return False


def card_problems(card: Path, *, must: bool = False) -> list[str]:
    """What differs from a card: sealed JSON, whose entry "files" has the hashes of files beside it. It `must` have hashes, or may have."""
    try:
        found = read_json(card, rule="", remedy="")
    except StoreError as error:
        return [f"{card.name}: {error.found.partition(': ')[2]}"]
    if "files" not in found and "sha256" not in found and not must:  # of an earlier version
        return []
    return seal_problems(card.name, found) or changed(card.parent, found["files"])


def seal_problems(name: str, card: Mapping[str, Any]) -> list[str]:
    """What is wrong with a card that was read from the file `name`, apart from the files beside it."""
    return [] if is_sealed(card) else [f"{name}: the content is not what was written"]


def read_json(path: Path, *, rule: str, remedy: str) -> dict[str, Any]:
    """The JSON mapping in a file; StoreError where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        why = f"a {type(found).__name__}"
    except OSError as error:
        why = error.strerror or str(error)
    except (ValueError, RecursionError) as error:
        why = str(error)
    raise StoreError(rule, found=f"{path}: {why}", remedy=remedy)


def note(text: str) -> None:
    """Say, once, what was found damaged and is made again."""
    warnings.warn(text, stacklevel=2)


# Trouble


@contextlib.contextmanager
def disk_errors(root: Path, what: str = RUN) -> Iterator[None]:
    """Turn what the operating system says about the disk into a StoreError with a way out; `what` is written or read there."""
    try:
        yield
    except ParetuneError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise no_room(root, error, what) from error
        if not isinstance(error, OSError) and not SYSTEM.search(str(error)):
            raise
        where = getattr(error, "filename", None) or root
        raise StoreError(
            f"{what} can be read and written",
            found=f"{where}: {getattr(error, 'strerror', None) or error}",
            remedy=f"check its permissions and its disk, or {'give another --root' if what == RUN else 'write it elsewhere'}",
        ) from error


def no_room(root: Path, error: BaseException, what: str = RUN) -> StoreError:
    """What to say, and to do, when the disk is full."""
    kept = "what is published and every checkpoint is kept" if what == RUN else "what was there before is still there"
    return StoreError(
        f"{what} has room on its disk",
        found=f"{root}: {error}",
        remedy=f"free some space and run the same command again: {kept}",
    )


def is_disk_full(error: BaseException | None) -> bool:
    """True where the error, or one that it came from, says that the disk or the quota is full (also in the words of safetensors)."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in FULL) or any(os.strerror(code) in str(error) for code in FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def _sync(path: Path) -> None:
    """Force a file's content, or a directory's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _known(path: Path) -> str:
    """The hash of a file, taken once as long as it is the same one."""
    about = path.stat()
    return _remembered(path, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)


@functools.lru_cache(maxsize=1 << 16)
def _remembered(path: Path, *about: int) -> str:
    return digest(path)
