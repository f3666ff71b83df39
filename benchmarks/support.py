"""Optimistic linear support with 5 trainings against the best possible set of 5: exact-v1, rho = -.8, judged seeds, the exact learner.

    python benchmarks/support.py [--root DIR] [--workers 1] [--out benchmarks/results/support.json]

The best possible set holds 5 optimal policies pi*, at the preferences that make the worst attainment over the judged preferences
largest when each is served by the best of them: it knows what will be judged. `ols_minus_best_set` is for the default, which plans for
the whole simplex; `ols_told_minus_best_set` for asked = "judged", which is told of the judged preferences and trains at none of them.
Worst attainment over the judged preferences on the training prompts, of trained policies for `ols`; the smallest difference over seeds
is the figure. The published estimate, the bound, is computed with pi* in place of trainings. Stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from common import emit
from paretune.evaluation.evaluate import evaluate
from paretune.evaluation.metrics import attainment
from paretune.methods.linear_support import next_corner
from paretune.registry import LEARNERS, METHODS, TASKS, describe
from paretune.runs.suite import fit

SEEDS, RHO, COUNT = (100, 101, 102), -0.8, 5
GRID = 1001


def of_optima(task: Any, w_KM: np.ndarray) -> np.ndarray:
    """(W, K) attainment at the judged preferences of the optimal policies of `w_KM`."""
    judged_WM = task.judged()
    start_M = task.J_M(task.reference_logp_PR("train"), "train")
    best_W = (judged_WM * task.front("train", judged_WM).points_KM).sum(1)
    points_KM = task.front("train", w_KM).points_KM
    return np.stack([attainment(judged_WM @ point_M, judged_WM @ start_M, best_W) for point_M in points_KM], axis=1)


def best_set(task: Any, count: int) -> tuple[float, np.ndarray]:
    """The largest worst attainment of any `count` optimal policies, and their preferences, on a grid; two objectives.

    Each policy serves an interval of preferences well, so for a wanted level the fewest are found by going from one end to the other,
    every time with the policy that reaches furthest; the level is found by bisection.
    """
    first = np.linspace(0.0, 1.0, GRID)
    w_KM = np.stack([first, 1 - first], axis=1)
    share_WK = of_optima(task, w_KM)

    def cover(level: float) -> list[int] | None:
        begin, chosen = 0, []
        while begin < len(share_WK) and len(chosen) < count:
            good_WK = share_WK[begin:] >= level
            reach_K = np.where(good_WK.all(0), len(good_WK), good_WK.argmin(0))
            chosen.append(int(reach_K.argmax()))
            if reach_K.max() == 0:
                return None
            begin += int(reach_K.max())
        return chosen if begin == len(share_WK) else None

    low, high = 0.0, 1.0
    for _ in range(40):
        level = (low + high) / 2
        low, high = (level, high) if cover(level) else (low, level)
    chosen = cover(low)
    assert chosen is not None
    return low, w_KM[chosen]


def by_bound(task: Any, count: int) -> float:
    """Worst attainment of the published way, every training perfect."""
    w_KM = np.eye(2)
    while len(w_KM) < count:
        found = next_corner(task.front("train", w_KM).points_KM, w_KM, eps=0.0, judged_WM=task.judged())
        assert found is not None
        w_KM = np.concatenate([w_KM, found[None]])
    return float(of_optima(task, w_KM).max(1).min())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("paretune-runs/support"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--asked", nargs="+", default=("all", "judged"), help="preferences that the choice is told of")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    learner = LEARNERS.build("exact")
    rows: list[dict[str, Any]] = []
    for asked in given.asked:
        for seed in given.seeds:
            task = TASKS.build({"name": "exact-v1", "rho": RHO, "seed": seed})
            best, best_KM = best_set(task, COUNT)
            method = METHODS.build({"name": "ols", "budget": COUNT, "asked": asked})
            family = fit(task, method, learner=learner, root=given.root, seed=seed, workers=given.workers)
            found = evaluate(task, family, splits=["train"]).metrics["splits"]["train"]["attainment"]["worst"]
            trained_KM = np.array(family.meta["trained_at"])
            row: dict[str, Any] = {"asked": asked, "seed": seed, "worst": round(found, 4), "trained_at": trained_KM[:, 0].tolist()}
            row["with_optimal_policies"] = round(float(of_optima(task, trained_KM).max(1).min()), 4)
            row |= {"best_set": round(best, 4), "best_set_at": best_KM[:, 0].round(4).tolist()}
            rows.append({**row, "bound_with_optimal_policies": round(by_bound(task, COUNT), 4)})
            print(rows[-1], flush=True)
    less = {asked: min(row["worst"] - row["best_set"] for row in rows if row["asked"] == asked) for asked in given.asked}
    bound = min(row["bound_with_optimal_policies"] - row["best_set"] for row in rows)
    names = {"all": "ols_minus_best_set", "judged": "ols_told_minus_best_set"}
    figures = {**{names[asked]: value for asked, value in less.items()}, "ols_bound_minus_best_set": bound}
    emit(figures, out=given.out, rows=rows, learner=describe(learner))


if __name__ == "__main__":
    main()
