"""Meta-policies at every judged preference: the bridge by both learners, against dedicated trainings and against EMORL.

    python benchmarks/meta.py [--root DIR] [--workers 1] [--part exact|sampled|m3] [--out benchmarks/results/meta.json]

exact    exact-v1 at rho .8, 0 and -.8, seeds 100-102: two experts and a bridge of 200 exact steps each. At each correlation, for the
         seed and the judged preference where the bridge is worst, one dedicated training of 200 steps.
sampled  the same correlations, seeds 100-102 (at rho -.8 100-109): experts of 40,000 samples, a bridge of 120,000. On the same experts,
         EMORL's aggregation with the published search, run anew for every judged preference on exact scores; its cost is in the rows.
m3       three objectives at rho -.4, seeds 100-102: experts of 40,000 samples, a bridge of 120,000.

Attainment on training prompts; every figure is the worst over preferences, correlations and seeds unless its name says otherwise.
Differences to EMORL are paired by preference; the interval of their mean is over the ten task seeds at rho -.8. Stopped, it goes on
where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cells import attainment_W, cells_of, row_of
from common import emit
from paretune.evaluation.evaluate import evaluate
from paretune.evaluation.stats import estimate
from paretune.runs.suite import fit, method, task

RHOS = [0.8, 0.0, -0.8]
EXACT = {"name": "exact"}
SAMPLED = {"name": "pg", "samples": 40_000}
SUITES: Mapping[str, Mapping[str, Any]] = {
    "exact": {
        "tasks": [{"name": "exact-v1", "rho": RHOS}],
        "learner": EXACT,
        "methods": ["bridge"],
        "seeds": [100, 101, 102],
    },
    "sampled": {
        "tasks": [{"name": "exact-v1", "rho": RHOS}],
        "learner": SAMPLED,
        "methods": [{"name": "bridge", "effort": 3.0}, "emorl-shared"],
        "seeds": [100, 101, 102],
    },
    "conflict": {
        "tasks": [{"name": "exact-v1", "rho": -0.8}],
        "learner": SAMPLED,
        "methods": [{"name": "bridge", "effort": 3.0}, "emorl-shared"],
        "seeds": list(range(100, 110)),
    },
    "m3": {
        "tasks": [{"name": "exact-v1", "rho": -0.4, "objective_count": 3}],
        "learner": SAMPLED,
        "methods": [{"name": "bridge", "effort": 3.0}],
        "seeds": [100, 101, 102],
    },
}
PARTS = ("exact", "sampled", "m3")


def against_dedicated(cells: Sequence[Mapping[str, Any]], root: Path) -> list[dict[str, Any]]:
    """For each correlation, a dedicated training where the bridge is worst: rows with both attainments."""
    rows = []
    lowest = [min((c for c in cells if c["task"]["rho"] == rho), key=lambda c: np.nanmin(attainment_W(c))) for rho in RHOS]
    for cell in lowest:
        values = attainment_W(cell)
        place = int(np.nanargmin(values))
        given = task(**{k: v for k, v in cell["task"].items() if k not in ("version", "content")})
        w_M = given.judged()[place]
        family = fit(given, method("linear", at=(tuple(map(float, w_M)),)), learner=EXACT, root=root, seed=cell["seed"])
        found = evaluate(given, family, w_WM=w_M[None], splits=["train"]).metrics["splits"]["train"]["attainment"]["worst"]
        row = {"rho": cell["task"]["rho"], "seed": cell["seed"], "w": w_M.round(4).tolist()}
        rows.append({**row, "bridge": round(float(values[place]), 4), "dedicated": round(found, 4)})
    return rows


def against_emorl(cells: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Bridge minus EMORL, paired by preference; the interval of the mean is over seeds at rho -.8, the rest over all cells."""
    found: dict[tuple[float, int], dict[str, np.ndarray]] = {}
    for cell in cells:
        found.setdefault((cell["task"]["rho"], cell["seed"]), {})[cell["method"]["name"]] = attainment_W(cell)
    rows: list[dict[str, Any]] = []
    by_seed: dict[int, np.ndarray] = {}
    weak: list[float] = []
    for (rho, seed), both in found.items():
        gap_W = both["bridge"] - both["emorl-shared"]
        if rho == -0.8:
            by_seed[seed] = gap_W
        weak += gap_W[both["emorl-shared"] < 0.93].tolist()
        rows.append({"rho": rho, "seed": seed, "mean": round(float(gap_W.mean()), 4), "lowest": round(float(gap_W.min()), 4)})
    mean = estimate(np.array([gap_W.mean() for gap_W in by_seed.values()]), seed=0)
    lowest = min(row["lowest"] for row in rows)
    figures = {"meta_minus_emorl_mean": mean.value, "meta_minus_emorl_low": mean.low, "meta_minus_emorl_min": lowest}
    return {**figures, "meta_minus_emorl_min_where_emorl_is_weak": float(min(weak)), "preferences_where_emorl_is_weak": len(weak)}, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("paretune-runs/meta"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--part", choices=PARTS, help="only this part; the results of the others are kept")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    known = json.loads(given.out.read_text()) if given.out and given.out.exists() else {}
    figures, rows = dict(known.get("figures", {})), dict(known.get("rows", {}))
    for part in [given.part] if given.part else PARTS:
        cells = cells_of({"name": f"meta-{part}", **SUITES[part]}, given.root / part, given.workers)
        if part == "sampled":  # the same directory: what both need is trained once
            more_cells = cells_of({"name": "meta-conflict", **SUITES["conflict"]}, given.root / part, given.workers)
            cells = list({json.dumps(cell["trainings"]) + cell["method"]["name"]: cell for cell in [*cells, *more_cells]}.values())
        rows[part] = [row_of(cell) for cell in cells]
        bridge = [cell for cell in cells if cell["method"]["name"] == "bridge"]
        name = {"exact": "meta_exact_worst", "sampled": "meta_sampled_worst", "m3": "meta_sampled_worst_m3"}[part]
        figures[name] = float(min(np.nanmin(attainment_W(cell)) for cell in bridge))
        if part == "exact":
            rows["dedicated"] = against_dedicated(bridge, given.root / part)
            figures["meta_exact_minus_dedicated"] = min(row["bridge"] - row["dedicated"] for row in rows["dedicated"])
        if part == "sampled":
            more, rows["emorl"] = against_emorl(cells)
            figures |= more
    emit(figures, out=given.out, rows=rows, suites=SUITES)


if __name__ == "__main__":
    main()
