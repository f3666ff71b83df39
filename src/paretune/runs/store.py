"""The run directory: published once, never changed, and nothing lost however a run ends.

    ROOT/artifacts/<TrainSpec.key>/   a training   spec.json env.json ledger.json train.jsonl adapter_* DONE
    ROOT/cells/<cell key>/            a result     cell.json env.json ledger.json curve.npz DONE
    ROOT/artifacts/.wip-<key>/        the same while it is made, with checkpoint/ (and FAILED.json where it failed)
    ROOT/suites/<name>.json  ROOT/logs/jobs/*.json  ROOT/logs/worker-*.log
    ROOT/.lock  ROOT/.workers         held by the one process that writes here, and by its workers

Publishing hashes every file into DONE, forces all of it to the disk, and renames the directory. A process that is killed leaves
either a `.wip-` directory, which readers do not see and the next run resumes, or a published one. A `.wip-` directory that already
holds a DONE was killed just before the rename: the next run checks the hashes and renames it, and trains nothing. Where a hash is
wrong, nothing in the directory can be trusted: it is removed, with a warning, and made again.

What is published is compared with its hashes when it is read. A damaged training or result is an error that names the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from paretune.errors import BusyError, StoreError
from paretune.files import (
    ASIDE,
    card_problems,
    changed,
    disk_errors,
    force_names,
    is_sealed,
    note,
    read_json,
    read_manifest,
    remove,
    seal,
    write_json,
)
from paretune.training.cost import FINISHED
from paretune.training.spec import FOLDER, Artifact, TrainSpec
from paretune.types import key_of

__all__ = ["ARTIFACTS", "CELLS", "CELL_FORMAT", "CELL_SPEC", "Store"]

ARTIFACTS, CELLS = KINDS = ("artifacts", "cells")
NAMED_BY = {ARTIFACTS: "spec.json", CELLS: "cell.json"}  # the file that a directory's key is computed from
WIP, DONE, FAILED, FAMILY = ".wip-", "DONE", "FAILED.json", "family.json"
CELL_FORMAT = 2  # of cell.json; 1 was before version 0.2, whose fields had other names
CELL_SPEC = ("method", "task", "learner", "seed", "evaluation")  # the entries of cell.json that make its key
WHOLE = "what is published is read as it was published"
AGAIN = "remove that directory; the next run makes it again, and `paretune check` finds whatever else is damaged"
WAIT_FOR_WORKERS = 5.0  # seconds that the workers of a killed run get to disappear


class Store:
    """One run directory. Readers need no lock; whoever writes holds `lock()`."""

    def __init__(self, root: str | Path):
        self.root = Path(root)

    # Reading

    def artifact(self, key: str) -> Artifact | None:
        """The published training `key`, or None. Raises StoreError where a file of it is not what was published."""
        folder = self._published(ARTIFACTS, key)
        if folder is None:
            return None
        self._whole(folder)
        try:
            spec = TrainSpec.from_json(read_json(folder / "spec.json", rule=WHOLE, remedy=AGAIN))
        except (KeyError, TypeError) as error:
            raise StoreError(WHOLE, found=f"{folder / 'spec.json'}: {error!r}", remedy=AGAIN) from error
        return Artifact(key=key, path=folder, spec=spec)

    def cell(self, key: str) -> Path | None:
        """The directory of the published result `key`, or None."""
        return self._published(CELLS, key)

    def read(self, key: str, name: str, kind: str = CELLS) -> bytes:
        """The file `name` of something published. Raises StoreError where it is not what was published."""
        folder = self._final(kind, key)
        self._whole(folder, name)
        with disk_errors(self.root):
            return (folder / name).read_bytes()

    def published(self, kind: str) -> list[str]:
        """Keys of everything published, sorted. `kind` is ARTIFACTS or CELLS."""
        return sorted(d.name for d in _folders(self.root / kind) if not d.name.startswith(".") and (d / DONE).is_file())

    def failures(self, kind: str) -> dict[str, dict[str, Any]]:
        """Key -> what FAILED.json says, of everything whose last attempt failed; one that cannot be read says so itself."""
        found: dict[str, dict[str, Any]] = {}
        for folder in sorted(_folders(self.root / kind)):
            if folder.name.startswith(WIP) and os.path.lexists(folder / FAILED):
                key = folder.name.removeprefix(WIP)
                problems = _unreadable(folder / FAILED)
                damaged = {"label": key, "error": "StoreError", "message": f"what failed cannot be read: {' '.join(problems)}"}
                found[key] = damaged if problems else json.loads((folder / FAILED).read_text(encoding="utf-8"))
        return found

    def families(self) -> list[Path]:
        """The families that `paretune fit` saved here, or the directory itself where it is one."""
        return sorted(file.parent for place in ("", "families/*/") for file in self.root.glob(f"{place}{FAMILY}"))

    def suites(self) -> tuple[dict[str, set[str]], list[str]]:
        """Name -> keys of the cells, of every suite that ran here; and a line for each whose list cannot be read."""
        found, problems = {}, []
        for path in sorted((self.root / "suites").glob("*.json")):
            try:
                listed = read_json(path, rule="a suite lists its cells", remedy="run it again")
                if "sha256" in listed and not is_sealed(listed):
                    raise KeyError
                found[path.stem] = set(listed["cells"])
            except (StoreError, KeyError, TypeError) as error:
                why = error.found.partition(": ")[2] if isinstance(error, StoreError) else "the content is not what was written"
                problems.append(f"suites/{path.name}: {why}")
        return found, problems

    def check(self) -> list[str]:
        """Hash everything published again: one line per problem, each naming a file. An empty list means that all is well."""
        problems = []
        for kind in KINDS:
            for folder in sorted(_folders(self.root / kind)):
                if not folder.name.startswith("."):
                    problems += [f"{kind}/{folder.name}/{problem}" for problem in _problems(folder, NAMED_BY[kind])]
                elif folder.name.startswith(WIP) and os.path.lexists(folder / FAILED):
                    problems += [f"{kind}/{folder.name}/{problem}" for problem in _unreadable(folder / FAILED)]
        for folder in self.families():
            problems += [f"{(folder / problem).relative_to(self.root)}" for problem in card_problems(folder / FAMILY)]
        return problems + self.suites()[1]

    def is_busy(self) -> bool:
        """Whether a process writes here now."""
        try:
            with open(self.root / ".lock", encoding="utf-8") as handle:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    # Writing

    @contextlib.contextmanager
    def lock(self, *, patience: float | None = None) -> Iterator[Store]:
        """Be the only writer; finishes what a killed run had all but published. Raises BusyError naming the process that writes.

        `patience` is how many seconds the workers of a killed run get to disappear, by default 5.
        """
        with disk_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            handle = open(self.root / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (held until the end of the block)
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                raise BusyError(
                    "one process writes to a run directory",
                    found=f"process {handle.read().strip() or 'unknown'} works on {self.root}",
                    remedy="wait for it, stop it, or give another --root",
                ) from None
            with disk_errors(self.root):
                handle.truncate(0)
                handle.write(f"{os.getpid()}\n")
                handle.flush()
                self._await_workers(WAIT_FOR_WORKERS if patience is None else patience)
                for kind in KINDS:
                    for folder in _folders(self.root / kind):
                        if folder.name.startswith(ASIDE):  # on its way out when a run was killed
                            remove(folder)
                        elif folder.name.startswith(WIP):
                            self.recover(folder.name.removeprefix(WIP), kind)
            yield self

    @contextlib.contextmanager
    def worker_lock(self) -> Iterator[None]:
        """Held by a worker for as long as it lives, so that the next run can tell when the workers of a killed one are gone."""
        with open(self.root / ".workers", "a", encoding="utf-8") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH)
            yield

    def begin(self, key: str, kind: str = ARTIFACTS) -> Path:
        """The directory to make `key` in: new, or as the last attempt left it. An old FAILED.json is removed."""
        final, wip = self._final(kind, key), self._wip(kind, key)
        if final.exists() and not (final / DONE).is_file():
            raise StoreError(
                "a directory without DONE was not published here",
                found=str(final),
                remedy="remove it, or copy it again with its DONE file",
            )
        with disk_errors(self.root):
            wip.mkdir(parents=True, exist_ok=True)
            force_names(wip.parent)
            (wip / FAILED).unlink(missing_ok=True)
        return wip

    def recover(self, key: str, kind: str = ARTIFACTS) -> None:
        """Finish a publication that was cut short after DONE was written, if there is one."""
        wip, final = self._wip(kind, key), self._final(kind, key)
        with disk_errors(self.root):
            if (final / DONE).is_file():
                shutil.rmtree(wip, ignore_errors=True)
            elif (wip / DONE).is_file():
                problems = _problems(wip, NAMED_BY[kind])
                if problems:  # a power cut or a broken disk: nothing in it can be trusted
                    note(f"{kind}/{key} is damaged and made again: {problems[0]}")
                    remove(wip)
                else:
                    self._finish(wip, final)

    def publish(self, wip: Path) -> Path:
        """Hash, write DONE, force to disk, rename; the checkpoint goes. Returns the final directory.

        Raises StoreError where the disk is full; what was made stays in `wip`, and publishing it again goes on from there.
        """
        assert wip.name.startswith(WIP), wip
        final = wip.with_name(wip.name.removeprefix(WIP))
        with disk_errors(self.root):
            (wip / FAILED).unlink(missing_ok=True)
            for aside in sorted(wip.rglob(ASIDE + "*")):
                remove(aside)
            seal(wip, DONE, _listed)
            return self._finish(wip, final)

    def fail(self, kind: str, key: str, record: Mapping[str, Any]) -> None:
        """Leave FAILED.json beside the checkpoint, so that the report can say why and the next run tries again."""
        with disk_errors(self.root):
            self._wip(kind, key).mkdir(parents=True, exist_ok=True)
            write_json(self._wip(kind, key) / FAILED, record)

    def _finish(self, wip: Path, final: Path) -> Path:
        if (final / DONE).is_file():  # the same key is the same content: the first one stays
            shutil.rmtree(wip)
            return final
        shutil.rmtree(wip / FOLDER, ignore_errors=True)
        (wip / FINISHED).unlink(missing_ok=True)
        os.replace(wip, final)
        force_names(final)
        return final

    def has_workers(self) -> bool:
        """Is there a worker that holds `worker_lock`, on whatever machine the file system's locks reach?"""
        with open(self.root / ".workers", "a", encoding="utf-8") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False  # closing the file releases it

    def _await_workers(self, patience: float) -> None:
        deadline = time.monotonic() + patience
        while self.has_workers():
            if time.monotonic() > deadline:
                raise BusyError(
                    "the workers of an earlier run are gone before the next one starts",
                    found=f"one still works on {self.root}",
                    remedy="end it (ps shows it as paretune.runs.executors.local, or under Ray as ray::Worker), or give another --root",
                )
            time.sleep(0.05)

    def _published(self, kind: str, key: str) -> Path | None:
        folder = self._final(kind, key)
        with disk_errors(self.root):
            return folder if (folder / DONE).is_file() else None

    def _whole(self, folder: Path, *names: str) -> None:
        """StoreError where DONE, or a file (of these) that it lists, is not what was published."""
        with disk_errors(self.root):
            hashes = read_manifest(folder / DONE)
            if hashes is None or not set(names) <= set(hashes):
                problems = [f"{DONE}: damaged" if hashes is None else f"{', '.join(names)}: not in {DONE}"]
            else:
                problems = changed(folder, {name: hashes[name] for name in names or hashes}, remembered=True)
        if problems:
            raise StoreError(WHOLE, found=f"{folder / problems[0]}", remedy=AGAIN)

    def _final(self, kind: str, key: str) -> Path:
        assert kind in KINDS, kind
        return self.root / kind / key

    def _wip(self, kind: str, key: str) -> Path:
        return self._final(kind, WIP + key)


def _listed(name: Path) -> bool:
    return name.parts[0] not in (DONE, FAILED, FINISHED, FOLDER) and not name.name.startswith(ASIDE)


def _problems(folder: Path, named_by: str) -> list[str]:
    """What differs from what was published, each as "file: what is wrong"."""
    try:
        hashes = read_manifest(folder / DONE)
    except FileNotFoundError:
        return [f"{DONE}: missing, so this was not published here"]
    if hashes is None:
        return [f"{DONE}: damaged"]
    problems = changed(folder, hashes)
    found = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
    problems += [f"{name}: added after publishing" for name in sorted(found) if _listed(name) and name.as_posix() not in hashes]
    key = folder.name.removeprefix(WIP)
    if not problems and _key_inside(folder / named_by) != key:
        problems.append(f"{named_by}: describes something else than {key}")
    return problems


def _unreadable(failed: Path) -> list[str]:
    """What is wrong with a FAILED.json."""
    try:
        record = read_json(failed, rule="", remedy="")
    except StoreError as error:
        return [f"{FAILED}: {error.found.partition(': ')[2]}"]
    return [] if {"error", "message"} <= set(record) else [f"{FAILED}: does not say what failed"]


def _key_inside(path: Path) -> str | None:
    """The key that follows from the description in the file: all of spec.json, some entries of cell.json."""
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        return key_of({name: described[name] for name in CELL_SPEC} if path.name == NAMED_BY[CELLS] else described)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _folders(parent: Path) -> list[Path]:
    return [d for d in parent.iterdir() if d.is_dir()] if parent.is_dir() else []
