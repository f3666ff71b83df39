"""Utilities other than w . J, each judged by its own exact optimum: exact-v1, two correlations, three judged seeds, the exact learner.

    python benchmarks/utility.py [--root DIR] [--workers 1] [--out benchmarks/results/utility.json]

Smooth Tchebycheff and max-min at w = (.3, .7) and (.5, .5). Lagrangian twice: objective 1 alone while objective 2 keeps half of what it
could gain by itself, and w = (.3, .7) while nobody falls below the untrained reference. All with the defaults of methods and learner.
Own-utility attainment on the training prompts, where a constraint's violation is charged at the optimum's multipliers; the worst is the
figure. The settings were written down before the first run on judged seeds. Stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common import emit
from paretune.evaluation.evaluate import evaluate
from paretune.registry import LEARNERS, METHODS, TASKS, describe
from paretune.runs.suite import fit
from paretune.tasks.exact.optimum import landmarks

RHOS, SEEDS = (0.0, -0.8), (100, 101, 102)
AT = ((0.3, 0.7), (0.5, 0.5))


def methods(task: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """A label and a method each; every training of a method is at one of its preferences `at`."""
    yield "tchebycheff", {"name": "tchebycheff", "at": AT}
    yield "max-min", {"name": "max-min", "at": AT}
    marks = landmarks(task)
    half = round(float(marks.reference_M[1] + 0.5 * (marks.ideal_M[1] - marks.reference_M[1])), 3)
    yield "lagrangian, half", {"name": "lagrangian", "at": ((1.0, 0.0),), "thresholds": (None, half)}
    yield "lagrangian, no harm", {"name": "lagrangian", "at": ((0.3, 0.7),)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("paretune-runs/utility"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    learner = LEARNERS.build("exact")
    rows: list[dict[str, Any]] = []
    for rho in RHOS:
        for seed in given.seeds:
            task = TASKS.build({"name": "exact-v1", "rho": rho, "seed": seed})
            for label, fields in methods(task):
                method = METHODS.build(fields)
                family = fit(task, method, learner=learner, root=given.root, seed=seed, workers=given.workers)
                w_WM = np.array(method.at)
                found = evaluate(task, family, w_WM=w_WM, splits=["train"]).metrics["splits"]["train"]
                own = found["own_utility"]
                for i, w_M in enumerate(w_WM.tolist()):
                    row = {"method": label, "rho": rho, "seed": seed, "w": w_M}
                    row["own_utility"] = round(own["attainment"]["per_preference"][i], 4)
                    row["violation"] = own["violation"] and round(own["violation"]["per_preference"][i], 5)
                    rows.append({**row, "linear": round(found["attainment"]["per_preference"][i], 4)})
                    print(rows[-1], flush=True)
    worst = {row["method"].split(",")[0]: 1.0 for row in rows}
    worst = {name: min(row["own_utility"] for row in rows if row["method"].startswith(name)) for name in worst}
    figures = {"own_utility_worst": min(worst.values()), **{f"own_utility_{name}": value for name, value in worst.items()}}
    emit(figures, out=given.out, rows=rows, learner=describe(learner))


if __name__ == "__main__":
    main()
