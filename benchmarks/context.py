"""Gates that look at the prompt against the best ones that do not: the contextual bandit on a task whose prompts differ in conflict.

    python benchmarks/context.py [--root DIR] [--workers 1] [--seeds 100 101 ...] [--out benchmarks/results/context.json]

exact-v1 with context 0.8: half of the prompts have correlation 0.8, half -0.8, and their first letter says which. Length 3 and 64 + 64
prompts, so that experts hold on test prompts; width 64. Two experts of 60 exact steps, shared by all; judged seeds 100-109. The bandit
pulls every training prompt in each of 100 rounds; the best static gates are those of a grid of 256 in the same box, measured on all
training prompts. A gain is attainment minus that of the static gates, mean over the judged preferences; intervals are over task seeds.
The same without features shows what the model itself loses. Everything that was tuned was tuned on seeds 0 and 1. Stopped, it goes on
where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from cells import attainment_W, cells_of, row_of
from common import emit
from paretune.evaluation.stats import estimate

TASK = {"name": "exact-v1", "context": 0.8, "length": 3, "prompt_count": 64, "width": 64}
LEARNER = {"name": "exact", "steps": 60}
METHODS: list[Any] = [
    {"name": "static-gates", "mixing": ["parameter", "logit"]},
    {"name": "contextual", "mixing": ["parameter", "logit"]},
    {"name": "contextual", "features": "none"},
]


def label(method: dict[str, Any]) -> str:
    """What tells the methods apart."""
    kind = "static" if method["name"] == "static-gates" else "blind" if method["features"] == "none" else "contextual"
    return f"{kind} {method['mixing']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("paretune-runs/context"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(100, 110)))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    suite = {"name": "context", "tasks": [TASK], "learner": LEARNER, "methods": METHODS, "seeds": given.seeds}
    cells = sorted(cells_of(suite, given.root, given.workers), key=lambda cell: (label(cell["method"]), cell["seed"]))
    means: dict[tuple[str, str], list[float]] = {}
    worst: dict[tuple[str, str], list[float]] = {}
    for cell in cells:
        for split in ("train", "test"):
            values_W = attainment_W(cell, split)
            means.setdefault((label(cell["method"]), split), []).append(float(values_W.mean()))
            worst.setdefault((label(cell["method"]), split), []).append(float(values_W.min()))
    figures: dict[str, float] = {}

    def gain(name: str, ours: str, theirs: str, split: str, of: dict[tuple[str, str], list[float]]) -> None:
        found = estimate(np.array(of[ours, split]) - np.array(of[theirs, split]), seed=0)
        figures.update({f"{name}_mean": found.value, f"{name}_low": found.low, f"{name}_high": found.high})

    gain("context_gain", "contextual parameter", "static parameter", "test", means)
    gain("context_gain_train", "contextual parameter", "static parameter", "train", means)
    gain("context_gain_worst", "contextual parameter", "static parameter", "test", worst)
    gain("context_gain_logit", "contextual logit", "static logit", "test", means)
    gain("context_gain_blind", "blind parameter", "static parameter", "test", means)
    figures["context_gain_train"] = figures.pop("context_gain_train_mean")
    for name, split in means:
        figures[f"{name.replace(' ', '_')}_{split}"] = float(np.mean(means[name, split]))
    rows = [row_of(cell, lambda cell: {"label": label(cell["method"])}) for cell in cells]
    emit(figures, out=given.out, rows=rows, task=TASK, learner=LEARNER)


if __name__ == "__main__":
    main()
