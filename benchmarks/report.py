"""`report`, and a `bench` that finds everything done: time and peak memory at 300, 1,000 and 3,000 cells.

    python benchmarks/report.py [--cells 300 1000 3000] [--grow settings|seeds|methods] [--root FOLDER] [--out FILE]

A cell is one of the suite's with the numbers of a closed form in place of measured ones: 10 methods at settings of 10 task seeds, and what
`--grow` names becomes more. Each command runs in a process of its own; seconds are its CPU's, so that what else the machine does
counts little. `report_growth` is how many times the seconds per cell (less those of an empty command) grow from the fewest to the most
cells: 1 where time is linear, 10 where it is a square.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import emit
from paretune.files import write_json
from paretune.runs.suite import load_suite, members_of

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from report_cells import METHODS, publish, record

POINTS = (5, 9)  # of `linear`, so that there are 10 methods
SETTINGS, SEEDS = 5, 10


def suite_of(cells: int, grow: str) -> dict[str, Any]:
    """A suite of so many cells, or a few less."""
    methods: list[dict[str, Any]] = [spec["method"] for label, spec in METHODS.items() if not label.startswith("linear")]
    settings, seeds, points = SETTINGS, SEEDS, list(POINTS)
    if grow == "methods":
        points = list(range(2, 2 + max(1, cells // (settings * seeds) - len(methods))))
    each = len(methods) + len(points)
    settings = max(1, cells // (each * seeds)) if grow == "settings" else settings
    seeds = max(2, cells // (each * settings)) if grow == "seeds" else seeds
    rhos = [round(0.9 - 1.8 * k / max(1, settings - 1), 4) for k in range(settings)]
    return {
        "name": f"{grow}-{cells}",
        "tasks": [{"name": "exact-v1", "rho": rhos}],
        "learner": {"name": "exact", "steps": 100},
        "methods": [*methods, {"name": "linear", "points": points}],
        "seeds": list(range(100, 100 + seeds)),
    }


def make(root: Path, suite: dict[str, Any]) -> int:
    """Publish every cell of the suite; returns how many there are."""
    members = members_of(*load_suite(suite))
    for member in members:
        method, task = member.spec["method"], member.spec["task"]
        if method["name"] == "linear":  # every sweep has numbers of its own
            METHODS[f"linear {method['points']}"] = {**METHODS["linear"], "share": 0.9 + 0.06 * np.tanh(method["points"] / 20)}
        told = {"expert": "objective", "experts": "mixing", "linear": "points"}.get(method["name"])
        label = f"{method['name']} {method[told]}" if told else method["name"]
        data = record(label, rho=task["rho"], task_seed=task["seed"])
        publish(root, {**data, **member.spec})
    (root / "suites").mkdir(exist_ok=True)
    write_json(root / "suites" / f"{suite['name']}.json", {"format": 1, "cells": {member.key: member.label for member in members}})
    return len(members)


def spent(command: Sequence[str], log: Path) -> tuple[float, float]:
    """CPU seconds, user and system, and peak MB of a command."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, log.read_text(encoding="utf-8")[-2000:]
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cells", type=int, nargs="+", default=[300, 1000, 3000])
    parser.add_argument("--grow", choices=("settings", "seeds", "methods"), default="settings")
    parser.add_argument("--root", type=Path, help="where run directories are made, and kept; default: a temporary folder")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    paretune, rows = [sys.executable, "-m", "paretune"], []
    with tempfile.TemporaryDirectory() as aside:
        folder, log = given.root or Path(aside), Path(aside) / "log"
        start, _ = spent([*paretune, "report", "--help"], log)
        for count in given.cells:
            suite = suite_of(count, given.grow)
            root, file = folder / suite["name"], folder / f"{suite['name']}.yaml"
            cells = make(root, suite)
            write_json(file, suite)  # JSON is YAML
            row: dict[str, float] = {"cells": cells}
            bench = [*paretune, "bench", str(file), "--root", str(root), "--json"]
            for name, command in (("report", [*paretune, "report", str(root), "--json"]), ("bench", bench)):
                row[f"{name}_seconds"], row[f"{name}_mb"] = (round(x, 2) for x in spent(command, log))
            page = root / "reports" / suite["name"] / "index.html"
            row["page_mb"] = round(page.stat().st_size / 1e6, 2)
            rows.append(row)
            print(row, flush=True)
    first, last = ((row["report_seconds"] - start) / row["cells"] for row in (rows[0], rows[-1]))
    figures = {f"{name}_{what}": rows[-1][f"{name}_{what}"] for name in ("report", "bench") for what in ("seconds", "mb")}
    emit({**figures, "report_growth": last / first}, out=given.out, rows=rows, grow=given.grow)


if __name__ == "__main__":
    main()
