"""How far experts are from the optimum of their own objective: exact-v1, three correlations, three judged seeds, both learners.

    python benchmarks/expert.py [--root DIR] [--workers 2] [--out benchmarks/results/expert.json]

Sampled: the default learner with 40,000 samples an expert. Exact: the enumerated gradient, with its default number of steps.
Attainment on the training prompts, of every expert at its own vertex; the worst of all is the figure. Stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common import emit
from paretune.registry import LEARNERS, describe
from paretune.runs.store import CELLS, Store
from paretune.runs.suite import run_suite

SUITE = {
    "tasks": [{"name": "exact-v1", "rho": [0.8, 0.0, -0.8]}],
    "methods": [{"name": "experts", "mixing": "logit"}],
    "seeds": [100, 101, 102],
}
KINDS = {"sampled": {"name": "pg", "samples": 40_000}, "exact": {"name": "exact"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("paretune-runs/expert"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    figures: dict[str, float] = {}
    rows: list[dict[str, object]] = []
    settings: dict[str, object] = {}
    for kind, learner in KINDS.items():
        root, settings[kind] = given.root / kind, describe(LEARNERS.build(learner))
        run_suite({**SUITE, "name": f"expert-{kind}", "learner": learner}, root=root, workers=given.workers)
        found = []
        for key in Store(root).published(CELLS):
            cell = json.loads((root / CELLS / key / "cell.json").read_text())
            if cell["learner"] != settings[kind]:
                continue  # of an earlier version of the learner
            for split, metrics in cell["metrics"]["splits"].items():
                for objective, loss in enumerate(metrics["loss"]["experts"]):
                    row = {"learner": kind, "rho": cell["task"]["rho"], "seed": cell["seed"], "objective": objective, "split": split}
                    found.append({**row, "attainment": round(1 - loss, 4)})
        rows += found
        figures[f"{kind}_worst_attainment"] = min(row["attainment"] for row in found if row["split"] == "train")
    emit(figures, out=given.out, rows=rows, learners=settings)


if __name__ == "__main__":
    main()
