"""Every way of mixing the same experts, and which layer is the best one to mix hidden states at.

    python benchmarks/mixings.py [--root DIR] [--workers 1] [--out benchmarks/results/mixings.json]

A small exact-v1 (5 symbols, 4 + 4 prompts, width 64, LoRA rank 8) with references of 2 and of 4 layers, three correlations, judged
seeds 100-102, experts by 60 exact steps; bone soups train their own. With 4 layers only the layer is asked for. The worst attainment
on training prompts over seeds and preferences, per mixing; for RMOD, which hears no preference, also what the worst-off objective
gains over the reference. Stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from common import emit
from paretune.registry import LEARNERS, describe
from paretune.runs.store import CELLS, Store
from paretune.runs.suite import run_suite

LEARNER = {"name": "exact", "steps": 60, "rank": 8, "alpha": 32}
TASK = {"name": "exact-v1", "alphabet": 5, "prompt_count": 4, "width": 64, "rho": [0.8, 0.0, -0.8]}
DEPTHS = (2, 4)
SEEDS = [100, 101, 102]


def methods(layers: int) -> list[Any]:
    """Layer 0 is the parameter level, and `layers` the logit level; deeper references ask the question of the layer only."""
    ends = [
        "reference",
        {"name": "experts", "mixing": ["parameter", "logit"]},
        {"name": "hidden-layer", "layer": list(range(1, layers))},
    ]
    if layers > DEPTHS[0]:
        return ends
    return [
        *ends,
        {"name": "experts", "mixing": "factor"},
        {"name": "mod-divergence", "divergence": ["forward-kl", "alpha", "js"]},
        {"name": "rmod", "radius": [0.1, 1.0]},
        {"name": "ties", "density": [0.2, 0.8]},
        {"name": "dare"},
        {"name": "bone-soup", "share": 0.8},
        {"name": "bone-soup", "share": 0.7, "mixing": "logit"},
    ]


def label(method: dict[str, Any]) -> str:
    """A method and what tells it apart here."""
    shown = [str(method[key]) for key in ("mixing", "divergence", "radius", "density", "layer") if key in method]
    return " ".join([method["name"], *shown])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("paretune-runs/mixings"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    settings = describe(LEARNERS.build(LEARNER))
    figures: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for layers in DEPTHS:
        root = given.root / f"{layers}-layers"
        suite = {"tasks": [{**TASK, "layers": layers}], "methods": methods(layers), "seeds": SEEDS, "learner": LEARNER}
        run_suite({**suite, "name": f"mixings-{layers}"}, root=root, workers=given.workers)
        found = _rows(root, layers, settings)
        rows += found
        figures |= _figures(found, layers)
    emit(figures, out=given.out, rows=rows, learner=settings)


def _rows(root: Path, layers: int, learner: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per method and correlation: attainment over seeds and preferences, and the gain of the objective that gains least."""
    cells: dict[tuple[str, float], list[Any]] = defaultdict(list)
    for key in Store(root).published(CELLS):
        cell = json.loads((root / CELLS / key / "cell.json").read_text())
        if cell["learner"] == learner:
            cells[label(cell["method"]), cell["task"]["rho"]].append(cell)
    rows = []
    for (name, rho), group in sorted(cells.items()):
        if len(group) < len(SEEDS):  # of a run that was stopped and asked for more
            continue
        row: dict[str, Any] = {"layers": layers, "method": name, "rho": rho, "forwards_per_token": group[0]["forwards_per_token"]}
        start = sorted(cells["reference", rho], key=lambda cell: cell["seed"])
        group.sort(key=lambda cell: cell["seed"])
        for split in ("train", "test"):
            attainment_SW = np.array([cell["metrics"]["splits"][split]["attainment"]["per_preference"] for cell in group], dtype=float)
            row |= {f"worst_{split}": round(float(attainment_SW.min()), 4), f"mean_{split}": round(float(attainment_SW.mean()), 4)}
            row[f"worst_per_seed_{split}"] = attainment_SW.min(1).round(4).tolist()
            gains_SWM = np.array([cell["metrics"]["splits"][split]["returns"] for cell in group], dtype=float) - np.array(
                [cell["metrics"]["splits"][split]["returns"] for cell in start], dtype=float
            )
            row[f"least_gain_{split}"] = gains_SWM.min((1, 2)).round(4).tolist()
        rows.append(row)
    return rows


def _figures(rows: list[dict[str, Any]], layers: int) -> dict[str, float]:
    """The worst over correlations, per mixing; and hidden states at the best single layer against logit mixing, where it matters most."""
    worst: dict[str, float] = {}
    for row in rows:
        worst[row["method"]] = min(worst.get(row["method"], np.inf), row["worst_train"])
    worst.pop("reference")
    figures = {f"{name.replace(' ', '_').replace('-', '_').replace('.', '')}_worst_{layers}_layers": value for name, value in worst.items()}
    between = {name: value for name, value in worst.items() if name.startswith("hidden-layer")}
    best = max(between, key=lambda name: between[name])
    per_seed = {(row["method"], row["rho"]): np.array(row["worst_per_seed_train"]) for row in rows}
    gap = np.concatenate([per_seed[best, rho] - per_seed["experts logit", rho] for rho in TASK["rho"]])
    figures[f"hidden_best_layer_{layers}_layers"] = float(best.split()[-1])
    figures[f"hidden_best_layer_minus_logit_worst_{layers}_layers"] = between[best] - worst["experts logit"]
    figures[f"hidden_beats_logit_share_{layers}_layers"] = float((gap > 0).mean())
    least = {(row["method"], row["rho"]): min(row["least_gain_train"]) for row in rows}
    if "rmod 1.0" in worst:
        gains = [least["rmod 1.0", rho] - least["experts logit", rho] for rho in TASK["rho"]]
        figures[f"rmod_minus_logit_least_gain_{layers}_layers"] = min(gains)
    return figures


if __name__ == "__main__":
    main()
