"""Results: what a run directory holds, as cells, task settings and methods in a fixed order.

Only what was published is read (a cell without DONE does not exist), and nothing is computed anew: no task is built, no model loaded.
A *setting* is a task with its dials but without its seed; the cells of one method in one setting are its seeds.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from paretune.errors import ConfigError, StoreError, nearest
from paretune.objectives.terms import brief
from paretune.report.looks import Look, looks
from paretune.runs.store import ARTIFACTS, CELL_FORMAT, CELLS, WIP, Store
from paretune.types import canonical_json, check_name, is_number, key_of

__all__ = ["NOT_DIALS", "PROMPTS", "SPLITS", "Cell", "Results", "Setting", "assemble", "load"]

SPLITS = ("train", "test")
PROMPTS = {"train": "training prompts", "test": "test prompts"}

Records = Mapping[str, Mapping[str, Any]]
NOT_DIALS = ("name", "version", "seed", "content")


@dataclass(frozen=True)
class Cell:
    """One method on one task seed, as published. `label` is the method's name in this report; see `Results`."""

    key: str
    label: str
    record: Mapping[str, Any]
    env: Mapping[str, Any]

    @property
    def task(self) -> Mapping[str, Any]:
        return self.record["task"]

    @property
    def seed(self) -> Any:
        """The task's seed; None where the task has none."""
        return self.task.get("seed")

    @property
    def unit(self) -> str:
        """What was drawn independently: the task's seed, or that of the trainings where the task has none."""
        return str(self.task.get("seed", self.record.get("seed")))

    @property
    def w_WM(self) -> np.ndarray:
        return np.asarray(self.record["metrics"]["preferences"], dtype=np.float64)

    def measured(self, split: str, *path: str) -> Any:
        """The metrics of one split, or what stands at `path` in them; {} or None where it was not measured."""
        found = self.record["metrics"]["splits"].get(split, {})
        for name in path:
            found = found.get(name) if isinstance(found, Mapping) else None
        return found

    def summary(self, split: str, which: str, *path: str) -> float | None:
        """The "worst" or "mean" of what stands at `path`, over judged preferences; an estimate's value, None where unknown."""
        value = self.measured(split, *path, which)
        if value is None and which == "worst":  # a gain has no worst of its own
            each = self.measured(split, *path, "per_preference") or ()
            value = min((e["value"] for e in each if isinstance(e, Mapping) and e["value"] is not None), default=None)
        return value["value"] if isinstance(value, Mapping) else value

    def cost(self, key: str, kind: str = "total") -> float:
        """`kind` is "total" or "critical_path"; samples are those for training, for validation and for search."""
        found = self.record["cost"][kind]
        return found["samples"] + found["validation_samples"] if key == "samples" else found[key]


@dataclass(frozen=True)
class Setting:
    """A task with its dials, without its seed, and every cell measured there; or several settings that are looked at together."""

    label: str
    name: str
    dials: Mapping[str, Any]
    cells: tuple[Cell, ...]
    parts: tuple[Setting, ...] = ()
    file: str = ""  # the label in names of files, where that of another setting would be the same
    scores: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)  # those that `comparison.scores` has worked out

    @property
    def slug(self) -> str:
        return "all" if self.parts else self.file or _slug(self.label)

    @cached_property
    def objectives(self) -> list[str]:
        return list(self.cells[0].record["metrics"]["objectives"])

    @cached_property
    def exact(self) -> bool:
        return all(cell.record["metrics"]["exact"] for cell in self.cells)

    @property
    def quality(self) -> str:
        """What methods are compared by: "attainment" where the optimum is known, else "gain" over the reference."""
        return "attainment" if self.exact else "gain"

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """What was measured, the headline's split first."""
        order = SPLITS if self.exact else SPLITS[::-1]
        return tuple(split for split in order if any(cell.measured(split) for cell in self.cells))

    @property
    def headline(self) -> str:
        """The split that methods are ranked by, and that every number is on whose name says no other.

        Training prompts where the optimum is known: there the distance from it is that of the frozen head, of learning and of combining;
        test prompts add what does not generalize. Test prompts elsewhere: without an optimum, a gain on prompts seen in training can be
        memory.
        """
        return self.splits[0]

    @cached_property
    def task_seeds(self) -> list[Any]:
        return sorted({cell.seed for cell in self.cells})

    @cached_property
    def units(self) -> list[str]:
        """What was drawn independently: task seeds, or those of the trainings where the task has none."""
        return sorted({cell.unit for cell in self.cells})

    @cached_property
    def labels(self) -> list[str]:
        """The methods measured here; of several settings, in each of them."""
        return [label for label in self._of if all(label in part.labels for part in self.parts)]

    @cached_property
    def shared_seeds(self) -> list[Any]:
        """The task seeds at which every method was measured."""
        have = [{cell.seed for cell in self.of(label)} for label in self.labels]
        return sorted(set.intersection(*have))

    @cached_property
    def shared_units(self) -> list[str]:
        """The seeds, of trainings where the task has none, that every method has: means over these can be drawn in one picture."""
        return sorted(set.intersection(*[{cell.unit for cell in self.of(label)} for label in self.labels]))

    @property
    def verified(self) -> dict[Any, Mapping[str, Any]]:
        """Task seed -> how its objectives relate, by split, as verified when the task was built."""
        return {cell.seed: cell.record["verified"] for cell in self.cells if cell.record.get("verified")}

    def known(self, split: str) -> dict[str, np.ndarray]:
        """Line -> (W,) attainment that the frozen head or the training prompts allow, mean over task seeds; see `ExactTask.known_W`."""
        by_seed = {cell.seed: lines[split] for cell in self.cells if split in (lines := cell.record.get("known") or {})}
        names = list(dict.fromkeys(name for lines in by_seed.values() for name in lines))
        return {name: np.mean([lines[name] for lines in by_seed.values() if name in lines], axis=0) for name in names}

    def of(self, label: str) -> list[Cell]:
        """The cells of one method, by task seed."""
        return self._of.get(label, [])

    @cached_property
    def _of(self) -> dict[str, list[Cell]]:
        found: dict[str, list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(cell.label, []).append(cell)
        return found

    def drawn(self, split: str) -> list[str]:
        """The methods that were measured on the split at all shared seeds."""
        return [label for label in self.labels if self.shared_units and all(cell.measured(split) for cell in self.of(label))]

    def qualities(self, label: str, split: str) -> np.ndarray:
        """(W,) attainment or gain of a method at each judged preference, mean over its seeds; NaN where unknown, empty if not measured."""
        each = [values for cell in self.of(label) if (values := cell.measured(split, self.quality, "per_preference"))]
        rows = [[value["value"] if isinstance(value, Mapping) else value for value in values] for values in each]
        return np.array(rows, dtype=float).mean(0) if rows else np.empty(0)

    def band(self, label: str, split: str) -> np.ndarray | None:
        """(2, W) ends of the 95 % intervals of `qualities` over prompts; None where nothing was sampled."""
        cells = [cell for cell in self.of(label) if cell.measured(split, self.quality, "per_preference")]
        if self.exact or not cells:
            return None
        each = [cell.measured(split, self.quality, "per_preference") for cell in cells]
        known = np.array([[[v["value"], v["low"], v["high"]] for v in values] for values in each], dtype=float)
        if not np.isfinite(known).any(axis=(0, 1)).all():
            return None
        mean_W, half_W = known[..., 0].mean(0), _half_of_mean((known[..., 2] - known[..., 1]) / 2, cells)
        return np.stack([mean_W - half_W, mean_W + half_W])

    def front(self, split: str) -> dict[str, np.ndarray] | None:
        """Means over the shared seeds of the exact front's points, (K, M) at the same K preferences, and of the reference's returns (M,).

        The mean over tasks of the points at w is a point of the mean task's front: no policies, one per task, have a larger mean return
        at w.
        """
        by_seed = {cell.seed: fronts[split] for cell in self.cells if (fronts := cell.record.get("fronts")) and split in fronts}
        fronts = [front for seed in self.shared_seeds if (front := by_seed.get(seed))]
        if not fronts or len(fronts) != len(self.shared_seeds):
            return None
        return {name: np.mean([np.asarray(front[name], dtype=float) for front in fronts], axis=0) for name in ("points", "w", "reference")}

    def _shared(self, label: str) -> list[Cell]:
        units = set(self.shared_units)
        return [cell for cell in self.of(label) if cell.unit in units]

    def mean_points(self, label: str, split: str) -> np.ndarray:
        """(W, M) regularized returns of a method, mean over the shared seeds; NaN where a return is unknown."""
        return np.mean([np.asarray(cell.measured(split, "returns"), dtype=float) for cell in self._shared(label)], axis=0)

    def mean_errors(self, label: str, split: str) -> np.ndarray | None:
        """(W, M) half the width of the 95 % intervals of `mean_points` over prompts; None where nothing was sampled."""
        cells = self._shared(label)
        errors = [cell.measured(split, "returns_error") for cell in cells]
        if not errors or any(error is None for error in errors):
            return None
        return _half_of_mean(np.asarray(errors, dtype=float), cells)


def _half_of_mean(half_CX: np.ndarray, cells: Sequence[Cell]) -> np.ndarray:
    """(...) half the width of the interval of a mean over C cells, given that of each cell, (C, ...).

    Cells of one task were measured on the same prompts, whatever the seed of their trainings. What these prompts add to all of them does
    not average out, so that their widths are averaged, as if their errors were the same. Errors of different tasks are independent.
    """
    by_task: dict[Any, np.ndarray] = {}
    for cell, half_X in zip(cells, half_CX, strict=True):
        by_task[cell.seed] = by_task.get(cell.seed, 0.0) + half_X
    return np.sqrt(np.sum(np.square(list(by_task.values())), axis=0)) / len(cells)


class Results:
    """All cells of a report, in a fixed order: settings by their dials, methods by family and name."""

    def __init__(self, cells: Sequence[Cell], failures: Sequence[Mapping[str, Any]] = (), name: str = "results"):
        self.cells, self.failures, self.name = list(cells), list(failures), name
        self.skipped: list[str] = []  # files that could not be read, and what is wrong with each

    @cached_property
    def families(self) -> dict[str, str]:
        """Label -> family, baselines last: the order of methods in a report."""
        found = {cell.label: str(cell.record["card"]["category"]) for cell in self.cells}
        return dict(sorted(found.items(), key=lambda item: (item[1] == "baseline", item[1] == "meta-policy", item)))

    @cached_property
    def looks(self) -> dict[str, Look]:
        """Label -> color and marker, the same in every report."""
        methods = {cell.label: cell.record["method"] for cell in self.cells}
        gray = [label for label, family in self.families.items() if family == "baseline"]
        return looks({label: methods[label] for label in self.families}, gray)

    @property
    def prompts(self) -> str:
        """The prompts of the headline, in words."""
        found = {setting.exact: PROMPTS[setting.headline] for setting in self.settings}
        if len(set(found.values())) < 2:
            return next(iter(found.values()), "")
        return f"{found[True]} where the optimum is known, {found[False]} elsewhere"

    @cached_property
    def settings(self) -> list[Setting]:
        groups: dict[str, list[Cell]] = {}
        for cell in self.cells:
            dials = {k: v for k, v in cell.task.items() if k != "seed"}
            groups.setdefault(canonical_json(dials), []).append(cell)
        tasks = [{k: v for k, v in group[0].task.items() if k != "seed"} for group in groups.values()]
        varying = [k for k in _keys(tasks) if k not in NOT_DIALS and len({canonical_json(t.get(k)) for t in tasks}) > 1]
        found, labels = [], _settings(tasks, varying)
        files = _apart(list(map(_slug, labels)), labels, "{}-{}")
        for label, file, task, group in zip(labels, files, tasks, groups.values(), strict=True):
            order = tuple(sorted(group, key=lambda cell: (cell.label, str(cell.task.get("seed")), cell.record.get("seed", 0), cell.key)))
            found.append(Setting(label, str(task["name"]), {k: v for k, v in task.items() if k not in NOT_DIALS}, order, file=file))
        return sorted(found, key=lambda s: (s.name, [_order(k, s.dials.get(k)) for k in varying], s.label))


def load(root: str | Path, *, suite: str | None = None) -> Results:
    """Everything published under `root`, or only the cells of one suite. Raises ConfigError where there is nothing to show."""
    store = Store(root)
    if not store.root.is_dir():
        raise ConfigError("a report is made from a run directory", found=f"{root} is not one", remedy="give the --root of `paretune bench`")
    suites, skipped = store.suites()
    for line in skipped:
        if line.startswith(f"suites/{suite}.json: "):
            raise StoreError("a suite lists its cells", found=f"{store.root}: {line}", remedy="run it again, or leave --suite out")
    if suite is not None and suite not in suites:
        raise ConfigError("a suite that ran here is known by its name", found=repr(suite), remedy=nearest(suite, suites))
    folders = {key: store.root / CELLS / key for key in store.published(CELLS) if suite is None or key in suites[suite]}
    broken = [(kind, key, record) for kind in (ARTIFACTS, CELLS) for key, record in store.failures(kind).items()]
    if suite is not None:  # its cells, and the trainings for which they failed
        mine = [record for kind, key, record in broken if kind == CELLS and key in suites[suite]]
        wanted = {(CELLS, key) for key in suites[suite]} | {(ARTIFACTS, record.get("training")) for record in mine}
        broken = [(kind, key, record) for kind, key, record in broken if (kind, key) in wanted]
    if not folders and not broken:
        found = f"none in {store.root / CELLS}" + (f" of suite {suite!r}" if suite else "")
        remedy = f"run `paretune bench SUITE.yaml --root {root}`, or `paretune fit RECIPE.yaml`, first"
        raise ConfigError("a report needs at least one finished cell", found=found, remedy=remedy)
    records: dict[str, dict[str, Any]] = {}
    truths: dict[str, dict[str, Any]] = {}  # one copy of what all cells of a task say about it: most of what they hold
    for key in folders:
        records[key] = record = json.loads(store.read(key, "cell.json"))
        if record.get("format") != CELL_FORMAT:
            found = f"format {record.get('format')!r} in {folders[key]}"
            remedy = "read them with the version that wrote them (env.json names it), or run the suite in a new --root"
            raise ConfigError(f"this version reads cells of format {CELL_FORMAT}", found=found, remedy=remedy)
        truth = {name: record[name] for name in ("fronts", "verified", "known") if name in record}
        known = truths.setdefault(canonical_json(record["task"]), truth)
        record.update(known if known == truth else {})
    envs = {key: json.loads(store.read(key, "env.json")) for key in folders}
    failures = [{"where": f"{kind}/{WIP}{key}", **record} for kind, key, record in broken]
    name = suite or (next(iter(suites)) if len(suites) == 1 else store.root.resolve().name)
    results = assemble(records, envs, failures=failures, name=name)
    results.skipped = skipped
    return results


def assemble(records: Records, envs: Records, *, failures: Sequence[Mapping[str, Any]] = (), name: str = "results") -> Results:
    """Results from the contents of cell.json and env.json by cell key."""
    for record in records.values():
        check_name("a method", record["method"]["name"])
        check_name("a task", record["task"]["name"])
        for objective in record["metrics"]["objectives"]:
            check_name("an objective", objective)
    check_name("a suite", name)
    labels = _labels(list(records.values()))
    return Results([Cell(key, label, records[key], envs[key]) for key, label in zip(records, labels, strict=True)], failures, name)


def _settings(tasks: Sequence[Mapping[str, Any]], varying: Sequence[str]) -> list[str]:
    """A label for each of the tasks: the fields that vary, without what more than half of them have; no two are called the same."""
    many = len({task["name"] for task in tasks}) > 1
    counts = {k: Counter(canonical_json(task.get(k)) for task in tasks) for k in varying if k != "rho"}
    usual = {k: value for k, count in counts.items() for value, n in count.most_common(1) if 2 * n > len(tasks)}

    def label(task: Mapping[str, Any], keys: Sequence[str]) -> str:
        said = {k: None if k not in task else brief(task[k]) if k == "terms" else _short(task[k]) for k in keys}
        parts = [f"no {k}" if text is None else f"{k} = {text}" for k, text in said.items()]
        return _line(", ".join([*([str(task["name"])] if many or not said else []), *parts]))

    labels = []
    for task in tasks:
        shown = [k for k in varying if k in task and canonical_json(task[k]) != usual.get(k)]
        labels.append(label(task, shown or [k for k in varying[:1] if k in task]))
    alike = Counter(labels)  # a usual value is left out, and so is a field that a task has not
    labels = [label(task, varying) if alike[said] > 1 else said for said, task in zip(labels, tasks, strict=True)]
    return _apart(labels, [canonical_json(task) for task in tasks])


def _labels(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A method's name, with the fields in which the methods of that name differ here; and the learner, where there are several."""
    methods = _names([record["method"] for record in records])
    learners = _names([record["learner"] for record in records if record["trainings"]])
    labels = []
    for record in records:
        learner = f" ({learners[canonical_json(record['learner'])]})" if len(learners) > 1 and record["trainings"] else ""
        labels.append(methods[canonical_json(record["method"])] + learner)
    return labels


def _names(things: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Canonical JSON -> the name, with the fields in which the things of that name differ; no two are called the same."""
    named: dict[str, dict[str, Mapping[str, Any]]] = {}  # name -> the distinct things of that name
    for thing in things:
        named.setdefault(thing["name"], {}).setdefault(canonical_json(thing), thing)
    found: dict[str, str] = {}
    for name, same in named.items():
        varying = [k for k in _keys(same.values()) if k not in NOT_DIALS and len({canonical_json(m.get(k)) for m in same.values()}) > 1]
        for whole, thing in same.items():
            parts = [str(thing[k]) if isinstance(thing.get(k), str) else f"{k} {_short(thing.get(k))}" for k in varying]
            found[whole] = _line(" ".join([str(name), *parts]))
    return dict(zip(found, _apart(list(found.values()), list(found)), strict=True))


def _apart(labels: Sequence[str], things: Sequence[str], form: str = "{} ({})") -> list[str]:
    """The labels; those that several things have, with the first digits of each thing's hash."""
    many = Counter(labels)
    return [form.format(label, key_of(thing)[:6]) if many[label] > 1 else label for label, thing in zip(labels, things, strict=True)]


LONGEST = 60  # letters of a label in the name of a file


def _slug(label: str) -> str:
    """A label as part of the name of a file."""
    plain = label.replace("\u2212", "-").replace(" = ", "_").replace(", ", "_")
    whole = "".join(c if c.isalnum() or c in "-._" else "_" for c in plain) or "task"
    return whole if len(whole) <= LONGEST else f"{whole[:LONGEST]}-{key_of(label)[:6]}"


def _keys(things: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for thing in things for key in thing))


def _order(key: str, value: Any) -> tuple[int, float, str]:
    """Numbers by size, but correlations from agreement to conflict."""
    return (0, -float(value) if key == "rho" else float(value), "") if is_number(value) else (1, 0.0, str(value))


def _line(text: str) -> str:
    """A label on one line: fields may hold texts of any kind."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}".replace("-", "\u2212")
    text = str(value)
    return text if len(text) <= 40 else "…" + text[-39:]
