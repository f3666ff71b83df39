"""Outer-level searches against the published one: evaluations until within 0.01 of the best weights, where weights = preference are bad.

    python benchmarks/search.py [--root DIR] [--out benchmarks/results/search.json] [--seeds 100 101 ...]

Scores are attainments of J_w on training prompts, exact. On exact-v1 with its default dials, judged task seeds (how many: SEEDS), at the
first judged preferences of each seed that are cases (at most six, four for soups):

    optimal   the optimal experts pi*_k, their logits mixed
    unequal   the same, but expert k is optimal for another price of KL, beta / t_k, t_k between 1/2 and 3: experts from elsewhere
    soup      experts of 60 exact steps, their parameters mixed (every evaluation is a run of the model: one task seed, M = 3 only)
    choice    synthetic: experts of unequal strength on one choice among 64; the best weights are known, w_k / t_k; M = 2 to 8

A case is a preference where alpha = w is at least 0.05 below a dense grid's best. The grid covers [0, 1]^M: 9 (M = 3) or 4 (M = 5) points
per axis, and a lattice of the simplex at eight scales; coarser for soups; for M = 5 its top is refined by a local search. A search has
arrived within 0.01 of the best of that grid, of its refined top, and of every point that any searcher came by. Only `grid`, `model` and
`optuna` look in the whole box; the others keep the sum of the weights at 1, and cannot arrive where the best sum is another. "grid cached"
scores shared corners once.

The published search has 5 levels, 5 * 3^M evaluations. A search that ends without coming within 0.01 is counted with that many, be it the
published one (the ratio is then a lower bound) or another. A ratio is that of the sums over the cases of a family; the figures are the
smallest over the families. Stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import emit
from paretune.methods.base import adapters_for, vertex_trainings
from paretune.methods.calibrated import outer_returns
from paretune.methods.search import SEARCHERS, hierarchical_grid, model_search, optuna_search, simplex_lattice
from paretune.policy.base import build_policy
from paretune.registry import LEARNERS, METHODS
from paretune.seeds import generator
from paretune.tasks.exact.task import ExactTask
from paretune.testing.methods import train_plan

RHO = {3: -0.4, 5: -0.2}
SEEDS = (("optimal", 3, 10), ("unequal", 3, 5), ("optimal", 5, 2), ("unequal", 5, 2), ("soup", 3, 1))  # family, M, task seeds
GAP, NEAR = 0.05, 0.01
AXIS, EDGE = {3: 9, 5: 4}, {3: 25, 5: 9}  # points per axis of the dense grid in the box, and per edge of the simplex's lattice
SOUP = (7, 9)  # the same where each point is a run of the model
SCALES = (0.125, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0, 1.1)
CASES = {"optimal": 6, "unequal": 6, "soup": 4}  # at most so many of a task seed, in the order of the judged preferences
CHOICES = 64
TRIALS = 40  # of each Optuna sampler, on the first three synthetic cases of M = 3 and 5
STRENGTHS = (0.5, 3.0)
OURS = ("model", "lattice", "simplex", "nelder-mead")
Vector = Callable[[np.ndarray], np.ndarray]


class Known:
    """(K,) weights -> (M,) returns, computed once: a search's evaluations are counted by the search, not here."""

    def __init__(self, returns: Vector):
        self._returns, self.table = returns, dict[bytes, np.ndarray]()

    def __call__(self, weights_K: np.ndarray) -> np.ndarray:
        name = np.asarray(weights_K, dtype=np.float64).tobytes()
        if name not in self.table:
            self.table[name] = self._returns(weights_K)
        return self.table[name]

    def all(self) -> np.ndarray:
        return np.stack(list(self.table.values()))


def mixed_optima(task: ExactTask, strength_K: np.ndarray) -> Vector:
    """Returns of pi*_k for the prices beta / t_k, their logits mixed."""
    optima = [task.optimum_logp_PR(t * e, "train") for t, e in zip(strength_K, np.eye(len(strength_K)), strict=True)]
    next_KPIV = torch.stack([task.tree.next_logp(torch.from_numpy(logp_PR)) for logp_PR in optima])

    def returns(weights_K: np.ndarray) -> np.ndarray:
        mixed_PIV = torch.tensordot(torch.from_numpy(np.array(weights_K)), next_KPIV, 1).log_softmax(-1)
        return task.J_M(task.tree.response_logp(mixed_PIV).numpy(), "train")

    return returns


def soup(task: ExactTask, root: Path) -> Vector:
    """Returns of the parameter soup of experts of 60 exact steps, trained in `root`; anew where a run was stopped."""
    learner, method = LEARNERS.build({"name": "exact", "steps": 60}), METHODS.build("experts")
    folder = root / f"experts-{task.seed}"
    shutil.rmtree(folder, ignore_errors=True)
    done = train_plan(method, task, learner, folder, seed=task.seed)
    adapters = adapters_for(vertex_trainings(task, learner, task.seed), done)
    return outer_returns(task, build_policy(task, "parameter", adapters), samples=1, seed=0)


def choice(seed: int, m: int) -> tuple[Vector, np.ndarray, np.ndarray, float, float]:
    """Weights -> (1,) J_w on one choice; the preference, the best weights, J_w of the reference and of the best."""
    rng, beta = generator(seed, "choice", m), 0.15
    while True:
        w_M = rng.dirichlet(np.ones(m))
        strength_M = np.exp(rng.uniform(*np.log(STRENGTHS), size=m))
        if (w_M / strength_M).max() <= 1:
            break
    rewards_RM = rng.normal(size=(CHOICES, m))
    rewards_RM = 0.12 * (rewards_RM - rewards_RM.mean(0)) / rewards_RM.std(0)

    def returns(weights_M: np.ndarray) -> np.ndarray:
        z_R = (rewards_RM * strength_M) @ weights_M / beta
        logp_R = z_R - z_R.max()
        logp_R -= np.log(np.exp(logp_R).sum())
        p_R = np.exp(logp_R)
        return np.array([p_R @ (rewards_RM @ w_M) - beta * p_R @ (logp_R + np.log(CHOICES))])

    return returns, w_M, w_M / strength_M, float(returns(np.zeros(m))[0]), float(returns(w_M / strength_M)[0])


def dense(m: int, axis: int, edge: int) -> Iterator[np.ndarray]:
    """The points of the dense grid in [0, 1]^m."""
    yield from (np.array(point) for point in itertools.product(np.linspace(0.0, 1.0, axis), repeat=m))
    lattice = simplex_lattice(m, edge)
    for scale in SCALES:
        yield from (point for point in scale * lattice if point.max() <= 1.0)


def searched(score: Callable[[np.ndarray], float], m: int, w_M: np.ndarray, *, optuna: bool) -> dict[str, Any]:
    """Searcher -> its result, from alpha = w where a searcher has a start."""
    published = hierarchical_grid(score, m)
    found = {"grid": published, "grid cached": hierarchical_grid(score, m, cache=True)}
    for name in OURS:
        found[name] = SEARCHERS[name](score, m, start=w_M, budget=published.evaluations)
    if optuna:
        for sampler in ("tpe", "gp", "cmaes"):
            found[f"optuna {sampler}"] = optuna_search(score, m, start=w_M, budget=TRIALS, sampler=sampler)
    return found


def row(found: dict[str, Any], plain: float, best: float, w_M: np.ndarray, **names: Any) -> dict[str, Any]:
    """One case: for each searcher the evaluations until it was near the best (None: never), all of them, and what it reached."""
    until = {name: [r.evaluations_until(best - NEAR), r.evaluations, round(r.value, 4)] for name, r in found.items()}
    return {**names, "w": w_M.round(4).tolist(), "plain": round(plain, 4), "best": round(best, 4), "searchers": until}


def exact_cases(family: str, m: int, seed: int, root: Path) -> list[dict[str, Any]]:
    """The cases of one task seed."""
    task = ExactTask(seed=seed, objective_count=m, rho=RHO[m])
    if family == "soup":
        known = Known(soup(task, root))
    else:
        drawn_K = np.exp(generator(seed, "strengths", m).uniform(*np.log(STRENGTHS), size=m))
        known = Known(mixed_optima(task, drawn_K if family == "unequal" else np.ones(m)))
    for point in dense(m, *(SOUP if family == "soup" else (AXIS[m], EDGE[m]))):
        known(point)
    points = np.stack([np.frombuffer(name) for name in known.table])
    grid_NM = known.all()
    start_M = task.J_M(task.reference_logp_PR("train"), "train")
    rows: list[dict[str, Any]] = []
    for number, w_M in enumerate(task.judged()):
        top = w_M @ (task.J_M(task.optimum_logp_PR(w_M, "train"), "train") - start_M)

        def score(weights_K: np.ndarray, w_M: np.ndarray = w_M, top: float = top) -> float:
            return float(w_M @ (known(weights_K) - start_M) / top)

        top_K = points[int((grid_NM @ w_M).argmax())]
        if m == 5:  # a coarse grid: its top is looked for between its points, too
            top_K = model_search(score, m, start=top_K, radius=0.06).best_K
        grid_best = score(top_K)
        if grid_best - score(w_M) < GAP:
            continue
        found = searched(score, m, w_M, optuna=False)
        model_search(score, m, start=top_K, radius=0.06)
        best = float(((known.all() - start_M) @ w_M).max() / top)
        rows.append(row(found, score(w_M), best, w_M, grid_best=round(grid_best, 4), preference=number))
        if len(rows) == CASES[family]:
            break
    return rows


def choice_cases(m: int, count: int) -> list[dict[str, Any]]:
    """The first `count` synthetic cases."""
    rows: list[dict[str, Any]] = []
    for seed in itertools.count():
        returns, w_M, best_M, start, top = choice(seed, m)

        def score(weights_K: np.ndarray, returns: Vector = returns, start: float = start, top: float = top) -> float:
            return float((returns(weights_K)[0] - start) / (top - start))

        if score(w_M) <= 1 - GAP:
            found = searched(score, m, w_M, optuna=m in (3, 5) and len(rows) < 3)
            rows.append(row(found, score(w_M), 1.0, w_M, seed=seed, best_weights=best_M.round(4).tolist()))
        if len(rows) == count:
            return rows
    raise AssertionError("seeds do not end")


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Per searcher: mean evaluations (the published number where it never came near), how often that was, and the published sum by its."""
    names = sorted({name for r in rows for name in r["searchers"]})
    found: dict[str, Any] = {"cases": len(rows), "mean_gap": round(float(np.mean([r["best"] - r["plain"] for r in rows])), 4)}
    for name in names:
        own = [r["searchers"] for r in rows if name in r["searchers"]]
        cost, grid = ([s[which][0] or s["grid"][1] for s in own] for which in (name, "grid"))
        found[name] = {
            "cases": len(own),
            "never": sum(s[name][0] is None for s in own),
            "evaluations": round(float(np.mean(cost)), 2),
            "ratio": round(sum(grid) / sum(cost), 2),
            "median_ratio": round(float(np.median(np.array(grid) / np.array(cost))), 2),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("paretune-runs/search"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(100, 110)))
    parser.add_argument("--family", help="only this one of the families on exact-v1")
    parser.add_argument("--choices", type=int, default=10, help="synthetic cases for each M")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    given.root.mkdir(parents=True, exist_ok=True)

    def kept(name: str, make: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        path = given.root / f"{name}.json"
        if not path.is_file():
            rows = make()
            path.with_suffix(".wip").write_text(json.dumps(rows))
            path.with_suffix(".wip").rename(path)
        print(name, len(json.loads(path.read_text())), "cases", flush=True)
        return json.loads(path.read_text())

    rows: dict[str, list[dict[str, Any]]] = {}
    for m in (2, 3, 4, 5, 6, 8):
        count = given.choices if m < 6 else min(given.choices, 3)  # the published search takes 3^M points a level
        rows[f"choice m{m}"] = kept(f"choice-{m}-{count}", lambda m=m, count=count: choice_cases(m, count))
    for family, m, seeds in SEEDS:
        for seed in given.seeds[:seeds] if given.family in (None, family) else ():
            make = lambda f=family, m=m, s=seed: exact_cases(f, m, s, given.root)  # noqa: E731
            cases = [{"seed": seed, **r} for r in kept(f"{family}-{m}-{seed}", make)]
            rows[f"{family} m{m}"] = rows.get(f"{family} m{m}", []) + cases
    families = {name: summary(found) for name, found in rows.items() if found}
    figures = {
        f"evaluations_ratio_m{m}": min(found["model"]["ratio"] for name, found in families.items() if name.endswith(f"m{m}"))
        for m in (3, 5, 8)
    }
    emit(figures, out=given.out, families=families, seeds=given.seeds, rows=rows)


if __name__ == "__main__":
    main()
