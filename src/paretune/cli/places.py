"""What lies in folders: run directories, their trainings and results, and families, by names that a person can say. No model is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from paretune.errors import ConfigError, first_line, nearest
from paretune.policy.card import FAMILY_FILE, read_card
from paretune.report.tables import Column, Table
from paretune.runs.store import ARTIFACTS, CELLS, DONE, FAILED, WIP, Store

__all__ = ["families_table", "find_family", "runs_table"]

DEPTH = 3  # folders below the one that is asked, in which run directories are looked for
JOBS = {ARTIFACTS: ("train", "training"), CELLS: ("cell", "result")}


def runs_table(root: Path) -> Table:
    """The trainings and results of a run directory, the latest first; of another folder, the run directories in it."""
    if _is_run(root):
        columns = (*_texts("what", "of", "date"), Column("samples", "samples", "count"), *_texts("state", "key"))
        return Table("runs", columns, sorted(_rows(root), key=lambda row: row["date"], reverse=True))
    counts = ("trainings", "results", "failed", "families")
    columns = (*_texts("name", "suites", "date"), *(Column(name, name, "count") for name in counts), *_texts("state"))
    return Table("runs", columns, [_run(folder, root) for folder in _below(root) if _is_run(folder)])


def families_table(root: Path) -> Table:
    """The families in a folder, the latest first: under the names that `paretune sample` and the others take."""
    columns = (*_texts("name", "method", "objectives", "date"), Column("samples", "samples", "count"), *_texts("state", "folder"))
    rows = []
    for folder in _families(root):
        try:
            card = read_card(folder)
        except ConfigError as error:
            state = f"unreadable: {error.rule}; found {first_line(error.found)}"
            rows.append({"name": folder.name, "date": _date(folder / FAMILY_FILE), "state": state, "folder": str(folder)})
            continue
        cost, measured = card["meta"].get("ledger", {}).get("total", {}), (folder / "measured.json").is_file()
        facts = {"method": card["meta"].get("method", {}).get("name"), "objectives": ", ".join(card["objectives"]["names"])}
        facts |= {"samples": cost.get("samples"), "state": "measured" if measured else "not measured"}
        rows.append({"name": folder.name, **facts, "date": _date(folder / FAMILY_FILE), "folder": str(folder)})
    return Table("families", columns, sorted(rows, key=lambda row: row["date"], reverse=True))


def find_family(given: Path) -> Path:
    """The folder of a family: `given` itself, or the one family of that name, or whose name begins so, in or below this folder."""
    if given.exists() or len(given.parts) != 1:
        return given
    families = _families(Path())
    known = {folder.name for folder in families}
    close = [folder for folder in families if folder.name == str(given)]
    close = close or [folder for folder in families if folder.name.startswith(str(given))]
    if len(close) > 1:
        found = f"{given}: {', '.join(map(str, close))}"
        raise ConfigError("a family's name says which one", found=found, remedy="write it out, or give its folder")
    if not close:
        remedy = "name a directory that `paretune fit` wrote" + (
            f", or a family by its name: {nearest(str(given), known)}" if known else ""
        )
        raise ConfigError(f"a family is a directory with {FAMILY_FILE}", found=str(given), remedy=remedy)
    return close[0]


def _texts(*keys: str) -> tuple[Column, ...]:
    return tuple(Column(key, key, "text") for key in keys)


def _below(root: Path) -> Iterator[Path]:
    """The folder, and those below it, without what a run directory holds."""
    if not root.is_dir():
        raise ConfigError("runs and families lie in a folder", found=f"no folder {root}", remedy="give a folder that exists, or none")
    folders = [root]
    for _ in range(DEPTH + 1):
        yield from folders
        inside = (sub for folder in folders if not _is_run(folder) for sub in sorted(folder.iterdir()))
        folders = [sub for sub in inside if sub.is_dir() and not sub.is_symlink() and not sub.name.startswith(".") and _may_look(sub)]


def _may_look(folder: Path) -> bool:
    """Not into a folder of somebody else's."""
    return os.access(folder, os.R_OK | os.X_OK)


def _is_run(folder: Path) -> bool:
    return any((folder / kind).is_dir() for kind in (ARTIFACTS, CELLS)) and (folder / ".lock").exists()


def _families(root: Path) -> list[Path]:
    """Each once: one that lies in families/ is found from there and from the folder around it, where that is no run directory."""
    return list(dict.fromkeys(family for folder in _below(root) for family in Store(folder).families()))


def _run(folder: Path, root: Path) -> dict[str, Any]:
    store = Store(folder)
    failed = sum(len(store.failures(kind)) for kind in JOBS)
    open_ = [d for kind in JOBS for d in (folder / kind).glob(f"{WIP}*") if not (d / FAILED).exists()]
    state = "running" if store.is_busy() else "stopped" if open_ else "failed" if failed else "done"
    facts = {"trainings": len(store.published(ARTIFACTS)), "results": len(store.published(CELLS)), "failed": failed}
    name = str(folder.relative_to(root)) if folder != root else folder.resolve().name
    suites = ", ".join(store.suites()[0])
    return {"name": name, "suites": suites, "date": _date(folder / ".lock"), **facts, "families": len(store.families()), "state": state}


def _rows(root: Path) -> Iterator[dict[str, Any]]:
    store = Store(root)
    unfinished = "running" if store.is_busy() else "stopped"
    for kind, (job, said) in JOBS.items():
        failures = store.failures(kind)
        for folder in sorted((root / kind).glob("*")):
            key = folder.name.removeprefix(WIP)
            done = not folder.name.startswith(".") and (folder / DONE).is_file()
            if not done and not folder.name.startswith(WIP):
                continue
            failure = failures.get(key)
            state = "done" if done else "failed: " + first_line(str(failure["message"])) if failure else unfinished
            label = _known(root / "logs" / "jobs" / f"{job}-{key}.json").get("label") or key
            samples = _known(folder / "ledger.json").get("samples")
            yield {"what": label, "of": said, "date": _date(folder), "samples": samples, "state": state, "key": key}


def _known(file: Path) -> dict[str, Any]:
    """What a JSON file says; nothing where it is not there or cannot be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _date(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
