"""The study: every method of the taxonomy on ten relationships of objectives, judged on training and on new prompts.

    python benchmarks/study.py [--root DIR ...] [--seeds 200 201 ...] [--parts exact sampled] [--run] [--out benchmarks/results/study.json]

`study.yaml` declares it: the task, relationships, equal budgets and methods. `--run` computes what the first root does not hold yet, seed
by seed, so that a stopped run has every method and relationship of the seeds that it finished; the same command goes on. Without it the
roots are read, several where processes ran side by side. Figures:

    study_cells_missing      cells that the study declares and no root holds, of both parts
    relate_without_evidence  shipped recipes and tasks of suites for which `relate` gives advice that names no measured rows
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cells import attainment_W
from common import emit
from paretune.registry import TASKS
from paretune.runs.store import Store
from paretune.runs.suite import load_suite, members_of, run_suite

HERE = Path(__file__).resolve().parent
OUT = HERE / "results" / "study.json"
KEPT = ("worst_train", "mean_train", "worst_test", "mean_test")


def declared() -> dict[str, Any]:
    return yaml.safe_load((HERE / "study.yaml").read_text(encoding="utf-8"))


def suites(study: Mapping[str, Any], part: str, seed: int) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """The suites of one part at one seed, one per number of objectives, each with the names of its relationships."""
    said = study["parts"][part]
    groups: dict[int, list[str]] = {}
    for name, dials in study["relationships"].items():
        if name in said.get("relationships", study["relationships"]) and name not in said.get("instead", {}):
            groups.setdefault(dials.get("objective_count", 2), []).append(name)
    for count, names in groups.items():
        yield names, _suite(study, part, seed, names, _filled(study, said.get("methods"), count))
    extra = [name for other in study["parts"].values() for name in other.get("instead", {}) if other is not said]
    for name in extra if part == "sampled" else ():  # all methods, where the other part cannot tell
        yield [name], _suite(study, part, seed, [name], _filled(study, None, 2))


def _filled(study: Mapping[str, Any], names: Sequence[str] | None, count: int) -> list[dict[str, Any]]:
    """The methods (those with these names) with the budget of `count` objectives written out."""
    budget, chosen = study["budgets"][count], []
    for entry in study["methods"]:
        entry = {"name": entry} if isinstance(entry, str) else entry
        if names is None or entry["name"] in names:
            filled = {key: budget.get(value, value) if isinstance(value, str) else value for key, value in entry.items()}
            chosen.append(filled | ({"effort": float(filled["effort"])} if "effort" in filled else {}))
    return chosen


def _suite(study: Mapping[str, Any], part: str, seed: int, names: Sequence[str], methods: Sequence[Any]) -> dict[str, Any]:
    tasks = [{**study["task"], **study["relationships"][name]} for name in names]
    name = f"study-{part}-{seed}-{'-'.join(names)}"
    legal = "".join(c if c.isalnum() or c in ".-" else "_" for c in name)
    return {"name": legal, "tasks": tasks, "learner": study["parts"][part]["learner"], "methods": list(methods), "seeds": [seed]}


def method_label(spec: Mapping[str, Any]) -> str:
    """As the leaderboard names it."""
    return f"{spec['name']} {spec['mixing']}" if spec["name"] == "experts" else str(spec["name"])


def read(study: Mapping[str, Any], roots: Sequence[Path], seeds: Sequence[int], parts: Sequence[str]) -> tuple[dict[str, Any], int, int]:
    """part -> relationship -> method -> per seed numbers and cost; the cells that are missing, and all that the study declares."""
    stores = [Store(root) for root in roots]
    found: dict[str, Any] = {}
    missing, total = 0, 0
    for part in parts:
        for seed in seeds:
            done: set[str] = set()
            for names, suite in suites(study, part, seed):
                told = {TASKS.build({**entry, "seed": seed}): name for entry, name in zip(suite["tasks"], names, strict=True)}
                for member in members_of(*load_suite(suite)):
                    if member.key in done:
                        continue
                    done.add(member.key)
                    total += 1
                    where = next((path for store in stores if (path := store.cell(member.key)) is not None), None)
                    if where is None:
                        missing += 1
                        continue
                    cell = json.loads((where / "cell.json").read_text(encoding="utf-8"))
                    name = told[member.task]
                    row = found.setdefault(part, {}).setdefault(name, {}).setdefault(method_label(cell["method"]), _empty(cell))
                    _add(row, cell)
    return found, missing, total


def _empty(cell: Mapping[str, Any]) -> dict[str, Any]:
    kept = {"category": cell["card"]["category"], "zero_shot": cell["card"]["zero_shot"], "forwards_per_token": cell["forwards_per_token"]}
    return {**kept, "seeds": [], **{name: [] for name in KEPT}, "own": [], "cost": {}}


def _add(row: dict[str, Any], cell: Mapping[str, Any]) -> None:
    row["seeds"].append(cell["seed"])
    for split in ("train", "test"):
        values = attainment_W(cell, split)
        row[f"worst_{split}"].append(round(float(np.nanmin(values)), 4))
        row[f"mean_{split}"].append(round(float(np.nanmean(values)), 4))
    own = cell["metrics"]["splits"]["train"].get("own_utility")
    if own:
        row["own"].append(own.get("attainment", {}).get("worst"))
    for kind, short in (("total", ""), ("critical_path", "_path")):
        for name in ("steps", "samples", "tokens", "evaluations"):
            row["cost"].setdefault(name + short, []).append(cell["cost"][kind][name])


def settled(found: dict[str, Any]) -> dict[str, Any]:
    """Costs as medians over seeds, and no list that says nothing."""
    for relations in found.values():
        for rows in relations.values():
            for row in rows.values():
                row["cost"] = {name: round(float(np.median(values))) for name, values in row["cost"].items()}
                if not row["own"]:
                    del row["own"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, nargs="+", default=[Path("runs/study")])
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--parts", nargs="+", default=["exact", "sampled"])
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    study = declared()
    seeds = given.seeds or study["seeds"]
    if given.run:
        for seed in seeds:
            for part in given.parts:
                for _, suite in suites(study, part, seed):
                    summary = run_suite(suite, root=given.root[0], executor="in-process", progress=False)
                    print(suite["name"], len(summary.cells), "cells", len(summary.failed), "failed", f"{summary.seconds:.0f} s", flush=True)
                    for row in summary.failed:
                        print("  failed", row.label, row.message, flush=True)
    found, missing, total = read(study, given.root, seeds, given.parts)
    emit({"study_cells_missing": missing}, out=given.out, cells_declared=total, study=study, cells=settled(found))


if __name__ == "__main__":
    main()
