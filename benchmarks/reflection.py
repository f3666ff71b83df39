"""The text task: the bridge, zero-shot, against one policy trained at equal weights, at every judged preference and at the vertices.

    python benchmarks/reflection.py [--root DIR] [--seed 100] [--out benchmarks/results/reflection.json]

Three aims, test prompts, sampled learner. Utilities are sampled on the same prompts with the same noise, so that differences are
paired: `reflection_min_gain` is the smallest mean difference over the 66 judged preferences, and "below" counts the preferences whose
95 % interval lies below 0. Near equal weights both are trained for the same thing, so the smallest of 66 noisy differences is expected
a little below 0 even where the truth is 0; the intervals tell the two apart. Stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from common import emit
from paretune.evaluation.evaluate import compare, evaluate
from paretune.registry import TASKS
from paretune.runs.suite import fit

LEARNER = {"name": "pg", "samples": 5_120, "batch": 64, "group": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("paretune-runs/reflection"))
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--samples", type=int, default=192, help="responses per preference")
    parser.add_argument("--training", type=int, default=LEARNER["samples"], help="samples of each training")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    task = TASKS.build({"name": "reflection", "seed": given.seed})
    learner = {**LEARNER, "samples": given.training}
    count = task.objectives.count
    w_WM = np.concatenate([np.eye(count), task.judged()])
    measured = {}
    for method in ("bridge", "uniform"):
        family = fit(task, method, learner=learner, root=given.root, seed=given.seed, progress=False)
        measured[method] = evaluate(task, family, w_WM=w_WM, splits=("test",), samples=given.samples, seed=given.seed)
        print(method, "measured", flush=True)
    gaps = compare(measured["bridge"], measured["uniform"], split="test")
    each = gaps["per_preference"]
    vertices, judged = each[:count], each[count:]
    worst = min(judged, key=lambda gap: gap["value"])
    figures = {
        "reflection_min_gain": worst["value"],
        "reflection_min_gain_low": worst["low"],
        "reflection_min_gain_high": worst["high"],
        "reflection_below": float(sum(gap["high"] < 0 for gap in judged)),
        "reflection_above": float(sum(gap["low"] > 0 for gap in judged)),
        "reflection_mean_gain": float(np.mean([gap["value"] for gap in judged])),
        "reflection_vertex_low": min(gap["low"] for gap in vertices),
    }
    emit(figures, out=given.out, seed=given.seed, samples=given.samples, learner=learner, **_details(measured, w_WM, each, worst, task))


def _details(measured: dict[str, Any], w_WM: np.ndarray, each: list[dict[str, Any]], worst: dict[str, Any], task: Any) -> dict[str, Any]:
    """What the figures come from: vertices and worst preference in full, the others' gaps, and ten responses at five preferences."""
    splits = {method: found.metrics["splits"]["test"] for method, found in measured.items()}

    def row(n: int) -> dict[str, Any]:
        returns = {
            method: {"rewards": _rounded(s["rewards"][n]), "kl": _rounded(s["kl"]["per_preference"][n])} for method, s in splits.items()
        }
        return {"w": _rounded(w_WM[n]), "gap": {k: _rounded(v) for k, v in each[n].items()}, **returns}

    said = splits["bridge"]["generations"]
    return {
        "objectives": list(task.objectives.names),
        "rows": [row(n) for n in range(len(w_WM))],
        "worst": _rounded(w_WM[each.index(worst)]),
        "generations": {
            **said,
            "preferences": [_rounded(w_WM[n]) for n in said["preferences"]],
            "uniform": splits["uniform"]["generations"]["texts"][0],
        },
    }


def _rounded(value: Any) -> Any:
    return np.round(np.asarray(value, dtype=float), 4).tolist()


if __name__ == "__main__":
    main()
